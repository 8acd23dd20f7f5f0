//! The slot memories: `gsa`, whose weights and decays are given, and `abc`, whose are those of a running softmax.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::abc::reference as abc_reference;
use burn_fla_ops::gsa::reference as gsa_reference;
use burn_fla_ops::{AbcOptions, AbcState, CuSeqlens, GsaOptions, GsaState, OpError, abc, gsa};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor};

use super::{flat, view};

/// Chunks against token by token, in f64.
const BOUND: f64 = 1e-12;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
    slots: usize,
    /// 1 for each row, or as many as are packed.
    sequences: usize,
}

impl Sizes {
    const SMALL: Self = Self { batch: 2, tokens: 64, heads: 2, keys: 5, values: 7, slots: 6, sequences: 2 };

    /// Inputs and states of one of the operators: q, k, v, s (and g), then keys and values (and z).
    fn shapes(&self, op: Op) -> Vec<(&'static str, [usize; 4])> {
        let &Sizes { batch, tokens, heads, keys, values, slots, sequences } = self;
        let token = |width| [batch, tokens, heads, width];
        let mut shapes = vec![("q", token(keys)), ("k", token(keys)), ("v", token(values)), ("s", token(slots))];
        if op == Op::Gsa {
            shapes.push(("log_decay", token(slots)));
        }
        shapes.extend([
            ("state keys", [sequences, heads, keys, slots]),
            ("state values", [sequences, heads, slots, values]),
        ]);
        if op == Op::Abc {
            shapes.push(("normaliser", [sequences, heads, slots, 1]));
        }
        shapes
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Gsa,
    Abc,
}

/// Outputs, and the state as a list.
type Outputs = (Tensor<4>, Vec<Tensor<4>>);

const SCALE: f64 = 0.7;

impl Op {
    const BOTH: [Self; 2] = [Self::Gsa, Self::Abc];

    /// How many inputs have tokens.
    fn inputs(self) -> usize {
        if self == Self::Gsa { 5 } else { 4 }
    }

    fn draw(self, sizes: Sizes, decay: (f64, f64)) -> Vec<Input> {
        let range = |name| match (name, self) {
            ("log_decay", _) => decay,
            ("s", Self::Gsa) => (0.0, 1.0),
            ("s", Self::Abc) => (-4.0, 4.0),
            _ => (-1.0, 1.0),
        };
        sizes.shapes(self).into_iter().map(|(name, shape)| Input::new(name, &shape, range(name))).collect()
    }

    /// The inputs with tokens, and the state.
    fn split(self, x: &[Tensor<1>], sizes: Sizes) -> (Vec<Tensor<4>>, Vec<Tensor<4>>) {
        let shapes = sizes.shapes(self);
        let mut x: Vec<Tensor<4>> = x.iter().zip(shapes).map(|(x, (_, shape))| view(x, shape)).collect();
        let state = x.split_off(self.inputs());
        (x, state)
    }

    fn run(
        self,
        x: &[Tensor<4>],
        state: Option<Vec<Tensor<4>>>,
        packed: Option<&[usize]>,
        chunk: Option<usize>,
    ) -> Outputs {
        let cu_seqlens = packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap());
        let [q, k, v, s] = [0, 1, 2, 3].map(|i| x[i].clone());
        let scale = Some(SCALE);
        match self {
            Self::Gsa => {
                let initial_state = state.map(|state| GsaState { keys: state[0].clone(), values: state[1].clone() });
                let options = GsaOptions { scale, initial_state, cu_seqlens, chunk, ..Default::default() };
                let (o, state) = gsa(q, k, v, s, x[4].clone(), options).unwrap();
                (o, vec![state.keys, state.values])
            }
            Self::Abc => {
                let initial_state = state.map(|state| abc_state(&state));
                let options = AbcOptions { scale, initial_state, cu_seqlens, chunk, ..Default::default() };
                let (o, state) = abc(q, k, v, s, options).unwrap();
                abc_outputs(o, state)
            }
        }
    }

    fn recurrent(self, x: &[Tensor<4>], state: Vec<Tensor<4>>) -> Outputs {
        let [q, k, v, s] = [0, 1, 2, 3].map(|i| x[i].clone());
        match self {
            Self::Gsa => {
                let state = GsaState { keys: state[0].clone(), values: state[1].clone() };
                let (o, state) = gsa_reference::recurrent(q, k, v, s, x[4].clone(), SCALE, state);
                (o, vec![state.keys, state.values])
            }
            Self::Abc => {
                let (o, state) = abc_reference::recurrent(q, k, v, s, SCALE, abc_state(&state));
                abc_outputs(o, state)
            }
        }
    }
}

fn abc_state(state: &[Tensor<4>]) -> AbcState {
    let [n, h, m, _] = state[2].dims();
    AbcState { keys: state[0].clone(), values: state[1].clone(), normaliser: state[2].clone().reshape([n, h, m]) }
}

fn abc_outputs(o: Tensor<4>, state: AbcState) -> Outputs {
    let [n, h, m] = state.normaliser.dims();
    (o, vec![state.keys, state.values, state.normaliser.reshape([n, h, m, 1])])
}

fn flatten((o, state): Outputs) -> Vec<Tensor<1>> {
    [o].into_iter().chain(state).map(flat).collect()
}

/// The operator against its recurrence.
fn check(what: &str, op: Op, sizes: Sizes, decay: (f64, f64), chunk: Option<usize>) {
    assert_agree(
        &format!("{op:?}, {what}"),
        &op.draw(sizes, decay),
        BOUND,
        |x| {
            let (x, state) = op.split(x, sizes);
            flatten(op.run(&x, Some(state), None, chunk))
        },
        |x| {
            let (x, state) = op.split(x, sizes);
            flatten(op.recurrent(&x, state))
        },
    );
}

#[test]
fn chunks_equal_token_by_token() {
    for op in Op::BOTH {
        for tokens in [1, 63, 64, 65, 131] {
            let sizes = Sizes { tokens, ..Sizes::SMALL };
            check(&format!("{tokens} tokens"), op, sizes, (-0.5, 0.0), None);
        }
        let one = Sizes { batch: 1, heads: 1, sequences: 1, ..Sizes::SMALL };
        check("wide", op, Sizes { tokens: 33, keys: 48, values: 100, slots: 20, ..one }, (-0.5, 0.0), None);
        check("one slot", op, Sizes { tokens: 20, slots: 1, ..one }, (-0.5, 0.0), None);
        check("a long chunk", op, Sizes { tokens: 70, ..one }, (-0.5, 0.0), Some(64));
        check("an odd chunk", op, Sizes { tokens: 70, ..one }, (-30.0, 0.0), Some(23));
    }
}

/// Through the form by factors (sums of log decays down to −60 a chunk) and the exact one below.
#[test]
fn extreme_decays_of_gsa() {
    let sizes = Sizes { batch: 1, tokens: 70, heads: 1, sequences: 1, ..Sizes::SMALL };
    for decay in [(0.0, 0.0), (-1.8, 0.0), (-30.0, 0.0), (-1000.0, -900.0)] {
        check(&format!("log decays {decay:?}"), Op::Gsa, sizes, decay, None);
    }
}

/// Scores that jump by a hundred: the exact form of the decays, and means that hold a single token.
#[test]
fn extreme_scores_of_abc() {
    let sizes = Sizes { batch: 1, tokens: 70, heads: 1, sequences: 1, ..Sizes::SMALL };
    let mut inputs = Op::Abc.draw(sizes, (0.0, 0.0));
    inputs[3] = Input::new("s", &sizes.shapes(Op::Abc)[3].1, (-100.0, 100.0));
    // A past that counts beside such scores: otherwise its gradient is the difference of numbers 10⁴⁰ times as large.
    inputs[6] = Input::new("normaliser", &sizes.shapes(Op::Abc)[6].1, (95.0, 100.0));
    assert_agree(
        "abc, wild scores",
        &inputs,
        // Exponents of 200 are known to 200 · 2⁻⁵³.
        1e-11,
        |x| {
            let (x, state) = Op::Abc.split(x, sizes);
            flatten(Op::Abc.run(&x, Some(state), None, None))
        },
        |x| {
            let (x, state) = Op::Abc.split(x, sizes);
            flatten(Op::Abc.recurrent(&x, state))
        },
    );
}

/// The slots are means over the tokens so far: written out with one softmax over the tokens for each slot.
#[test]
fn abc_is_attention_to_means() {
    let sizes = Sizes { batch: 1, tokens: 37, heads: 1, sequences: 1, ..Sizes::SMALL };
    let inputs = Op::Abc.draw(sizes, (0.0, 0.0));
    assert_agree(
        "abc, means",
        &inputs[..4],
        BOUND,
        |x| {
            let (x, _) = Op::Abc.split(x, sizes);
            vec![flat(Op::Abc.run(&x, None, None, None).0)]
        },
        |x| {
            let (x, _) = Op::Abc.split(x, sizes);
            // [T, width]
            let [q, k, v, s] = [0, 1, 2, 3].map(|i: usize| x[i].clone().reshape([37, x[i].dims()[3] as i32]));
            let rows = (1..=37).map(|n| {
                // [M, n]
                let mean = burn::tensor::activation::softmax(s.clone().narrow(0, 0, n).transpose(), 1);
                let keys = mean.clone().matmul(k.clone().narrow(0, 0, n));
                let scores = q.clone().narrow(0, n - 1, 1).matmul(keys.transpose()).mul_scalar(SCALE);
                burn::tensor::activation::softmax(scores, 1).matmul(mean.matmul(v.clone().narrow(0, 0, n)))
            });
            vec![flat(Tensor::<2>::cat(rows.collect(), 0))]
        },
    );
}

#[test]
fn packed_equals_separate() {
    let offsets = [0, 33, 33, 34, 70];
    let sizes = Sizes { batch: 1, tokens: 70, sequences: 4, ..Sizes::SMALL };
    for op in Op::BOTH {
        assert_agree(
            &format!("{op:?}, packed"),
            &op.draw(sizes, (-0.5, 0.0)),
            BOUND,
            |x| {
                let (x, state) = op.split(x, sizes);
                flatten(op.run(&x, Some(state), Some(&offsets), None))
            },
            |x| {
                let (x, state) = op.split(x, sizes);
                let (mut outputs, mut states) = (Vec::new(), Vec::new());
                for (i, window) in offsets.windows(2).enumerate() {
                    let before: Vec<_> = state.iter().map(|s| s.clone().narrow(0, i, 1)).collect();
                    if window[0] == window[1] {
                        states.push(before);
                        continue;
                    }
                    let x: Vec<_> = x.iter().map(|x| x.clone().narrow(1, window[0], window[1] - window[0])).collect();
                    let (o, after) = op.run(&x, Some(before), None, None);
                    outputs.push(o);
                    states.push(after);
                }
                let states = (0..state.len()).map(|i| Tensor::cat(states.iter().map(|s| s[i].clone()).collect(), 0));
                flatten((Tensor::cat(outputs, 1), states.collect()))
            },
        );
    }
}

#[test]
fn a_continued_run_equals_the_whole() {
    let sizes = Sizes { tokens: 50, ..Sizes::SMALL };
    for op in Op::BOTH {
        let inputs = op.draw(sizes, (-0.5, 0.0));
        assert_agree(
            &format!("{op:?}, continued"),
            &inputs[..op.inputs()],
            BOUND,
            |x| {
                let (x, _) = op.split(x, sizes);
                flatten(op.run(&x, None, None, None))
            },
            |x| {
                let (x, _) = op.split(x, sizes);
                let (mut state, mut outputs, mut at) = (None, Vec::new(), 0);
                for length in [34, 1, 1, 14] {
                    let piece: Vec<_> = x.iter().map(|x| x.clone().narrow(1, at, length)).collect();
                    let (o, after) = op.run(&piece, state, None, None);
                    outputs.push(o);
                    (state, at) = (Some(after), at + length);
                }
                flatten((Tensor::cat(outputs, 1), state.unwrap()))
            },
        );
    }
}

#[test]
fn no_tokens_leave_the_state() {
    let sizes = Sizes { tokens: 0, ..Sizes::SMALL };
    let device = reference_device();
    for op in Op::BOTH {
        let mut x: Vec<Tensor<4>> =
            sizes.shapes(op).into_iter().map(|(_, shape)| Tensor::full(shape, 0.25, &device)).collect();
        let state = x.split_off(op.inputs());
        let (o, after) = op.run(&x, Some(state.clone()), None, None);
        assert_eq!(o.dims(), [2, 0, 2, 7]);
        for (before, after) in state.into_iter().zip(after) {
            assert_eq!(numbers(after), numbers(before), "{op:?}");
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let sizes = Sizes { batch: 1, tokens: 5, heads: 2, keys: 3, values: 4, slots: 3, sequences: 1 };
    for op in Op::BOTH {
        assert_finite_differences(&format!("{op:?}"), &op.draw(sizes, (-0.5, 0.0)), 8, 1e-8, |x| {
            let (x, state) = op.split(x, sizes);
            flatten(op.run(&x, Some(state), None, None))
        });
    }
}

/// Single precision against double, and bf16 against single: only the output is rounded to bf16.
#[test]
fn precision() {
    let sizes = Sizes { tokens: 100, ..Sizes::SMALL };
    let device = reference_device();
    for op in Op::BOTH {
        let inputs = op.draw(sizes, (-0.5, 0.0));
        let run = |dtype| {
            evaluate(&inputs, &device, dtype, |x| {
                let (x, state) = op.split(x, sizes);
                flatten(op.run(&x, Some(state), None, None))
            })
        };
        let (single, double) = (run(DType::F32), run(DType::F64));
        for (i, (a, b)) in single.outputs.iter().zip(&double.outputs).enumerate() {
            assert_close(&format!("{op:?}, f32, output {i}"), a, b, 1e-6);
        }
        for (input, (a, b)) in inputs.iter().zip(single.gradients.iter().zip(&double.gradients)) {
            // That of z is a difference of larger numbers.
            let bound = if input.name == "normaliser" { 5e-6 } else { 2e-6 };
            assert_close(&format!("{op:?}, f32, gradient of {}", input.name), a, b, bound);
        }
        let half: Vec<Tensor<4>> = inputs
            .iter()
            .zip(sizes.shapes(op))
            .take(op.inputs())
            .map(|(input, (_, shape))| tensor(&input.values, shape, &device, DType::BF16))
            .collect();
        let wide: Vec<Tensor<4>> = half.iter().map(|x| x.clone().cast(DType::F32)).collect();
        let (o, state) = op.run(&half, None, None, None);
        let (exact, exact_state) = op.run(&wide, None, None, None);
        assert_eq!(o.dtype(), DType::BF16);
        assert_eq!(numbers(o), numbers(exact.cast(DType::BF16)), "{op:?}: bf16, rounded once");
        for (a, b) in state.into_iter().zip(exact_state) {
            assert_eq!(a.dtype(), DType::F32);
            assert_eq!(numbers(a), numbers(b), "{op:?}: the state of bf16 inputs");
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let x = |width| Tensor::<4>::zeros([1, 3, 2, width], &device);
    let run = |slots, decay, options| gsa(x(4), x(4), x(5), slots, decay, options).unwrap_err().to_string();
    let error = run(x(6), x(7), GsaOptions::default());
    assert!(error.contains("`log_decay`") && error.contains("[1, 3, 2, 6]"), "{error}");
    let error = run(Tensor::zeros([1, 2, 2, 6], &device), x(6), GsaOptions::default());
    assert!(error.contains("gsa: `slots`"), "{error}");
    let error = run(x(6), x(6), GsaOptions { chunk: Some(0), ..Default::default() });
    assert!(error.contains("`chunk`"), "{error}");
    let state = GsaState { keys: Tensor::zeros([1, 2, 4, 6], &device), values: Tensor::zeros([1, 2, 5, 6], &device) };
    let error = run(x(6), x(6), GsaOptions { initial_state: Some(state), ..Default::default() });
    assert!(error.contains("`initial_state.values`") && error.contains("[1, 2, 6, 5]"), "{error}");
    let packed = Some(CuSeqlens::new(vec![0, 2]).unwrap());
    let error = abc(x(4), x(4), x(5), x(6), AbcOptions { cu_seqlens: packed, ..Default::default() }).unwrap_err();
    assert!(error.to_string().contains("last offset is 2"), "{error}");
    let error = abc(x(4), x(4), x(5).cast(DType::BF16), x(6), AbcOptions::default()).unwrap_err();
    assert!(matches!(error, OpError::DType { argument: "v", .. }), "{error}");
}
