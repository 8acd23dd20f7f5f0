//! What surrounds the products and recurrences of a layer, on tensors of 256 MiB: the bytes that it must move a second,
//! forward and backward. The first rows are checked against the reference in f32 on the same bf16 inputs.

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use burn_fla_ops::{
    DecayGate, Engine, GateActivation, ShortConvOptions, add_rms_norm, decay_gate, gated_rms_norm, log_gate, rms_norm,
    rotary, short_conv, swiglu,
};
use burn_fla_tests::{numbers, ratio};

use super::seed::loss;
use super::timing::median;

const EPS: f64 = 1e-6;
const BATCH: usize = 8;
/// Elements of a tensor.
const SIZE: usize = 1 << 27;
const WIDTH: usize = 4096;
const HEAD: usize = 128;
/// Rows that are compared.
const CHECKED: usize = 64;

/// An operator of activations `[B, T, D]`, and how many tensors of that size it reads and writes, forward and backward.
struct Case {
    name: &'static str,
    /// Channels of a token; the tensors are of one size.
    width: usize,
    inputs: usize,
    moved: [f64; 2],
    apply: fn(&Parameters, Vec<Tensor<3>>, Engine) -> Vec<Tensor<3>>,
}

/// The parameters that the operators share.
struct Parameters {
    weight: Tensor<1>,
    taps: Tensor<2>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    positions: Tensor<2, Int>,
}

const CASES: [Case; 12] = [
    Case {
        name: "rms_norm",
        width: WIDTH,
        inputs: 1,
        moved: [2.0, 3.0],
        apply: |p, mut x, engine| {
            vec![rms_norm(x.remove(0), Some(p.weight.clone()), EPS, engine).expect("good inputs")]
        },
    },
    Case {
        name: "rms_norm",
        width: 1024,
        inputs: 1,
        moved: [2.0, 3.0],
        apply: |p, mut x, engine| {
            vec![rms_norm(x.remove(0), Some(p.weight.clone()), EPS, engine).expect("good inputs")]
        },
    },
    Case {
        name: "rms_norm",
        width: 256,
        inputs: 1,
        moved: [2.0, 3.0],
        apply: |p, mut x, engine| {
            vec![rms_norm(x.remove(0), Some(p.weight.clone()), EPS, engine).expect("good inputs")]
        },
    },
    // Both inputs receive one gradient, which is written once.
    Case {
        name: "add_rms_norm",
        width: WIDTH,
        inputs: 2,
        moved: [4.0, 4.0],
        apply: |p, mut x, engine| {
            let residual = x.remove(1);
            let (y, sum) = add_rms_norm(x.remove(0), residual, p.weight.clone(), EPS, engine).expect("good inputs");
            vec![y, sum]
        },
    },
    Case {
        name: "add_rms_norm",
        width: 1024,
        inputs: 2,
        moved: [4.0, 4.0],
        apply: |p, mut x, engine| {
            let residual = x.remove(1);
            let (y, sum) = add_rms_norm(x.remove(0), residual, p.weight.clone(), EPS, engine).expect("good inputs");
            vec![y, sum]
        },
    },
    Case {
        name: "gated_rms_norm",
        width: WIDTH,
        inputs: 2,
        moved: [3.0, 5.0],
        apply: |p, mut x, engine| {
            let gate = x.remove(1);
            let (act, weight) = (GateActivation::Silu, Some(p.weight.clone()));
            vec![gated_rms_norm(x.remove(0), gate, weight, EPS, act, engine).expect("good inputs")]
        },
    },
    Case {
        name: "gated_rms_norm",
        width: 256,
        inputs: 2,
        moved: [3.0, 5.0],
        apply: |p, mut x, engine| {
            let gate = x.remove(1);
            let (act, weight) = (GateActivation::Silu, Some(p.weight.clone()));
            vec![gated_rms_norm(x.remove(0), gate, weight, EPS, act, engine).expect("good inputs")]
        },
    },
    Case {
        name: "swiglu",
        width: WIDTH,
        inputs: 2,
        moved: [3.0, 5.0],
        apply: |_, mut x, engine| {
            let up = x.remove(1);
            vec![swiglu(x.remove(0), up, engine).expect("good inputs")]
        },
    },
    // Its output is f32.
    Case {
        name: "log_gate",
        width: WIDTH,
        inputs: 1,
        moved: [3.0, 4.0],
        apply: |p, mut x, engine| {
            vec![log_gate(x.remove(0), Some(p.weight.clone()), 16.0, engine).expect("good inputs")]
        },
    },
    Case {
        name: "decay_gate",
        width: WIDTH,
        inputs: 1,
        moved: [3.0, 4.0],
        apply: |p, mut x, engine| {
            let gate = DecayGate { a_log: p.weight.clone(), bias: Some(p.weight.clone()) };
            vec![decay_gate(x.remove(0), gate, engine).expect("good inputs")]
        },
    },
    Case {
        name: "short_conv",
        width: WIDTH,
        inputs: 1,
        moved: [2.0, 3.0],
        apply: |p, mut x, engine| {
            let options = ShortConvOptions { silu: true, engine, ..Default::default() };
            vec![short_conv(x.remove(0), p.taps.clone(), None, options).expect("good inputs").0]
        },
    },
    Case {
        name: "rotary",
        width: WIDTH,
        inputs: 1,
        moved: [2.0, 2.0],
        apply: |p, mut x, engine| {
            let x = x.remove(0);
            let [b, t, d] = x.dims();
            let heads = x.reshape([b, t, d / HEAD, HEAD]);
            let positions = p.positions.clone().narrow(0, 0, b).narrow(1, 0, t);
            let y = rotary(heads, p.cos.clone(), p.sin.clone(), positions, engine).expect("good inputs");
            vec![y.reshape([b, t, d])]
        },
    },
];

/// Times those of `operators`, or all.
pub(super) fn run(plain: &Device, operators: Option<&str>) -> bool {
    println!("operator width forward_ms forward_TB/s backward_ms backward_TB/s error");
    let device = plain.clone().autodiff();
    let mut right = true;
    let chosen = |name| operators.is_none_or(|list| list.split(',').any(|operator| operator == name));
    for case in CASES.iter().filter(|case| chosen(case.name)) {
        let normal = Distribution::Normal(0.0, 1.0);
        let tokens = SIZE / BATCH / case.width;
        let angles: Tensor<2> = Tensor::random([tokens, HEAD / 2], normal, (&device, DType::F32));
        let positions = Tensor::<1, Int>::arange(0..tokens as i64, plain).unsqueeze::<2>().repeat_dim(0, BATCH);
        let parameters = Parameters {
            weight: Tensor::random([case.width], normal, (&device, DType::F32)).require_grad(),
            taps: Tensor::random([case.width, 4], normal, (&device, DType::F32)).require_grad(),
            cos: angles.clone().cos(),
            sin: angles.sin(),
            positions,
        };
        let random = || Tensor::<3>::random([BATCH, tokens, case.width], normal, (&device, DType::BF16));
        let inputs: Vec<Tensor<3>> = (0..case.inputs).map(|_| random().require_grad()).collect();
        let forward = || (case.apply)(&parameters, inputs.clone(), Engine::Auto);
        let outputs = forward();
        let grads: Vec<Tensor<3>> = outputs.iter().map(|y| random().detach().cast(y.dtype())).collect();
        let cut = |x: Tensor<3>| x.narrow(0, 0, 1).narrow(1, 0, CHECKED);
        let wide = inputs.iter().map(|x| cut(x.clone()).cast(DType::F32)).collect();
        let right_ones = (case.apply)(&parameters, wide, Engine::Reference);
        let errors = outputs.into_iter().zip(right_ones).map(|(y, right)| ratio(&numbers(cut(y)), &numbers(right)));
        let error = errors.fold(0.0, |worst: f64, error| if error > worst || error.is_nan() { error } else { worst });
        // bf16 outputs round to 2^-9.
        if error.is_nan() || error > 3e-3 {
            println!("{}: WRONG, off by {error:.1e}", case.name);
            right = false;
            continue;
        }
        let both = || {
            drop(loss(forward(), grads.clone()).backward());
        };
        let (one, two) = (median(plain, || drop(forward())), median(plain, both));
        let speed = |moved: f64, seconds: f64| moved * (SIZE * 2) as f64 / seconds / 1e12;
        println!(
            "{} {} {:.3} {:.2} {:.3} {:.2} {error:.1e}",
            case.name,
            case.width,
            one * 1e3,
            speed(case.moved[0], one),
            (two - one) * 1e3,
            speed(case.moved[1], two - one)
        );
    }
    right
}
