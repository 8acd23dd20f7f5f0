//! Linear attention with and without its normaliser, and the two polynomial kernels.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::linear_attn::reference as linear;
use burn_fla_ops::{CuSeqlens, OpError, SequenceOptions, based, linear_attn, rebased};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, reference_device};

use crate::{flat, view};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Linear,
    Normalized,
    Based,
    Rebased,
}

const OPS: [Op; 4] = [Op::Linear, Op::Normalized, Op::Based, Op::Rebased];

impl Op {
    fn apply(
        self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: SequenceOptions,
    ) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        match self {
            Self::Linear => linear_attn(q, k, v, false, options),
            Self::Normalized => linear_attn(q, k, v, true, options),
            Self::Based => based(q, k, v, options),
            Self::Rebased => rebased(q, k, v, 1e-5, options),
        }
    }

    /// Token by token, from a state as the operator's own.
    fn recurrent(self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [b, t, h, keys] = q.dims();
        let values = v.dims()[3];
        let scale = (keys as f64).powf(-0.5);
        match self {
            Self::Linear => {
                let none = Tensor::zeros([b, t, h], (&q.device(), q.dtype()));
                burn_fla_ops::simple_gla::reference::recurrent(q, k, v, none, scale, state)
            }
            Self::Normalized => {
                let z = state.clone().narrow(3, values, 1).reshape([b, h, keys]);
                let (o, s, z) = linear::recurrent(q, k, v, scale, 1e-10, state.narrow(3, 0, values), z);
                (o, Tensor::cat(vec![s, z.reshape([b, h, keys, 1])], 3))
            }
            Self::Based => burn_fla_ops::based::reference::recurrent(q, k, v, scale, Some(state)),
            Self::Rebased => burn_fla_ops::rebased::reference::recurrent(q, k, v, scale, 1e-5, Some(state)),
        }
    }
}

/// Sizes of a problem.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
}

impl Sizes {
    fn state(&self, op: Op, sequences: usize) -> [usize; 4] {
        let (rows, columns) = match op {
            Op::Linear => (self.keys, self.values),
            Op::Normalized => (self.keys, self.values + 1),
            Op::Based => (burn_fla_ops::based::features(self.keys), self.values + 1),
            Op::Rebased => (burn_fla_ops::rebased::features(self.keys), self.values + 1),
        };
        [sequences, self.heads, rows, columns]
    }

    fn keys(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.heads, self.keys]
    }

    fn values(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.heads, self.values]
    }

    /// q, k, v and the state of `sequences` sequences. A normaliser is a sum of products of positive features; the state
    /// is one that tokens could have left behind.
    fn inputs(&self, op: Op, sequences: usize) -> Vec<Input> {
        let keys = if op == Op::Normalized { (0.1, 1.0) } else { (-1.0, 1.0) };
        let mut inputs = vec![
            Input::new("q", &self.keys(), keys),
            Input::new("k", &self.keys(), keys),
            Input::new("v", &self.values(), (-1.0, 1.0)),
        ];
        let shape = self.state(op, sequences);
        let device = reference_device();
        let before = Sizes { batch: sequences, tokens: 3, ..*self };
        let draw = |name, shape: [usize; 4]| {
            let input = Input::new(name, &shape, keys);
            burn_fla_tests::tensor::<4>(&input.values, shape, &device, DType::F64)
        };
        let zero = Tensor::zeros(shape, (&device, DType::F64));
        let (_, state) =
            op.recurrent(draw("a", before.keys()), draw("b", before.keys()), draw("c", before.values()), zero);
        inputs.push(Input { name: "state", values: burn_fla_tests::numbers(state) });
        inputs
    }
}

const EDGES: [usize; 5] = [1, 63, 64, 65, 131];

#[test]
fn the_chunked_forms_are_the_token_recurrences() {
    let run = |op: Op, sizes: Sizes, chunk: Option<usize>| {
        let state = sizes.state(op, sizes.batch);
        let (keys, values) = (sizes.keys(), sizes.values());
        let what = format!("{op:?}, {} tokens, {} keys, chunk {chunk:?}", sizes.tokens, sizes.keys);
        assert_agree(
            &what,
            &sizes.inputs(op, sizes.batch),
            1e-11,
            |x| {
                let options = SequenceOptions { initial_state: Some(view(&x[3], state)), chunk, ..Default::default() };
                let (o, end) =
                    op.apply(view(&x[0], keys), view(&x[1], keys), view(&x[2], values), options).expect("valid");
                vec![flat(o), flat(end)]
            },
            |x| {
                let (o, end) =
                    op.recurrent(view(&x[0], keys), view(&x[1], keys), view(&x[2], values), view(&x[3], state));
                vec![flat(o), flat(end)]
            },
        );
    };
    for op in OPS {
        for tokens in EDGES {
            run(op, Sizes { batch: 2, tokens, heads: 2, keys: 5, values: 7 }, Some(64));
        }
        run(op, Sizes { batch: 1, tokens: 131, heads: 1, keys: 5, values: 7 }, None);
        run(op, Sizes { batch: 1, tokens: 65, heads: 1, keys: 48, values: 3 }, Some(32));
    }
    for op in [Op::Linear, Op::Normalized] {
        run(op, Sizes { batch: 1, tokens: 65, heads: 1, keys: 100, values: 48 }, None);
    }
}

/// The equation as it stands, without features: what a layer with the parallel form computes.
#[test]
fn the_polynomial_kernels_are_the_quadratic_form() {
    for op in [Op::Based, Op::Rebased] {
        for (tokens, keys, values, chunk) in
            [(1, 5, 7, None), (131, 16, 9, Some(32)), (200, 16, 9, None), (9, 100, 48, Some(4))]
        {
            let sizes = Sizes { batch: 1, tokens, heads: 2, keys, values };
            let (keys, values) = (sizes.keys(), sizes.values());
            let mut inputs = sizes.inputs(op, 1);
            inputs.pop();
            let scale = 0.3;
            assert_agree(
                &format!("{op:?}, {tokens} tokens"),
                &inputs,
                // rebased divides by sums of squares that begin near zero.
                1e-10,
                |x| {
                    let options = SequenceOptions { scale: Some(scale), chunk, ..Default::default() };
                    let (o, _) =
                        op.apply(view(&x[0], keys), view(&x[1], keys), view(&x[2], values), options).expect("valid");
                    vec![flat(o)]
                },
                |x| {
                    let [q, k] = [0, 1].map(|i| view(&x[i], keys));
                    let v = view(&x[2], values);
                    let o = match op {
                        Op::Based => burn_fla_ops::based::reference::parallel(q, k, v, scale),
                        _ => burn_fla_ops::rebased::reference::parallel(q, k, v, scale, 1e-5),
                    };
                    vec![flat(o.expect("valid"))]
                },
            );
        }
    }
}

#[test]
fn packed_sequences_are_separate_sequences() {
    const OFFSETS: [usize; 6] = [0, 66, 66, 67, 72, 90];
    let cu = CuSeqlens::new(OFFSETS.to_vec()).expect("offsets");
    for op in OPS {
        let sizes = Sizes { batch: 1, tokens: 90, heads: 2, keys: 5, values: 7 };
        let state = sizes.state(op, 5);
        let (keys, values) = (sizes.keys(), sizes.values());
        assert_agree(
            &format!("{op:?}"),
            &sizes.inputs(op, 5),
            1e-12,
            |x| {
                let options = SequenceOptions {
                    initial_state: Some(view(&x[3], state)),
                    cu_seqlens: Some(cu.clone()),
                    ..Default::default()
                };
                let (o, end) =
                    op.apply(view(&x[0], keys), view(&x[1], keys), view(&x[2], values), options).expect("valid");
                vec![flat(o), flat(end)]
            },
            |x| {
                let (mut outputs, mut ends) = (Vec::new(), Vec::new());
                for (i, pair) in OFFSETS.windows(2).enumerate() {
                    let state = view(&x[3], state).narrow(0, i, 1);
                    let length = pair[1] - pair[0];
                    if length == 0 {
                        ends.push(state);
                        continue;
                    }
                    let part = |x: Tensor<4>| x.narrow(1, pair[0], length);
                    let options = SequenceOptions { initial_state: Some(state), ..Default::default() };
                    let (o, end) = op
                        .apply(part(view(&x[0], keys)), part(view(&x[1], keys)), part(view(&x[2], values)), options)
                        .expect("valid");
                    outputs.push(o);
                    ends.push(end);
                }
                vec![flat(Tensor::cat(outputs, 1)), flat(Tensor::cat(ends, 0))]
            },
        );
    }
}

#[test]
fn a_continued_sequence_is_the_whole() {
    for op in OPS {
        let sizes = Sizes { batch: 2, tokens: 90, heads: 2, keys: 5, values: 7 };
        let (keys, values) = (sizes.keys(), sizes.values());
        let mut inputs = sizes.inputs(op, 2);
        inputs.pop();
        let pieces = |x: &[Tensor<1>], cuts: &[usize]| {
            let (mut outputs, mut state) = (Vec::new(), None);
            for pair in cuts.windows(2) {
                let part = |x: Tensor<4>| x.narrow(1, pair[0], pair[1] - pair[0]);
                let options = SequenceOptions { initial_state: state, ..Default::default() };
                let (o, end) = op
                    .apply(part(view(&x[0], keys)), part(view(&x[1], keys)), part(view(&x[2], values)), options)
                    .expect("valid");
                outputs.push(o);
                state = Some(end);
            }
            vec![flat(Tensor::cat(outputs, 1)), flat(state.expect("a state"))]
        };
        // rebased meets sums near zero in its first tokens, there in two roundings.
        let bound = if op == Op::Rebased { 1e-8 } else { 1e-11 };
        assert_agree(&format!("{op:?}"), &inputs, bound, |x| pieces(x, &[0, 90]), |x| pieces(x, &[0, 1, 2, 70, 90]));
    }
}

#[test]
fn gradients_are_finite_differences() {
    for op in OPS {
        let sizes = Sizes { batch: 1, tokens: 5, heads: 2, keys: 3, values: 4 };
        let state = sizes.state(op, 1);
        let (keys, values) = (sizes.keys(), sizes.values());
        // Central differences of step 1e-5 are exact to about the square of it.
        assert_finite_differences(&format!("{op:?}"), &sizes.inputs(op, 1), 12, 1e-7, |x| {
            let options =
                SequenceOptions { initial_state: Some(view(&x[3], state)), chunk: Some(2), ..Default::default() };
            let (o, end) = op.apply(view(&x[0], keys), view(&x[1], keys), view(&x[2], values), options).expect("valid");
            vec![flat(o), flat(end)]
        });
    }
}

/// The first token attends to itself: where its query is orthogonal to its key, the ε of the denominator decides, and f32
/// must square a small score, not cancel a sum.
#[test]
fn rebased_keeps_small_scores_in_f32() {
    let shape = [1, 80, 1, 16];
    let mut inputs = vec![
        Input::new("q", &shape, (-2.0, 2.0)),
        Input::new("k", &shape, (-2.0, 2.0)),
        Input::new("v", &shape, (-1.0, 1.0)),
    ];
    // q₀ · k₀ = 0.004.
    for channel in 0..16 {
        inputs[0].values[channel] = if channel % 2 == 0 { 1.5 } else { 1.499 };
        inputs[1].values[channel] = if channel % 2 == 0 { 0.5 } else { -0.5 };
    }
    let run = |dtype| {
        evaluate(&inputs, &reference_device(), dtype, |x| {
            let [q, k, v] = [0, 1, 2].map(|i| view(&x[i], shape));
            vec![flat(rebased(q, k, v, 1e-5, SequenceOptions::default()).expect("valid").0)]
        })
    };
    let (exact, found) = (run(DType::F64), run(DType::F32));
    // The score itself is a sum of 16 products of 0.75 and has 1e-7 · 12 / 0.004 = 3e-4 of its digits left in f32.
    assert_close("the first token", &found.outputs[0][..16], &exact.outputs[0][..16], 1e-3);
    assert_close("all tokens", &found.outputs[0], &exact.outputs[0], 1e-5);
}

#[test]
fn bf16_inputs_are_computed_in_f32() {
    for op in OPS {
        let sizes = Sizes { batch: 1, tokens: 70, heads: 2, keys: 16, values: 8 };
        let mut inputs = sizes.inputs(op, 1);
        inputs.pop();
        // Numbers that bf16 holds.
        for input in &mut inputs {
            for x in &mut input.values {
                *x = (*x * 64.0).round() / 64.0;
            }
        }
        let run = |dtype| {
            let (keys, values) = (sizes.keys(), sizes.values());
            evaluate(&inputs, &reference_device(), dtype, |x| {
                let [q, k] = [0, 1].map(|i| view(&x[i], keys));
                let (o, end) = op.apply(q, k, view(&x[2], values), SequenceOptions::default()).expect("valid");
                assert_eq!((o.dtype(), end.dtype()), (dtype, if dtype == DType::F64 { dtype } else { DType::F32 }));
                vec![flat(o), flat(end)]
            })
        };
        let (exact, found) = (run(DType::F64), run(DType::BF16));
        // Half a unit in the last of 8 bits.
        assert_close(&format!("{op:?}, output"), &found.outputs[0], &exact.outputs[0], 2e-3);
        assert_close(&format!("{op:?}, state"), &found.outputs[1], &exact.outputs[1], 1e-6);
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, (&device, DType::F32));
    let good = || zeros([2, 3, 2, 4]);
    for op in OPS {
        let error = |q, k, v, options| op.apply(q, k, v, options).expect_err("wrong").to_string();
        let message = error(good(), zeros([2, 3, 2, 5]), good(), SequenceOptions::default());
        assert!(message.contains("`k` has shape [2, 3, 2, 5]"), "{message}");
        let message = error(good(), good(), good().cast(DType::BF16), SequenceOptions::default());
        assert!(message.contains("`v` is BF16"), "{message}");
        let state = zeros([2, 2, 4, 99]);
        let options = SequenceOptions { initial_state: Some(state), ..Default::default() };
        let message = error(good(), good(), good(), options);
        assert!(message.contains("`initial_state` has shape [2, 2, 4, 99]"), "{message}");
        let options =
            SequenceOptions { cu_seqlens: Some(CuSeqlens::new(vec![0, 3]).expect("offsets")), ..Default::default() };
        assert!(error(good(), good(), good(), options).contains("batch of 1"));
        let options = SequenceOptions { chunk: Some(0), ..Default::default() };
        assert!(error(good(), good(), good(), options).contains("`chunk`"));
        let message = error(zeros([2, 3, 2, 0]), zeros([2, 3, 2, 0]), good(), SequenceOptions::default());
        assert!(message.contains("at least one row"), "{message}");
        // No token is no error: the state passes through.
        let state =
            Tensor::<4>::ones(Sizes { batch: 2, tokens: 0, heads: 2, keys: 4, values: 4 }.state(op, 2), &device);
        let options = SequenceOptions { initial_state: Some(state.clone()), ..Default::default() };
        let empty = || zeros([2, 0, 2, 4]);
        let (o, end) = op.apply(empty(), empty(), empty(), options).expect("valid");
        assert_eq!(o.dims(), [2, 0, 2, 4]);
        assert_eq!(burn_fla_tests::numbers(end), burn_fla_tests::numbers(state));
    }
}
