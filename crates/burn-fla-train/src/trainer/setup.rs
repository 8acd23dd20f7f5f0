//! Everything that happens before the first step, in the order in which it can fail without leaving anything behind:
//! first what is only read, then the run folder, then the data.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{DType, Device};
use burn_fla_nn::device::open_device_for;
use burn_fla_nn::{CausalLm, Compute, ModelConfig, hub};

use super::compute::Computer;
use super::pool::Pool;
use super::profile::Profiler;
use super::task::{HeldOut, HeldOutBatches, Task};
use super::{Interval, Trainer};
use crate::TrainError;
use crate::checkpoint::{Background, CheckpointStore, TrainState, load_optimizer, verify, write_atomic};
use crate::data::{HeldOutRows, Loader, PATIENCE};
use crate::metrics::memory::available;
use crate::metrics::{Journal, TensorBoard, Terminal};
use crate::optim::{Optimizer, ParamEntry, ParamTable};
use crate::plan::{check_memory, training_flops_per_token};
use crate::recipe::{ComputeDtype, Recipe, Resume};
use crate::schedule::Schedule;

pub(super) fn prepare(mut recipe: Recipe) -> Result<Trainer, TrainError> {
    let (config, weights) = model_config(&recipe)?;
    let task = Task::open(&recipe, &config)?;
    let tight = check_memory(&recipe, &config, available())?;
    let dtype = match recipe.device.compute_dtype {
        ComputeDtype::Bfloat16 => DType::BF16,
        ComputeDtype::Float32 => DType::F32,
    };
    let device = open_device_for(recipe.device.backend, recipe.device.index, dtype)?;
    let compute = Compute { dtype, engine: Default::default() };

    let store = CheckpointStore::new(&recipe.checkpoint.folder, recipe.checkpoint.keep_latest_k);
    let mut notes = recipe.notices.clone();
    notes.extend(tight);
    let resume = checkpoint_to_resume(&recipe, &store, &mut |note| notes.push(note))?;
    // The recipe in the run folder and in every checkpoint continues the run, whatever was typed to start it.
    recipe.checkpoint.resume = Resume::Auto;
    let folder = &recipe.job.dump_folder;
    std::fs::create_dir_all(folder).map_err(TrainError::io("create the folder", folder))?;
    store.prepare()?;

    let seq_len = recipe.training.seq_len;
    let (train, held_out) = task.corpus(&recipe.training, &mut |note| eprintln!("{note}"))?;
    let held_out = match held_out {
        HeldOutRows::There(rows) => HeldOutBatches::There(HeldOut::of(&recipe, rows, &task)?),
        later => HeldOutBatches::Later(later),
    };

    let model = initial_model(&recipe, &config, weights, resume.as_deref(), &device)?;
    let entries = model
        .named_parameters()
        .into_iter()
        .map(|param| ParamEntry { name: param.name, id: param.id, shape: param.shape })
        .collect();
    let table = ParamTable::new(entries);
    let mut optimizer = Optimizer::new(table, &recipe.optimizer, &recipe.training, &device)?;
    let fresh = TrainState {
        version: 1,
        step: 0,
        tokens: 0,
        cursor: 0,
        seconds: 0.0,
        pending_losses: Vec::new(),
        data_seed: recipe.data.seed(),
        seq_len,
        data: train.fingerprint_of(0),
        recipe: recipe.hash(),
        threads: recipe.device.threads,
    };
    let state = match &resume {
        None => fresh,
        Some(path) => {
            let saved = TrainState::load(path)?;
            // As far as the run had come the data are to be the same.
            while !train.wait(saved.cursor, PATIENCE)? {
                train.notes().iter().for_each(|note| eprintln!("{note}"));
            }
            let fresh = TrainState { data: train.fingerprint_of(saved.cursor), ..fresh };
            check_same_run(path, &saved, &fresh, &mut |note| notes.push(note))?;
            load_optimizer(&mut optimizer, path, &device)?;
            notes.push(format!("resuming after step {} from {}", saved.step, path.display()));
            TrainState { recipe: fresh.recipe, threads: fresh.threads, ..saved }
        }
    };

    write_atomic(&folder.join("recipe.toml"), recipe.to_toml().as_bytes())?;
    let board = match recipe.metrics.tensorboard {
        true => Some(TensorBoard::create(&folder.join("tensorboard"), state.step)?),
        false => None,
    };
    let journal = Journal::open(&folder.join("metrics.jsonl"), state.step)?.with_tensorboard(board);
    let profiler = Profiler::open(&recipe.profiling, state.step)?;
    let total = recipe.training.total_steps();
    let mut terminal = Terminal::new(recipe.metrics.terminal, state.step, total);
    for note in &notes {
        terminal.note(note);
    }
    let flops_per_token = training_flops_per_token(&config, seq_len)?;
    let parameters: usize = optimizer.table().entries().iter().map(ParamEntry::len).sum();
    terminal.note(&format!(
        "{}: {:.2} M parameters in {} layers on {} ({}); {}",
        config.model_type(),
        parameters as f64 / 1e6,
        config.num_layers(),
        recipe.device.backend.name(),
        match recipe.device.threads {
            1 => format!("{:?}", compute.dtype),
            n => format!("{:?}, {n} threads", compute.dtype),
        },
        train.describe(),
    ));
    Ok(Trainer {
        schedule: Schedule::new(&recipe.lr_scheduler),
        loader: Loader::shuffled(train, recipe.data.seed(), state.cursor),
        computer: Computer {
            device,
            compute,
            activations: recipe.training.activation_checkpoint,
            pool: Pool::new(recipe.device.threads),
        },
        interval: Interval::default(),
        pending: state.pending_losses.iter().map(|bits| f32::from_bits(*bits)).collect(),
        unread: Vec::new(),
        report: None,
        last_lr: 0.0,
        evaluated: None,
        saved: resume.is_some().then_some(state.step),
        resumed: resume.is_some() || recipe.model.config.is_dir(),
        flops_per_token,
        config,
        recipe,
        task,
        model: Some(model),
        optimizer,
        state,
        saver: Background::new(store.clone()),
        store,
        journal,
        terminal,
        held_out,
        profiler,
    })
}

/// The configuration, and the folder of the weights to start from if the recipe names one.
pub(crate) fn model_config(recipe: &Recipe) -> Result<(ModelConfig, Option<PathBuf>), TrainError> {
    let path = &recipe.model.config;
    let overrides = &recipe.model.overrides;
    if !path.is_dir() {
        let config = ModelConfig::from_file(path)?;
        return Ok((config.with_overrides(overrides)?, None));
    }
    if !overrides.is_empty() {
        return Err(TrainError::BadValue {
            at: "recipe".to_string(),
            key: "model.overrides".to_string(),
            message: format!(
                "{} holds weights, whose shapes are fixed: remove the overrides, or name its config.json to start from random weights",
                path.display()
            ),
        });
    }
    Ok((hub::load_config(path)?, Some(path.clone())))
}

/// Finds and verifies what `checkpoint.resume` asks for.
fn checkpoint_to_resume(
    recipe: &Recipe,
    store: &CheckpointStore,
    tell: &mut dyn FnMut(String),
) -> Result<Option<PathBuf>, TrainError> {
    match &recipe.checkpoint.resume {
        Resume::Auto => store.latest(tell),
        Resume::Never => match store.list()?.last() {
            None => Ok(None),
            Some((step, path)) => Err(TrainError::ResumeMismatch {
                path: path.clone(),
                message: format!(
                    "checkpoint.resume = \"never\", but the folder holds the run up to step {step}; remove it, or choose another job.dump_folder"
                ),
            }),
        },
        Resume::From(path) => match verify(path) {
            Ok(()) => Ok(Some(path.clone())),
            Err(TrainError::CheckpointDamaged { path, message, .. }) => {
                let remedy = "choose another one, or checkpoint.resume = \"auto\"".to_string();
                Err(TrainError::CheckpointDamaged { path, message, remedy })
            }
            Err(other) => Err(other),
        },
    }
}

/// The model a run starts from, without autodiff.
fn initial_model(
    recipe: &Recipe,
    config: &ModelConfig,
    weights: Option<PathBuf>,
    resume: Option<&Path>,
    device: &Device,
) -> Result<CausalLm, TrainError> {
    let model = match resume.or(weights.as_deref()) {
        None => CausalLm::init(config, recipe.job.seed, &device.clone().autodiff())?,
        Some(folder) => {
            let saved = hub::load_config(folder)?;
            if resume.is_some() && saved.fields() != config.fields() {
                let differs = config
                    .fields()
                    .keys()
                    .chain(saved.fields().keys())
                    .find(|key| saved.fields().get(*key) != config.fields().get(*key));
                return Err(TrainError::ResumeMismatch {
                    path: folder.to_path_buf(),
                    message: format!(
                        "its config.json differs from {} in `{}`; restore the model's configuration, or choose another job.dump_folder",
                        recipe.model.config.display(),
                        differs.map_or("?", String::as_str),
                    ),
                });
            }
            hub::load_model(folder, &device.clone().autodiff())?
        }
    };
    Ok(model.valid())
}

/// A checkpoint continues the same stream of data or none.
fn check_same_run(
    path: &Path,
    saved: &TrainState,
    now: &TrainState,
    tell: &mut dyn FnMut(String),
) -> Result<(), TrainError> {
    let differs = |what: &str, was: String, is: String| TrainError::ResumeMismatch {
        path: path.to_path_buf(),
        message: format!(
            "{what} was {was} and is now {is}, so the data would not continue where it stopped; restore it, or choose another job.dump_folder"
        ),
    };
    if saved.data != now.data {
        return Err(differs("the training data (or the tokenizer)", saved.data.clone(), now.data.clone()));
    }
    if saved.data_seed != now.data_seed {
        return Err(differs("data.seed", saved.data_seed.to_string(), now.data_seed.to_string()));
    }
    if saved.seq_len != now.seq_len {
        return Err(differs("training.seq_len", saved.seq_len.to_string(), now.seq_len.to_string()));
    }
    if saved.threads != now.threads {
        tell(format!(
            "device.threads was {} and is now {}: the run continues, but its sums are rounded in another order",
            saved.threads, now.threads
        ));
    } else if saved.recipe != now.recipe {
        tell("the recipe has changed since the checkpoint was written".to_string());
    }
    Ok(())
}
