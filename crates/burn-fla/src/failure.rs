//! The one error of the command, and what a panic looks like.

use std::io;
use std::path::PathBuf;

use burn_fla::nn::NnError;
use burn_fla::nn::device::{DeviceError, is_probing};
use burn_fla::train::TrainError;
use burn_fla::train::data::is_reading_parquet;
use burn_fla::train::plan::is_out_of_memory;

/// Why a command failed, in one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The trainer, or one of its files.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A model, a tokenizer, or a file of theirs.
    #[error(transparent)]
    Model(#[from] NnError),
    /// The device asked for.
    #[error("--device {backend}: {source}")]
    Device {
        /// Its name.
        backend: String,
        /// What is wrong with it.
        source: DeviceError,
    },
    /// A folder, or the name of a file, that is not what the command needs.
    #[error("{}: {message}", path.display())]
    Folder {
        /// The path.
        path: PathBuf,
        /// What was looked for, and what to do.
        message: String,
    },
    /// Standard output.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    /// Whether the reader of standard output went away: `burn-fla generate … | head` is no failure.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// A panic is a bug, of ours or below: one line says so. With `RUST_BACKTRACE` set it says all.
pub fn say_panics_in_one_line() {
    if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
        return;
    }
    std::panic::set_hook(Box::new(|panic| {
        if is_probing() || is_reading_parquet() {
            return;
        }
        let text = panic.payload_as_str().unwrap_or("no message");
        // The trainer makes an error of it that says what would fit.
        if is_out_of_memory(text) {
            return;
        }
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let place = panic.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        eprintln!("error: a bug{place}: {text} (RUST_BACKTRACE=1 shows where it comes from; please report it)");
    }));
}
