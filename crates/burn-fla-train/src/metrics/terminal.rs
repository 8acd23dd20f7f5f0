//! Progress on the terminal: a bar where there is one to draw on, else a line per log step.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use super::{TrainLine, ValidationLine};
use crate::recipe::TerminalKind;

/// Progress goes to standard error, what a run produces (evaluations and samples) to standard output.
#[derive(Debug)]
pub struct Terminal {
    bar: Option<ProgressBar>,
}

impl Terminal {
    /// A view of a run that is at `step`. `total` is unknown under a budget of time.
    pub fn new(kind: TerminalKind, step: u64, total: Option<u64>) -> Terminal {
        if kind == TerminalKind::Plain || !std::io::stderr().is_terminal() {
            return Terminal { bar: None };
        }
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::no_length(),
        };
        let template = "{bar:24} {pos}/{len} steps, {eta} left  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_position(step);
        bar.reset_eta();
        Terminal { bar: Some(bar) }
    }

    /// A step was made.
    pub fn step(&self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
    }

    /// Something worth knowing.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// A log step.
    pub fn train(&self, line: &TrainLine, total: Option<u64>) {
        let figures = format!(
            "loss {:.4}  lr {:.2e}  |g| {:.3}  {:.0} tokens/s{}",
            line.loss,
            line.lr,
            line.grad_norm,
            line.tokens_per_s,
            if line.skipped > 0 { format!("  {} skipped", line.skipped) } else { String::new() }
        );
        match &self.bar {
            Some(bar) => bar.set_message(figures),
            None => {
                let total = total.map(|total| format!("/{total}")).unwrap_or_default();
                eprintln!("step {}{total}  {figures}  {:.0} s", line.step, line.seconds);
            }
        }
    }

    /// An evaluation.
    pub fn validation(&self, line: &ValidationLine) {
        let figure = match (line.validation_bits_per_byte, line.validation_accuracy) {
            (Some(bits), _) => format!(", {bits:.3} bits per byte"),
            (None, Some(share)) => format!(", {:.2} % of the answers right", 100.0 * share),
            (None, None) => String::new(),
        };
        self.print(&format!(
            "step {}: validation loss {:.4}{figure}, after {:.0} s of training",
            line.step, line.validation_loss, line.seconds
        ));
    }

    /// Text for standard output.
    pub fn print(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// Leaves the bar as it is.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}
