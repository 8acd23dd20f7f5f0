//! The recurrences of the list of operators, beside the operators' references in f64: what the times of the benches are
//! checked by must itself be right.

use burn::tensor::DType;
use burn_fla_ops::{Engine, SequenceOptions};
use burn_fla_tests::operators::{Check, Draw, Heads, OPERATORS, Operator, SHARED_KEYS, Size};
use burn_fla_tests::reference_device;

fn worst(operator: &'static Operator, size: Size) {
    let device = reference_device().autodiff();
    let draw = Draw { device, size, dtype: DType::F64, wide: DType::F64 };
    let inputs = (operator.inputs)(&draw);
    let tensors: Vec<_> = inputs.iter().map(|input| input.tensor.clone()).collect();
    let options = SequenceOptions { engine: Engine::Reference, ..Default::default() };
    let (o, _) = (operator.forward)(&tensors, options).expect("good inputs");
    let grad = draw.by_head(size.v).detach();
    let grads = (o.clone() * grad.clone()).sum().backward();
    let gradients: Vec<_> = inputs.iter().map(|input| input.tensor.grad(&grads)).collect();
    let check = Check::start(operator, size, &inputs, &grad.inner(), &o.inner(), &gradients, Heads::All);
    let errors = check.finish();
    assert_eq!(errors.len(), 1 + tensors.iter().filter(|x| x.is_require_grad()).count(), "{}", operator.name);
    for error in errors {
        assert!(error.found < 1e-9, "{} at {size}: {} is off by {:.1e}", operator.name, error.name, error.found);
    }
}

#[test]
fn the_recurrences_of_the_list_are_the_operators() {
    for operator in OPERATORS {
        worst(operator, Size { b: 2, t: 35, h: 2, key_heads: 2, k: 5, v: 3 });
        worst(operator, Size { b: 1, t: 3, h: 1, key_heads: 1, k: 4, v: 6 });
    }
    for operator in SHARED_KEYS {
        worst(operator, Size { b: 2, t: 7, h: 6, key_heads: 2, k: 5, v: 3 });
    }
}

#[test]
fn every_operator_has_a_name_of_its_own_and_a_floor() {
    let size = Size { b: 1, t: 64, h: 1, key_heads: 1, k: 128, v: 128 };
    for (i, operator) in OPERATORS.into_iter().enumerate() {
        assert!(OPERATORS[..i].iter().all(|other| other.name != operator.name), "{}", operator.name);
        let [forward, both] = (operator.flops)(size);
        assert!(forward > 0.0 && both > 2.0 * forward, "{}: {forward} and {both}", operator.name);
    }
    // Six products of 64 × 64 × 128, and fifteen more: one of 64 × 128 × 128 is two.
    let linear = OPERATORS.into_iter().find(|operator| operator.name == "linear_attn").expect("in the list");
    assert_eq!((linear.flops)(size), [6.0, 21.0].map(|units| units * 2.0 * 64.0 * 64.0 * 128.0));
}
