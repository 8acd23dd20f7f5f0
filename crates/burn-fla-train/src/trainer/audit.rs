//! What a fresh model must show at its first step.

use burn::tensor::{DType, Tensor};
use burn_fla_nn::CausalLm;

use super::compute::{Gradient, read};
use crate::TrainError;
use crate::optim::ParamTable;

/// Where the rate A = e^A_log starts in every published model: from a draw near 0 to the 16 of Mamba, with room on both
/// sides. A parameter that holds A itself, or whose logarithm is taken twice, lies outside of it.
const RATES: (f64, f64) = (1e-7, 1e3);

/// Where the step Δ = softplus(dt_bias) starts: drawn between 0.001 and 0.1, and not below 1e-4, with room on both sides. A
/// bias that is zero, drawn as a weight is, or the step itself, gives 0.69 and more.
const STEPS: (f64, f64) = (1e-5, 0.5);

/// Looks at the first loss and gradient of a run from random weights, and at those weights that decide how a layer forgets:
/// a loss far from ln V, a parameter whose gradient is absent, zero or not finite, and a rate or a step out of its range
/// are signs of a wrong initialisation. Returns one line for each finding.
pub(super) fn audit(
    model: &CausalLm,
    table: &ParamTable,
    gradient: &Gradient,
    vocab_size: usize,
) -> Result<Vec<String>, TrainError> {
    let mut lines = Vec::new();
    let loss = f64::from(read(gradient.loss.clone())?[0]);
    let expected = (vocab_size as f64).ln();
    if !(0.5 * expected..=1.5 * expected).contains(&loss) {
        lines.push(format!(
            "first step: the loss is {loss:.3}, but a model that knows nothing has ln {vocab_size} = {expected:.3}; check initializer_range and the tokenizer"
        ));
    }
    let norm = |grad: &Tensor<1>| (grad.clone() * grad.clone()).sum().sqrt();
    // One after the other: as one tensor they would be one kernel of as many inputs, which takes seconds to compile.
    let norms = gradient.grads.iter().flatten().map(|grad| Ok(read(norm(grad))?[0]));
    let mut norms = norms.collect::<Result<Vec<f32>, TrainError>>()?.into_iter();
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
    lines.extend(ranges(model, table)?);
    Ok(lines)
}

/// A line for each kind of weight of which a value is out of the range in which it starts.
fn ranges(model: &CausalLm, table: &ParamTable) -> Result<Vec<String>, TrainError> {
    let mut lines = Vec::new();
    let is = |name: &str, last: &str| name == last || name.strip_suffix(last).is_some_and(|rest| rest.ends_with('.'));
    let kinds: [(&str, &str, fn(f64) -> f64, (f64, f64)); 3] = [
        ("A_log", "e^A_log", f64::exp, RATES),
        ("dt_bias", "softplus(dt_bias)", softplus, STEPS),
        ("dt_proj.bias", "softplus(dt_proj.bias)", softplus, STEPS),
    ];
    for (last, what, map, range) in kinds {
        let values = table.values(model, |entry| is(&entry.name, last));
        let mut found = Vec::new();
        for (entry, values) in values {
            let values = read(values.cast(DType::F32))?;
            found.extend(out_of_range(&values, map, range).map(|value| (entry.name.as_str(), value)));
        }
        if let Some((name, value)) = found.first() {
            let names: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
            let (low, high) = range;
            lines.push(format!(
                "first step: {what} is {value:.3e} in {name}, out of {low:e} to {high}, in which it starts; check the initial values of {}",
                some_of(&names)
            ));
        }
    }
    Ok(lines)
}

/// ln(1 + e^x)
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// The value that `map` makes furthest out of the range, or one that is no number.
fn out_of_range(values: &[f32], map: fn(f64) -> f64, (low, high): (f64, f64)) -> Option<f64> {
    let values = values.iter().map(|value| map(f64::from(*value)));
    let out = values.filter(|value| !(low..=high).contains(value));
    // How many times below or above; what is no number is the worst of all.
    let excess = |value: &f64| if value.is_finite() { (value / high).max(low / value) } else { f64::INFINITY };
    out.max_by(|a, b| excess(a).total_cmp(&excess(b)))
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
    use super::*;

    #[test]
    fn ranges_take_what_models_start_with_and_nothing_else() {
        let steps = |values: &[f32]| out_of_range(values, softplus, STEPS);
        let inverse = |step: f64| (step.exp_m1()).ln() as f32;
        assert_eq!(steps(&[inverse(1e-4), inverse(0.001), inverse(0.1)]), None);
        // Zeros, and steps that were stored as they are: each is a step of about ln 2.
        assert!((steps(&[0.0]).unwrap() - 2f64.ln()).abs() < 1e-12);
        assert!(steps(&[0.001, 0.1]).unwrap() > 0.69);
        assert!(steps(&[inverse(0.01), f32::NAN]).unwrap().is_nan());
        let rates = |values: &[f32]| out_of_range(values, f64::exp, RATES);
        assert_eq!(rates(&[0.0, 16f32.ln(), -12.0]), None);
        // A in the place of its logarithm.
        assert!((rates(&[1.0, 15.5]).unwrap() / 15.5f64.exp() - 1.0).abs() < 1e-12);
        assert_eq!(rates(&[f32::NEG_INFINITY, 1.0]), Some(0.0));
        assert!((softplus(3.0) - (1.0 + 3f64.exp()).ln()).abs() < 1e-12 && (softplus(800.0) - 800.0).abs() < 1e-9);
    }

    #[cfg(feature = "flex")]
    #[test]
    fn every_architecture_starts_in_range_and_what_does_not_is_named() {
        use crate::optim::ParamEntry;
        use burn_fla_nn::models::registry::ARCHITECTURES;
        let device = burn::tensor::Device::flex();
        let mut audited = 0;
        for architecture in ARCHITECTURES {
            let config = architecture.tiny_config().unwrap();
            let model = CausalLm::init(&config, 7, &device).unwrap();
            let entries = model.named_parameters().into_iter();
            let table = ParamTable::new(
                entries.map(|param| ParamEntry { name: param.name, id: param.id, shape: param.shape }).collect(),
            );
            assert_eq!(ranges(&model, &table).unwrap(), Vec::<String>::new(), "{}", architecture.model_type);
            let bias = |entry: &ParamEntry| entry.name.ends_with("dt_bias") || entry.name.ends_with("dt_proj.bias");
            if !table.entries().iter().any(bias) {
                continue;
            }
            audited += 1;
            // As if a rule for all weights had drawn them around zero.
            let zeros = |values: Vec<Option<Tensor<1>>>| Ok(values.into_iter().map(|x| x.map(|x| x * 0.0)).collect());
            let wrong = table.map(model, zeros).unwrap();
            let [line] = &ranges(&wrong, &table).unwrap()[..] else { panic!("{}", architecture.model_type) };
            assert!(line.contains("bias) is 6.931e-1 in ") && line.contains(".layers.0."), "{line}");
            // As if a rate had been stored in the place of its logarithm.
            let large = |values: Vec<Option<Tensor<1>>>| Ok(values.into_iter().map(|x| x.map(|x| x + 9.0)).collect());
            let wrong = table.map(wrong, large).unwrap();
            let lines = ranges(&wrong, &table).unwrap();
            assert!(lines[0].contains("e^A_log is 8.103e3"), "{lines:?}");
        }
        assert!(audited >= 5, "{audited} architectures have steps");
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(some_of(&["a"]), "a");
        assert_eq!(some_of(&["a", "b", "c"]), "a, b, c");
        assert_eq!(some_of(&["a", "b", "c", "d", "e"]), "a, b, c and 2 more");
    }
}
