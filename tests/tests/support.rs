//! Norms, SwiGLU, the short convolution and the rotary embedding: references against finite differences, kernels against
//! references, on every device. The update of AdamW, and the output layer with the loss.

#[path = "support/adamw.rs"]
mod adamw;
#[path = "support/loss.rs"]
mod loss;
#[path = "support/problem.rs"]
mod problem;

use burn::tensor::{DType, Device, Int, Tensor};
use burn_fla_ops::bridge::{has_kernels, poison_outputs};
use burn_fla_ops::{
    CuSeqlens, DecayGate, Engine, GateActivation, OpError, ShortConvOptions, add_rms_norm, decay_gate, gated_rms_norm,
    rms_norm, rotary, short_conv, swiglu,
};
use burn_fla_tests::{assert_close, kernel_devices, numbers, ratio, reference_device, tensor, uniform};
use problem::{EPS, Op, Problem, Way, compare, loss_of, problems, run, values};

#[test]
fn kernel_devices_have_kernels() {
    for (name, device) in kernel_devices() {
        assert!(has_kernels(&device, Engine::Auto) && has_kernels(&device.clone().autodiff(), Engine::Auto), "{name}");
        assert!(!has_kernels(&device, Engine::Reference), "{name}");
    }
    assert!(!has_kernels(&reference_device(), Engine::Auto));
}

#[test]
fn reference_gradients_are_those_of_finite_differences() {
    for (shape, taps) in [([2, 5, 4], 4), ([1, 7, 2], 3), ([2, 2, 3], 4), ([1, 1, 6], 1)] {
        for problem in problems(shape, taps) {
            let way = Way::reference();
            let values = values(&problem, false);
            let (_, gradients) = run(&problem, &way, &values);
            let untracked = Way { tracked: vec![false; 4], ..way };
            for (i, gradient) in gradients.iter().enumerate() {
                let step = 1e-5;
                let slope = |j: usize| {
                    let at = |delta: f64| {
                        let mut moved = values.clone();
                        moved[i][j] += delta;
                        loss_of(&run(&problem, &untracked, &moved).0)
                    };
                    (at(step) - at(-step)) / (2.0 * step)
                };
                let slopes: Vec<_> = (0..gradient.len()).map(slope).collect();
                assert_eq!(gradient.len(), values[i].len(), "{problem:?}: input {i} has a gradient");
                let largest = slopes.iter().fold(1e-3, |m: f64, s| m.max(s.abs()));
                for (a, b) in gradient.iter().zip(&slopes) {
                    assert!((a - b).abs() < 1e-7 * largest.max(1.0), "{problem:?}: input {i}: {a} is not {b}");
                }
            }
        }
    }
}

#[test]
fn kernels_are_the_reference_at_odd_sizes() {
    for (name, device) in kernel_devices() {
        for d in [1, 48, 96, 100, 131] {
            for t in [1, 63, 65] {
                for problem in problems([1, t, d], 4) {
                    // The gradient of a norm over one number is a difference of equal numbers.
                    let bound = if d == 1 { 1e-3 } else { 1e-5 };
                    compare(&problem, &Way::new(&device, DType::F32), name, bound);
                }
            }
        }
        for (shape, taps) in [([3, 33, 20], 3), ([2, 2, 36], 4), ([2, 40, 6], 1), ([1, 3, 1026], 4), ([2, 3, 2048], 2)]
        {
            for problem in problems(shape, taps) {
                compare(&problem, &Way::new(&device, DType::F32), name, 1e-5);
            }
        }
    }
}

/// More rows than cubes have at a time: each walks over several, and some end before others.
#[test]
fn cubes_walk_over_many_rows() {
    for (name, device) in kernel_devices() {
        for problem in problems([1, 1700, 516], 4) {
            let row_wise = matches!(problem.op, Op::Rms { .. } | Op::L2 | Op::AddRms | Op::Gated { .. });
            let gates = matches!(problem.op, Op::LogGate { .. } | Op::DecayGate { .. });
            if row_wise || gates || matches!(problem.op, Op::Linear { residual: false, .. }) {
                compare(&problem, &Way::new(&device, DType::F32), name, 1e-5);
            }
        }
        // A convolution whose units walk over several runs.
        let conv = Op::Conv { silu: true, bias: true, initial: false, packed: None };
        let problem = Problem { op: conv, shape: [1, 2100, 4096], taps: 4 };
        compare(&problem, &Way::new(&device, DType::F32), name, 1e-5);
    }
}

#[test]
fn kernels_take_any_inputs_and_losses() {
    for (name, device) in kernel_devices() {
        for problem in [problems([2, 9, 12], 4), problems([1, 70, 12], 4)].concat() {
            let way = Way::new(&device, DType::F32);
            let count = problem.inputs().len();
            for i in 0..count {
                let mut only = way.clone();
                only.tracked = (0..4).map(|j| j == i).collect();
                compare(&problem, &only, name, 1e-5);
                let mut without = way.clone();
                without.tracked = (0..4).map(|j| j != i).collect();
                compare(&problem, &without, name, 1e-5);
            }
            compare(&problem, &Way { tracked: vec![false; 4], ..way.clone() }, name, 1e-5);
            compare(&problem, &Way { strided: true, ..way.clone() }, name, 1e-5);
            compare(&problem, &Way { engine: Engine::Reference, ..way.clone() }, name, 1e-5);
            match problem.op {
                Op::AddRms => {
                    compare(&problem, &Way { used: vec![true, false], ..way.clone() }, name, 1e-5);
                    compare(&problem, &Way { used: vec![false, true], ..way.clone() }, name, 1e-5);
                    compare(&problem, &Way { shared: true, ..way.clone() }, name, 1e-5);
                }
                Op::Conv { .. } => {
                    compare(&problem, &Way { used: vec![true, false], ..way.clone() }, name, 1e-5);
                    compare(&problem, &Way { used: vec![false, true], ..way.clone() }, name, 1e-5);
                }
                Op::Gated { .. } | Op::SwiGlu | Op::SwiGluLinear => {
                    compare(&problem, &Way { shared: true, ..way }, name, 1e-5)
                }
                Op::Rms { .. } | Op::L2 | Op::Linear { .. } | Op::Rotary => {}
                Op::LogGate { .. } | Op::DecayGate { .. } => {}
            }
        }
    }
}

#[test]
fn kernels_take_bf16() {
    for (name, device) in kernel_devices().into_iter().filter(|(_, d)| d.supports_dtype(DType::BF16)) {
        for shape in [[2, 33, 64], [1, 65, 100], [1, 40, 131]] {
            for problem in problems(shape, 4) {
                compare(&problem, &Way::new(&device, DType::BF16), name, 1e-2);
            }
        }
    }
}

#[test]
fn a_residual_stream_in_f32_carries_bf16_layers() {
    let devices = kernel_devices().into_iter().filter(|(_, d)| d.supports_dtype(DType::BF16));
    for (name, device) in devices.chain([("flex", reference_device())]) {
        let device = device.autodiff();
        let (shape, values) = ([3, 100], uniform(3, 300, (-1.0, 1.0)));
        let x = tensor(&values, shape, &device, DType::BF16).require_grad();
        let r = tensor(&uniform(4, 300, (-1.0, 1.0)), shape, &device, DType::F32).require_grad();
        let w = tensor(&uniform(5, 100, (0.5, 1.5)), [100], &device, DType::F32).require_grad();
        let (y, s) = add_rms_norm(x.clone(), r.clone(), w.clone(), EPS, Engine::Auto).unwrap();
        assert_eq!((y.dtype(), s.dtype()), (DType::BF16, DType::F32), "{name}");
        let expected: Vec<_> = numbers(x.clone()).iter().zip(numbers(r.clone())).map(|(a, b)| a + b).collect();
        assert_close(name, &numbers(s.clone()), &expected, 1e-6);
        let grads = (y.cast(DType::F32).sum() + (s.clone() * s).sum()).backward();
        let (dx, dr) = (x.grad(&grads).unwrap(), r.grad(&grads).unwrap());
        assert_eq!((dx.dtype(), dr.dtype()), (DType::BF16, DType::F32), "{name}");
        assert!(ratio(&numbers(dx), &numbers(dr)) < 4e-3, "{name}");
        assert!(w.grad(&grads).is_some(), "{name}");
    }
}

#[test]
fn steps_of_a_convolution_are_the_convolution() {
    for (name, device) in kernel_devices().into_iter().chain([("flex", reference_device())]) {
        poison_outputs(true);
        let (b, t, d, taps) = (2, 7, 20, 4);
        let x: Tensor<3> = tensor(&uniform(1, b * t * d, (-1.0, 1.0)), [b, t, d], &device, DType::F32);
        let w: Tensor<2> = tensor(&uniform(2, d * taps, (-1.0, 1.0)), [d, taps], &device, DType::F32);
        let bias: Tensor<1> = tensor(&uniform(3, d, (-1.0, 1.0)), [d], &device, DType::F32);
        for bias in [None, Some(bias)] {
            let options = || ShortConvOptions { silu: true, ..Default::default() };
            let (whole, end) = short_conv(x.clone(), w.clone(), bias.clone(), options()).unwrap();
            let mut cache = None;
            let mut outputs = Vec::new();
            for i in 0..t {
                let options = ShortConvOptions { initial: cache.take(), ..options() };
                let (y, next) = short_conv(x.clone().narrow(1, i, 1), w.clone(), bias.clone(), options).unwrap();
                outputs.push(y);
                cache = Some(next);
            }
            assert_close(name, &numbers(Tensor::cat(outputs, 1)), &numbers(whole), 1e-6);
            assert_close(name, &numbers(cache.unwrap()), &numbers(end), 0.0);
        }
    }
}

#[test]
fn nothing_is_computed_from_nothing() {
    for (name, device) in kernel_devices().into_iter().chain([("flex", reference_device())]) {
        let empty = || Tensor::<3>::zeros([2, 0, 8], (&device, DType::F32));
        let ones = |n: usize| Tensor::<1>::ones([n], (&device, DType::F32));
        assert_eq!(rms_norm(empty(), Some(ones(8)), EPS, Engine::Auto).unwrap().dims(), [2, 0, 8], "{name}");
        let (y, s) = add_rms_norm(empty(), empty(), ones(8), EPS, Engine::Auto).unwrap();
        assert_eq!((y.dims(), s.dims()), ([2, 0, 8], [2, 0, 8]), "{name}");
        let y = gated_rms_norm(empty(), empty(), None, EPS, GateActivation::Silu, Engine::Auto).unwrap();
        assert_eq!(y.dims(), [2, 0, 8], "{name}");
        assert_eq!(swiglu(empty(), empty(), Engine::Auto).unwrap().dims(), [2, 0, 8], "{name}");
        let weight = Tensor::<2>::ones([8, 4], (&device, DType::F32));
        let (y, cache) = short_conv(empty(), weight, None, ShortConvOptions::default()).unwrap();
        assert_eq!((y.dims(), cache.dims()), ([2, 0, 8], [2, 8, 4]), "{name}");
        assert_eq!(numbers(cache), vec![0.0; 64], "{name}");
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = Device::flex();
    let f32s = |shape: [usize; 2]| Tensor::<2>::ones(shape, (&device, DType::F32));
    let x = || f32s([2, 6]);
    let w = |n: usize| Tensor::<1>::ones([n], (&device, DType::F32));
    let named = |error: OpError, op: &str, argument: &str| {
        let message = error.to_string();
        assert!(message.starts_with(op) && message.contains(&format!("`{argument}`")), "{message}");
    };
    let e = Engine::Auto;
    named(rms_norm(x(), Some(w(5)), EPS, e).unwrap_err(), "rms_norm", "weight");
    named(rms_norm(x(), None, 0.0, e).unwrap_err(), "rms_norm", "eps");
    named(rms_norm(x(), None, f64::NAN, e).unwrap_err(), "rms_norm", "eps");
    named(rms_norm(x().cast(DType::F16), None, EPS, e).unwrap_err(), "rms_norm", "x");
    named(add_rms_norm(x(), f32s([2, 5]), w(6), EPS, e).unwrap_err(), "add_rms_norm", "residual");
    named(add_rms_norm(x(), x().cast(DType::BF16), w(6), EPS, e).unwrap_err(), "add_rms_norm", "residual");
    named(add_rms_norm(x(), x(), w(7), EPS, e).unwrap_err(), "add_rms_norm", "weight");
    let silu = GateActivation::Silu;
    named(gated_rms_norm(x(), f32s([3, 6]), None, EPS, silu, e).unwrap_err(), "gated_rms_norm", "gate");
    named(gated_rms_norm(x(), x().cast(DType::BF16), None, EPS, silu, e).unwrap_err(), "gated_rms_norm", "gate");
    let gate = |heads: usize, bias: Option<usize>| DecayGate { a_log: w(heads), bias: bias.map(w) };
    named(decay_gate(x(), gate(4, None), e).unwrap_err(), "decay_gate", "a_log");
    named(decay_gate(x(), gate(0, None), e).unwrap_err(), "decay_gate", "a_log");
    named(decay_gate(x(), gate(3, Some(3)), e).unwrap_err(), "decay_gate", "bias");
    named(decay_gate(x().cast(DType::F16), gate(6, None), e).unwrap_err(), "decay_gate", "a");
    named(swiglu(x(), f32s([6, 2]), e).unwrap_err(), "swiglu", "up");
    named(swiglu(x(), x().cast(DType::F64), e).unwrap_err(), "swiglu", "up");

    let x3 = || x().reshape([1, 2, 6]);
    let conv = |weight: Tensor<2>, bias, options| short_conv(x3(), weight, bias, options).unwrap_err();
    named(conv(f32s([5, 4]), None, Default::default()), "short_conv", "weight");
    named(conv(f32s([6, 0]), None, Default::default()), "short_conv", "weight");
    named(conv(f32s([6, 17]), None, Default::default()), "short_conv", "weight");
    named(conv(f32s([6, 4]), Some(w(5)), Default::default()), "short_conv", "bias");
    let initial = Some(Tensor::<3>::ones([2, 6, 4], (&device, DType::F32)));
    named(conv(f32s([6, 4]), None, ShortConvOptions { initial, ..Default::default() }), "short_conv", "initial");
    let cu_seqlens = Some(CuSeqlens::new(vec![0, 3]).unwrap());
    let packed = conv(f32s([6, 4]), None, ShortConvOptions { cu_seqlens, ..Default::default() });
    assert!(matches!(packed, OpError::CuSeqlens { .. }), "{packed}");

    let heads = || x().reshape([1, 2, 1, 6]);
    let at = |positions: [i32; 2]| Tensor::<2, Int>::from_data([positions], &device);
    let table = || f32s([4, 3]);
    named(rotary(heads(), f32s([4, 2]), table(), at([0, 1]), e).unwrap_err(), "rotary", "cos");
    named(rotary(heads(), table(), f32s([3, 3]), at([0, 1]), e).unwrap_err(), "rotary", "sin");
    named(rotary(heads(), table(), table(), at([0, 4]), e).unwrap_err(), "rotary", "positions");
    named(rotary(heads(), table(), table(), at([-1, 0]), e).unwrap_err(), "rotary", "positions");
    let odd = x().reshape([1, 4, 1, 3]);
    let four = Tensor::<2, Int>::zeros([1, 4], &device);
    named(rotary(odd, table(), table(), four.clone(), e).unwrap_err(), "rotary", "x");
    named(rotary(heads(), table(), table(), four, e).unwrap_err(), "rotary", "positions");

    for (_, other) in kernel_devices() {
        let elsewhere = Tensor::<2>::ones([2, 6], (&other, DType::F32));
        named(swiglu(x(), elsewhere.clone(), e).unwrap_err(), "swiglu", "up");
        let weight = Tensor::<1>::ones([6], (&other, DType::F32));
        named(rms_norm(x(), Some(weight), EPS, e).unwrap_err(), "rms_norm", "weight");
        named(add_rms_norm(x(), elsewhere, w(6), EPS, e).unwrap_err(), "add_rms_norm", "residual");
    }
}
