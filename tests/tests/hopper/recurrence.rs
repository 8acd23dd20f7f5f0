//! The linear recurrences on the tensor cores, by every engine that the device has, against the recurrence in f64 over the
//! same bf16 inputs.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::{CuSeqlens, Engine, ScalarDecay, SequenceOptions, bridge, gla, simple_gla};
use burn_fla_tests::{numbers, ratio, reference_device, rounded, tensor, uniform};

use super::device_for;

#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Head,
    Token,
    /// By token and key channel; log decays f32 or bf16.
    Key(DType),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
    /// Log decays are drawn from this range.
    decay: (f64, f64),
    packed: Option<&'static [usize]>,
    initial: bool,
    by: By,
}

const BASE: Case = Case {
    batch: 2,
    tokens: 131,
    heads: 2,
    keys: 128,
    values: 128,
    decay: (-0.5, 0.0),
    packed: None,
    initial: true,
    by: By::Token,
};

const NAMES: [&str; 7] = ["o", "state", "dq", "dk", "dv", "dg", "dh0"];
/// Relative RMS errors: bf16 operands round to 2^-9, and each number is a sum of their products.
const BOUNDS: [f64; 7] = [5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 8e-3, 8e-3];

impl Case {
    fn sequences(&self) -> usize {
        self.packed.map_or(self.batch, |offsets| offsets.len() - 1)
    }

    /// Outputs and gradients: of the public function with an engine, or of the recurrence by tensor operations in f64.
    fn run(&self, device: &Device, engine: Option<Engine>) -> Vec<Vec<f64>> {
        let exact = engine.is_none();
        let device = device.clone().autodiff();
        let (dtype, wide) = if exact { (DType::F64, DType::F64) } else { (DType::BF16, DType::F32) };
        let Self { batch: b, tokens: t, heads: h, keys, values, .. } = *self;
        let n = self.sequences();
        // The same rounded numbers on both sides.
        let narrow = |seed, shape: [usize; 4]| -> Tensor<4> {
            let values = rounded(&uniform(seed, shape.iter().product(), (-1.0, 1.0)), DType::BF16);
            tensor(&values, shape, &device, dtype)
        };
        let (q, k) = (narrow(1, [b, t, h, keys]).require_grad(), narrow(2, [b, t, h, keys]).require_grad());
        let v = narrow(3, [b, t, h, values]).require_grad();
        let state = |seed| -> Tensor<4> {
            tensor(&uniform(seed, n * h * keys * values, (-1.0, 1.0)), [n, h, keys, values], &device, wide)
        };
        let h0 = self.initial.then(|| state(4).require_grad());
        let key_gates = || -> Tensor<4> {
            let By::Key(dtype) = self.by else { unreachable!("asked for with a decay by key alone") };
            let g = rounded(&uniform(6, b * t * h * keys, self.decay), dtype);
            tensor(&g, [b, t, h, keys], &device, if exact { DType::F64 } else { dtype })
        };
        let by_key = matches!(self.by, By::Key(_)).then(|| key_gates().require_grad());
        let head: Tensor<1> = tensor(&uniform(5, h, self.decay), [h], &device, wide);
        let g: Tensor<3> = tensor(&uniform(6, b * t * h, self.decay), [b, t, h], &device, wide).require_grad();
        let by_token = if self.by != By::Head { g.clone() } else { head.clone().reshape([1, 1, h]).expand([b, t, h]) };
        let (o, end) = if exact {
            let first = h0.clone().unwrap_or_else(|| Tensor::zeros([n, h, keys, values], (&device, wide)));
            let decay = by_key.clone().unwrap_or_else(|| by_token.unsqueeze_dim::<4>(3).expand([b, t, h, keys]));
            self.recurrent(q.clone(), k.clone(), v.clone(), decay, first)
        } else {
            let options = SequenceOptions {
                initial_state: h0.clone(),
                cu_seqlens: self.packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap()),
                engine: engine.unwrap_or_default(),
                ..Default::default()
            };
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            match self.by {
                By::Head => simple_gla(q, k, v, ScalarDecay::PerHead(head), options).unwrap(),
                By::Token => simple_gla(q, k, v, ScalarDecay::PerToken(by_token), options).unwrap(),
                By::Key(_) => gla(q, k, v, by_key.clone().unwrap(), options).unwrap(),
            }
        };
        let on_o = (o.clone() * narrow(8, [b, t, h, values])).cast(wide).sum();
        let on_state = (end.clone() * state(9)).sum();
        let grads = (on_o + on_state).backward();
        let of = |x: &Tensor<4>| x.grad(&grads).map(numbers).unwrap_or_default();
        let dg = match self.by {
            By::Head => Vec::new(),
            By::Token => g.grad(&grads).map(numbers).unwrap_or_default(),
            By::Key(_) => of(by_key.as_ref().unwrap()),
        };
        vec![numbers(o), numbers(end), of(&q), of(&k), of(&v), dg, h0.as_ref().map(of).unwrap_or_default()]
    }

    fn recurrent(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        g: Tensor<4>,
        first: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        use burn_fla_ops::gla::reference::recurrent;
        let scale = (self.keys as f64).powf(-0.5);
        let whole = [0, q.dims()[1]];
        let (mut outputs, mut states) = (Vec::new(), Vec::new());
        for (i, w) in self.packed.unwrap_or(&whole).windows(2).enumerate() {
            let mut state = first.clone().narrow(0, i, q.dims()[0]);
            // In pieces: the gradient of each token's slice is as large as what it was cut from.
            for start in (w[0]..w[1]).step_by(64) {
                let cut = |x: &Tensor<4>| x.clone().narrow(1, start, (w[1] - start).min(64));
                let (o, end) = recurrent(cut(&q), cut(&k), cut(&v), cut(&g), scale, state);
                outputs.push(o);
                state = end;
            }
            states.push(state);
        }
        (Tensor::cat(outputs, 1), Tensor::cat(states, 0))
    }
}

/// On Hopper, `Engine::Auto` is the kernels for mma where at most 64 channels decay beside at most 128 others: sizes are above
/// that, but where both are meant.
const KEY: Case = Case { by: By::Key(DType::F32), ..BASE };

suite!(Auto: hopper, Mma: mma; {
    every_length_is_right,
    every_size_is_right,
    every_decay_is_right,
    packed_sequences_are_right,
    segments_are_right,
    narrow_heads_are_right,
    two_runs_are_equal_bit_for_bit,
    more_than_256_values_are_right,
    every_length_is_right_by_key,
    every_size_is_right_by_key,
    every_decay_is_right_by_key,
    packed_sequences_are_right_by_key,
    segments_are_right_by_key,
});

fn check(engine: Engine, cases: &[Case]) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    let mut wrong = Vec::new();
    for case in cases {
        let (found, expected) = (case.run(&device, Some(engine)), case.run(&reference_device(), None));
        let mut line = String::new();
        for (i, (found, exact)) in found.iter().zip(&expected).enumerate() {
            if found.is_empty() && exact.iter().all(|x| *x == 0.0) {
                continue;
            }
            let error = ratio(found, exact);
            line += &format!(" {} {error:.1e}", NAMES[i]);
            // Where every decay is e^-29 or less, so is dg, as a difference of numbers of order one: its size counts. By
            // key, these are k ∘ dk, with |k| ≤ 1, rounded to 2^-11.
            let largest = || expected[3].iter().fold(0.0f64, |most, x| most.max(x.abs()));
            let most = if matches!(case.by, By::Key(_)) { largest() / 1024.0 } else { 1e-5 };
            let vanishes = i == 5 && case.decay.1 < -1.0;
            let small = found.iter().zip(exact).all(|(a, b)| (a - b).abs() <= most);
            // With decays down to −500, one gate in hundreds has a gradient, and every other only the rounding of such
            // numbers.
            let bound = if i == 5 && case.decay.0 < -100.0 { 2e-2 } else { BOUNDS[i] };
            if !(error <= bound || vanishes && small) {
                wrong.push(format!("{engine:?} {case:?}: {} is off by {error:.1e}", NAMES[i]));
            }
        }
        println!("{engine:?} {case:?}:{line}");
    }
    bridge::poison_outputs(false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn every_length_is_right(engine: Engine) {
    let lengths = [2, 63, 64, 65, 131, 600];
    check(engine, &lengths.map(|tokens| Case { tokens, ..BASE }));
}

fn every_size_is_right(engine: Engine) {
    let sizes =
        [(16, 16), (64, 64), (128, 64), (64, 128), (48, 80), (96, 176), (128, 256), (256, 128), (192, 192), (256, 256)];
    check(engine, &sizes.map(|(keys, values)| Case { keys, values, batch: 1, tokens: 100, ..BASE }));
}

fn every_decay_is_right(engine: Engine) {
    check(
        engine,
        &[
            Case { decay: (0.0, 0.0), ..BASE },
            Case { decay: (-30.0, 0.0), ..BASE },
            Case { decay: (-30.0, -29.0), ..BASE },
            Case { by: By::Head, ..BASE },
            Case { by: By::Head, initial: false, tokens: 600, ..BASE },
        ],
    );
}

fn packed_sequences_are_right(engine: Engine) {
    let base = Case { batch: 1, tokens: 700, ..BASE };
    check(
        engine,
        &[
            Case { packed: Some(&[0, 64, 64, 65, 73, 140, 700]), ..base },
            Case { packed: Some(&[0, 64, 64, 65, 73, 140, 700]), initial: false, keys: 64, values: 48, ..base },
        ],
    );
}

/// One head and a long sequence: it is walked in segments.
fn segments_are_right(engine: Engine) {
    let base = Case { batch: 1, heads: 1, tokens: 2200, decay: (-0.1, 0.0), ..BASE };
    check(
        engine,
        &[
            base,
            Case { keys: 64, values: 128, initial: false, ..base },
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 32, values: 32, ..base },
        ],
    );
}

/// More narrow heads than processors: on Hopper two of them are walked side by side, where their number is even.
fn narrow_heads_are_right(engine: Engine) {
    let base = Case { batch: 1, tokens: 70, heads: 134, keys: 64, values: 64, ..BASE };
    check(
        engine,
        &[
            base,
            Case { heads: 135, ..base },
            Case { by: By::Head, initial: false, keys: 48, values: 32, ..base },
            Case { batch: 3, heads: 46, tokens: 131, keys: 16, values: 48, decay: (-30.0, 0.0), ..base },
            Case { heads: 34, tokens: 140, packed: Some(&[0, 64, 64, 65, 73, 140]), keys: 32, values: 32, ..base },
            // In segments.
            Case { heads: 68, tokens: 2100, keys: 16, values: 16, decay: (-0.1, 0.0), ..base },
        ],
    );
}

fn two_runs_are_equal_bit_for_bit(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for by in [By::Token, By::Key(DType::F32)] {
        for channels in [64, 128] {
            let case = Case { heads: 1, batch: 1, tokens: 2200, keys: channels, values: channels, by, ..BASE };
            assert_eq!(case.run(&device, Some(engine)), case.run(&device, Some(engine)));
        }
    }
}

/// They are walked as two heads each; 272 with 16 channels of zeros.
fn more_than_256_values_are_right(engine: Engine) {
    let packed: Option<&[usize]> = Some(&[0, 64, 64, 65, 140]);
    for by in [By::Head, By::Token, By::Key(DType::F32)] {
        check(
            engine,
            &[
                Case { values: 512, by, ..BASE },
                Case { keys: 48, values: 272, batch: 1, tokens: 140, packed, by, ..BASE },
            ],
        );
    }
}

fn every_length_is_right_by_key(engine: Engine) {
    let lengths = [2, 63, 64, 65, 131, 600];
    check(engine, &lengths.map(|tokens| Case { tokens, ..KEY }));
}

fn every_size_is_right_by_key(engine: Engine) {
    let sizes =
        [(16, 16), (64, 64), (128, 64), (64, 128), (48, 80), (96, 176), (128, 256), (256, 128), (192, 192), (256, 256)];
    check(
        engine,
        &sizes.map(|(keys, values)| Case { keys, values, batch: 1, tokens: 100, by: By::Key(DType::BF16), ..KEY }),
    );
}

/// Chunks are cut where the decay is strong: into 2, 4 and more spans.
fn every_decay_is_right_by_key(engine: Engine) {
    check(
        engine,
        &[
            Case { decay: (0.0, 0.0), ..KEY },
            Case { decay: (-4.0, 0.0), ..KEY },
            Case { decay: (-8.0, -1.0), ..KEY },
            Case { decay: (-30.0, 0.0), tokens: 600, ..KEY },
            Case { decay: (-30.0, 0.0), by: By::Key(DType::BF16), keys: 48, values: 80, ..KEY },
            Case { decay: (-30.0, 0.0), by: By::Key(DType::BF16), keys: 80, values: 48, ..KEY },
            Case { decay: (-30.0, -29.0), ..KEY },
            Case { decay: (-500.0, 0.0), ..KEY },
        ],
    );
}

fn packed_sequences_are_right_by_key(engine: Engine) {
    let base = Case { batch: 1, tokens: 700, packed: Some(&[0, 64, 64, 65, 73, 140, 700]), ..KEY };
    check(
        engine,
        &[
            base,
            Case { initial: false, keys: 64, values: 48, ..base },
            Case { initial: false, keys: 80, values: 48, ..base },
            Case { decay: (-20.0, 0.0), ..base },
        ],
    );
}

fn segments_are_right_by_key(engine: Engine) {
    let base = Case { batch: 1, heads: 1, tokens: 2200, decay: (-0.1, 0.0), ..KEY };
    check(
        engine,
        &[
            base,
            Case { keys: 64, values: 128, initial: false, ..base },
            Case { keys: 64, values: 256, initial: false, ..base },
            Case { decay: (-10.0, 0.0), ..base },
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 32, values: 32, ..base },
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 96, values: 32, ..base },
        ],
    );
}
