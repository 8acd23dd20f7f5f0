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
    let (mut absent, mut zero, mut not_finite) = (Vec::new(), Vec::new(), Vec::new());
    for (entry, grad) in table.entries().iter().zip(&gradient.grads) {
        let name = entry.name.as_str();
        match grad.as_ref().and_then(|_| norms.next()) {
            None => absent.push(name),
            Some(norm) if !norm.is_finite() => not_finite.push(name),
            Some(0.0) => zero.push(name),
            Some(_) => {}
        }
    }
    for (names, finding) in [
        (absent, "the loss does not depend on"),
        (zero, "the gradient is zero everywhere, as it is once behind a map that starts at zero, of"),
        (not_finite, "the gradient is not finite, of"),
    ] {
        if !names.is_empty() {
            lines.push(format!("first step: {finding} {}", some_of(&names)));
        }
    }
    Ok(lines)
}

/// The first few of a list.
fn some_of(names: &[&str]) -> String {
    const SHOWN: usize = 3;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::some_of;

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(some_of(&["a"]), "a");
        assert_eq!(some_of(&["a", "b", "c"]), "a, b, c");
        assert_eq!(some_of(&["a", "b", "c", "d", "e"]), "a, b, c and 2 more");
    }
}
