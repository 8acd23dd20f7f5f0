//! Two implementations of one operator, compared in value and in every gradient, and a gradient compared with finite
//! differences. An operator is here a function of flat tensors, so that inputs of any rank stand in one list.

use burn::tensor::{DType, Device, Tensor};

use crate::{assert_close, numbers, tensor, uniform};

/// A flat input in its shape.
pub fn view<const D: usize>(x: &Tensor<1>, shape: [usize; D]) -> Tensor<D> {
    x.clone().reshape(shape)
}

/// An output, flat.
pub fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.shape().num_elements();
    x.reshape([count])
}

/// One differentiable input.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its name in messages.
    pub name: &'static str,
    /// Its numbers, row-major.
    pub values: Vec<f64>,
}

impl Input {
    /// Numbers drawn evenly from `range`, from a seed made of the name.
    pub fn new(name: &'static str, shape: &[usize], range: (f64, f64)) -> Self {
        let seed = name.bytes().fold(shape.len() as u64, |seed, byte| seed * 31 + u64::from(byte));
        Self { name, values: uniform(seed, shape.iter().product(), range) }
    }
}

/// The outputs of an operator, and the gradient of every input.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The outputs, flat.
    pub outputs: Vec<Vec<f64>>,
    /// The gradient of each input; empty where the outputs do not depend on it.
    pub gradients: Vec<Vec<f64>>,
}

/// Runs `f` on `device` in `dtype`, and backward through the sum of its outputs, each weighted by fixed random numbers.
pub fn evaluate(
    inputs: &[Input],
    device: &Device,
    dtype: DType,
    f: impl Fn(&[Tensor<1>]) -> Vec<Tensor<1>>,
) -> Evaluation {
    let device = device.clone().autodiff();
    let leaves: Vec<Tensor<1>> =
        inputs.iter().map(|i| tensor(&i.values, [i.values.len()], &device, dtype).require_grad()).collect();
    let outputs = f(&leaves);
    let loss = outputs
        .iter()
        .enumerate()
        .map(|(i, output)| {
            let count = output.dims()[0];
            let weight: Tensor<1> = tensor(&weights(i, count), [count], &device, output.dtype());
            (output.clone() * weight).sum().cast(dtype)
        })
        .reduce(|a, b| a + b)
        .expect("an output at least");
    let gradients = loss.backward();
    Evaluation {
        outputs: outputs.into_iter().map(numbers).collect(),
        gradients: leaves.iter().map(|leaf| leaf.grad(&gradients).map(numbers).unwrap_or_default()).collect(),
    }
}

/// The weights of output `i` in the loss.
fn weights(i: usize, count: usize) -> Vec<f64> {
    uniform(1000 + i as u64, count, (-1.0, 1.0))
}

/// Panics where two implementations differ by more than `bound` (relative RMS) in an output or a gradient, in f64 on
/// the reference device.
pub fn assert_agree(
    what: &str,
    inputs: &[Input],
    bound: f64,
    left: impl Fn(&[Tensor<1>]) -> Vec<Tensor<1>>,
    right: impl Fn(&[Tensor<1>]) -> Vec<Tensor<1>>,
) {
    let device = crate::reference_device();
    let left = evaluate(inputs, &device, DType::F64, left);
    let right = evaluate(inputs, &device, DType::F64, right);
    assert_evaluations(what, inputs, bound, &left, &right);
}

/// Panics where two evaluations differ by more than `bound` (relative RMS).
pub fn assert_evaluations(what: &str, inputs: &[Input], bound: f64, left: &Evaluation, right: &Evaluation) {
    assert_eq!(left.outputs.len(), right.outputs.len(), "{what}: as many outputs");
    for (i, (a, b)) in left.outputs.iter().zip(&right.outputs).enumerate() {
        assert_close(&format!("{what}, output {i}"), a, b, bound);
    }
    for (input, (a, b)) in inputs.iter().zip(left.gradients.iter().zip(&right.gradients)) {
        assert_close(&format!("{what}, gradient of {}", input.name), a, b, bound);
    }
}

/// Panics where a gradient differs by more than `bound` from central differences in f64: `samples` elements of each
/// input, relative to the largest of them.
pub fn assert_finite_differences(
    what: &str,
    inputs: &[Input],
    samples: usize,
    bound: f64,
    f: impl Fn(&[Tensor<1>]) -> Vec<Tensor<1>>,
) {
    const STEP: f64 = 1e-5;
    let device = crate::reference_device();
    let exact = evaluate(inputs, &device, DType::F64, &f);
    let loss = |inputs: &[Input]| -> f64 {
        let tensors: Vec<Tensor<1>> =
            inputs.iter().map(|i| tensor(&i.values, [i.values.len()], &device, DType::F64)).collect();
        f(&tensors)
            .into_iter()
            .enumerate()
            .map(|(i, output)| {
                let values = numbers(output);
                values.iter().zip(weights(i, values.len())).map(|(x, w)| x * w).sum::<f64>()
            })
            .sum()
    };
    for (at, input) in inputs.iter().enumerate() {
        let count = input.values.len();
        let stride = (count / samples.max(1)).max(1);
        let mut found = Vec::new();
        let mut expected = Vec::new();
        for element in (0..count).step_by(stride) {
            let shifted = |by: f64| {
                let mut inputs = inputs.to_vec();
                inputs[at].values[element] += by;
                loss(&inputs)
            };
            expected.push((shifted(STEP) - shifted(-STEP)) / (2.0 * STEP));
            found.push(exact.gradients[at].get(element).copied().unwrap_or(0.0));
        }
        assert_close(&format!("{what}, finite differences of {}", input.name), &found, &expected, bound);
    }
}
