//! What a fresh model must show at its first step.

use crate::TrainError;
use crate::optim::ParamTable;
use burn::tensor::Tensor;

use super::compute::{Gradient, read};

/// Looks at the first loss and gradient of a run from random weights: a loss far from ln V, or a parameter whose
/// gradient is absent, zero or not finite, is the sign of a wrong initialisation. Returns one line for each finding.
pub(super) fn audit(table: &ParamTable, gradient: &Gradient, vocab_size: usize) -> Result<Vec<String>, TrainError> {
    let mut lines = Vec::new();
    let loss = f64::from(read(gradient.loss.clone())?[0]);
    let expected = (vocab_size as f64).ln();
    if !(0.5 * expected..=1.5 * expected).contains(&loss) {
        lines.push(format!(
            "first step: the loss is {loss:.3}, but a model that knows nothing has ln {vocab_size} = {expected:.3}; check initializer_range and the tokenizer"
        ));
    }
    let norm = |grad: &Tensor<1>| (grad.clone() * grad.clone()).sum().sqrt();
    let present: Vec<Tensor<1>> = gradient.grads.iter().flatten().map(norm).collect();
    let mut norms = match present.is_empty() {
        true => Vec::new(),
        false => read(Tensor::cat(present, 0))?,
    }
    .into_iter();
    for (entry, grad) in table.entries().iter().zip(&gradient.grads) {
        let name = &entry.name;
        match grad.as_ref().and_then(|_| norms.next()) {
            None => lines.push(format!("first step: the loss does not depend on {name}; it will not be trained")),
            Some(norm) if !norm.is_finite() => {
                lines.push(format!("first step: the gradient of {name} is not finite"));
            }
            Some(0.0) => lines.push(format!("first step: the gradient of {name} is zero everywhere")),
            Some(_) => {}
        }
    }
    Ok(lines)
}
