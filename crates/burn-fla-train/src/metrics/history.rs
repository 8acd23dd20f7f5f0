//! What a run has written of itself, read again: for tables and plots.

use std::path::{Path, PathBuf};

use crate::TrainError;

/// The figures of a run folder.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The run folder.
    pub folder: PathBuf,
    /// Every training line: tokens so far, loss, tokens in a second.
    pub training: Vec<TrainPoint>,
    /// Every evaluation: tokens so far and held-out loss.
    pub validation: Vec<ValidationPoint>,
    /// The last step of any line.
    pub step: u64,
    /// Seconds of training.
    pub seconds: f64,
}

/// A training line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainPoint {
    /// Steps made.
    pub step: u64,
    /// Tokens so far.
    pub tokens: f64,
    /// Mean cross entropy since the line before.
    pub loss: f64,
    /// Tokens in a second since the line before.
    pub tokens_per_s: f64,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValidationPoint {
    /// Steps made.
    pub step: u64,
    /// Tokens so far.
    pub tokens: f64,
    /// Held-out cross entropy.
    pub loss: f64,
    /// In bits per byte, of text.
    pub bits_per_byte: Option<f64>,
    /// The share of right answers, of a task with answers.
    pub accuracy: Option<f64>,
}

impl History {
    /// Reads `metrics.jsonl` of a run folder. Lines that are no JSON, as a crash may leave one at the end, are passed over.
    ///
    /// # Errors
    /// A file that is not there or cannot be read.
    pub fn read(folder: &Path) -> Result<History, TrainError> {
        let path = folder.join("metrics.jsonl");
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        let mut history = History { folder: folder.to_path_buf(), ..History::default() };
        for line in bytes.split(|byte| *byte == b'\n') {
            let Ok(line) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
            let number = |name: &str| line.get(name).and_then(serde_json::Value::as_f64);
            let Some(step) = line.get("step").and_then(serde_json::Value::as_u64) else { continue };
            history.step = history.step.max(step);
            history.seconds = number("seconds").unwrap_or(history.seconds).max(history.seconds);
            let tokens = number("tokens").unwrap_or_default();
            if let Some(loss) = number("loss") {
                let tokens_per_s = number("tokens_per_s").unwrap_or_default();
                history.training.push(TrainPoint { step, tokens, loss, tokens_per_s });
            }
            if let Some(loss) = number("validation_loss") {
                let (bits_per_byte, accuracy) = (number("validation_bits_per_byte"), number("validation_accuracy"));
                history.validation.push(ValidationPoint { step, tokens, loss, bits_per_byte, accuracy });
            }
        }
        Ok(history)
    }

    /// The name of the run: that of its folder.
    pub fn name(&self) -> String {
        self.folder
            .file_name()
            .map_or_else(|| self.folder.display().to_string(), |name| name.to_string_lossy().into_owned())
    }

    /// The runs in `folder`, at any depth up to 3, in the order of their paths; a run folder has a `metrics.jsonl`.
    ///
    /// # Errors
    /// A folder that cannot be listed, a file that cannot be read.
    pub fn all(folder: &Path) -> Result<Vec<History>, TrainError> {
        fn visit(folder: &Path, depth: usize, found: &mut Vec<History>) -> Result<(), TrainError> {
            if folder.join("metrics.jsonl").is_file() {
                found.push(History::read(folder)?);
                return Ok(());
            }
            let mut below = Vec::new();
            for entry in std::fs::read_dir(folder).map_err(TrainError::io("list", folder))? {
                let path = entry.map_err(TrainError::io("list", folder))?.path();
                if depth > 0 && path.is_dir() {
                    below.push(path);
                }
            }
            below.sort();
            below.iter().try_for_each(|path| visit(path, depth - 1, found))
        }
        let mut found = Vec::new();
        visit(folder, 3, &mut found)?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_sorted_out_and_half_lines_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("deep/run");
        std::fs::create_dir_all(&run).unwrap();
        let lines = "{\"step\":1,\"tokens\":10,\"loss\":5.0,\"tokens_per_s\":7.0,\"seconds\":1.5}\n\
            {\"step\":1,\"tokens\":10,\"validation_loss\":4.0,\"validation_bits_per_byte\":2.0,\"seconds\":1.5}\n\
            {\"step\":2,\"prompt\":\"x\",\"sample\":\"y\"}\n{\"step\":3,\"lo";
        std::fs::write(run.join("metrics.jsonl"), lines).unwrap();
        let [history] = &History::all(folder.path()).unwrap()[..] else { panic!() };
        assert_eq!(history.name(), "run");
        assert_eq!((history.step, history.seconds), (2, 1.5));
        assert_eq!(history.training, [TrainPoint { step: 1, tokens: 10.0, loss: 5.0, tokens_per_s: 7.0 }]);
        assert_eq!(history.validation[0].bits_per_byte, Some(2.0));
        assert!(History::read(folder.path()).unwrap_err().to_string().contains("metrics.jsonl"));
    }
}
