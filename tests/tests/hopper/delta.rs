//! The delta rules on the tensor cores of Hopper GPUs and of any since Ampere, against the token recurrence in f64 over the
//! same bf16 inputs.

// The suite of the references uses more of it.
#[allow(dead_code)]
#[path = "../sequence/delta_problem.rs"]
mod delta_problem;

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::{Engine, bridge};
use burn_fla_tests::{numbers, ratio, reference_device, rounded, tensor, uniform};

use self::delta_problem::{Op, Problem};
use super::device_for;

const NAMES: [&str; 9] = ["o", "state", "dq", "dk", "dv", "dp", "dg", "dbeta", "dh0"];
/// Relative RMS errors: bf16 operands round to 2^-9, and each number is a sum of their products. At two tokens dβ is eight
/// numbers, over which nothing averages: 8.3e-3 was found.
const BOUNDS: [f64; 9] = [5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 8e-3, 8e-3, 1e-2, 8e-3];

fn base(op: Op, tokens: usize) -> Problem {
    Problem { heads: 2, groups: 1, keys: 128, values: 128, l2_norm: false, ..Problem::new(op, tokens) }
}

/// Outputs and gradients: of the public function with an engine, or of the recurrence in f64. `keys`: what to make of the
/// keys' numbers.
fn run(problem: &Problem, keys: fn(&mut [f64], usize), device: &Device, engine: Option<Engine>) -> Vec<Vec<f64>> {
    let exact = engine.is_none();
    let problem = &Problem { engine: engine.unwrap_or_default(), ..problem.clone() };
    let device = device.clone().autodiff();
    let wide = if exact { DType::F64 } else { DType::F32 };
    let leaves: Vec<Tensor<1>> = problem
        .inputs()
        .into_iter()
        .map(|mut input| {
            if input.name == "k" {
                keys(&mut input.values, problem.heads * problem.keys);
            }
            let narrow = !["g", "beta", "state"].contains(&input.name);
            let held = if narrow { DType::BF16 } else { DType::F32 };
            // The numbers that both sides hold.
            let values = rounded(&input.values, held);
            let held = if exact { DType::F64 } else { held };
            tensor::<1>(&values, [values.len()], &device, held).require_grad()
        })
        .collect();
    let views = problem.views(&leaves);
    let (o, end) = if exact { problem.oracle(&views) } else { problem.public(&views).unwrap() };
    let weight = |seed, like: &Tensor<4>| -> Tensor<4> {
        let values = rounded(&uniform(seed, like.shape().num_elements(), (-1.0, 1.0)), DType::BF16);
        tensor(&values, like.dims(), &device, like.dtype())
    };
    let on_o = (o.clone() * weight(8, &o)).cast(wide).sum();
    let on_end = (end.clone() * weight(9, &end)).sum();
    let grads = (on_o + on_end).backward();
    let mut found = vec![numbers(o), numbers(end)];
    found.extend(leaves.iter().map(|leaf| leaf.grad(&grads).map(numbers).unwrap_or_default()));
    found
}

fn as_they_are(_: &mut [f64], _: usize) {}

/// Every token has the keys of the first one.
fn repeated(keys: &mut [f64], width: usize) {
    for i in width..keys.len() {
        keys[i] = keys[i % width];
    }
}

fn check_with(engine: Engine, problems: &[Problem], keys: fn(&mut [f64], usize), times: f64) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    let mut wrong = Vec::new();
    for problem in problems {
        let found = run(problem, keys, &device, Some(engine));
        let exact = run(problem, keys, &reference_device(), None);
        let mut line = String::new();
        for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
            if found.is_empty() && exact.is_empty() {
                continue;
            }
            let error = ratio(found, exact);
            line += &format!(" {} {error:.1e}", NAMES[i]);
            // Where every decay is e^-29 or less, so is dg, as a difference of numbers of order one: its size counts.
            let vanishes = i == 6 && problem.decay.1 < -1.0;
            let small = found.iter().zip(exact).all(|(a, b)| (a - b).abs() <= 1e-5);
            if !(error <= times * BOUNDS[i] || vanishes && small) {
                wrong.push(format!("{engine:?} {problem:?}: {} is off by {error:.1e}", NAMES[i]));
            }
        }
        println!("{engine:?} {problem:?}:{line}");
    }
    bridge::poison_outputs(false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn check(engine: Engine, problems: &[Problem]) {
    check_with(engine, problems, as_they_are, 1.0);
}

const OPS: [Op; 3] = [Op::Delta, Op::Gated, Op::Kda];

suite!(Auto: hopper, Mma: mma; {
    every_length_is_right,
    every_size_is_right,
    every_larger_size_is_right,
    every_wide_size_is_right,
    many_heads_are_right,
    many_packed_heads_are_right,
    every_decay_is_right,
    keys_that_repeat_are_right,
    normalised_keys_are_right,
    packed_sequences_are_right,
    value_heads_of_a_key_head_are_right,
    products_are_right,
    few_heads_are_right,
    two_runs_are_equal_bit_for_bit,
});

fn every_length_is_right(engine: Engine) {
    for op in OPS {
        check(engine, &[2, 63, 64, 65, 131, 300].map(|tokens| base(op, tokens)));
    }
}

/// Every size is kernels of its own, which take their time to compile: dplr's suite has other ones of kda's.
fn every_size_is_right(engine: Engine) {
    sizes_are_right(engine, &[(16, 16), (64, 64), (48, 80)], &[(48, 80)]);
}

fn every_larger_size_is_right(engine: Engine) {
    sizes_are_right(engine, &[(128, 64), (64, 128), (96, 176)], &[(96, 176)]);
}

fn every_wide_size_is_right(engine: Engine) {
    sizes_are_right(engine, &[(128, 256), (112, 512)], &[(128, 256)]);
}

fn sizes_are_right(engine: Engine, sizes: &[(usize, usize)], of_kda: &[(usize, usize)]) {
    for op in OPS {
        let sizes = if op == Op::Kda { of_kda } else { sizes };
        let problems: Vec<Problem> =
            sizes.iter().map(|&(keys, values)| Problem { keys, values, batch: 1, ..base(op, 100) }).collect();
        check(engine, &problems);
    }
}

/// Enough heads for cubes that walk 128 value channels.
fn many_heads_are_right(engine: Engine) {
    for op in OPS {
        let problems =
            [Problem { heads: 70, ..base(op, 70) }, Problem { heads: 140, values: 80, keys: 32, ..base(op, 70) }];
        check(engine, &problems);
    }
}

/// Enough heads for cubes that walk several segments: of one chunk, of two and of none.
fn many_packed_heads_are_right(engine: Engine) {
    for op in OPS {
        let packed = Some(vec![0, 64, 64, 65, 150]);
        check(engine, &[Problem { heads: 110, values: 64, keys: 64, batch: 1, packed, ..base(op, 150) }]);
    }
}

fn every_decay_is_right(engine: Engine) {
    let ranges = [(0.0, 0.0), (-3.0, 0.0), (-30.0, 0.0), (-30.0, -29.0)];
    for op in OPS.into_iter().filter(|op| *op != Op::Delta) {
        check(engine, &ranges.map(|decay| Problem { decay, ..base(op, 131) }));
    }
}

/// Every token writes where all others read: their roundings add up.
fn keys_that_repeat_are_right(engine: Engine) {
    for op in OPS {
        check_with(engine, &[base(op, 131), Problem { l2_norm: true, ..base(op, 131) }], repeated, 3.0);
    }
}

/// Keys of length one are rounded to bf16 after the norm, which the recurrence here does not do, and with a β of up to 2
/// nothing shortens a state and its errors.
fn normalised_keys_are_right(engine: Engine) {
    for op in OPS {
        let problem = Problem { l2_norm: true, ..base(op, 131) };
        check_with(engine, &[problem.clone(), Problem { keys: 16, values: 16, ..problem }], as_they_are, 2.0);
    }
}

fn packed_sequences_are_right(engine: Engine) {
    for op in OPS {
        let packed = Some(vec![0, 64, 64, 65, 73, 140, 300]);
        let problem = Problem { batch: 1, packed, ..base(op, 300) };
        check(engine, &[problem.clone(), Problem { keys: 64, values: 48, ..problem }]);
    }
}

/// Sequences that are cut into segments on Hopper.
fn few_heads_are_right(engine: Engine) {
    for op in OPS {
        let problem = Problem { heads: 1, keys: 64, values: 32, batch: 1, ..base(op, 3300) };
        let packed = Some(vec![0, 3110, 3110, 3174, 3300]);
        check(engine, &[problem.clone(), Problem { keys: 48, values: 80, packed, ..problem }]);
    }
}

fn value_heads_of_a_key_head_are_right(engine: Engine) {
    for op in OPS {
        check(
            engine,
            &[Problem { groups: 3, ..base(op, 131) }, Problem { groups: 4, keys: 48, values: 64, ..base(op, 70) }],
        );
    }
}

/// Several steps a token.
fn products_are_right(engine: Engine) {
    check(engine, &[Op::Product(3), Op::ProductUngated(2)].map(|op| base(op, 131)));
}

fn two_runs_are_equal_bit_for_bit(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for op in OPS {
        let problem = Problem { groups: 2, ..base(op, 600) };
        let long = Problem { heads: 1, keys: 64, values: 32, batch: 1, ..base(op, 3300) };
        for problem in [problem, long] {
            let once = || run(&problem, as_they_are, &device, Some(engine));
            assert_eq!(once(), once());
        }
    }
}
