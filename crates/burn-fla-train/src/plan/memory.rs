//! Memory of a run, estimated: before it begins, and when a device has run out of it.

use burn_fla_nn::device::Backend;
use burn_fla_nn::layers::MixerConfig;
use burn_fla_nn::models::LayerConfig;
use burn_fla_nn::{ModelConfig, NnError};
use serde::Serialize;

use super::{Counted, count_model};
use crate::TrainError;
use crate::recipe::{ActivationCheckpoint, ComputeDtype, OptimizerName, Recipe};

/// Bytes on the device.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryPlan {
    /// Parameters, in f32.
    pub parameters: u64,
    /// Their gradients, in f32: on the CPU once for each thread.
    pub gradients: u64,
    /// The optimiser's moments, in f32.
    pub moments: u64,
    /// An estimate: what is kept of a micro-batch for the backward pass, and the logits of a strip of the output layer.
    ///
    /// It is the number of inputs and outputs of the linear maps, times a factor for each mixer that was measured as the
    /// resident memory of runs on the CPU. In those runs (8 architectures, widths 256 and 512, 4 and 8 layers, 512 to 8192
    /// tokens) all of the memory was between 0.87 and 1.27 times the estimate; a mixer that was not among them may be further
    /// off.
    pub activations: u64,
}

/// Numbers kept for the backward pass for each input and output of a layer's linear maps, by mixer.
const KEPT: [(&str, f64); 8] = [
    ("Attention", 1.85),
    ("DeltaNet", 2.7),
    ("GatedDeltaNet", 2.95),
    ("Gla", 2.2),
    ("Hgrn2", 3.15),
    ("Mamba2", 6.4),
    ("Retention", 2.25),
    ("Rwkv7", 4.2),
];

/// The same of a mixer that was not measured.
const KEPT_OF_OTHERS: f64 = 3.2;

/// Numbers kept of a softmax layer for each score.
const KEPT_OF_SCORES: f64 = 3.0;

/// Bytes that the logits of a strip may take, and how many tensors of that size there are at once.
const STRIP: (u64, f64) = (64 << 20, 3.3);

/// What a process takes before it has a model.
const PROCESS: u64 = 50 << 20;

/// By how much an estimate may be too high: below this share of it, memory is certainly not enough. The second is that of
/// models with mixers that were not measured.
const CERTAIN: [f64; 2] = [0.6, 0.3];

impl MemoryPlan {
    /// The memory of a recipe with this model.
    pub(crate) fn of(recipe: &Recipe, config: &ModelConfig) -> Result<MemoryPlan, TrainError> {
        Ok(memory(recipe, config, &count_model(config, recipe.training.seq_len)?)?)
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.fixed() + self.activations
    }

    fn fixed(&self) -> u64 {
        self.parameters + self.gradients + self.moments
    }
}

/// What the layers keep of a token, in numbers.
fn kept(config: &ModelConfig, counted: &Counted, seq_len: usize) -> Vec<f64> {
    let of_layer = |(layer, features): (&LayerConfig, &u64)| {
        let kind = layer.mixer.kind();
        let factor = KEPT.iter().find(|(known, _)| *known == kind).map_or(KEPT_OF_OTHERS, |(_, factor)| *factor);
        let scores = match &layer.mixer {
            // Every query's with every key, whether it sees it or not.
            MixerConfig::Attention(attention) => KEPT_OF_SCORES * (attention.num_heads * seq_len) as f64,
            _ => 0.0,
        };
        factor * *features as f64 + scores
    };
    config.layers().iter().zip(&counted.features).map(of_layer).collect()
}

pub(super) fn memory(recipe: &Recipe, config: &ModelConfig, counted: &Counted) -> Result<MemoryPlan, NnError> {
    let training = &recipe.training;
    let tokens = (training.batch_size * training.seq_len) as f64;
    let width = match recipe.device.compute_dtype {
        ComputeDtype::Bfloat16 => 2.0,
        ComputeDtype::Float32 => 4.0,
    };
    let moments = match recipe.optimizer.name {
        OptimizerName::Adamw => 2 * counted.parameters,
        // One for the matrices of the layers, two for the others.
        OptimizerName::Muon => 2 * counted.parameters - counted.matrices,
    };
    let layers = kept(config, counted, training.seq_len);
    let of_token = match training.activation_checkpoint {
        ActivationCheckpoint::None => layers.iter().sum(),
        // One layer's at a time, and of every layer what enters it: the residual and what is to be added.
        ActivationCheckpoint::Block => {
            layers.iter().copied().fold(0.0, f64::max) + (2 * layers.len() * config.hidden_size()) as f64
        }
    };
    let (most, times) = STRIP;
    let strip = (times * (width * tokens * counted.vocabulary as f64).min(most as f64)) as u64;
    Ok(MemoryPlan {
        parameters: 4 * counted.parameters,
        gradients: 4 * counted.parameters * recipe.device.threads as u64,
        moments: 4 * moments,
        activations: (tokens * of_token * width) as u64 + strip,
    })
}

/// On the CPU memory that is not there ends the process without a word, so it is looked for before anything is begun.
///
/// # Errors
/// A run that certainly needs more memory than the machine has left: with what would fit.
pub(crate) fn check_memory(
    recipe: &Recipe,
    config: &ModelConfig,
    available: Option<u64>,
) -> Result<Option<String>, TrainError> {
    let (Backend::Cpu, Some(available)) = (recipe.device.backend, available) else { return Ok(None) };
    let plan = MemoryPlan::of(recipe, config)?;
    let needed = plan.total() + PROCESS;
    let what = format!(
        "training.batch_size = {} needs about {:.1} GiB, and the machine has {:.1} left",
        recipe.training.batch_size,
        gib(needed),
        gib(available)
    );
    let known = |layer: &LayerConfig| KEPT.iter().any(|(kind, _)| *kind == layer.mixer.kind());
    let certain = CERTAIN[usize::from(!config.layers().iter().all(known))];
    if needed as f64 * certain > available as f64 {
        return Err(TrainError::OutOfMemory {
            what,
            advice: advice(recipe, config, available.saturating_sub(PROCESS))?,
        });
    }
    Ok((needed > available).then(|| format!("warning: {what}: it may be killed for it")))
}

/// The error of a device that ran out of memory in a step when its allocator had taken `reserved` bytes, if known.
pub(crate) fn ran_out(recipe: &Recipe, config: &ModelConfig, step: u64, reserved: Option<u64>) -> TrainError {
    let rows = recipe.training.batch_size;
    let what = match reserved.filter(|bytes| *bytes > 0) {
        Some(bytes) => format!("step {step} with training.batch_size = {rows}, {:.1} GiB reserved", gib(bytes)),
        None => format!("step {step} with training.batch_size = {rows}"),
    };
    // What did not fit is more than what was reserved: half a batch at most, or with one row half of what it keeps.
    let half = MemoryPlan::of(&with_rows(recipe, (rows / 2).max(1)), config);
    let half = half.map(|plan| if rows > 1 { plan.total() } else { plan.total() - plan.activations / 2 });
    let advice = half.and_then(|half| {
        let room = reserved.filter(|bytes| *bytes > 0).map_or(half, |bytes| bytes.min(half));
        advice(recipe, config, room)
    });
    match advice {
        Ok(advice) => TrainError::OutOfMemory { what, advice },
        Err(error) => error,
    }
}

fn with_rows(recipe: &Recipe, rows: usize) -> Recipe {
    let mut other = recipe.clone();
    other.training.batch_size = rows;
    other
}

/// The most rows of a micro-batch, up to those of the recipe, with which it needs no more than `bytes`.
fn rows_in(recipe: &Recipe, config: &ModelConfig, counted: &Counted, bytes: u64) -> Result<usize, NnError> {
    let (mut fits, mut above) = (0, recipe.training.batch_size + 1);
    while above - fits > 1 {
        let middle = fits + (above - fits) / 2;
        let plan = memory(&with_rows(recipe, middle), config, counted)?;
        if plan.total() <= bytes { fits = middle } else { above = middle }
    }
    Ok(fits)
}

/// What to change so that the run needs no more than `bytes`.
fn advice(recipe: &Recipe, config: &ModelConfig, bytes: u64) -> Result<String, TrainError> {
    let counted = count_model(config, recipe.training.seq_len)?;
    let mut lines = Vec::new();
    let mut most = 0;
    let rows_of_step = recipe.training.batch_size * recipe.training.gradient_accumulation_steps;
    let mut offer = |recipe: &Recipe, more: &str| -> Result<(), TrainError> {
        let fits = rows_in(recipe, config, &counted, bytes)?;
        // The largest that leaves a step its tokens, unless that is far below what fits.
        let even = (1..=fits).rev().find(|rows| rows_of_step.is_multiple_of(*rows)).filter(|rows| 2 * rows > fits);
        let before = std::mem::replace(&mut most, fits);
        match (fits, even) {
            (0, _) => {}
            // Recomputing is worth its time only for more rows.
            (fits, _) if fits <= before => {}
            (_, Some(rows)) => lines.push(format!(
                "training.batch_size = {rows} and training.gradient_accumulation_steps = {}{more} fit, with as many tokens a step",
                rows_of_step / rows
            )),
            (_, None) => lines.push(format!("training.batch_size = {fits}{more} fits")),
        }
        Ok(())
    };
    offer(recipe, "")?;
    if recipe.training.activation_checkpoint == ActivationCheckpoint::None {
        let mut other = recipe.clone();
        other.training.activation_checkpoint = ActivationCheckpoint::Block;
        offer(&other, " and training.activation_checkpoint = \"block\"")?;
    }
    Ok(match lines.is_empty() {
        true => format!(
            "not one row of {} tokens fits: lower training.seq_len or the size of the model",
            recipe.training.seq_len
        ),
        false => lines.join("; or "),
    })
}

/// Whether a device's or a runtime's message says that memory has run out.
pub fn is_out_of_memory(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    ["out of device memory", "out-of-memory", "out of memory", "can't allocate", "out_of_memory"]
        .iter()
        .any(|words| message.contains(words))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
