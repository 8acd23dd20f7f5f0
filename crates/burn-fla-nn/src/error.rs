//! The one error type of this crate.

use std::path::PathBuf;

use burn_fla_ops::OpError;

/// What can go wrong while a model is configured, built, loaded, saved or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NnError {
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: "read", "write", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there, but its content is not what its name promises.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        message: String,
    },
    /// The text of a config is not a JSON object.
    #[error("the model config is not a JSON object: {0}")]
    Json(String),
    /// A field of config.json has a value this library does not accept.
    #[error("model config, field `{field}`: {message}")]
    Config {
        /// The field's name, with the way to it (`attn[0].layers`).
        field: String,
        /// What was found and what would be right.
        message: String,
    },
    /// `model_type` names an architecture that is not in the registry.
    #[error("model config, field `model_type`: `{found}` is not supported{hint}; supported are {supported}")]
    ModelType {
        /// The name in the config.
        found: String,
        /// Empty, or a suggestion.
        hint: String,
        /// All names in the registry.
        supported: String,
    },
    /// The tensors of a file do not fit the model: every difference, in one message.
    #[error("{origin} does not fit the model: {}", problems.join("; "))]
    Tensors {
        /// Where the tensors come from.
        origin: String,
        /// One entry a tensor: missing, unexpected, or of another shape or type.
        problems: Vec<String>,
    },
    /// A tokenizer could not be loaded or used.
    #[error("tokenizer{}: {message}", path.as_ref().map(|p| format!(" {}", p.display())).unwrap_or_default())]
    Tokenizer {
        /// The file, when there is one.
        path: Option<PathBuf>,
        /// What was wrong.
        message: String,
    },
    /// An argument has a value, shape or type that the function does not take.
    #[error("argument `{argument}`: {message}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What was found and what would be right.
        message: String,
    },
    /// A device failed while results were read from it.
    #[error("the device failed: {0}")]
    Device(String),
    /// An operator refused its arguments.
    #[error(transparent)]
    Op(#[from] OpError),
}

impl NnError {
    /// A [`NnError::Config`] for `field`.
    pub(crate) fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { field: field.into(), message: message.into() }
    }

    /// A [`NnError::Argument`] for `argument`.
    pub(crate) fn argument(argument: &'static str, message: impl Into<String>) -> Self {
        Self::Argument { argument, message: message.into() }
    }

    /// A closure for `map_err` that names the file and what was done with it.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// A [`NnError::Format`] for `path`.
    pub(crate) fn format(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Format { path: path.into(), message: message.into() }
    }
}
