//! The table of what was measured.

use std::fmt;
use std::path::Path;

use burn::tensor::Device;

use crate::Compute;

/// One number and its bound.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was measured.
    pub name: String,
    /// The deviation from what is expected.
    pub measured: f64,
    /// The largest deviation that passes; `None` for a number that is not judged.
    pub bound: Option<f64>,
}

impl Check {
    /// Whether the number is within its bound. A NaN never is.
    pub fn ok(&self) -> bool {
        self.bound.is_none_or(|bound| self.measured <= bound)
    }
}

/// What [`verify_folder`](super::verify_folder) measured. Its `Display` is a table with the verdict below.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// Folder, device and types.
    pub title: String,
    /// Why the bounds are not those of f32, where they are not.
    pub reason: Option<&'static str>,
    /// The numbers, in the order of the computation.
    pub checks: Vec<Check>,
    /// Parameters that have no gradient, here and in what is expected.
    pub absent: Vec<String>,
}

impl VerifyReport {
    pub(super) fn new(folder: &Path, device: &Device, compute: Compute) -> Self {
        Self {
            title: format!("{} on {device:?}, {:?}, engine {:?}", folder.display(), compute.dtype, compute.engine),
            reason: None,
            checks: Vec::new(),
            absent: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, name: impl Into<String>, measured: f64, bound: Option<f64>) {
        self.checks.push(Check { name: name.into(), measured, bound });
    }

    /// Whether every number that is judged is within its bound, and at least one is judged.
    pub fn passed(&self) -> bool {
        self.checks.iter().any(|c| c.bound.is_some()) && self.checks.iter().all(Check::ok)
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
        writeln!(f, "{}", self.title)?;
        if let Some(reason) = self.reason {
            writeln!(f, "bounds of its own: {reason}")?;
        }
        writeln!(f, "{:width$}  {:>9}  {:>9}", "", "measured", "bound")?;
        for check in &self.checks {
            let (bound, verdict) = match check.bound {
                Some(bound) if check.ok() => (format!("{bound:.2e}"), "ok"),
                Some(bound) => (format!("{bound:.2e}"), "TOO LARGE"),
                None => ("-".to_string(), ""),
            };
            let row = format!("{:width$}  {:>9.2e}  {bound:>9}  {verdict}", check.name, check.measured);
            writeln!(f, "{}", row.trim_end())?;
        }
        if !self.absent.is_empty() {
            writeln!(f, "without a gradient, as expected: {}", self.absent.join(", "))?;
        }
        let failed = self.checks.iter().filter(|c| !c.ok()).count();
        let judged = self.checks.iter().filter(|c| c.bound.is_some()).count();
        if self.passed() {
            write!(f, "passed: all {judged} within their bounds")
        } else if judged == 0 {
            write!(f, "failed: the folder holds nothing to compare with")
        } else {
            write!(f, "FAILED: {failed} of {judged} past their bounds")
        }
    }
}
