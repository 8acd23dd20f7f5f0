//! What a recipe asks for, before a device is touched: parameters, arithmetic by mixer, memory, learning rates, data, time.

mod memory;
mod text;

use std::path::Path;

use burn::tensor::Device;
use burn_fla_nn::{CausalLm, ModelConfig};
use serde::Serialize;

use crate::TrainError;
use crate::data::{DataSize, data_size};
use crate::optim::{ParamEntry, is_matrix};
use crate::recipe::{DataSection, Recipe};
use crate::schedule::Schedule;
use crate::trainer::{Task, read_model_config};
pub use memory::{MemoryPlan, is_out_of_memory};
pub(crate) use memory::{check_memory, ran_out};

/// A recipe, counted.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// `model_type` of the model.
    pub model_type: String,
    /// Parameters in all.
    pub parameters: u64,
    /// Of them, those of the embedding, which no token is multiplied with; 0 where the output map shares them.
    pub embedding_parameters: u64,
    /// The layers, gathered by mixer, in the order in which each first comes.
    pub mixers: Vec<MixerPlan>,
    /// Arithmetic of a token: of the layers' linear maps, of the output map, of the mixers.
    pub flops: FlopsPerToken,
    /// Memory on the device.
    pub memory: MemoryPlan,
    /// Tokens of an optimiser step.
    pub tokens_per_step: u64,
    /// Steps of the run; `None` under a budget of time without a rate.
    pub steps: Option<u64>,
    /// Tokens of the run.
    pub tokens: Option<u64>,
    /// Learning rate before each of these steps, counted from 0.
    pub learning_rates: Vec<(u64, f64)>,
    /// What there is to learn from, source by source.
    pub data: Vec<DataSize>,
    /// Tokens in a second: given, or those of the last run in the run folder.
    pub tokens_per_s: Option<f64>,
    /// Seconds of training that are left to the budget at that rate.
    pub seconds: Option<f64>,
    /// Things worth telling.
    pub notices: Vec<String>,
}

/// The layers of one mixer.
#[derive(Clone, Debug, Serialize)]
pub struct MixerPlan {
    /// The mixer.
    pub kind: String,
    /// How many layers have it.
    pub layers: usize,
    /// Parameters of these layers, feed-forward networks and norms included.
    pub parameters: u64,
    /// Numbers that the mixers keep of a sequence in generation, whatever its length.
    pub state: u64,
    /// Numbers more for each token.
    pub cache: u64,
    /// Forward operations a token of the layers' linear maps.
    pub map_flops: f64,
    /// Forward operations a token of the mixers themselves.
    pub mixer_flops: f64,
}

/// Floating-point operations a token; a multiplication and an addition are two.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FlopsPerToken {
    /// Forward pass.
    pub forward: f64,
    /// Forward and backward: three times the forward, for each product has two gradients of its size.
    pub training: f64,
}

impl Plan {
    /// Counts `recipe`. `tokens_per_s` is the rate to reckon with; without it, the last of the run folder's
    /// `metrics.jsonl` is taken.
    ///
    /// # Errors
    /// A configuration or a tokenizer that cannot be read, or that do not fit each other. Data that is not there yet is a
    /// notice.
    pub fn new(recipe: &Recipe, tokens_per_s: Option<f64>) -> Result<Plan, TrainError> {
        let (config, _) = read_model_config(recipe)?;
        let task = Task::open(recipe, &config)?;
        let training = &recipe.training;
        let mut notices = recipe.notices.clone();
        let counted = count_model(&config, training.seq_len)?;
        let tokens_per_s = tokens_per_s.or_else(|| last_rate(&recipe.job.dump_folder));
        let tokens_per_step = training.tokens_per_step();
        let seconds_of_budget = training.hours.map(|hours| hours * 3600.0);
        let steps = training.total_steps().or_else(|| {
            let tokens = seconds_of_budget? * tokens_per_s?;
            Some((tokens / tokens_per_step as f64) as u64)
        });
        let tokens = steps.map(|steps| steps * tokens_per_step);
        let data = match (&recipe.data, task.encoder()) {
            (DataSection::Text(section), Some(encoder)) => data_size(section, encoder, &mut |note| notices.push(note)),
            _ => Vec::new(),
        };
        Ok(Plan {
            model_type: config.model_type().to_string(),
            parameters: counted.parameters,
            embedding_parameters: counted.embedding,
            flops: counted.flops,
            memory: memory::memory(recipe, &config, &counted)?,
            mixers: counted.mixers,
            tokens_per_step,
            steps,
            tokens,
            learning_rates: steps.map_or_else(Vec::new, |steps| learning_rates(recipe, steps)),
            data,
            seconds: seconds_of_budget.or_else(|| Some(tokens? as f64 / tokens_per_s?)),
            tokens_per_s,
            notices,
        })
    }
}

/// The arithmetic of a token in training: what a rate is multiplied with.
pub(crate) fn training_flops_per_token(config: &ModelConfig, seq_len: usize) -> Result<f64, TrainError> {
    Ok(count_model(config, seq_len)?.flops.training)
}

/// A number in three digits, `1.23 M`.
pub(crate) fn count(number: f64) -> String {
    text::Count(number).to_string()
}

struct Counted {
    parameters: u64,
    embedding: u64,
    mixers: Vec<MixerPlan>,
    flops: FlopsPerToken,
    /// Inputs and outputs of the linear maps of each layer.
    features: Vec<u64>,
    /// Matrices of the layers, which Muon updates.
    matrices: u64,
    vocabulary: usize,
}

fn count_model(config: &ModelConfig, seq_len: usize) -> Result<Counted, TrainError> {
    let model = CausalLm::outline(config, &Device::default())?;
    let inner = format!("{}.layers.", config.common().names.model);
    let mut mixers: Vec<MixerPlan> = Vec::new();
    let mut of_layer = Vec::new();
    for layer in config.layers() {
        let (kind, cost) = (layer.mixer.kind(), layer.mixer.cost(seq_len)?);
        let at = mixers.iter().position(|mixer| mixer.kind == kind).unwrap_or_else(|| {
            let empty =
                MixerPlan { kind, layers: 0, parameters: 0, state: 0, cache: 0, map_flops: 0.0, mixer_flops: 0.0 };
            mixers.push(empty);
            mixers.len() - 1
        });
        mixers[at].layers += 1;
        mixers[at].state += cost.state as u64;
        mixers[at].cache += cost.cache as u64;
        mixers[at].mixer_flops += cost.flops;
        of_layer.push(at);
    }
    let (mut parameters, mut matrices, mut embedding, mut head) = (0, 0, 0, 0);
    let mut features = vec![0; of_layer.len()];
    for param in model.named_parameters() {
        let elements: u64 = param.shape.iter().map(|side| *side as u64).product();
        parameters += elements;
        let layer = param.name.strip_prefix(&inner).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        // A matrix of coefficients is no map; the taps of a convolution are one, `[channels, 1, taps]`.
        let is_map = param.shape.len() >= 2 && param.name.ends_with("weight");
        match layer.and_then(|layer| Some((layer, of_layer.get(layer)?))) {
            Some((layer, at)) => {
                mixers[*at].parameters += elements;
                if is_matrix(&ParamEntry { name: param.name.clone(), id: param.id, shape: param.shape.clone() }) {
                    matrices += elements;
                }
                if is_map {
                    mixers[*at].map_flops += 2.0 * elements as f64;
                    features[layer] += param.shape.iter().map(|side| *side as u64).sum::<u64>();
                }
            }
            None if param.name.ends_with("lm_head.weight") => head = elements,
            None if param.shape.len() == 2 && param.shape[0] == config.vocab_size() => embedding = elements,
            None => {}
        }
    }
    if config.common().tie_word_embeddings {
        (head, embedding) = (embedding, 0);
    }
    let layers: f64 = mixers.iter().map(|mixer| mixer.map_flops + mixer.mixer_flops).sum();
    let forward = layers + 2.0 * head as f64;
    let flops = FlopsPerToken { forward, training: 3.0 * forward };
    Ok(Counted { parameters, embedding, mixers, flops, features, matrices, vocabulary: config.vocab_size() })
}

/// The rates where the schedule turns, and between.
fn learning_rates(recipe: &Recipe, steps: u64) -> Vec<(u64, f64)> {
    let schedule = Schedule::new(&recipe.lr_scheduler);
    let warmup = recipe.lr_scheduler.warmup_steps;
    let decay = recipe.lr_scheduler.decay_ratio.map(|ratio| steps - ((ratio * steps as f64) as u64).min(steps));
    let mut at: Vec<u64> = vec![0, warmup / 2, warmup, steps / 4, steps / 2, steps * 3 / 4, steps.saturating_sub(1)];
    at.extend(decay);
    at.sort_unstable();
    at.dedup();
    at.retain(|step| *step < steps);
    at.into_iter().map(|step| (step, recipe.optimizer.lr * schedule.factor(step, steps))).collect()
}

/// Tokens in a second in the last line of training that a run has written.
fn last_rate(folder: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).ok()?;
    text.lines()
        .rev()
        .find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?.get("tokens_per_s")?.as_f64())
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
