//! The kernels of `running_softmax` and `logcumsumexp`, against their recurrences token by token in f64.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::{CuSeqlens, Engine, ScanOptions, bridge, logcumsumexp, running_softmax};
use burn_fla_tests::agree::{Evaluation, Input, evaluate, flat, view};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Softmax,
    LogSumExp,
}

/// What is before the first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Past {
    None,
    Numbers,
    /// −∞ in every other channel: nothing, said by a state.
    Mixed,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    channels: usize,
    range: f64,
    past: Past,
    packed: Option<&'static [usize]>,
    /// The outputs that the loss uses, bit by bit.
    used: usize,
}

const BASE: Case =
    Case { batch: 2, tokens: 70, channels: 6, range: 4.0, past: Past::Numbers, packed: None, used: 0b111 };

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [1, 63, 64, 65, 127, 128, 129, 131].map(|tokens| Case { tokens, ..BASE }).to_vec();
    cases.extend([1, 5, 31, 34, 70].map(|channels| Case { channels, past: Past::None, ..BASE }));
    cases.extend([
        Case { past: Past::Mixed, ..BASE },
        Case { tokens: 1, past: Past::None, ..BASE },
        // Cut into segments where whole sequences leave the device idle.
        Case { batch: 1, tokens: 1300, channels: 3, ..BASE },
        Case { batch: 1, tokens: 1300, channels: 34, past: Past::None, ..BASE },
        Case { batch: 1, tokens: 1500, packed: Some(&[0, 3, 3, 1153, 1500]), past: Past::Mixed, ..BASE },
        Case { batch: 1, tokens: 1500, packed: Some(&[0, 0, 1400, 1500]), past: Past::None, ..BASE },
        Case { tokens: 200, range: 80.0, ..BASE },
        Case { batch: 1, tokens: 1200, range: 80.0, past: Past::Mixed, ..BASE },
        Case { tokens: 200, range: 0.0, past: Past::None, ..BASE },
        Case { batch: 1, tokens: 140, packed: Some(&[0, 64, 64, 65, 73, 140]), ..BASE },
        Case { batch: 1, tokens: 140, packed: Some(&[0, 64, 64, 65, 73, 140]), past: Past::None, ..BASE },
        Case { batch: 1, tokens: 3, packed: Some(&[0, 1, 2, 3]), past: Past::Mixed, ..BASE },
    ]);
    cases.extend([0b001, 0b010, 0b100, 0b011].map(|used| Case { used, ..BASE }));
    cases.extend([0b001, 0b010, 0b100].map(|used| Case { used, batch: 1, tokens: 1200, ..BASE }));
    cases
}

impl Case {
    fn sequences(&self) -> usize {
        self.packed.map_or(self.batch, |offsets| offsets.len() - 1)
    }

    fn shapes(&self) -> ([usize; 3], [usize; 2]) {
        ([self.batch, self.tokens, self.channels], [self.sequences(), self.channels])
    }

    /// Numbers that f32 holds: what is compared is the arithmetic, not the rounding of the scores.
    fn inputs(&self) -> Vec<Input> {
        let (shape, state) = self.shapes();
        let mut inputs = vec![Input::new("scores", &shape, (-self.range, self.range))];
        if self.past != Past::None {
            inputs.push(Input::new("state", &state, (-1.0, 1.0)));
        }
        for input in &mut inputs {
            input.values.iter_mut().for_each(|x| *x = f64::from(*x as f32));
        }
        if self.past == Past::Mixed {
            inputs[1].values.iter_mut().step_by(2).for_each(|x| *x = f64::NEG_INFINITY);
        }
        inputs
    }

    fn public(&self, op: Op, x: &[Tensor<1>], engine: Engine) -> Vec<Tensor<1>> {
        let (shape, state) = self.shapes();
        let options = ScanOptions {
            initial_state: x.get(1).map(|x| view(x, state)),
            cu_seqlens: self.packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap()),
            engine,
        };
        let scores = view(&x[0], shape);
        let outputs = match op {
            Op::Softmax => {
                let (weights, log_decay, end) = running_softmax(scores, options).unwrap();
                vec![flat(weights), flat(log_decay), flat(finite(end))]
            }
            Op::LogSumExp => {
                let (z, end) = logcumsumexp(scores, options).unwrap();
                vec![flat(z), flat(finite(end))]
            }
        };
        self.of_loss(op, outputs)
    }

    /// Token by token, sequence by sequence.
    fn recurrent(&self, op: Op, x: &[Tensor<1>]) -> Vec<Tensor<1>> {
        let (shape, state) = self.shapes();
        let scores: Tensor<3> = view(&x[0], shape);
        let nothing = Tensor::full(state, f64::NEG_INFINITY, (&scores.device(), scores.dtype()));
        let state = x.get(1).map_or(nothing, |x| view(x, state));
        let windows: Vec<[usize; 2]> = match self.packed {
            Some(offsets) => offsets.windows(2).map(|w| [w[0], w[1]]).collect(),
            None => vec![[0, self.tokens]],
        };
        let rows = if self.packed.is_some() { 1 } else { self.batch };
        let mut found: Vec<Vec<Tensor<3>>> = Vec::new();
        let mut ends = Vec::new();
        for (i, [start, end]) in windows.into_iter().enumerate() {
            let before = state.clone().narrow(0, i * rows, rows);
            if start == end {
                ends.push(before);
                continue;
            }
            let piece = scores.clone().narrow(1, start, end - start);
            let (outputs, after) = match op {
                Op::Softmax => {
                    let (w, g, end) = burn_fla_ops::running_softmax::reference::recurrent(piece, before);
                    (vec![w, g], end)
                }
                Op::LogSumExp => {
                    let (z, end) = burn_fla_ops::logcumsumexp::reference::recurrent(piece, before);
                    (vec![z], end)
                }
            };
            found.push(outputs);
            ends.push(after);
        }
        let count = found[0].len();
        let joined = (0..count).map(|i| flat(Tensor::cat(found.iter().map(|piece| piece[i].clone()).collect(), 1)));
        let outputs = joined.chain([flat(finite(Tensor::cat(ends, 0)))]).collect();
        self.of_loss(op, outputs)
    }

    /// The outputs that the loss uses; the normaliser has no third.
    fn of_loss(&self, op: Op, outputs: Vec<Tensor<1>>) -> Vec<Tensor<1>> {
        let used = if op == Op::LogSumExp && self.used & 0b011 == 0 { 0b010 } else { self.used };
        outputs.into_iter().enumerate().filter(|(i, _)| used >> i & 1 == 1).map(|(_, x)| x).collect()
    }
}

/// The state of a sequence without tokens may be −∞, which cannot be multiplied by a weight of the loss.
fn finite(end: Tensor<2>) -> Tensor<2> {
    let nothing = end.clone().equal_elem(f64::NEG_INFINITY);
    end.mask_fill(nothing, 1e4)
}

fn compare(what: &str, inputs: &[Input], found: &Evaluation, exact: &Evaluation, bound: f64) {
    for (i, (a, b)) in found.outputs.iter().zip(&exact.outputs).enumerate() {
        assert_close(&format!("{what}, output {i}"), a, b, bound);
    }
    for (input, (a, b)) in inputs.iter().zip(found.gradients.iter().zip(&exact.gradients)) {
        // A gradient that one side does not have is zero.
        let size = a.len().max(b.len());
        let full = |x: &[f64]| x.iter().copied().chain(std::iter::repeat(0.0)).take(size).collect::<Vec<f64>>();
        let (a, b) = (full(a), full(b));
        if b.iter().all(|b| *b == 0.0) {
            assert!(a.iter().all(|a| a.abs() < 1e-6), "{what}, gradient of {}: {a:?}", input.name);
            continue;
        }
        assert_close(&format!("{what}, gradient of {}", input.name), &a, &b, bound);
    }
}

#[test]
fn kernels_equal_the_recurrence() {
    bridge::poison_outputs(true);
    for (name, device) in kernel_devices() {
        for case in cases() {
            for op in [Op::Softmax, Op::LogSumExp] {
                let inputs = case.inputs();
                let exact = evaluate(&inputs, &reference_device(), DType::F64, |x| case.recurrent(op, x));
                let found = evaluate(&inputs, &device, DType::F32, |x| case.public(op, x, Engine::Auto));
                // A difference of scores of 80 is known to 160 · 2⁻²⁵.
                let bound = if case.range > 10.0 { 5e-6 } else { 2e-6 };
                compare(&format!("{name}, {op:?}, {case:?}"), &inputs, &found, &exact, bound);
            }
        }
    }
}

#[test]
fn the_reference_stays_reachable() {
    for (name, device) in kernel_devices() {
        let inputs = BASE.inputs();
        for op in [Op::Softmax, Op::LogSumExp] {
            let run = |engine| evaluate(&inputs, &device, DType::F32, |x| BASE.public(op, x, engine));
            let (kernels, reference) = (run(Engine::Auto), run(Engine::Reference));
            compare(&format!("{name}, {op:?}"), &inputs, &kernels, &reference, 1e-5);
            assert_ne!(kernels.outputs, reference.outputs, "{name}, {op:?}: one of them is not what it should be");
        }
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    for (_, device) in kernel_devices() {
        for case in [BASE, Case { batch: 1, tokens: 1300, ..BASE }] {
            for op in [Op::Softmax, Op::LogSumExp] {
                let run = || evaluate(&case.inputs(), &device, DType::F32, |x| case.public(op, x, Engine::Auto));
                let (first, second) = (run(), run());
                assert_eq!((first.outputs, first.gradients), (second.outputs, second.gradients), "{op:?}");
            }
        }
    }
}

/// All scores equal: `w_t = 1 / t`, `z_t = log t`, where a rounded logarithm of the sum would lose what a token adds.
#[test]
fn a_long_sequence_of_equal_scores_keeps_its_digits() {
    let tokens = 6000;
    for (name, device) in kernel_devices() {
        for score in [0.0, 80.0] {
            let scores: Tensor<3> = Tensor::full([1, tokens, 2], score, (&device, DType::F32));
            let (weights, log_decay, end) = running_softmax(scores, ScanOptions::default()).unwrap();
            let by_token =
                |f: &dyn Fn(f64) -> f64| -> Vec<f64> { (1..=tokens).flat_map(|t| [f(t as f64); 2]).collect() };
            let what = format!("{name}, scores of {score}");
            let (weights, log_decay) = (numbers(weights), numbers(log_decay));
            let late = 2 * (tokens - 1000);
            let exact = by_token(&|t| 1.0 / t);
            assert_close(&format!("{what}, weights"), &weights[late..], &exact[late..], 2e-6);
            let exact = by_token(&|t| if t > 1.0 { ((t - 1.0) / t).ln() } else { 0.0 });
            assert_close(&format!("{what}, log decays"), &log_decay[late..], &exact[late..], 2e-6);
            assert_close(&format!("{what}, the end"), &numbers(end), &[score + (tokens as f64).ln(); 2], 1e-6);
        }
    }
}

/// Nothing overflows and no gradient is lost, whatever the scores are: up to ±10³⁷ in one channel.
#[test]
fn extreme_scores() {
    let values = [-1e37, -1e37, 50.0, -1e30, 90.0, 1e37, -1e37, 1e37];
    let inputs = [Input { name: "scores", values: values.to_vec() }];
    for (name, device) in kernel_devices() {
        let found = evaluate(&inputs, &device, DType::F32, |x| {
            let (z, end) = logcumsumexp(view(&x[0], [1, 8, 1]), ScanOptions::default()).unwrap();
            vec![flat(z), flat(end)]
        });
        let z = [-1e37, -1e37, 50.0, 50.0, 90.0, 1e37, 1e37, 1e37].map(|z: f64| f64::from(z as f32));
        assert_close(&format!("{name}, the normaliser"), &found.outputs[0], &z, 1e-6);
        assert!(found.gradients[0].iter().all(|g| g.is_finite()), "{name}: {:?}", found.gradients[0]);
        let scores = tensor(&values, [1, 8, 1], &device, DType::F32);
        let (weights, log_decay, _) = running_softmax(scores, ScanOptions::default()).unwrap();
        let expected = [1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.0, 0.5];
        assert_close(&format!("{name}, weights"), &numbers(weights), &expected, 1e-6);
        assert!(numbers(log_decay).iter().all(|g| *g <= 0.0 && !g.is_nan()), "{name}");
    }
}

/// bf16 scores are computed in f32 and rounded once.
#[test]
fn bf16_is_computed_in_f32() {
    for (name, device) in kernel_devices() {
        if !device.supports_dtype(DType::BF16) {
            continue;
        }
        for case in [BASE, Case { channels: 7, ..BASE }, Case { batch: 1, tokens: 1300, ..BASE }] {
            let (shape, _) = case.shapes();
            let narrow: Tensor<3> = tensor(&case.inputs()[0].values, shape, &device, DType::BF16);
            let wide = narrow.clone().cast(DType::F32);
            let (weights, log_decay, end) = running_softmax(narrow, ScanOptions::default()).unwrap();
            let (exact, exact_decay, exact_end) = running_softmax(wide, ScanOptions::default()).unwrap();
            assert_eq!(weights.dtype(), DType::BF16);
            assert_eq!(numbers(weights), numbers(exact.cast(DType::BF16)), "{name}: weights");
            assert_eq!(numbers(log_decay), numbers(exact_decay), "{name}: log decays");
            assert_eq!(numbers(end), numbers(exact_end), "{name}: the end");
        }
    }
}
