//! The recurrences with a decay by key channel: GLA, RWKV6, RWKV7, and the diagonal-plus-low-rank delta rule.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::{CuSeqlens, OpError, SequenceOptions, dplr, gla, rwkv6, rwkv7};
use burn_fla_tests::agree::{Input, assert_agree, assert_evaluations, assert_finite_differences, evaluate};
use burn_fla_tests::{numbers, reference_device};

use super::{flat, view};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Gla,
    Rwkv6,
    Dplr,
    Rwkv7,
}

const OPS: [Op; 4] = [Op::Gla, Op::Rwkv6, Op::Dplr, Op::Rwkv7];

/// A problem: sizes, decays, and how many sequences its states are for.
#[derive(Clone, Copy, Debug)]
struct Case {
    op: Op,
    b: usize,
    t: usize,
    h: usize,
    k: usize,
    v: usize,
    decay: (f64, f64),
    chunk: Option<usize>,
    sequences: usize,
}

impl Case {
    fn new(op: Op, [b, t, h, k, v]: [usize; 5]) -> Self {
        // RWKV7 keeps its log decays in this range.
        Self { op, b, t, h, k, v, decay: (-0.6065, 0.0), chunk: None, sequences: b }
    }

    /// Inputs in the order of the operator, the state last. The keys of a delta rule are about as long as a head of
    /// RWKV7 has them, so that no state grows without bound.
    fn inputs(&self) -> Vec<Input> {
        let keys = [self.b, self.t, self.h, self.k];
        let short = 1.5 / (self.k as f64).sqrt();
        let unit = (-1.0, 1.0);
        let mut inputs = vec![
            Input::new("q", &keys, unit),
            Input::new("k", &keys, unit),
            Input::new("v", &[self.b, self.t, self.h, self.v], unit),
            Input::new("decay", &keys, self.decay),
        ];
        match self.op {
            Op::Gla => {}
            Op::Rwkv6 => inputs.push(Input::new("bonus", &[self.h, self.k], unit)),
            Op::Dplr => {
                inputs.push(Input::new("a", &keys, (-short, short)));
                inputs.push(Input::new("b", &keys, (-short, short)));
            }
            Op::Rwkv7 => {
                inputs.push(Input::new("kk", &keys, (-short, short)));
                inputs.push(Input::new("rate", &keys, (0.0, 1.0)));
            }
        }
        inputs.push(Input::new("state", &[self.sequences, self.h, self.k, self.v], unit));
        inputs
    }

    /// The inputs by token, the bonus, and the state.
    fn tensors(&self, x: &[Tensor<1>]) -> (Vec<Tensor<4>>, Option<Tensor<2>>, Tensor<4>) {
        let keys = |x: &Tensor<1>| view(x, [self.b, self.t, self.h, self.k]);
        let mut tokens = vec![keys(&x[0]), keys(&x[1]), view(&x[2], [self.b, self.t, self.h, self.v]), keys(&x[3])];
        let mut bonus = None;
        match self.op {
            Op::Gla => {}
            Op::Rwkv6 => bonus = Some(view(&x[4], [self.h, self.k])),
            Op::Dplr | Op::Rwkv7 => tokens.extend([keys(&x[4]), keys(&x[5])]),
        }
        let state = view(x.last().expect("a state"), [self.sequences, self.h, self.k, self.v]);
        (tokens, bonus, state)
    }

    fn options(&self, state: Tensor<4>, packed: Option<&[usize]>) -> SequenceOptions {
        SequenceOptions {
            scale: Some(0.7),
            initial_state: Some(state),
            cu_seqlens: packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).expect("offsets")),
            chunk: self.chunk,
            ..Default::default()
        }
    }

    /// The public function.
    fn call(&self, tokens: &[Tensor<4>], bonus: Option<Tensor<2>>, options: SequenceOptions) -> (Tensor<4>, Tensor<4>) {
        let [q, k, v, g] = [0, 1, 2, 3].map(|i| tokens[i].clone());
        let second = |i: usize| tokens[i].clone();
        match self.op {
            Op::Gla => gla(q, k, v, g, options),
            Op::Rwkv6 => rwkv6(q, k, v, g, bonus.expect("a bonus"), options),
            Op::Dplr => dplr(q, k, v, second(4), second(5), g, options),
            Op::Rwkv7 => rwkv7(q, g, k, v, second(4), second(5), options),
        }
        .expect("a result")
    }

    fn run(&self, x: &[Tensor<1>], packed: Option<&[usize]>) -> Vec<Tensor<1>> {
        let (tokens, bonus, state) = self.tensors(x);
        let (o, end) = self.call(&tokens, bonus, self.options(state, packed));
        vec![flat(o), flat(end)]
    }

    /// The token recurrence.
    fn recurrence(&self, x: &[Tensor<1>]) -> Vec<Tensor<1>> {
        let (tokens, bonus, state) = self.tensors(x);
        let [q, k, v, g] = [0, 1, 2, 3].map(|i| tokens[i].clone());
        let (o, end) = match (self.op, bonus) {
            (Op::Gla, _) => burn_fla_ops::gla::reference::recurrent(q, k, v, g, 0.7, state),
            (Op::Rwkv6, Some(bonus)) => burn_fla_ops::rwkv6::reference::recurrent([q, k, v, g], bonus, 0.7, state),
            _ => {
                let (a, b) = (tokens[4].clone(), tokens[5].clone());
                let (a, b) = if self.op == Op::Rwkv7 { (a.clone().neg(), a * b) } else { (a, b) };
                burn_fla_ops::dplr::reference::recurrent([q, k, v, a, b, g], 0.7, state)
            }
        };
        vec![flat(o), flat(end)]
    }

    /// The chunked form and the recurrence, in f64.
    fn check(&self, bound: f64) {
        let what = format!("{self:?}");
        assert_agree(&what, &self.inputs(), bound, |x| self.run(x, None), |x| self.recurrence(x));
    }

    /// The chunked form in `dtype` and the recurrence in f64. The gradient of the decays is the difference of sums as
    /// large as the gradients of queries and keys, and is held to that scale: where nothing outlives a token it is 0 but
    /// for their rounding.
    fn check_in(&self, dtype: DType, inputs: &[Input], bound: f64) {
        let device = reference_device();
        let mut found = evaluate(inputs, &device, dtype, |x| self.run(x, None));
        let mut exact = evaluate(inputs, &device, DType::F64, |x| self.recurrence(x));
        for result in [&mut found, &mut exact] {
            let keys = result.gradients[1].clone();
            result.gradients[3].extend(keys);
        }
        let what = format!("{dtype:?}, {self:?}");
        assert_evaluations(&what, inputs, bound, &found, &exact);
    }
}

#[test]
fn chunks_follow_the_recurrence() {
    for op in OPS {
        for sizes in [[2, 1, 2, 5, 7], [1, 2, 1, 1, 1], [1, 63, 2, 5, 7], [1, 64, 1, 7, 5], [1, 65, 1, 100, 48]] {
            Case::new(op, sizes).check(1e-12);
        }
        Case::new(op, [2, 131, 2, 7, 5]).check(1e-12);
        // Chunks that no power of two divides, and the longest that RWKV7's decays allow in factors.
        for chunk in [1, 5, 23, 64] {
            Case { chunk: Some(chunk), ..Case::new(op, [1, 70, 1, 6, 5]) }.check(1e-12);
        }
    }
}

#[test]
fn every_range_of_decays_is_exact() {
    for op in OPS {
        // None, and RWKV7's; then those for which factors would leave the range of numbers.
        for decay in [(0.0, 0.0), (-3.0, 0.0), (-30.0, 0.0), (-30.0, -29.0), (-1000.0, 0.0)] {
            for chunk in [None, Some(64)] {
                let case = Case { decay, chunk, ..Case::new(op, [1, 70, 2, 6, 5]) };
                case.check_in(DType::F64, &case.inputs(), 1e-12);
            }
        }
    }
}

#[test]
fn f32_is_near_f64() {
    for op in OPS {
        for decay in [(-0.6065, 0.0), (-30.0, 0.0)] {
            let case = Case { decay, ..Case::new(op, [1, 131, 2, 32, 32]) };
            // The same numbers on both sides: those that f32 has.
            let mut inputs = case.inputs();
            inputs.iter_mut().for_each(|i| i.values.iter_mut().for_each(|x| *x = f64::from(*x as f32)));
            case.check_in(DType::F32, &inputs, 1e-5);
        }
    }
}

/// Powers of a triangle of ones would grow to 1e18 here, and cancel: the inverse must not be made of them.
#[test]
fn keys_that_repeat_do_not_harm_the_inverse() {
    let case = Case { decay: (0.0, 0.0), chunk: Some(64), ..Case::new(Op::Rwkv7, [1, 128, 1, 16, 8]) };
    let mut inputs = case.inputs();
    inputs[4].values.iter_mut().for_each(|x| *x = 0.25);
    inputs[5].values.iter_mut().for_each(|x| *x = 1.0);
    case.check_in(DType::F32, &inputs, 1e-5);
}

#[test]
fn packed_sequences_are_separate() {
    const OFFSETS: [usize; 6] = [0, 33, 33, 34, 41, 76];
    for op in OPS {
        let case = Case { sequences: OFFSETS.len() - 1, ..Case::new(op, [1, 76, 2, 5, 7]) };
        let separate = |x: &[Tensor<1>]| {
            let (tokens, bonus, state) = case.tensors(x);
            let (mut outputs, mut states) = (Vec::new(), Vec::new());
            for (i, window) in OFFSETS.windows(2).enumerate() {
                let state = state.clone().narrow(0, i, 1);
                if window[0] == window[1] {
                    states.push(state);
                    continue;
                }
                let piece: Vec<_> =
                    tokens.iter().map(|x| x.clone().narrow(1, window[0], window[1] - window[0])).collect();
                let (o, end) = case.call(&piece, bonus.clone(), case.options(state, None));
                outputs.push(o);
                states.push(end);
            }
            vec![flat(Tensor::cat(outputs, 1)), flat(Tensor::cat(states, 0))]
        };
        assert_agree(&format!("{op:?}, packed"), &case.inputs(), 1e-14, |x| case.run(x, Some(&OFFSETS)), separate);
    }
}

#[test]
fn a_sequence_goes_on_from_its_state() {
    for op in OPS {
        let case = Case::new(op, [2, 50, 2, 5, 7]);
        for first in [1, 17, 49] {
            let parts = |x: &[Tensor<1>]| {
                let (tokens, bonus, state) = case.tensors(x);
                let piece = |start, length| -> Vec<Tensor<4>> {
                    tokens.iter().map(|x| x.clone().narrow(1, start, length)).collect()
                };
                let (one, state) = case.call(&piece(0, first), bonus.clone(), case.options(state, None));
                let (two, state) = case.call(&piece(first, case.t - first), bonus, case.options(state, None));
                vec![flat(Tensor::cat(vec![one, two], 1)), flat(state)]
            };
            let what = format!("{op:?}, {first} tokens and the rest");
            assert_agree(&what, &case.inputs(), 1e-13, parts, |x| case.run(x, None));
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for op in OPS {
        let case = Case { chunk: Some(4), ..Case::new(op, [1, 6, 2, 3, 4]) };
        assert_finite_differences(&format!("{op:?}"), &case.inputs(), 12, 1e-8, |x| case.run(x, None));
    }
}

#[test]
fn bf16_is_computed_in_f32() {
    let device = reference_device();
    for op in OPS {
        let case = Case::new(op, [1, 40, 2, 6, 5]);
        let inputs = case.inputs();
        let run = |dtype: DType| {
            let leaves: Vec<Tensor<1>> = inputs
                .iter()
                .map(|i| burn_fla_tests::tensor(&i.values, [i.values.len()], &device, DType::BF16).cast(dtype))
                .collect();
            let (tokens, bonus, state) = case.tensors(&leaves);
            case.call(&tokens, bonus, case.options(state.cast(DType::F32), None))
        };
        let ((half, half_state), (single, state)) = (run(DType::BF16), run(DType::F32));
        assert_eq!((half.dtype(), half_state.dtype()), (DType::BF16, DType::F32));
        assert_eq!(numbers(half), numbers(single.cast(DType::BF16)), "{op:?}");
        assert_eq!(numbers(half_state), numbers(state), "{op:?}");
    }
}

#[test]
fn without_a_state_it_is_zero_and_without_tokens_it_stays() {
    let device = reference_device();
    for op in OPS {
        let case = Case::new(op, [2, 9, 2, 3, 4]);
        let leaves: Vec<Tensor<1>> = case
            .inputs()
            .iter()
            .map(|i| burn_fla_tests::tensor(&i.values, [i.values.len()], &device, DType::F64))
            .collect();
        let (tokens, bonus, state) = case.tensors(&leaves);
        let none = SequenceOptions { scale: Some(0.7), ..Default::default() };
        let zero = case.options(state.clone().zeros_like(), None);
        let (o, end) = case.call(&tokens, bonus.clone(), none);
        let (expected, expected_end) = case.call(&tokens, bonus.clone(), zero);
        assert_eq!((numbers(o), numbers(end)), (numbers(expected), numbers(expected_end)));
        let empty = |x: &Tensor<4>| Tensor::zeros([2, 0, 2, x.dims()[3]], (&device, DType::F64));
        let nothing: Vec<_> = tokens.iter().map(empty).collect();
        let (o, end) = case.call(&nothing, bonus, case.options(state.clone(), None));
        assert_eq!((o.dims(), numbers(end)), ([2, 0, 2, 4], numbers(state)));
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let x = |d: usize| Tensor::<4>::zeros([1, 3, 2, d], &device);
    let options = SequenceOptions::default;
    let bonus = |h: usize| Tensor::<2>::zeros([h, 4], &device);
    let is_shape = |error: OpError, name: &str| {
        assert!(matches!(error, OpError::Shape { argument, .. } if argument == name), "{error}");
    };
    is_shape(rwkv6(x(4), x(4), x(5), x(4), bonus(3), options()).unwrap_err(), "bonus");
    is_shape(rwkv6(x(4), x(5), x(5), x(4), bonus(2), options()).unwrap_err(), "k");
    is_shape(dplr(x(4), x(4), x(5), x(5), x(4), x(4), options()).unwrap_err(), "a");
    is_shape(dplr(x(4), x(4), x(5), x(4), x(3), x(4), options()).unwrap_err(), "b");
    is_shape(rwkv7(x(4), x(3), x(4), x(5), x(4), x(4), options()).unwrap_err(), "log_decay");
    is_shape(rwkv7(x(4), x(4), x(4), x(5), x(3), x(4), options()).unwrap_err(), "kk");
    let state = SequenceOptions { initial_state: Some(Tensor::zeros([2, 2, 4, 5], &device)), ..options() };
    is_shape(dplr(x(4), x(4), x(5), x(4), x(4), x(4), state).unwrap_err(), "initial_state");
    let half = || x(4).cast(DType::BF16);
    let error = dplr(x(4), x(4), x(5), half(), x(4), x(4), options()).unwrap_err();
    assert!(matches!(error, OpError::DType { argument: "a", .. }), "{error}");
    let error = rwkv7(half(), x(4), half(), x(5).cast(DType::BF16), half(), x(4), options()).unwrap_err();
    assert!(matches!(error, OpError::DType { op: "rwkv7", argument: "a", .. }), "{error}");
    let error = rwkv6(x(4), x(4), x(5), x(4), bonus(2).cast(DType::F16), options()).unwrap_err();
    assert!(matches!(error, OpError::DType { argument: "bonus", .. }), "{error}");
    let packed = SequenceOptions { cu_seqlens: Some(CuSeqlens::new(vec![0, 2]).unwrap()), ..options() };
    let error = rwkv6(x(4), x(4), x(5), x(4), bonus(2), packed).unwrap_err();
    assert!(error.to_string().contains("last offset is 2"), "{error}");
    let none = SequenceOptions { chunk: Some(0), ..options() };
    let error = rwkv7(x(4), x(4), x(4), x(5), x(4), x(4), none).unwrap_err();
    assert!(matches!(error, OpError::Option { option: "chunk", .. }), "{error}");
}
