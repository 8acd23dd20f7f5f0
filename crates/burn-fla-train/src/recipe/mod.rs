//! The recipe of a run: as typed (TOML, strict) → resolved (every default filled in, hashed, written beside the run).
//!
//! A recipe has the sections of [`Recipe`]'s fields. An unknown key or a wrong type is an error that names the
//! file, the line and the nearest valid name. `extends = "other.toml"` (relative to the file that says it) lays a
//! recipe over another; `--set section.key=value` overrides a key of the result. All other paths are relative to
//! the working directory; `~` and `$VAR` expand.

mod data;
mod resolve;
mod schema;
mod section;
mod value;

use std::path::{Path, PathBuf};

use burn_fla_nn::device::Backend;
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::TrainError;
use value::{Kind, Table};

pub use data::{DataSection, Filler, MqarSection, SourceFormat, SourceSection, TextSection};
pub use schema::{reference, schema};

/// A resolved recipe: nothing is left to a default.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct Recipe {
    /// `[job]`: where the run lives.
    pub job: Job,
    /// `[device]`: what computes.
    pub device: DeviceSection,
    /// `[model]`: what is trained.
    pub model: ModelSection,
    /// `[optimizer]`: AdamW or Muon.
    pub optimizer: OptimizerSection,
    /// `[lr_scheduler]`: the learning rate over the steps.
    pub lr_scheduler: SchedulerSection,
    /// `[training]`: batch, sequence, budget.
    pub training: TrainingSection,
    /// `[data]`: what it is trained on.
    pub data: DataSection,
    /// `[checkpoint]`: when to save, what to resume.
    pub checkpoint: CheckpointSection,
    /// `[metrics]`: what is reported.
    pub metrics: MetricsSection,
    /// `[validation]`: held-out loss and samples.
    pub validation: ValidationSection,
    /// `[profiling]`: where the milliseconds of a step go.
    #[serde(skip_serializing_if = "ProfilingSection::is_off")]
    pub profiling: ProfilingSection,
    /// Things worth telling that are no errors, such as keys without effect.
    #[serde(skip)]
    pub notices: Vec<String>,
}

/// `[job]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct Job {
    /// The run folder: checkpoints, metrics and the resolved recipe (default `runs/NAME`, NAME the recipe's file name).
    pub dump_folder: PathBuf,
    /// Free text.
    pub description: String,
    /// Seeds the initialisation and the order of the data (42).
    pub seed: u64,
}

fn by_name<S: Serializer>(backend: &Backend, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(backend.name())
}

/// The numbers in which activations are kept; parameters and moments are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// 16-bit brain floats.
    Bfloat16,
    /// 32-bit floats.
    Float32,
}

/// `[device]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct DeviceSection {
    /// `"cpu"` (default), `"cuda"` or `"wgpu"`.
    #[serde(serialize_with = "by_name")]
    #[schemars(schema_with = "schema::backend")]
    pub backend: Backend,
    /// Which device of that backend (0), in the driver's order.
    pub index: usize,
    /// `"bfloat16"` (CUDA's default) or `"float32"` (elsewhere).
    pub compute_dtype: ComputeDtype,
    /// Data-parallel threads of the CPU backend (default: the cores, at most `batch_size`). The sums of a run are
    /// exact for a given number of threads.
    pub threads: usize,
}

/// `[model]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct ModelSection {
    /// A config.json, or a folder in Hugging Face's layout whose weights the run starts from.
    pub config: PathBuf,
    /// `"byte"`, or the path of a tokenizer.json.
    pub tokenizer: String,
    /// Fields of config.json to replace.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub overrides: serde_json::Map<String, serde_json::Value>,
}

/// The rule of the updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// AdamW for every parameter.
    Adamw,
    /// Muon for the matrices of the layers, AdamW for the others.
    Muon,
}

/// `[optimizer]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct OptimizerSection {
    /// `"adamw"` (default) or `"muon"`.
    pub name: OptimizerName,
    /// Peak learning rate (3e-4).
    pub lr: f64,
    /// Decay of the first moment (0.9).
    pub beta1: f64,
    /// Decay of the second moment (0.95).
    pub beta2: f64,
    /// Added to the root of the second moment (1e-8).
    pub eps: f64,
    /// Decoupled weight decay (0.1); not on 1-D parameters, `A_log`, `dt_bias` and `D` unless a group says so.
    pub weight_decay: f64,
    /// Of Muon: decay of its moment (0.95).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Of Muon: Newton-Schulz iterations (5).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ns_steps: Option<usize>,
    /// Exceptions by parameter name; the first that matches counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupRule>,
}

/// One entry of `optimizer.groups`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct GroupRule {
    /// A regular expression searched in the parameter's name.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Multiplies the learning rate (1).
    pub lr_scale: f64,
    /// Replaces the weight decay.
    pub weight_decay: Option<f64>,
}

/// The shape of the learning rate's decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DecayKind {
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
    /// 1 − √x.
    Sqrt,
}

/// `[lr_scheduler]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct SchedulerSection {
    /// Linear warm-up (2 % of the steps).
    pub warmup_steps: u64,
    /// None: decay right after the warm-up; r: stable, then decay over the last r of the steps.
    pub decay_ratio: Option<f64>,
    /// `"cosine"` (default), `"linear"` or `"sqrt"`.
    pub decay_type: DecayKind,
    /// The last learning rate as a ratio of the peak (0.1).
    pub lr_min: f64,
}

/// What is kept between forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpoint {
    /// Every activation.
    None,
    /// What enters each block; the rest is computed again, for one more forward pass.
    Block,
}

/// `[training]`: exactly one of `steps`, `tokens` and `hours` is set.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct TrainingSection {
    /// Rows per device and micro-batch (16).
    pub batch_size: usize,
    /// Tokens of a row (1024).
    pub seq_len: usize,
    /// Documents in a row do not see each other, and no label crosses from one to the next (false).
    pub varlen: bool,
    /// With `varlen`: longer documents are cut into sequences of this many tokens, at most `seq_len` (none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_len: Option<usize>,
    /// Micro-batches per optimiser step (1; or derived from `tokens_per_step`).
    pub gradient_accumulation_steps: usize,
    /// Budget in optimiser steps.
    pub steps: Option<u64>,
    /// Budget in tokens.
    pub tokens: Option<u64>,
    /// Budget in hours of training, fractions allowed.
    pub hours: Option<f64>,
    /// Bound of the gradient's global norm (1); 0 turns clipping off.
    pub max_norm: f64,
    /// Skip the update when the gradient is not finite (true).
    pub skip_nan_inf: bool,
    /// Skips in a row after which the run stops with an error (10).
    pub max_skipped: u64,
    /// `"none"` (default), or `"block"`: keep only what enters each block, and compute the rest again going backward. Less
    /// memory for one more forward pass; the gradients stay the same.
    pub activation_checkpoint: ActivationCheckpoint,
}

impl TrainingSection {
    /// Tokens of one optimiser step.
    pub fn tokens_per_step(&self) -> u64 {
        (self.batch_size * self.seq_len * self.gradient_accumulation_steps) as u64
    }

    /// The optimiser steps of the budget, unless it is one of time.
    pub fn total_steps(&self) -> Option<u64> {
        match (self.steps, self.tokens) {
            (Some(steps), _) => Some(steps),
            (None, Some(tokens)) => Some(tokens.div_ceil(self.tokens_per_step())),
            (None, None) => None,
        }
    }
}

/// What a run continues from.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(into = "String")]
pub enum Resume {
    /// The latest checkpoint of the run folder, if there is one.
    Auto,
    /// Nothing: a run folder with checkpoints is an error.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

impl From<Resume> for String {
    fn from(resume: Resume) -> String {
        match resume {
            Resume::Auto => "auto".to_string(),
            Resume::Never => "never".to_string(),
            Resume::From(path) => path.display().to_string(),
        }
    }
}

/// `[checkpoint]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct CheckpointSection {
    /// Steps between saves (500); the last step is always saved.
    pub interval: u64,
    /// Write checkpoints while the run goes on (true).
    #[serde(rename = "async")]
    pub background: bool,
    /// Every checkpoint is a Hugging Face folder in any case (true).
    pub export_hf: bool,
    /// How many to keep (2); 0 keeps all.
    pub keep_latest_k: usize,
    /// Where (default `checkpoints` in the run folder).
    pub folder: PathBuf,
    /// `"auto"` (default), `"never"` or a path.
    pub resume: Resume,
}

/// How progress is shown; `metrics.jsonl` is written in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TerminalKind {
    /// A progress bar; plain lines where the output is not a terminal.
    Bar,
    /// One line per log step.
    Plain,
    /// burn-train's dashboard, in a build with the feature `tui`; plain lines where the output is not a terminal.
    Tui,
}

/// `[metrics]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct MetricsSection {
    /// Steps between log lines (10); only then are losses read from the device.
    pub log_freq: u64,
    /// `metrics.jsonl` is written in any case (true).
    pub jsonl: bool,
    /// What the device computes at most, in 10¹² operations a second, to say which share of it is used (none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
    /// Write the folder `tensorboard` of the run too (false).
    pub tensorboard: bool,
    /// `"bar"` (default), `"plain"` or `"tui"`.
    pub terminal: TerminalKind,
}

/// `[validation]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct ValidationSection {
    /// Steps between evaluations (500); 0 turns them off. The last step is always evaluated.
    pub freq: u64,
    /// Batches of an evaluation (20), spread evenly over the held-out data.
    pub steps: u64,
    /// Prompts continued by the model after every evaluation.
    pub samples: Vec<String>,
    /// Tokens of each continuation (200).
    pub sample_tokens: usize,
    /// Temperature of the continuations (0.8).
    pub temperature: f64,
}

/// `[profiling]`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct ProfilingSection {
    /// Measure the parts of a step (false).
    pub enable: bool,
    /// Steps between measured ones (10); these wait for the device after each part.
    pub freq: u64,
    /// Where `profile.jsonl` is written (default `profile` in the run folder).
    pub folder: PathBuf,
}

impl ProfilingSection {
    /// Whether nothing is measured: then the section is not part of what makes a run.
    fn is_off(&self) -> bool {
        !self.enable
    }
}

impl Recipe {
    /// Reads a recipe, lays it over what it `extends`, applies `overrides` (`section.key=value`) and resolves it.
    ///
    /// # Errors
    /// An unreadable file, TOML that does not parse, an unknown key, a wrong type, a value out of range: each names
    /// the file and the line.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Recipe, TrainError> {
        let mut table = read_with_bases(path, &mut Vec::new())?;
        for text in overrides {
            let (keys, value) = value::parse_override(text)?;
            table.set_path(&keys, value).map_err(|message| TrainError::BadOverride { text: text.clone(), message })?;
        }
        resolve::resolve(path, &table)
    }

    /// The recipe as TOML: loading it again gives the same recipe.
    pub fn to_toml(&self) -> String {
        // Every field is a plain value with a string key, so there is nothing TOML could refuse.
        toml::to_string(self).expect("a resolved recipe is representable in TOML")
    }

    /// SHA-256 of [`Recipe::to_toml`] in hexadecimal.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.to_toml().as_bytes()))
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A recipe file merged over the chain of files it extends.
fn read_with_bases(path: &Path, chain: &mut Vec<PathBuf>) -> Result<Table, TrainError> {
    let read = |source| TrainError::RecipeRead { path: path.to_path_buf(), source };
    let canonical = path.canonicalize().map_err(read)?;
    let text = std::fs::read_to_string(path).map_err(read)?;
    let mut table = value::parse(path, &text)?;
    let Some(base) = table.remove("extends") else { return Ok(table) };
    let at = base.origin.to_string();
    let Kind::String(base_name) = &base.kind else {
        return Err(TrainError::WrongType {
            at,
            key: "extends".to_string(),
            expected: "the path of a recipe",
            found: base.describe(),
        });
    };
    chain.push(canonical);
    let base_path = path.parent().unwrap_or(Path::new("")).join(base_name);
    if base_path.canonicalize().is_ok_and(|base| chain.contains(&base)) {
        return Err(TrainError::BadValue {
            at,
            key: "extends".to_string(),
            message: format!("{base_name} extends this recipe in turn"),
        });
    }
    let mut merged = read_with_bases(&base_path, chain)?;
    merged.merge(table);
    Ok(merged)
}

#[cfg(test)]
mod tests;
