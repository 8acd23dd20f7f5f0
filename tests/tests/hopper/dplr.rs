//! The delta rules with a diagonal-plus-low-rank transition on the tensor cores, by every engine that the device has,
//! against the token recurrence in f64 over the same bf16 inputs.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::{CuSeqlens, Engine, SequenceOptions, bridge, dplr, rwkv7};
use burn_fla_tests::agree::{Input, view};
use burn_fla_tests::{numbers, ratio, reference_device, rounded, tensor, uniform};

use super::device_for;

const NAMES: [&str; 9] = ["o", "state", "dq", "dk", "dv", "dg", "da", "db", "dh0"];
/// Relative RMS errors: bf16 operands round to 2^-9, and each number is a sum of their products.
const BOUNDS: [f64; 9] = [5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 2e-2, 8e-3, 8e-3, 8e-3];

/// A problem; its inputs are, in this order, q, k, v, log decay, a and b (`rwkv7`: κ and the rate), initial state.
#[derive(Clone, Debug)]
struct Problem {
    removal: bool,
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
    /// Log decays are drawn from this range.
    decay: (f64, f64),
    packed: Option<Vec<usize>>,
    /// Every token has the removal key of the first one.
    repeated: bool,
    /// Log decays are bf16.
    narrow: bool,
}

fn base(removal: bool, tokens: usize) -> Problem {
    let decay = (-0.6, 0.0);
    Problem {
        removal,
        batch: 2,
        tokens,
        heads: 2,
        keys: 64,
        values: 64,
        decay,
        packed: None,
        repeated: false,
        narrow: false,
    }
}

type Pair = (Tensor<4>, Tensor<4>);

impl Problem {
    fn offsets(&self) -> Vec<usize> {
        self.packed.clone().unwrap_or_else(|| vec![0, self.tokens])
    }

    fn states(&self) -> usize {
        self.packed.as_ref().map_or(self.batch, |offsets| offsets.len() - 1)
    }

    /// Vectors so short that the transition does not make states longer.
    fn inputs(&self) -> Vec<Input> {
        let keys = [self.batch, self.tokens, self.heads, self.keys];
        let short = 1.7 / (self.keys as f64).sqrt();
        let names = if self.removal { ["kk", "rate"] } else { ["a", "b"] };
        let second = if self.removal { (0.0, 1.0) } else { (-short, short) };
        let mut inputs = vec![
            Input::new("q", &keys, (-1.0, 1.0)),
            Input::new("k", &keys, (-short, short)),
            Input::new("v", &[self.batch, self.tokens, self.heads, self.values], (-1.0, 1.0)),
            Input::new("g", &keys, self.decay),
            Input::new(names[0], &keys, (-short, short)),
            Input::new(names[1], &keys, second),
            Input::new("state", &[self.states(), self.heads, self.keys, self.values], (-1.0, 1.0)),
        ];
        if self.repeated {
            let width = self.heads * self.keys;
            let values = &mut inputs[4].values;
            for i in width..values.len() {
                values[i] = values[i % width];
            }
        }
        inputs
    }

    fn views(&self, x: &[Tensor<1>]) -> ([Tensor<4>; 6], Tensor<4>) {
        let keys = |i: usize| view(&x[i], [self.batch, self.tokens, self.heads, self.keys]);
        let v = view(&x[2], [self.batch, self.tokens, self.heads, self.values]);
        let state = view(&x[6], [self.states(), self.heads, self.keys, self.values]);
        ([keys(0), keys(1), v, keys(3), keys(4), keys(5)], state)
    }

    fn public(&self, x: &[Tensor<1>], engine: Engine) -> Pair {
        let ([q, k, v, g, a, b], state) = self.views(x);
        let options = SequenceOptions {
            scale: Some(0.7),
            initial_state: Some(state),
            cu_seqlens: self.packed.clone().map(|offsets| CuSeqlens::new(offsets).expect("offsets")),
            engine,
            ..Default::default()
        };
        let result = if self.removal { rwkv7(q, g, k, v, a, b, options) } else { dplr(q, k, v, a, b, g, options) };
        result.expect("a result")
    }

    fn oracle(&self, x: &[Tensor<1>]) -> Pair {
        let ([q, k, v, g, a, b], state) = self.views(x);
        let (a, b) = if self.removal { (a.clone().neg(), a * b) } else { (a, b) };
        let (mut outputs, mut states) = (Vec::new(), Vec::new());
        for (i, pair) in self.offsets().windows(2).enumerate() {
            let first = if self.packed.is_some() { state.clone().narrow(0, i, 1) } else { state.clone() };
            if pair[0] == pair[1] {
                states.push(first);
                continue;
            }
            let inputs = [&q, &k, &v, &a, &b, &g].map(|x| x.clone().narrow(1, pair[0], pair[1] - pair[0]));
            let (o, end) = dplr::reference::recurrent(inputs, 0.7, first);
            outputs.push(o);
            states.push(end);
        }
        (Tensor::cat(outputs, 1), Tensor::cat(states, 0))
    }

    /// Outputs and gradients: of the public function with an engine, or of the recurrence in f64.
    fn run(&self, device: &Device, engine: Option<Engine>) -> Vec<Vec<f64>> {
        let exact = engine.is_none();
        let device = device.clone().autodiff();
        let wide = if exact { DType::F64 } else { DType::F32 };
        let leaves: Vec<Tensor<1>> = self
            .inputs()
            .into_iter()
            .map(|input| {
                let f32s = input.name == "state" || (input.name == "g" && !self.narrow);
                let held = if f32s { DType::F32 } else { DType::BF16 };
                // The numbers that both sides hold.
                let values = rounded(&input.values, held);
                let held = if exact { DType::F64 } else { held };
                tensor::<1>(&values, [values.len()], &device, held).require_grad()
            })
            .collect();
        let (o, end) = match engine {
            Some(engine) => self.public(&leaves, engine),
            None => self.oracle(&leaves),
        };
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
}

fn check_within(engine: Engine, problems: &[Problem], times: f64) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    let mut wrong = Vec::new();
    for problem in problems {
        let found = problem.run(&device, Some(engine));
        let exact = problem.run(&reference_device(), None);
        let mut line = String::new();
        for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
            let error = ratio(found, exact);
            line += &format!(" {} {error:.1e}", NAMES[i]);
            // Where every decay is e^-29 or less, so is dg, as a difference of numbers of order one: its size counts.
            let vanishes = i == 5 && problem.decay.1 < -1.0;
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
    check_within(engine, problems, 1.0);
}

suite!(Auto: hopper, Mma: mma; {
    every_length_is_right,
    every_size_is_right,
    every_larger_size_is_right,
    many_heads_are_right,
    every_decay_is_right,
    keys_that_repeat_are_right,
    few_heads_are_right,
    packed_sequences_are_right,
    two_runs_are_equal_bit_for_bit,
});

fn every_length_is_right(engine: Engine) {
    for removal in [true, false] {
        check(engine, &[1, 2, 63, 64, 65, 131, 300].map(|tokens| base(removal, tokens)));
    }
}

fn every_size_is_right(engine: Engine) {
    let sizes = [(16, 16), (64, 128), (48, 80)];
    check(engine, &sizes.map(|(keys, values)| Problem { keys, values, batch: 1, ..base(true, 100) }));
}

fn every_larger_size_is_right(engine: Engine) {
    let sizes = [(128, 128), (112, 512)];
    check(engine, &sizes.map(|(keys, values)| Problem { keys, values, batch: 1, ..base(true, 100) }));
    check(engine, &[Problem { keys: 80, values: 256, batch: 1, ..base(false, 100) }]);
}

/// Enough heads for several rounds of cubes, and for cubes that walk 128 value channels.
fn many_heads_are_right(engine: Engine) {
    let problem = Problem { heads: 140, keys: 32, values: 16, ..base(true, 70) };
    let wide = Problem { heads: 140, keys: 80, batch: 1, ..problem.clone() };
    check(engine, &[problem.clone(), Problem { heads: 150, values: 80, ..problem }, wide]);
}

fn every_decay_is_right(engine: Engine) {
    let ranges = [(0.0, 0.0), (-3.0, 0.0), (-30.0, 0.0), (-30.0, -29.0)];
    for removal in [true, false] {
        check(engine, &ranges.map(|decay| Problem { decay, ..base(removal, 131) }));
    }
    check(engine, &[Problem { decay: (-4.0, 0.0), keys: 128, values: 128, batch: 1, narrow: true, ..base(true, 131) }]);
}

/// Every token takes away where all others do: their roundings add up.
fn keys_that_repeat_are_right(engine: Engine) {
    check_within(engine, &[Problem { repeated: true, ..base(true, 131) }], 3.0);
}

/// Sequences that are cut into segments.
fn few_heads_are_right(engine: Engine) {
    for removal in [true, false] {
        let problem = Problem { heads: 1, values: 32, batch: 1, ..base(removal, 3300) };
        let packed = Some(vec![0, 3110, 3110, 3174, 3300]);
        check(engine, &[problem.clone(), Problem { keys: 48, values: 80, packed, ..problem }]);
    }
}

fn packed_sequences_are_right(engine: Engine) {
    for removal in [true, false] {
        let packed = Some(vec![0, 64, 64, 65, 73, 140, 300]);
        let problem = Problem { batch: 1, packed, ..base(removal, 300) };
        check(engine, &[problem.clone(), Problem { keys: 128, values: 48, narrow: true, ..problem }]);
    }
}

fn two_runs_are_equal_bit_for_bit(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for problem in [base(true, 600), Problem { keys: 128, values: 128, ..base(false, 200) }] {
        assert_eq!(problem.run(&device, Some(engine)), problem.run(&device, Some(engine)));
    }
}
