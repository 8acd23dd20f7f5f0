//! The one error type of the trainer: what was wrong, where, and what would be right.

use std::path::{Path, PathBuf};

/// Everything that can stop a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The recipe, or a file it extends, could not be read.
    #[error("cannot read the recipe {}: {source}; check the path and its permissions", path.display())]
    RecipeRead {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The recipe is not valid TOML.
    #[error("{at}: not valid TOML: {message}")]
    RecipeSyntax {
        /// File and line.
        at: String,
        /// What the parser said.
        message: String,
    },
    /// A key or section that the recipe format does not have.
    #[error("{at}: unknown key `{key}`{}", nearest_hint(.nearest))]
    UnknownKey {
        /// File and line.
        at: String,
        /// The key with its section.
        key: String,
        /// The nearest valid name.
        nearest: Option<String>,
    },
    /// A key whose value has the wrong type.
    #[error("{at}: `{key}` must be {expected}, but it is {found}")]
    WrongType {
        /// File and line.
        at: String,
        /// The key with its section.
        key: String,
        /// The type it must have.
        expected: &'static str,
        /// What it has.
        found: String,
    },
    /// A value of the right type that cannot be used.
    #[error("{at}: `{key}`: {message}")]
    BadValue {
        /// File and line.
        at: String,
        /// The key with its section.
        key: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A required key is absent.
    #[error("{path}: `{key}` is missing: {message}")]
    MissingKey {
        /// The recipe.
        path: String,
        /// The key with its section.
        key: String,
        /// What it is for.
        message: String,
    },
    /// A `--set` that cannot be understood.
    #[error("--set {text}: {message}; write --set section.key=value")]
    BadOverride {
        /// The override as typed.
        text: String,
        /// What is wrong.
        message: String,
    },
    /// The device asked for is not there, or not in this build.
    #[error("[device] of the recipe: {0}")]
    Device(#[from] burn_fla_nn::device::DeviceError),
    /// A pattern of a data source matched no file.
    #[error("data source {source_name}: no file matches {pattern}; {remedy}")]
    NoFiles {
        /// Which source of the recipe.
        source_name: String,
        /// The pattern after expansion.
        pattern: String,
        /// What to do.
        remedy: String,
    },
    /// A document that cannot be read as its format says.
    #[error("{}{}: {message}", path.display(), line.map(|l| format!(":{l}")).unwrap_or_default())]
    BadDocument {
        /// The data file.
        path: PathBuf,
        /// The line in it.
        line: Option<u64>,
        /// What is wrong.
        message: String,
    },
    /// The corpus holds too few tokens to make one window.
    #[error(
        "the {role} data holds {tokens} tokens, but one sequence needs {needed} (training.seq_len + 1); add data or shorten training.seq_len"
    )]
    EmptyCorpus {
        /// "training" or "validation".
        role: String,
        /// Tokens found.
        tokens: u64,
        /// Tokens needed.
        needed: u64,
    },
    /// A token id that the model has no embedding for.
    #[error(
        "the tokenizer {tokenizer} has {tokens} tokens, but the model {model} has vocab_size {vocab}; raise vocab_size to at least {tokens} (model.overrides) or choose another tokenizer"
    )]
    TokenizerTooLarge {
        /// The tokenizer as named in the recipe.
        tokenizer: String,
        /// Its tokens.
        tokens: usize,
        /// The model's configuration.
        model: String,
        /// Its vocabulary.
        vocab: usize,
    },
    /// A checkpoint whose files do not match its manifest.
    #[error("the checkpoint {} is damaged: {message}; {remedy}", path.display())]
    CheckpointDamaged {
        /// The checkpoint folder.
        path: PathBuf,
        /// Which file, and how.
        message: String,
        /// What to do.
        remedy: String,
    },
    /// A checkpoint that was asked for and is not there.
    #[error("no checkpoint at {}: {message}", path.display())]
    CheckpointMissing {
        /// The folder looked at.
        path: PathBuf,
        /// What to do.
        message: String,
    },
    /// A checkpoint that belongs to another run.
    #[error("cannot resume from {}: {message}", path.display())]
    ResumeMismatch {
        /// The checkpoint folder.
        path: PathBuf,
        /// What differs and what to do.
        message: String,
    },
    /// Too many steps in a row had a gradient that was not finite.
    #[error(
        "{in_a_row} optimiser steps in a row up to step {step} had a gradient that was not finite and were skipped (training.max_skipped = {limit}); the batch of that step is in {}; lower optimizer.lr, or resume from a checkpoint", batch.display()
    )]
    Diverged {
        /// The last step.
        step: u64,
        /// How many in a row.
        in_a_row: u64,
        /// The bound of the recipe.
        limit: u64,
        /// Where the batch was written.
        batch: PathBuf,
    },
    /// Memory does not hold the run, or did not hold a step.
    #[error("out of memory: {what}; {advice}")]
    OutOfMemory {
        /// Where, and what there was.
        what: String,
        /// Which keys to change to which values.
        advice: String,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {source}{}", path.display(), io_hint(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An error of the model's storey.
    #[error(transparent)]
    Model(burn_fla_nn::NnError),
    /// An error of an operator.
    #[error(transparent)]
    Op(#[from] burn_fla_ops::OpError),
    /// The device failed while computing or reading.
    #[error("the device failed: {0}")]
    Execution(String),
}

/// A file that a model's storey could not read or write gets the hints of this one.
impl From<burn_fla_nn::NnError> for TrainError {
    fn from(error: burn_fla_nn::NnError) -> TrainError {
        match error {
            burn_fla_nn::NnError::Io { action, path, source } => TrainError::Io { action, path, source },
            other => TrainError::Model(other),
        }
    }
}

impl TrainError {
    /// Makes the closure that gives an [`std::io::Error`] its action and path.
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> TrainError + 'a {
        move |source| TrainError::Io { action, path: path.to_path_buf(), source }
    }
}

fn nearest_hint(nearest: &Option<String>) -> String {
    match nearest {
        Some(name) => format!("; did you mean `{name}`?"),
        None => String::new(),
    }
}

fn io_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a folder that can be written (job.dump_folder)"
        }
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; free space on the disk, then resume: the checkpoints already written are intact"
        }
        std::io::ErrorKind::FileTooLarge => {
            "; raise the limit on a file's size (`ulimit -f`) or choose another disk, then resume: the checkpoints already written are intact"
        }
        _ => "",
    }
}
