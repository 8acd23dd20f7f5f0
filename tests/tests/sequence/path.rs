//! Attention with accumulated reflections against its token recurrence.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::path_attn::reference::recurrent;
use burn_fla_ops::{CuSeqlens, PathOptions, PathState, path_attn};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, reference_device};

use crate::{flat, view};

/// Sizes of a problem.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    groups: usize,
    width: usize,
    values: usize,
}

const BASE: Sizes = Sizes { batch: 2, tokens: 17, heads: 4, groups: 2, width: 5, values: 7 };

/// The tensors of a call, without a forget gate where there is none.
#[derive(Clone)]
struct Call {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    w: Tensor<4>,
    beta: Tensor<3>,
    gate: Option<Tensor<3>>,
}

impl Sizes {
    fn inputs(&self, gate: Option<(f64, f64)>) -> Vec<Input> {
        let Self { batch, tokens, heads, groups, width, values } = *self;
        // Vectors of length one, as the layer gives.
        let mut w = Input::new("w", &[batch, tokens, groups, width], (-1.0, 1.0));
        for vector in w.values.chunks_mut(width) {
            let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
            vector.iter_mut().for_each(|x| *x /= norm);
        }
        let mut inputs = vec![
            Input::new("q", &[batch, tokens, heads, width], (-2.0, 2.0)),
            Input::new("k", &[batch, tokens, groups, width], (-2.0, 2.0)),
            Input::new("v", &[batch, tokens, groups, values], (-1.0, 1.0)),
            w,
            Input::new("beta", &[batch, tokens, groups], (0.0, 2.0)),
        ];
        inputs.extend(gate.map(|range| Input::new("gate", &[batch, tokens, heads], range)));
        inputs
    }

    fn read(&self, x: &[Tensor<1>]) -> Call {
        let Self { batch, tokens, heads, groups, width, values } = *self;
        let key = [batch, tokens, groups, width];
        Call {
            q: view(&x[0], [batch, tokens, heads, width]),
            k: view(&x[1], key),
            v: view(&x[2], [batch, tokens, groups, values]),
            w: view(&x[3], key),
            beta: view(&x[4], [batch, tokens, groups]),
            gate: x.get(5).map(|gate| view(gate, [batch, tokens, heads])),
        }
    }
}

impl Call {
    fn narrow(&self, dim: usize, start: usize, length: usize) -> Self {
        let cut = |x: &Tensor<4>| x.clone().narrow(dim, start, length);
        let cut3 = |x: &Tensor<3>| x.clone().narrow(dim, start, length);
        Self {
            q: cut(&self.q),
            k: cut(&self.k),
            v: cut(&self.v),
            w: cut(&self.w),
            beta: cut3(&self.beta),
            gate: self.gate.as_ref().map(cut3),
        }
    }

    fn run(self, options: PathOptions) -> (Tensor<4>, PathState) {
        path_attn(self.q, self.k, self.v, self.w, self.beta, self.gate, options).expect("valid")
    }

    fn oracle(self, scale: f64) -> (Tensor<4>, Tensor<4>) {
        recurrent(self.q, self.k, self.v, self.w, self.beta, self.gate, scale)
    }
}

const GATES: [Option<(f64, f64)>; 3] = [None, Some((-1.0, 0.0)), Some((-200.0, 0.0))];

#[test]
fn the_chunked_form_is_the_token_recurrence() {
    let run = |sizes: Sizes, gate, chunk| {
        let options = PathOptions { scale: Some(0.6), chunk, ..Default::default() };
        assert_agree(
            &format!("{sizes:?}, gate {gate:?}, chunk {chunk:?}"),
            &sizes.inputs(gate),
            1e-11,
            |x| {
                let (o, state) = sizes.read(x).run(options.clone());
                vec![flat(o), flat(state.keys)]
            },
            |x| {
                let (o, keys) = sizes.read(x).oracle(0.6);
                vec![flat(o), flat(keys)]
            },
        );
    };
    for tokens in [1, 63, 64, 65, 131] {
        run(Sizes { batch: 1, tokens, ..BASE }, Some((-0.5, 0.0)), None);
    }
    for gate in GATES {
        run(BASE, gate, Some(4));
        run(BASE, gate, Some(1));
    }
    run(Sizes { batch: 1, heads: 3, groups: 1, width: 48, values: 5, ..BASE }, None, Some(8));
    run(Sizes { batch: 1, heads: 2, groups: 2, width: 100, values: 48, ..BASE }, None, Some(16));
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    const OFFSETS: [usize; 6] = [0, 20, 20, 21, 26, 60];
    let sizes = Sizes { batch: 1, tokens: 60, ..BASE };
    let cu = CuSeqlens::new(OFFSETS.to_vec()).expect("offsets");
    assert_agree(
        "packed",
        &sizes.inputs(Some((-1.0, 0.0))),
        1e-12,
        |x| {
            let options = PathOptions { cu_seqlens: Some(cu.clone()), chunk: Some(8), ..Default::default() };
            let (o, state) = sizes.read(x).run(options);
            vec![flat(o), flat(state.keys)]
        },
        |x| {
            let call = sizes.read(x);
            let filled = OFFSETS.windows(2).filter(|pair| pair[1] > pair[0]);
            let (o, keys) =
                filled.map(|pair| call.narrow(1, pair[0], pair[1] - pair[0]).oracle(5f64.powf(-0.5))).unzip();
            vec![flat(Tensor::cat(o, 1)), flat(Tensor::cat(keys, 1))]
        },
    );
}

#[test]
fn a_continued_sequence_is_the_whole() {
    for gate in GATES {
        assert_agree(
            &format!("gate {gate:?}"),
            &BASE.inputs(gate),
            1e-12,
            |x| {
                let call = BASE.read(x);
                let (mut outputs, mut initial) = (Vec::new(), None);
                for (start, length) in [(0, 1), (1, 1), (2, 10), (12, 5)] {
                    let options = PathOptions { initial, chunk: Some(4), ..Default::default() };
                    let (o, state) = call.narrow(1, start, length).run(options);
                    outputs.push(o);
                    initial = Some(state);
                }
                vec![flat(Tensor::cat(outputs, 1)), flat(initial.expect("a state").keys)]
            },
            |x| {
                let (o, keys) = BASE.read(x).oracle(5f64.powf(-0.5));
                vec![flat(o), flat(keys)]
            },
        );
    }
}

/// A row of fewer tokens stands behind zeros, which no query sees.
#[test]
fn rows_of_different_lengths_are_separate_rows() {
    let inputs = BASE.inputs(Some((-1.0, 0.0)));
    let first = 9;
    let row = |x: &[Tensor<1>], row: usize, skip: usize| {
        let call = BASE.read(x).narrow(0, row, 1);
        let before = call.narrow(1, skip, first - skip).run(PathOptions::default()).1;
        (before, call.narrow(1, first, 17 - first))
    };
    assert_agree(
        "lengths",
        &inputs,
        1e-12,
        |x| {
            let states = [0, 4].into_iter().enumerate().map(|(at, skip)| (skip, row(x, at, skip).0));
            let padded = |x: Tensor<4>, skip: usize| {
                let [b, _, heads, width] = x.dims();
                if skip == 0 {
                    return x;
                }
                Tensor::cat(vec![Tensor::zeros([b, skip, heads, width], (&x.device(), x.dtype())), x], 1)
            };
            let states: Vec<_> = states
                .map(|(skip, state)| {
                    let gate = state.log_forget.expect("gates").unsqueeze_dim::<4>(3);
                    [padded(state.keys, skip), padded(state.values, skip), padded(gate, skip)]
                })
                .collect();
            let rows = |part: usize| Tensor::cat(states.iter().map(|state| state[part].clone()).collect(), 0);
            let initial = PathState { keys: rows(0), values: rows(1), log_forget: Some(rows(2).squeeze_dim(3)) };
            let options = PathOptions {
                initial: Some(initial),
                lengths: Some(vec![17, 13]),
                chunk: Some(3),
                ..Default::default()
            };
            vec![flat(BASE.read(x).narrow(1, first, 17 - first).run(options).0)]
        },
        |x| {
            let rows = [0, 4].into_iter().enumerate().map(|(at, skip)| {
                let (initial, call) = row(x, at, skip);
                call.run(PathOptions { initial: Some(initial), ..Default::default() }).0
            });
            vec![flat(Tensor::cat(rows.collect(), 0))]
        },
    );
}

#[test]
fn gradients_are_finite_differences() {
    let sizes = Sizes { batch: 1, tokens: 9, ..BASE };
    assert_finite_differences("path_attn", &sizes.inputs(Some((-1.0, 0.0))), 12, 1e-7, |x| {
        let (o, state) = sizes.read(x).run(PathOptions { chunk: Some(4), ..Default::default() });
        vec![flat(o), flat(state.keys)]
    });
}

#[test]
fn bf16_inputs_are_computed_in_f32() {
    let mut inputs = BASE.inputs(None);
    for x in inputs.iter_mut().flat_map(|input| &mut input.values) {
        *x = (*x * 32.0).round() / 32.0;
    }
    let run = |dtype| {
        evaluate(&inputs, &reference_device(), dtype, |x| {
            let (o, state) = BASE.read(x).run(PathOptions::default());
            assert_eq!(o.dtype(), dtype);
            vec![flat(o), flat(state.keys)]
        })
    };
    let (exact, found) = (run(DType::F64), run(DType::BF16));
    // Half a unit in the last of 8 bits.
    assert_close("output", &found.outputs[0], &exact.outputs[0], 2e-3);
    assert_close("keys", &found.outputs[1], &exact.outputs[1], 1e-6);
}

#[test]
fn wrong_arguments_are_named() {
    let inputs = BASE.inputs(Some((-1.0, 0.0)));
    let device = reference_device();
    let tensors: Vec<Tensor<1>> = inputs
        .iter()
        .map(|input| burn_fla_tests::tensor(&input.values, [input.values.len()], &device, DType::F32))
        .collect();
    let call = BASE.read(&tensors);
    let error = |call: Call, options| {
        path_attn(call.q, call.k, call.v, call.w, call.beta, call.gate, options).expect_err("wrong").to_string()
    };
    let cut = |x: &Tensor<4>| x.clone().narrow(1, 0, 16);
    let message = error(Call { w: cut(&call.w), ..call.clone() }, PathOptions::default());
    assert!(message.contains("`w` has shape [2, 16, 2, 5]"), "{message}");
    let message = error(Call { k: cut(&call.k), ..call.clone() }, PathOptions::default());
    assert!(message.contains("`k`") || message.contains("`v`"), "{message}");
    let (_, state) = call.clone().run(PathOptions::default());
    let without = PathState { log_forget: None, ..state.clone() };
    let message = error(call.clone(), PathOptions { initial: Some(without), ..Default::default() });
    assert!(message.contains("`initial`"), "{message}");
    let message = error(call.clone(), PathOptions { lengths: Some(vec![17, 18]), ..Default::default() });
    assert!(message.contains("`lengths`"), "{message}");
    let message = error(call.clone(), PathOptions { chunk: Some(0), ..Default::default() });
    assert!(message.contains("`chunk`"), "{message}");
    let cu_seqlens = Some(CuSeqlens::new(vec![0, 17]).expect("offsets"));
    assert!(error(call, PathOptions { cu_seqlens, ..Default::default() }).contains("batch of 1"));
}
