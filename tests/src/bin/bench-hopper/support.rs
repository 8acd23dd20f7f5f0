//! What surrounds the products and recurrences of a layer, on tensors of 256 MiB: the bytes that it must move a second,
//! forward and backward. The first rows are checked against the reference in f32 on the same bf16 inputs.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use burn_fla_ops::bridge::apply;
use burn_fla_ops::{
    Engine, GateActivation, ShortConvOptions, add_rms_norm, gated_rms_norm, log_gate, rms_norm, rotary, short_conv,
    swiglu,
};
use burn_fla_tests::{numbers, ratio};

use super::median;
use super::recurrence::Seed;

const EPS: f64 = 1e-6;
const ROWS: [usize; 2] = [8, 4096];
const WIDTH: usize = 4096;
const HEAD: usize = 128;
/// Rows that are compared.
const CHECKED: usize = 64;

/// An operator of activations `[B, T, D]`, and how many tensors of that size it reads and writes, forward and backward.
struct Case {
    name: &'static str,
    inputs: usize,
    moved: [f64; 2],
    apply: fn(&Parameters, Vec<Tensor<3>>, Engine) -> Tensor<3>,
}

/// The parameters that the operators share.
struct Parameters {
    weight: Tensor<1>,
    taps: Tensor<2>,
    cos: Tensor<2>,
    sin: Tensor<2>,
}

const CASES: [Case; 7] = [
    Case {
        name: "rms_norm",
        inputs: 1,
        moved: [2.0, 3.0],
        apply: |p, mut x, engine| rms_norm(x.remove(0), Some(p.weight.clone()), EPS, engine).expect("good inputs"),
    },
    // Of its two outputs the loss uses the norm alone, so no gradient of the sum is read.
    Case {
        name: "add_rms_norm",
        inputs: 2,
        moved: [4.0, 4.0],
        apply: |p, mut x, engine| {
            let residual = x.remove(1);
            add_rms_norm(x.remove(0), residual, p.weight.clone(), EPS, engine).expect("good inputs").0
        },
    },
    Case {
        name: "gated_rms_norm",
        inputs: 2,
        moved: [3.0, 5.0],
        apply: |p, mut x, engine| {
            let gate = x.remove(1);
            let (act, weight) = (GateActivation::Silu, Some(p.weight.clone()));
            gated_rms_norm(x.remove(0), gate, weight, EPS, act, engine).expect("good inputs")
        },
    },
    Case {
        name: "swiglu",
        inputs: 2,
        moved: [3.0, 5.0],
        apply: |_, mut x, engine| {
            let up = x.remove(1);
            swiglu(x.remove(0), up, engine).expect("good inputs")
        },
    },
    // Its output is f32.
    Case {
        name: "log_gate",
        inputs: 1,
        moved: [3.0, 4.0],
        apply: |p, mut x, engine| log_gate(x.remove(0), Some(p.weight.clone()), 16.0, engine).expect("good inputs"),
    },
    Case {
        name: "short_conv",
        inputs: 1,
        moved: [2.0, 3.0],
        apply: |p, mut x, engine| {
            let options = ShortConvOptions { silu: true, engine, ..Default::default() };
            short_conv(x.remove(0), p.taps.clone(), None, options).expect("good inputs").0
        },
    },
    Case {
        name: "rotary",
        inputs: 1,
        moved: [2.0, 2.0],
        apply: |p, mut x, engine| {
            let x = x.remove(0);
            let [b, t, d] = x.dims();
            let positions = Tensor::<1, Int>::arange(0..t as i64, &x.device()).unsqueeze::<2>().repeat_dim(0, b);
            let heads = x.reshape([b, t, d / HEAD, HEAD]);
            let y = rotary(heads, p.cos.clone(), p.sin.clone(), positions, engine).expect("good inputs");
            y.reshape([b, t, d])
        },
    },
];

pub(super) fn run(plain: &Device) -> bool {
    println!("operator forward_ms forward_TB/s backward_ms backward_TB/s error");
    let device = plain.clone().autodiff();
    let normal = Distribution::Normal(0.0, 1.0);
    let angles: Tensor<2> = Tensor::random([ROWS[1], HEAD / 2], normal, (&device, DType::F32));
    let parameters = Parameters {
        weight: Tensor::random([WIDTH], normal, (&device, DType::F32)).require_grad(),
        taps: Tensor::random([WIDTH, 4], normal, (&device, DType::F32)).require_grad(),
        cos: angles.clone().cos(),
        sin: angles.sin(),
    };
    let shape = [ROWS[0], ROWS[1], WIDTH];
    let bytes = (shape.iter().product::<usize>() * 2) as f64;
    let mut right = true;
    for case in &CASES {
        let random = || Tensor::<3>::random(shape, normal, (&device, DType::BF16));
        let inputs: Vec<Tensor<3>> = (0..case.inputs).map(|_| random().require_grad()).collect();
        let forward = || (case.apply)(&parameters, inputs.clone(), Engine::Auto);
        let y = forward();
        let grad = random().detach().cast(y.dtype());
        let cut = |x: Tensor<3>| x.narrow(0, 0, 1).narrow(1, 0, CHECKED);
        let wide = inputs.iter().map(|x| cut(x.clone()).cast(DType::F32)).collect();
        let error = ratio(&numbers(cut(y)), &numbers((case.apply)(&parameters, wide, Engine::Reference)));
        // bf16 outputs round to 2^-9.
        if error.is_nan() || error > 3e-3 {
            println!("{}: WRONG, off by {error:.1e}", case.name);
            right = false;
            continue;
        }
        let both = || {
            let floats: Vec<DispatchTensor> = vec![forward().into_dispatch(), grad.clone().into_dispatch()];
            drop(Tensor::<1>::from_dispatch(apply(Seed, floats, Vec::new()).remove(0)).backward());
        };
        let (one, two) = (median(plain, || drop(forward())), median(plain, both));
        let speed = |moved: f64, seconds: f64| moved * bytes / seconds / 1e12;
        println!(
            "{} {:.3} {:.2} {:.3} {:.2} {error:.1e}",
            case.name,
            one * 1e3,
            speed(case.moved[0], one),
            (two - one) * 1e3,
            speed(case.moved[1], two - one)
        );
    }
    right
}
