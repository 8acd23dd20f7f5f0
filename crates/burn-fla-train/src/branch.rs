//! Decay runs out of the stable phase of another run: one long run at a constant rate, ended at several lengths
//! (warm-up, stable, decay: Hu et al. 2024, [arXiv:2404.06395](https://arxiv.org/abs/2404.06395)).

use std::path::{Path, PathBuf};

use crate::TrainError;
use crate::checkpoint::{CheckpointStore, TrainState, verify};
use crate::recipe::{DecayKind, Recipe, Resume};

/// What is to be branched off.
#[derive(Clone, Debug)]
pub struct Branch {
    /// The run folder whose checkpoint it starts from.
    pub run: PathBuf,
    /// Which checkpoint, by its step; the newest without one.
    pub from: Option<u64>,
    /// Steps of the decay.
    pub decay_steps: u64,
    /// The shape of the decay; that of the run without one.
    pub decay_type: Option<DecayKind>,
    /// The folder of the new run; beside the run's, with the length of the decay in its name, without one.
    pub folder: Option<PathBuf>,
}

impl Branch {
    /// The recipe of the decay run: that of the checkpoint, with a schedule that begins to fall there and a budget that ends
    /// with it. It continues the data where the checkpoint stopped.
    ///
    /// # Errors
    /// A checkpoint that is not there, is damaged, or lies in a decay already: what it would fall from is no constant rate.
    pub fn recipe(&self) -> Result<Recipe, TrainError> {
        let saved = Recipe::load(&self.run.join("recipe.toml"), &[])?;
        let store = CheckpointStore::new(&saved.checkpoint.folder, 0);
        let all = store.list()?;
        let found = match self.from {
            None => all.last(),
            Some(from) => all.iter().find(|(step, _)| *step == from),
        };
        let Some((step, path)) = found else {
            let steps: Vec<String> = all.iter().map(|(step, _)| step.to_string()).collect();
            let message = match steps.is_empty() {
                true => "the run has no checkpoint yet".to_string(),
                false => format!("the run has checkpoints of the steps {}", steps.join(", ")),
            };
            return Err(TrainError::CheckpointMissing { path: saved.checkpoint.folder.clone(), message });
        };
        verify(path)?;
        let step = TrainState::load(path).map(|state| state.step.max(*step))?;
        // The recipe of the checkpoint itself: the run may have been given another budget since.
        let mut recipe = Recipe::load(&path.join("recipe.toml"), &[])?;
        let stable = &recipe.lr_scheduler;
        if step < stable.warmup_steps {
            let message = format!("step {step} is in the warm-up, which ends at step {}", stable.warmup_steps);
            return Err(TrainError::ResumeMismatch { path: path.clone(), message });
        }
        if let Some(total) = recipe.training.total_steps() {
            let decay = stable
                .decay_ratio
                .map_or(total.saturating_sub(stable.warmup_steps), |ratio| (ratio * total as f64).ceil() as u64);
            let begins = total.saturating_sub(decay);
            if step > begins {
                let message = format!(
                    "step {step} is in the decay of its run, which began at step {begins} of {total}; choose an earlier one, or train the run with a small lr_scheduler.decay_ratio"
                );
                return Err(TrainError::ResumeMismatch { path: path.clone(), message });
            }
        }
        let total = step + self.decay_steps;
        let folder = self.folder.clone().unwrap_or_else(|| self.default_folder(step));
        recipe.job.dump_folder = folder.clone();
        recipe.checkpoint.folder = folder.join("checkpoints");
        recipe.checkpoint.resume = Resume::From(path.clone());
        (recipe.training.steps, recipe.training.tokens, recipe.training.hours) = (Some(total), None, None);
        recipe.lr_scheduler.decay_ratio = Some(self.decay_steps as f64 / total as f64);
        if let Some(decay_type) = self.decay_type {
            recipe.lr_scheduler.decay_type = decay_type;
        }
        recipe.job.description =
            format!("decay over {} steps from step {step} of {}", self.decay_steps, self.run.display());
        Ok(recipe)
    }

    fn default_folder(&self, step: u64) -> PathBuf {
        let name = self.run.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned());
        let beside = self.run.parent().unwrap_or(Path::new(""));
        beside.join(format!("{name}-from{step}-decay{}", self.decay_steps))
    }
}
