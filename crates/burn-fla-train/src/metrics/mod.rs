//! What a run reports: `metrics.jsonl` always, the terminal, TensorBoard; and what is made of it afterwards.

#[cfg(feature = "tui")]
mod dashboard;
mod history;
pub(crate) mod memory;
mod plot;
mod tensorboard;
mod terminal;

#[cfg(feature = "tui")]
pub use dashboard::Dashboard;
pub use history::{History, TrainPoint, ValidationPoint};
pub use memory::Memory;
pub use plot::{plot, plot_png};
pub use tensorboard::TensorBoard;
pub use terminal::Terminal;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::TrainError;
use crate::checkpoint::write_atomic;

/// One line of `metrics.jsonl`. Every line has the step; the other fields depend on what is reported.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Line {
    /// Every `metrics.log_freq` steps.
    Train(TrainLine),
    /// After an evaluation.
    Validation(ValidationLine),
    /// A continuation of one of `validation.samples`.
    Sample(SampleLine),
    /// In `profile.jsonl`: every `profiling.freq` steps.
    Profile(ProfileLine),
}

/// The training figures since the line before.
#[derive(Clone, Debug, Serialize)]
pub struct TrainLine {
    /// Optimiser steps made.
    pub step: u64,
    /// Tokens counted in the loss so far.
    pub tokens: u64,
    /// Mean cross entropy in nats per token, over the steps since the line before.
    pub loss: f64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Norm of the last gradient before the clip.
    pub grad_norm: f64,
    /// Training speed since the line before, without evaluations and saves.
    pub tokens_per_s: f64,
    /// Floating-point operations of the model in a second, forward and backward, as [`crate::plan::Plan`] counts them.
    pub flops_per_s: f64,
    /// The share of what the device computes at most (`metrics.peak_tflops`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Tokens drawn from each source so far, where sources have weights.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "as_map")]
    pub sources: Vec<(String, u64)>,
    /// Seconds since the line before in which the model waited for data.
    pub data_wait_s: f64,
    /// Seconds of training so far, without evaluations and saves.
    pub seconds: f64,
    /// Steps skipped so far because the gradient was not finite.
    pub skipped: u64,
    /// Memory after the last of these steps: `in_use_gib` and `reserved_gib` of a device, `rss_gib` and `peak_rss_gib` of
    /// the process.
    #[serde(flatten)]
    pub memory: Memory,
}

fn as_map<S: Serializer>(list: &[(String, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(list.iter().map(|(name, tokens)| (name, tokens)))
}

/// A held-out evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct ValidationLine {
    /// Optimiser steps made.
    pub step: u64,
    /// Tokens counted in the loss so far.
    pub tokens: u64,
    /// Mean cross entropy in nats per held-out token.
    pub validation_loss: f64,
    /// Cross entropy in bits per byte of held-out text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_bits_per_byte: Option<f64>,
    /// The share of held-out answers that were right: the most likely token is the label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_accuracy: Option<f64>,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// A continuation.
#[derive(Clone, Debug, Serialize)]
pub struct SampleLine {
    /// Optimiser steps made.
    pub step: u64,
    /// What the model was given.
    pub prompt: String,
    /// What it went on with.
    pub sample: String,
}

/// Where the milliseconds of a step went.
#[derive(Clone, Debug, Serialize)]
pub struct ProfileLine {
    /// Optimiser steps made, this one included.
    pub step: u64,
    /// Waiting for rows.
    pub data_ms: f64,
    /// Rows to the device.
    pub upload_ms: f64,
    /// Forward and loss; the output layer's gradient is made there too.
    pub forward_ms: f64,
    /// Backward.
    pub backward_ms: f64,
    /// Sums over micro-batches and threads, and the update.
    pub optimizer_ms: f64,
    /// The most memory in use at the end of any of these parts, where the device tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_use_gib: Option<f64>,
    /// The most memory that the allocator had reserved then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserved_gib: Option<f64>,
}

/// `metrics.jsonl`: one JSON object a line, flushed as it is written.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    tensorboard: Option<TensorBoard>,
}

impl Journal {
    /// Opens the journal of a run that continues after `step`: lines of later steps, and a last line cut short by a
    /// crash, are removed, so that every step is reported once.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Journal, TrainError> {
        match std::fs::read(path) {
            Ok(bytes) => {
                let kept: Vec<&[u8]> = bytes
                    .split_inclusive(|byte| *byte == b'\n')
                    .filter(|line| line.ends_with(b"\n") && step_of(line).is_some_and(|at| at <= step))
                    .collect();
                let kept = if step == 0 { Vec::new() } else { kept.concat() };
                if kept.len() < bytes.len() {
                    write_atomic(path, &kept)?;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(TrainError::io("read", path)(error)),
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Journal { path: path.to_path_buf(), file: file.map_err(TrainError::io("open", path))?, tensorboard: None })
    }

    /// The same, that writes into `board` too.
    pub fn with_tensorboard(self, board: Option<TensorBoard>) -> Journal {
        Journal { tensorboard: board, ..self }
    }

    /// Appends a line.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        let mut text = serde_json::to_string(line).expect("a line is plain JSON");
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(TrainError::io("write", &self.path))?;
        self.tensorboard.as_mut().map_or(Ok(()), |board| board.write(line))
    }
}

fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<serde_json::Value>(line).ok()?.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_journal_ends_at_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let sample = |step| Line::Sample(SampleLine { step, prompt: "fn".into(), sample: " main\n".into() });
        let mut journal = Journal::open(&path, 0).unwrap();
        for step in 1..=4 {
            journal.write(&sample(step)).unwrap();
        }
        drop(journal);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"step\": 2, \"lo")).unwrap();
        let mut journal = Journal::open(&path, 2).unwrap();
        journal.write(&sample(3)).unwrap();
        let lines: Vec<u64> =
            std::fs::read_to_string(&path).unwrap().lines().map(|line| step_of(line.as_bytes()).unwrap()).collect();
        assert_eq!(lines, [1, 2, 3]);
        Journal::open(&path, 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
