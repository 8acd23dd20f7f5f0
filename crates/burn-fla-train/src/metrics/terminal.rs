//! Progress on the terminal: a bar where there is one to draw on, burn-train's dashboard on request, else a line per log
//! step.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

#[cfg(feature = "tui")]
use super::Dashboard;
use super::{TrainLine, ValidationLine};
use crate::recipe::TerminalKind;

/// Progress goes to standard error, what a run produces (evaluations and samples) to standard output.
#[derive(Debug)]
pub struct Terminal {
    bar: Option<ProgressBar>,
    #[cfg(feature = "tui")]
    dashboard: Option<Dashboard>,
}

impl Terminal {
    /// A view of a run that is at `step`. `total` is unknown under a budget of time.
    pub fn new(kind: TerminalKind, step: u64, total: Option<u64>) -> Terminal {
        let bar = (kind == TerminalKind::Bar && std::io::stderr().is_terminal()).then(|| {
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
            bar
        });
        Terminal {
            bar,
            #[cfg(feature = "tui")]
            dashboard: (kind == TerminalKind::Tui && std::io::stdout().is_terminal())
                .then(|| Dashboard::open(step, total)),
        }
    }

    /// Whether somebody at the terminal asked the run to stop.
    pub fn asked_to_stop(&self) -> bool {
        #[cfg(feature = "tui")]
        if let Some(dashboard) = &self.dashboard {
            return dashboard.asked_to_stop();
        }
        false
    }

    /// A step was made.
    pub fn step(&mut self, step: u64) {
        #[cfg(feature = "tui")]
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.step(step);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
    }

    /// Something worth knowing.
    pub fn note(&mut self, text: &str) {
        #[cfg(feature = "tui")]
        if let Some(dashboard) = &mut self.dashboard {
            return dashboard.keep(text);
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// A log step.
    pub fn train(&mut self, line: &TrainLine, total: Option<u64>) {
        #[cfg(feature = "tui")]
        if let Some(dashboard) = &mut self.dashboard {
            return dashboard.train(line);
        }
        let figures = format!(
            "loss {:.4}  lr {:.2e}  |g| {:.3}  {:.0} tokens/s{}{}{}",
            line.loss,
            line.lr,
            line.grad_norm,
            line.tokens_per_s,
            line.mfu.map(|share| format!("  MFU {:.1} %", 100.0 * share)).unwrap_or_default(),
            line.memory.most().map(|most| format!("  {most:.2} GiB")).unwrap_or_default(),
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
    pub fn validation(&mut self, line: &ValidationLine) {
        #[cfg(feature = "tui")]
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.validation(line);
        }
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
    pub fn print(&mut self, text: &str) {
        #[cfg(feature = "tui")]
        if let Some(dashboard) = &mut self.dashboard {
            return dashboard.keep(text);
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// Leaves the bar as it is; gives the terminal back, and writes what waited for it.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
        #[cfg(feature = "tui")]
        if let Some(dashboard) = self.dashboard.take() {
            for text in dashboard.close() {
                println!("{text}");
            }
        }
    }
}

impl Drop for Terminal {
    /// An error that ends the run finds the terminal as it was.
    fn drop(&mut self) {
        self.finish();
    }
}
