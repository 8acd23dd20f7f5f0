//! `ssd` in bf16, whose step sizes, D and all gradients the walks take or make themselves, against its recurrence in f64 over
//! the same numbers: each form of D, steps of zero, each input tracked alone, losses that use one of the outputs.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::ssd::reference::recurrent;
use burn_fla_ops::{CuSeqlens, Engine, HeadGroups, SsdOptions, bridge, ssd};
use burn_fla_tests::{numbers, ratio, reference_device, rounded, tensor, uniform};

use super::device_for;

const NAMES: [&str; 7] = ["x", "delta", "a", "b", "c", "skip", "state"];

/// Relative RMS errors of outputs and gradients: those of the other operators with one decay for all channels.
const BOUNDS: [f64; 2] = [5e-3, 8e-3];

/// D has a number for each head, or channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    None,
    Head,
    Channel,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    width: usize,
    states: usize,
    skip: Skip,
    /// Which inputs are tracked.
    tracked: [bool; 7],
    /// Which of the output and the state the loss uses.
    loss: [bool; 2],
    /// The token takes no step where this divides its number.
    still: Option<usize>,
}

/// Heads that are walked one by one; many of them, narrow and even in number, are walked in pairs.
const BASE: Case = Case {
    batch: 2,
    tokens: 131,
    heads: 2,
    width: 64,
    states: 64,
    skip: Skip::Head,
    tracked: [true; 7],
    loss: [true; 2],
    still: None,
};
const PAIRS: Case = Case { batch: 35, tokens: 70, heads: 4, ..BASE };
const WIDE: Case = Case { width: 128, states: 128, ..BASE };
const GROUPS: usize = 2;

impl Case {
    fn shapes(&self) -> [[usize; 4]; 7] {
        let &Case { batch, tokens, heads, width, states, skip, .. } = self;
        let groups = GROUPS.min(heads);
        [
            [batch, tokens, heads, width],
            [batch, tokens, heads, 1],
            [1, 1, 1, heads],
            [batch, tokens, groups, states],
            [batch, tokens, groups, states],
            [1, 1, 1, if skip == Skip::Channel { heads * width } else { heads }],
            [batch, heads, states, width],
        ]
    }

    /// Outputs, then the gradients of what is tracked: of the public function with an engine, or of the recurrence in f64.
    fn run(&self, device: &Device, engine: Option<Engine>) -> Vec<(&'static str, Vec<f64>, bool)> {
        let device = device.clone().autodiff();
        let exact = engine.is_none();
        let leaf = |i: usize| -> Tensor<4> {
            let (shape, narrow) = (self.shapes()[i], if [0, 3, 4].contains(&i) { DType::BF16 } else { DType::F32 });
            let range = [(-1.0, 1.0), (0.0, 1.0), (-0.5, -0.01)][if i == 1 || i == 2 { i } else { 0 }];
            let mut values = uniform(1 + i as u64, shape.iter().product(), range);
            if let Some(still) = self.still.filter(|_| i == 1) {
                let token = |at: usize| at / self.heads % self.tokens;
                values.iter_mut().enumerate().filter(|(at, _)| token(*at) % still == 0).for_each(|(_, x)| *x = 0.0);
            }
            // The same rounded numbers on both sides.
            let values = rounded(&values, narrow);
            let leaf = tensor(&values, shape, &device, if exact { DType::F64 } else { narrow });
            if self.tracked[i] { leaf.require_grad() } else { leaf }
        };
        let leaves = [0, 1, 2, 3, 4, 5, 6].map(leaf);
        let [x, delta, a, b, c, skip, state] = leaves.clone();
        let delta = delta.reshape([self.batch, self.tokens, self.heads]);
        let a = a.reshape([self.heads]);
        let skip = (self.skip != Skip::None).then(|| skip.reshape([-1]));
        let (y, end) = match engine {
            Some(engine) => {
                let options = SsdOptions { skip, initial_state: Some(state), engine, ..Default::default() };
                ssd(x, delta, a, b, c, options).expect("fitting operands")
            }
            None => recurrent(x, delta, a, b, c, skip, HeadGroups::Contiguous, state),
        };
        let wide = if exact { DType::F64 } else { DType::F32 };
        let mut found = vec![("y", numbers(y.clone()), true), ("end", numbers(end.clone()), true)];
        let mut loss = Tensor::<1>::zeros([1], (&device, wide));
        for (i, y) in [y, end].into_iter().enumerate().filter(|(i, _)| self.loss[*i]) {
            // Gradients of the outputs are bf16 as the outputs are.
            let weight = rounded(&uniform(80 + i as u64, y.shape().num_elements(), (-1.0, 1.0)), DType::BF16);
            loss = loss + (y.clone() * tensor(&weight, y.dims(), &device, y.dtype())).cast(wide).sum();
        }
        let gradients = loss.backward();
        for (i, leaf) in leaves.iter().enumerate().filter(|(i, _)| self.tracked[*i]) {
            let zeros = || vec![0.0; leaf.shape().num_elements()];
            found.push((NAMES[i], leaf.grad(&gradients).map_or_else(zeros, numbers), false));
        }
        found
    }
}

fn check(engine: Engine, cases: &[Case]) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    let mut wrong = Vec::new();
    for case in cases {
        let (found, expected) = (case.run(&device, Some(engine)), case.run(&reference_device(), None));
        let mut line = String::new();
        for ((name, found, output), (_, exact, _)) in found.iter().zip(&expected) {
            let error = ratio(found, exact);
            line += &format!(" {name} {error:.1e}");
            if error > BOUNDS[usize::from(!output)] {
                wrong.push(format!("{engine:?} {case:?}: {name} is off by {error:.1e}"));
            }
        }
        println!("{engine:?} {case:?}:{line}");
    }
    bridge::poison_outputs(false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

suite!(Auto: hopper, Mma: mma; {
    every_form_of_d_is_right,
    every_size_is_right,
    steps_of_zero_are_right,
    each_input_may_be_tracked_alone,
    decays_may_have_no_gradient,
    a_loss_may_use_one_output,
    packed_equals_separate,
});

fn every_form_of_d_is_right(engine: Engine) {
    let skips = [Skip::None, Skip::Head, Skip::Channel];
    check(engine, &skips.map(|skip| [BASE, PAIRS, WIDE].map(|base| Case { skip, ..base })).concat());
}

/// The last is walked in segments.
fn every_size_is_right(engine: Engine) {
    let sizes = [(64, 128), (128, 64), (48, 80), (16, 16), (256, 128), (128, 256)];
    let sized = |(states, width)| Case { states, width, skip: Skip::Channel, batch: 1, tokens: 100, ..BASE };
    let long = Case { batch: 1, heads: 1, tokens: 2200, ..BASE };
    check(engine, &[&sizes.map(sized)[..], &[long, Case { width: 128, ..long }]].concat());
}

/// Their gradient of Δ is that of any other token, and what they add to the state is nothing.
fn steps_of_zero_are_right(engine: Engine) {
    let still = |still, base| Case { still: Some(still), ..base };
    check(engine, &[still(3, BASE), still(2, PAIRS), still(3, WIDE), still(1, Case { tokens: 70, ..BASE })]);
}

/// A's gradient is one number a head, a sum over all tokens in which most may cancel: eight heads are compared together.
fn each_input_may_be_tracked_alone(engine: Engine) {
    let narrow = Case { tokens: 70, heads: 8, ..BASE };
    for base in [narrow, Case { batch: 34, tokens: 65, heads: 4, ..BASE }, Case { width: 128, states: 128, ..narrow }] {
        check(engine, &std::array::from_fn::<_, 7, _>(|i| Case { tracked: std::array::from_fn(|j| i == j), ..base }));
    }
}

/// x, B and C have one: narrow heads have those of x and B from one walk then.
fn decays_may_have_no_gradient(engine: Engine) {
    let tracked = [true, false, false, true, true, false, false];
    let skips = [Skip::Head, Skip::Channel];
    check(engine, &skips.map(|skip| [BASE, PAIRS, WIDE].map(|base| Case { skip, tracked, ..base })).concat());
}

fn a_loss_may_use_one_output(engine: Engine) {
    let losses = [[true, false], [false, true]];
    check(engine, &losses.map(|loss| [BASE, WIDE].map(|base| Case { loss, skip: Skip::Channel, ..base })).concat());
}

/// Bit for bit: where a sequence stands in a row changes nothing. One token alone is a step's kernel, which rounds elsewhere:
/// that sequence, and the empty one, are there for what follows them.
fn packed_equals_separate(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    let (offsets, heads, width, states) = ([0, 70, 70, 71, 200], 2, 64, 64);
    let draw = |seed, shape: [usize; 4], range, dtype| -> Tensor<4> {
        tensor(&uniform(seed, shape.iter().product(), range), shape, &device, dtype)
    };
    let (unit, total) = ((-1.0, 1.0), offsets[4]);
    let x = draw(1, [1, total, heads, width], unit, DType::BF16);
    let delta = draw(2, [1, total, heads, 1], (0.0, 1.0), DType::F32).reshape([1, total, heads]);
    let a = draw(3, [1, 1, 1, heads], (-0.5, -0.01), DType::F32).reshape([heads]);
    let [b, c] = [4, 5].map(|seed| draw(seed, [1, total, GROUPS, states], unit, DType::BF16));
    let skip = draw(6, [1, 1, 1, heads], unit, DType::F32).reshape([heads]);
    let state = draw(7, [4, heads, states, width], unit, DType::F32);
    let options = |state: Tensor<4>, cu_seqlens| SsdOptions {
        skip: Some(skip.clone()),
        initial_state: Some(state),
        cu_seqlens,
        engine,
        ..Default::default()
    };
    let packed = Some(CuSeqlens::new(offsets.to_vec()).expect("offsets"));
    let inputs = (x.clone(), delta.clone(), b.clone(), c.clone());
    let (y, end) =
        ssd(inputs.0, inputs.1, a.clone(), inputs.2, inputs.3, options(state.clone(), packed)).expect("it fits");
    for (i, piece) in offsets.windows(2).enumerate().filter(|(_, piece)| piece[1] > piece[0] + 1) {
        let cut = |x: &Tensor<4>| x.clone().narrow(1, piece[0], piece[1] - piece[0]);
        let steps = delta.clone().narrow(1, piece[0], piece[1] - piece[0]);
        let before = state.clone().narrow(0, i, 1);
        let (alone, after) = ssd(cut(&x), steps, a.clone(), cut(&b), cut(&c), options(before, None)).expect("it fits");
        assert_eq!(numbers(alone), numbers(cut(&y)), "{engine:?}, sequence {i}");
        assert_eq!(numbers(after), numbers(end.clone().narrow(0, i, 1)), "{engine:?}, state of sequence {i}");
    }
}
