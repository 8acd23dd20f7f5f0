//! Softmax attention and native sparse attention against their query-by-query forms.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::attention::reference as softmax;
use burn_fla_ops::nsa::reference as sparse;
use burn_fla_ops::{AttentionOptions, CuSeqlens, NsaOptions, attention, nsa};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device};

use crate::{flat, view};

/// Sizes of a problem: `keys` tokens of which the last `queries` ask.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    groups: usize,
    width: usize,
    values: usize,
}

const BASE: Sizes = Sizes { batch: 2, queries: 17, keys: 17, heads: 4, groups: 2, width: 5, values: 7 };

impl Sizes {
    fn q(&self) -> [usize; 4] {
        [self.batch, self.queries, self.heads, self.width]
    }

    fn k(&self) -> [usize; 4] {
        [self.batch, self.keys, self.groups, self.width]
    }

    fn v(&self) -> [usize; 4] {
        [self.batch, self.keys, self.groups, self.values]
    }

    fn forget(&self) -> [usize; 3] {
        [self.batch, self.keys, self.heads]
    }

    fn gate(&self) -> [usize; 3] {
        [self.batch, self.queries, self.heads]
    }

    fn qkv(&self) -> Vec<Input> {
        vec![
            Input::new("q", &self.q(), (-2.0, 2.0)),
            Input::new("k", &self.k(), (-2.0, 2.0)),
            Input::new("v", &self.v(), (-1.0, 1.0)),
        ]
    }

    /// With a forget gate in the range.
    fn forgetting(&self, range: (f64, f64)) -> Vec<Input> {
        let mut inputs = self.qkv();
        inputs.push(Input::new("forget", &self.forget(), range));
        inputs
    }

    /// With the gates of the three branches.
    fn gated(&self) -> Vec<Input> {
        let mut inputs = self.qkv();
        inputs.extend(["compression", "selection", "window"].map(|name| Input::new(name, &self.gate(), (0.0, 1.0))));
        inputs
    }

    fn read(&self, x: &[Tensor<1>]) -> [Tensor<4>; 3] {
        [view(&x[0], self.q()), view(&x[1], self.k()), view(&x[2], self.v())]
    }

    fn gates(&self, x: &[Tensor<1>]) -> [Tensor<3>; 3] {
        [3, 4, 5].map(|i| view(&x[i], self.gate()))
    }
}

fn attention_agrees(sizes: Sizes, forget: Option<(f64, f64)>, window: Option<usize>, lengths: Option<Vec<usize>>) {
    let inputs = forget.map_or_else(|| sizes.qkv(), |range| sizes.forgetting(range));
    let gate = |x: &[Tensor<1>]| x.get(3).map(|x| view(x, sizes.forget()));
    assert_agree(
        &format!("{sizes:?}, forget {forget:?}, window {window:?}, lengths {lengths:?}"),
        &inputs,
        1e-12,
        |x| {
            let [q, k, v] = sizes.read(x);
            let options = AttentionOptions {
                scale: Some(0.7),
                window,
                log_forget: gate(x),
                lengths: lengths.clone(),
                ..Default::default()
            };
            vec![flat(attention(q, k, v, options).expect("valid"))]
        },
        |x| {
            let [q, k, v] = sizes.read(x);
            vec![flat(softmax::sequential(q, k, v, gate(x), 0.7, window, lengths.as_deref()))]
        },
    );
}

#[test]
fn attention_is_the_query_by_query_form() {
    for tokens in [1, 2, 17, 65] {
        for window in [None, Some(1), Some(5), Some(64), Some(100)] {
            attention_agrees(Sizes { queries: tokens, keys: tokens, ..BASE }, Some((-0.5, 0.0)), window, None);
        }
    }
    for (queries, keys) in [(1, 9), (4, 20), (3, 4)] {
        for window in [None, Some(2), Some(6)] {
            let sizes = Sizes { queries, keys, ..BASE };
            attention_agrees(sizes, None, window, None);
            attention_agrees(sizes, Some((-2.0, 0.0)), window, Some(vec![queries, keys]));
            attention_agrees(sizes, None, window, Some(vec![keys, keys - 1]));
        }
    }
    attention_agrees(Sizes { heads: 3, groups: 1, width: 100, values: 48, ..BASE }, None, None, None);
}

/// A closed gate leaves nothing of what came before, an open one all of it.
#[test]
fn extreme_forget_gates() {
    attention_agrees(BASE, Some((-200.0, -100.0)), None, None);
    attention_agrees(BASE, Some((-1e4, 0.0)), Some(6), None);
    attention_agrees(BASE, Some((0.0, 0.0)), None, None);
}

const OFFSETS: [usize; 6] = [0, 20, 20, 21, 26, 60];

fn pieces(x: &Tensor<4>, at: usize) -> Tensor<4> {
    x.clone().narrow(1, OFFSETS[at], OFFSETS[at + 1] - OFFSETS[at])
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let sizes = Sizes { batch: 1, queries: 60, keys: 60, ..BASE };
    let cu = CuSeqlens::new(OFFSETS.to_vec()).expect("offsets");
    let filled = || (0..5).filter(|at| OFFSETS[at + 1] > OFFSETS[*at]);
    assert_agree(
        "attention",
        &sizes.forgetting((-1.0, 0.0)),
        1e-13,
        |x| {
            let [q, k, v] = sizes.read(x);
            let options = AttentionOptions {
                window: Some(9),
                log_forget: Some(view(&x[3], sizes.forget())),
                cu_seqlens: Some(cu.clone()),
                ..Default::default()
            };
            vec![flat(attention(q, k, v, options).expect("valid"))]
        },
        |x| {
            let parts = filled().map(|at| {
                let [q, k, v] = sizes.read(x).map(|x| pieces(&x, at));
                let gate = pieces(&view::<3>(&x[3], sizes.forget()).unsqueeze_dim(3), at).squeeze_dim(3);
                softmax::sequential(q, k, v, Some(gate), 5f64.powf(-0.5), Some(9), None)
            });
            vec![flat(Tensor::cat(parts.collect(), 1))]
        },
    );
    let sparse = NsaOptions { window: Some(9), ..NsaOptions::new(8, 3) };
    assert_agree(
        "nsa",
        &sizes.gated(),
        1e-12,
        |x| {
            let [q, k, v] = sizes.read(x);
            let options = NsaOptions { cu_seqlens: Some(cu.clone()), ..sparse.clone() };
            vec![flat(nsa(q, k, v, sizes.gates(x), options).expect("valid"))]
        },
        |x| {
            let parts = filled().map(|at| {
                let [q, k, v] = sizes.read(x).map(|x| pieces(&x, at));
                let gates = sizes.gates(x).map(|gate| pieces(&gate.unsqueeze_dim(3), at).squeeze_dim(3));
                sparse::sequential(q, k, v, gates, &sparse)
            });
            vec![flat(Tensor::cat(parts.collect(), 1))]
        },
    );
}

fn nsa_agrees(sizes: Sizes, options: &NsaOptions) {
    assert_agree(
        &format!("{sizes:?}, {options:?}"),
        &sizes.gated(),
        1e-12,
        |x| {
            let [q, k, v] = sizes.read(x);
            vec![flat(nsa(q, k, v, sizes.gates(x), options.clone()).expect("valid"))]
        },
        |x| {
            let [q, k, v] = sizes.read(x);
            vec![flat(sparse::sequential(q, k, v, sizes.gates(x), options))]
        },
    );
}

/// One and two blocks are decided by ties, three, five and six lose gradients, four and eight do not.
#[test]
fn nsa_is_the_query_by_query_form() {
    let sizes = |queries, keys| Sizes { batch: 1, queries, keys, ..BASE };
    for counts in [1, 2, 3, 4] {
        let options = NsaOptions { window: Some(11), ..NsaOptions::new(8, counts) };
        for (queries, keys) in [(1, 1), (63, 63), (64, 64), (65, 65), (1, 90), (7, 131)] {
            nsa_agrees(sizes(queries, keys), &options);
        }
    }
    // More blocks than a tile of the network is wide.
    nsa_agrees(sizes(75, 75), &NsaOptions { window: Some(3), ..NsaOptions::new(4, 2) });
    nsa_agrees(sizes(30, 90), &NsaOptions { window: None, scale: Some(0.2), ..NsaOptions::new(8, 4) });
    for counts in [5, 6, 8] {
        nsa_agrees(sizes(20, 200), &NsaOptions { window: Some(300), scale: Some(0.9), ..NsaOptions::new(16, counts) });
    }
    nsa_agrees(Sizes { batch: 2, heads: 3, groups: 1, width: 48, values: 9, ..BASE }, &NsaOptions::new(4, 1));
}

#[test]
fn nsa_of_rows_of_different_lengths() {
    let sizes = Sizes { queries: 3, keys: 50, ..BASE };
    let options = NsaOptions { window: Some(6), ..NsaOptions::new(8, 4) };
    let lengths = [50, 20];
    assert_agree(
        "lengths",
        &sizes.gated(),
        1e-12,
        |x| {
            let [q, k, v] = sizes.read(x);
            let options = NsaOptions { lengths: Some(lengths.to_vec()), ..options.clone() };
            vec![flat(nsa(q, k, v, sizes.gates(x), options).expect("valid"))]
        },
        |x| {
            let rows = lengths.iter().enumerate().map(|(row, length)| {
                let [q, k, v] = sizes.read(x).map(|x| x.narrow(0, row, 1));
                let [k, v] = [k, v].map(|x| x.narrow(1, 50 - length, *length));
                let gates = sizes.gates(x).map(|gate| gate.narrow(0, row, 1));
                sparse::sequential(q, k, v, gates, &options)
            });
            vec![flat(Tensor::cat(rows.collect(), 0))]
        },
    );
}

#[test]
fn gradients_are_finite_differences() {
    let sizes = Sizes { batch: 1, queries: 9, keys: 11, ..BASE };
    assert_finite_differences("attention", &sizes.forgetting((-1.0, 0.0)), 12, 1e-7, |x| {
        let [q, k, v] = sizes.read(x);
        let log_forget = Some(view(&x[3], sizes.forget()));
        let options = AttentionOptions { window: Some(4), log_forget, ..Default::default() };
        vec![flat(attention(q, k, v, options).expect("valid"))]
    });
    // A choice of blocks does not move under a small step.
    let sizes = Sizes { batch: 1, queries: 9, keys: 60, ..BASE };
    assert_finite_differences("nsa", &sizes.gated(), 12, 1e-7, |x| {
        let [q, k, v] = sizes.read(x);
        let options = NsaOptions { window: Some(4), ..NsaOptions::new(8, 4) };
        vec![flat(nsa(q, k, v, sizes.gates(x), options).expect("valid"))]
    });
}

/// In bf16 the blocks are those of the same numbers in f32.
#[test]
fn nsa_in_bf16_is_computed_in_f32() {
    let sizes = Sizes { batch: 1, queries: 70, keys: 70, ..BASE };
    let mut inputs = sizes.gated();
    for input in &mut inputs {
        for x in &mut input.values {
            *x = (*x * 32.0).round() / 32.0;
        }
    }
    let run = |dtype| {
        evaluate(&inputs, &reference_device(), dtype, |x| {
            let [q, k, v] = sizes.read(x);
            let options = NsaOptions { window: Some(9), ..NsaOptions::new(8, 4) };
            vec![flat(nsa(q, k, v, sizes.gates(x), options).expect("valid"))]
        })
    };
    // Half a unit in the last of 8 bits.
    assert_close("output", &run(DType::BF16).outputs[0], &run(DType::F64).outputs[0], 2e-3);
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, (&device, DType::F32));
    let kv = || (zeros([2, 5, 2, 8]), zeros([2, 5, 2, 6]));
    let q = || zeros([2, 3, 4, 8]);
    let gates = || [(); 3].map(|()| Tensor::<3>::zeros([2, 3, 4], (&device, DType::F32)));
    let plain = |q, (k, v), options: AttentionOptions| attention(q, k, v, options).expect_err("wrong").to_string();
    let sparse = |q, (k, v), options: NsaOptions| nsa(q, k, v, gates(), options).expect_err("wrong").to_string();
    let good = NsaOptions::new(8, 4);
    let (k, v) = kv();
    for message in [plain(q(), (k.clone(), k.clone().narrow(1, 0, 4)), AttentionOptions::default()), {
        sparse(q(), (k.clone(), k.narrow(1, 0, 4)), good.clone())
    }] {
        assert!(message.contains("`v` has shape [2, 4, 2, 8]"), "{message}");
    }
    assert!(plain(zeros([2, 3, 3, 8]), kv(), AttentionOptions::default()).contains("divides the 3"));
    assert!(plain(zeros([2, 6, 4, 8]), kv(), AttentionOptions::default()).contains("each of the 6 queries"));
    let options = AttentionOptions { window: Some(0), ..Default::default() };
    assert!(plain(q(), kv(), options).contains("`window`"));
    for lengths in [vec![5], vec![2, 5], vec![3, 6]] {
        let options = AttentionOptions { lengths: Some(lengths.clone()), ..Default::default() };
        assert!(plain(q(), kv(), options).contains("`lengths`"), "{lengths:?}");
    }
    let options =
        AttentionOptions { log_forget: Some(Tensor::zeros([2, 3, 4], (&device, DType::F32))), ..Default::default() };
    assert!(plain(q(), kv(), options).contains("`log_forget` has shape [2, 3, 4]"));
    let cu_seqlens = Some(CuSeqlens::new(vec![0, 3]).expect("offsets"));
    let options = AttentionOptions { cu_seqlens: cu_seqlens.clone(), ..Default::default() };
    let one = || (zeros([1, 5, 2, 8]), zeros([1, 5, 2, 6]));
    assert!(plain(zeros([1, 3, 4, 8]), one(), options).contains("as many keys as queries"));
    for (options, name) in [
        (NsaOptions::new(12, 2), "`block_size`"),
        (NsaOptions::new(8, 5), "`block_size`"),
        (NsaOptions::new(8, 0), "`block_counts`"),
        (NsaOptions { window: Some(0), ..good.clone() }, "`window`"),
        (NsaOptions::new(8, usize::MAX), "`block_size`"),
    ] {
        let message = sparse(q(), kv(), options);
        assert!(message.contains(name), "{message}");
    }
    let bad = gates().map(|gate| gate.narrow(2, 0, 2));
    let message = nsa(q(), kv().0, v.clone(), bad, good.clone()).expect_err("wrong").to_string();
    assert!(message.contains("`compression gate` has shape [2, 3, 2]"), "{message}");
    // No query is no error.
    let none = attention(zeros([2, 0, 4, 8]), kv().0, v, AttentionOptions::default()).expect("valid");
    assert!(numbers(none).is_empty());
}
