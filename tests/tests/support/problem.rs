//! Problems of every operator, how one runs, and how two ways are compared.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_fla_ops::bridge::poison_outputs;
use burn_fla_ops::{
    Activation, CuSeqlens, DecayGate, Engine, Epilogue, GateActivation, ShortConvOptions, add_rms_norm, decay_gate,
    gated_rms_norm, l2_norm, linear_with, log_gate, rms_norm, rotary, short_conv, swiglu, swiglu_linear,
};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

pub const EPS: f64 = 1e-5;
/// Outputs of a linear layer.
const OUT: usize = 24;

/// An operator over inputs that are all carried as `[_, _, _]`.
#[derive(Clone, Debug)]
pub enum Op {
    Rms { weight: bool },
    L2,
    AddRms,
    Gated { weight: bool, act: GateActivation },
    SwiGlu,
    SwiGluLinear,
    LogGate { bias: bool },
    DecayGate { bias: bool, heads: usize },
    Linear { activation: Activation, residual: bool },
    Conv { silu: bool, bias: bool, initial: bool, packed: Option<Vec<usize>> },
    Rotary,
}

/// One input: its shape, and whether it is a parameter, which stays f32 under bf16 activations.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    pub shape: [usize; 3],
    pub parameter: bool,
}

pub fn activation(shape: [usize; 3]) -> Input {
    Input { shape, parameter: false }
}

pub fn parameter(shape: [usize; 3]) -> Input {
    Input { shape, parameter: true }
}

/// A problem: an operator, the shape of its activations, the width of a convolution.
#[derive(Clone, Debug)]
pub struct Problem {
    pub op: Op,
    pub shape: [usize; 3],
    pub taps: usize,
}

impl Problem {
    pub fn inputs(&self) -> Vec<Input> {
        let [b, _, d] = self.shape;
        let x = activation(self.shape);
        let w = parameter([1, 1, d]);
        match &self.op {
            Op::Rms { weight } => [vec![x], vec![w; usize::from(*weight)]].concat(),
            Op::AddRms => vec![x, x, w],
            Op::Gated { weight, .. } => [vec![x, x], vec![w; usize::from(*weight)]].concat(),
            Op::L2 => vec![x],
            Op::SwiGlu => vec![x, x],
            Op::SwiGluLinear => vec![x, x, parameter([1, OUT, d])],
            Op::LogGate { bias } => [vec![x], vec![w; usize::from(*bias)]].concat(),
            Op::DecayGate { bias, heads } => [vec![x, parameter([1, 1, *heads])], vec![w; usize::from(*bias)]].concat(),
            Op::Linear { residual, .. } => {
                let [_, t, _] = self.shape;
                let residual = vec![activation([b, t, OUT]); usize::from(*residual)];
                [vec![x, parameter([1, OUT, d]), parameter([1, 1, OUT])], residual].concat()
            }
            Op::Conv { bias, initial, packed, .. } => {
                let n = packed.as_ref().map_or(b, |offsets| offsets.len() - 1);
                let mut inputs = vec![x, parameter([1, d, self.taps])];
                inputs.extend(bias.then_some(w));
                inputs.extend(initial.then_some(activation([n, d, self.taps])));
                inputs
            }
            Op::Rotary => vec![x],
        }
    }

    pub fn apply(&self, inputs: Vec<Tensor<3>>, engine: Engine) -> Vec<Tensor<3>> {
        let [b, t, d] = self.shape;
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().unwrap();
        match &self.op {
            Op::Rms { weight } => {
                let x = next();
                vec![rms_norm(x, weight.then(|| next().reshape([d])), EPS, engine).unwrap()]
            }
            // In tensor operations where there are no kernels; it takes no engine.
            Op::L2 => vec![l2_norm(next(), EPS).unwrap()],
            Op::AddRms => {
                let (y, s) = add_rms_norm(next(), next(), next().reshape([d]), EPS, engine).unwrap();
                vec![y, s]
            }
            Op::Gated { weight, act } => {
                let (x, gate) = (next(), next());
                vec![gated_rms_norm(x, gate, weight.then(|| next().reshape([d])), EPS, *act, engine).unwrap()]
            }
            Op::SwiGlu => vec![swiglu(next(), next(), engine).unwrap()],
            Op::SwiGluLinear => {
                let (gate, up, weight) = (next(), next(), next().reshape([OUT, d]));
                vec![swiglu_linear(gate, up, weight, engine).unwrap()]
            }
            Op::LogGate { bias } => {
                let x = next();
                vec![log_gate(x, bias.then(|| next().reshape([d])), 16.0, engine).unwrap()]
            }
            Op::DecayGate { bias, heads } => {
                let (x, a_log) = (next(), next().reshape([*heads]));
                let gate = DecayGate { a_log, bias: bias.then(|| next().reshape([d])) };
                vec![decay_gate(x, gate, engine).unwrap()]
            }
            Op::Linear { activation, residual } => {
                let (x, weight, bias) = (next(), next().reshape([OUT, d]), Some(next().reshape([OUT])));
                let epilogue =
                    Epilogue { bias, activation: *activation, residual: residual.then(next), ..Default::default() };
                vec![linear_with(x, weight, epilogue).unwrap()]
            }
            Op::Conv { silu, bias, initial, packed } => {
                let (x, weight) = (next(), next().reshape([d, self.taps]));
                let bias = bias.then(|| next().reshape([d]));
                let options = ShortConvOptions {
                    silu: *silu,
                    initial: initial.then(next),
                    cu_seqlens: packed.clone().map(|offsets| CuSeqlens::new(offsets).unwrap()),
                    engine,
                };
                let (y, cache) = short_conv(x, weight, bias, options).unwrap();
                vec![y, cache]
            }
            Op::Rotary => {
                let x = next();
                let device = x.device();
                let (head, rows) = (d / 2 * 2, t + 5);
                assert_eq!(head, d, "an even size");
                let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                let table = |seed| tensor(&uniform(seed, rows * d / 2, (-1.0, 1.0)), [rows, d / 2], &device, dtype);
                let positions: Vec<i32> = (0..b * t).map(|i| ((i * 7 + 3) % rows) as i32).collect();
                let positions = Tensor::<2, Int>::from_data(TensorData::new(positions, [b, t]), &device);
                let x = x.reshape([b, t, 1, d]).repeat_dim(2, 2);
                let y = rotary(x, table(71), table(72), positions, engine).unwrap();
                vec![y.reshape([b, t, 2 * d])]
            }
        }
    }
}

/// Where and how a problem runs.
#[derive(Clone, Debug)]
pub struct Way {
    pub device: Device,
    pub dtype: DType,
    pub engine: Engine,
    pub tracked: Vec<bool>,
    /// Which outputs the loss uses.
    pub used: Vec<bool>,
    /// All activations are one tensor.
    pub shared: bool,
    /// Activations are views whose last two dimensions are swapped in memory.
    pub strided: bool,
}

impl Way {
    pub fn new(device: &Device, dtype: DType) -> Self {
        Self {
            device: device.clone(),
            dtype,
            engine: Engine::Auto,
            tracked: vec![true; 4],
            used: vec![true; 2],
            shared: false,
            strided: false,
        }
    }

    pub fn reference() -> Self {
        Self::new(&reference_device(), DType::F64)
    }
}

pub fn values(problem: &Problem, shared: bool) -> Vec<Vec<f64>> {
    let inputs = problem.inputs();
    let draw = |(i, input): (usize, &Input)| {
        let seed = if shared && !input.parameter { 1 } else { 1 + i as u64 };
        uniform(seed, input.shape.iter().product(), (-1.5, 1.5))
    };
    inputs.iter().enumerate().map(draw).collect()
}

/// The outputs' numbers, then the gradients'; an empty list where there is none.
pub fn run(problem: &Problem, way: &Way, values: &[Vec<f64>]) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let device = way.device.clone().autodiff();
    let wide = if way.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let mut leaves: Vec<Tensor<3>> = Vec::new();
    for (i, input) in problem.inputs().iter().enumerate() {
        let dtype = if input.parameter { wide } else { way.dtype };
        if way.shared && !input.parameter && i > 0 {
            leaves.push(leaves[0].clone());
            continue;
        }
        let leaf = tensor(&values[i], input.shape, &device, dtype);
        leaves.push(if way.tracked[i] { leaf.require_grad() } else { leaf });
    }
    let view = |x: &Tensor<3>| {
        if way.strided { (x.clone().swap_dims(1, 2) * 1.0).swap_dims(1, 2) } else { x.clone() }
    };
    let outputs = problem.apply(leaves.iter().map(view).collect(), way.engine);
    let found: Vec<_> = outputs.iter().map(|y| numbers(y.clone())).collect();
    if !way.tracked[..leaves.len()].contains(&true) {
        return (found, Vec::new());
    }
    let mut loss = Tensor::<1>::zeros([1], (&device, wide));
    for (i, y) in outputs.into_iter().enumerate().filter(|(i, _)| way.used[*i]) {
        let shape = y.dims();
        let weight = tensor(&uniform(90 + i as u64, shape.iter().product(), (-1.0, 1.0)), shape, &device, wide);
        loss = loss + (y.cast(wide) * weight).sum();
    }
    let grads = loss.backward();
    let of = |x: &Tensor<3>| x.grad(&grads).map(numbers).unwrap_or_default();
    let distinct = if way.shared { 1 } else { leaves.len() };
    let gradients = leaves.iter().enumerate().map(|(i, x)| {
        let repeated = i >= distinct && !problem.inputs()[i].parameter;
        if repeated { Vec::new() } else { of(x) }
    });
    (found, gradients.collect())
}

pub fn loss_of(found: &[Vec<f64>]) -> f64 {
    let weighed = |(i, y): (usize, &Vec<f64>)| -> f64 {
        let weight = uniform(90 + i as u64, y.len(), (-1.0, 1.0));
        y.iter().zip(weight).map(|(a, b)| a * b).sum()
    };
    found.iter().enumerate().map(weighed).sum()
}

/// Every operator in the forms that differ, at one size.
pub fn problems(shape: [usize; 3], taps: usize) -> Vec<Problem> {
    let [b, t, d] = shape;
    let mut ops = vec![
        Op::Rms { weight: true },
        Op::Rms { weight: false },
        Op::L2,
        Op::AddRms,
        Op::Gated { weight: true, act: GateActivation::Silu },
        Op::Gated { weight: false, act: GateActivation::Sigmoid },
        Op::SwiGlu,
        Op::SwiGluLinear,
        Op::LogGate { bias: true },
        Op::LogGate { bias: false },
        Op::DecayGate { bias: true, heads: d },
        Op::DecayGate { bias: false, heads: if d.is_multiple_of(2) { d / 2 } else { 1 } },
        Op::Linear { activation: Activation::Identity, residual: false },
        Op::Linear { activation: Activation::Identity, residual: true },
        Op::Linear { activation: Activation::Silu, residual: false },
        Op::Linear { activation: Activation::ReluSquared, residual: true },
        Op::Conv { silu: true, bias: false, initial: false, packed: None },
        Op::Conv { silu: false, bias: true, initial: true, packed: None },
        Op::Conv { silu: true, bias: true, initial: false, packed: None },
    ];
    if b == 1 {
        // Empty at both ends and inside, one token, shorter than the taps, longer than a run.
        let cut = |n: usize| n.min(t);
        let offsets = vec![0, 0, cut(1), cut(3), cut(3), cut(40), t, t];
        ops.push(Op::Conv { silu: true, bias: false, initial: false, packed: Some(offsets.clone()) });
        ops.push(Op::Conv { silu: true, bias: true, initial: true, packed: Some(offsets) });
    }
    if d % 2 == 0 {
        ops.push(Op::Rotary);
    }
    ops.into_iter().map(|op| Problem { op, shape, taps }).collect()
}

/// Compares a way on a kernel device with the reference in f64.
pub fn compare(problem: &Problem, way: &Way, name: &str, bound: f64) {
    poison_outputs(true);
    let values = values(problem, way.shared);
    let oracle = Way { device: reference_device(), dtype: DType::F64, ..way.clone() };
    let (expected, expected_grads) = run(problem, &oracle, &values);
    let (found, grads) = run(problem, way, &values);
    let both = found.iter().zip(&expected).map(|pair| ("output", pair));
    let grads = grads.iter().zip(&expected_grads).map(|pair| ("gradient", pair));
    for (i, (kind, (found, expected))) in both.chain(grads).enumerate() {
        let what = || format!("{name}: {kind} ({i}) of {problem:?}, {way:?}");
        if expected.is_empty() {
            // An input that the loss does not reach: a kernel may say zero where Burn says nothing.
            assert!(found.iter().all(|a| *a == 0.0), "{}", what());
            continue;
        }
        assert_eq!(found.len(), expected.len(), "{}", what());
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        if worst.is_nan() || worst > 1e-6 || found.iter().any(|a| a.is_nan()) {
            assert_close(&what(), found, expected, bound);
        }
    }
}
