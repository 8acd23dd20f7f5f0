//! What runs on the tensor cores under another name than the linear recurrences', by every engine that the device has, against the token recurrence in f64 over
//! the same bf16 inputs: the slot memories `gsa` and `abc`, whose first pass decays by value, `rwkv6`, whose state is read
//! before the token, and `ssd`, whose heads share queries and keys.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::{
    AbcOptions, AbcState, CuSeqlens, Engine, GsaOptions, GsaState, HeadGroups, SequenceOptions, SsdOptions, abc,
    bridge, gsa, rwkv6, ssd,
};
use burn_fla_tests::{numbers, ratio, reference_device, rounded, tensor, uniform};

use super::device_for;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Gsa,
    Abc,
    Rwkv6,
    Ssd(HeadGroups),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    op: Op,
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
    /// Slots of gsa and abc, groups of ssd.
    slots: usize,
    /// Log decays are drawn from this range.
    decay: (f64, f64),
    /// The dtype of the log decays.
    gates: DType,
    packed: Option<&'static [usize]>,
    initial: bool,
}

/// More than 64 slots: with fewer, `Engine::Auto` is the kernels for mma on Hopper too (unless values are more than 128).
const BASE: Case = Case {
    op: Op::Gsa,
    batch: 2,
    tokens: 131,
    heads: 2,
    keys: 128,
    values: 128,
    slots: 80,
    decay: (-0.5, 0.0),
    gates: DType::F32,
    packed: None,
    initial: true,
};

impl Op {
    /// Relative RMS errors of outputs and gradients. In gsa and abc each of the two passes and the probabilities between
    /// them round to 2^-9.
    fn bounds(self) -> [f64; 2] {
        match self {
            Self::Gsa | Self::Abc => [6e-3, 1.2e-2],
            Self::Rwkv6 | Self::Ssd(_) => [5e-3, 8e-3],
        }
    }
}

/// A name, its numbers, and whether it is an output.
type Found = Vec<(&'static str, Vec<f64>, bool)>;

impl Case {
    fn sequences(&self) -> usize {
        self.packed.map_or(self.batch, |offsets| offsets.len() - 1)
    }

    fn shapes(&self) -> Vec<(&'static str, [usize; 4], (f64, f64))> {
        let &Case { batch, tokens, heads, keys, values, slots, .. } = self;
        let (n, unit) = (self.sequences(), (-1.0, 1.0));
        let token = |width| [batch, tokens, heads, width];
        let mut shapes = vec![("q", token(keys), unit), ("k", token(keys), unit), ("v", token(values), unit)];
        match self.op {
            Op::Gsa => {
                shapes.push(("s", token(slots), (0.0, 1.0)));
                shapes.push(("g", token(slots), self.decay));
            }
            Op::Abc => shapes.push(("s", token(slots), (-4.0, 4.0))),
            Op::Rwkv6 => {
                shapes.push(("g", token(keys), self.decay));
                shapes.push(("u", [1, 1, heads, keys], unit));
                shapes.push(("h", [n, heads, keys, values], unit));
                return shapes;
            }
            Op::Ssd(_) => {
                shapes[0].1 = [batch, tokens, slots, keys];
                shapes[1].1 = [batch, tokens, slots, keys];
                shapes.push(("delta", token(1), (0.0, 1.0)));
                shapes.push(("a", [1, 1, heads, 1], self.decay));
                shapes.push(("D", [1, 1, heads, 1], unit));
                shapes.push(("h", [n, heads, keys, values], unit));
                return shapes;
            }
        }
        shapes.extend([("h_keys", [n, heads, keys, slots], unit), ("h_values", [n, heads, slots, values], unit)]);
        if self.op == Op::Abc {
            shapes.push(("h_weight", [n, heads, slots, 1], unit));
        }
        shapes
    }

    /// Outputs and gradients: of the public function with an engine, or of the recurrence in f64.
    fn run(&self, device: &Device, engine: Option<Engine>) -> Found {
        let exact = engine.is_none();
        let device = device.clone().autodiff();
        let shapes = self.shapes();
        let states = match self.op {
            Op::Gsa => 2,
            Op::Abc => 3,
            Op::Rwkv6 | Op::Ssd(_) => 1,
        };
        let leaf = |i: usize, (name, shape, range): (&str, [usize; 4], (f64, f64))| -> Tensor<4> {
            let narrow = match name {
                "g" => self.gates,
                "u" | "delta" | "a" | "D" => DType::F32,
                _ if i + states >= shapes.len() => DType::F32,
                _ => DType::BF16,
            };
            // The same rounded numbers on both sides.
            let values = rounded(&uniform(1 + i as u64, shape.iter().product(), range), narrow);
            tensor(&values, shape, &device, if exact { DType::F64 } else { narrow }).require_grad()
        };
        let leaves: Vec<Tensor<4>> = shapes.iter().enumerate().map(|(i, shape)| leaf(i, *shape)).collect();
        let (x, state) = leaves.split_at(leaves.len() - states);
        let outputs = match engine {
            Some(engine) => self.public(x, state, engine),
            None => self.recurrent(x, state),
        };
        let wide = if exact { DType::F64 } else { DType::F32 };
        let mut loss = Tensor::<1>::zeros([1], (&device, wide));
        let mut found = Vec::new();
        for (i, y) in outputs.into_iter().enumerate() {
            found.push((["o", "keys", "values", "weight"][i], numbers(y.clone()), true));
            // Gradients of the outputs are bf16 as the outputs are.
            let weight = rounded(&uniform(80 + i as u64, y.shape().num_elements(), (-1.0, 1.0)), DType::BF16);
            loss = loss + (y.clone() * tensor(&weight, y.dims(), &device, y.dtype())).cast(wide).sum();
        }
        let grads = loss.backward();
        for (x, (name, ..)) in leaves.iter().zip(&shapes) {
            found.push((name, x.grad(&grads).map(numbers).unwrap_or_default(), false));
        }
        found
    }

    fn public(&self, x: &[Tensor<4>], state: &[Tensor<4>], engine: Engine) -> Vec<Tensor<4>> {
        let cu_seqlens = self.packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap());
        let [q, k, v, s] = [0, 1, 2, 3].map(|i: usize| x[i].clone());
        match self.op {
            Op::Gsa => {
                let initial_state = self.initial.then(|| GsaState { keys: state[0].clone(), values: state[1].clone() });
                let options = GsaOptions { initial_state, cu_seqlens, engine, ..Default::default() };
                let (o, state) = gsa(q, k, v, s, x[4].clone(), options).unwrap();
                vec![o, state.keys, state.values]
            }
            Op::Abc => {
                let initial_state = self.initial.then(|| abc_state(state));
                let options = AbcOptions { initial_state, cu_seqlens, engine, ..Default::default() };
                let (o, state) = abc(q, k, v, s, options).unwrap();
                let [n, h, m] = state.normaliser.dims();
                vec![o, state.keys, state.values, state.normaliser.reshape([n, h, m, 1])]
            }
            Op::Rwkv6 => {
                let initial_state = self.initial.then(|| state[0].clone());
                let options = SequenceOptions { initial_state, cu_seqlens, engine, ..Default::default() };
                let (o, state) = rwkv6(q, k, v, s, x[4].clone().reshape([self.heads, self.keys]), options).unwrap();
                vec![o, state]
            }
            Op::Ssd(groups) => {
                let [delta, a, skip] = [3, 4, 5].map(|i: usize| x[i].clone());
                let (skip, initial_state) = (Some(skip.reshape([self.heads])), self.initial.then(|| state[0].clone()));
                let options = SsdOptions { skip, groups, initial_state, cu_seqlens, engine, ..Default::default() };
                let delta = delta.reshape([self.batch, self.tokens, self.heads]);
                let (o, state) = ssd(v, delta, a.reshape([self.heads]), k, q, options).unwrap();
                vec![o, state]
            }
        }
    }

    fn recurrent(&self, x: &[Tensor<4>], state: &[Tensor<4>]) -> Vec<Tensor<4>> {
        let mut state = state.to_vec();
        if !self.initial {
            state = state.iter().map(Tensor::zeros_like).collect();
            if let Some(weight) = state.get_mut(2) {
                *weight = Tensor::full(weight.dims(), f64::NEG_INFINITY, (&weight.device(), weight.dtype()));
            }
        }
        let windows: Vec<[usize; 2]> = match self.packed {
            Some(offsets) => offsets.windows(2).map(|w| [w[0], w[1]]).collect(),
            None => vec![[0, self.tokens]],
        };
        let rows = if self.packed.is_some() { 1 } else { self.batch };
        let (mut outputs, mut ends) = (Vec::new(), Vec::new());
        for (i, [start, end]) in windows.into_iter().enumerate() {
            let before: Vec<_> = state.iter().map(|s| s.clone().narrow(0, i * rows, rows)).collect();
            if start == end {
                ends.push(before);
                continue;
            }
            // Parameters have no tokens.
            let cut =
                |x: &Tensor<4>| if x.dims()[1] == 1 { x.clone() } else { x.clone().narrow(1, start, end - start) };
            let piece: Vec<_> = x.iter().map(cut).collect();
            let (o, after) = self.token_by_token(&piece, &before);
            outputs.push(o);
            ends.push(after);
        }
        let ends = (0..state.len()).map(|i| Tensor::cat(ends.iter().map(|s| s[i].clone()).collect(), 0));
        [Tensor::cat(outputs, 1)].into_iter().chain(ends).collect()
    }

    fn token_by_token(&self, x: &[Tensor<4>], state: &[Tensor<4>]) -> (Tensor<4>, Vec<Tensor<4>>) {
        let scale = (self.keys as f64).powf(-0.5);
        let [q, k, v, s] = [0, 1, 2, 3].map(|i: usize| x[i].clone());
        match self.op {
            Op::Gsa => {
                let state = GsaState { keys: state[0].clone(), values: state[1].clone() };
                let (o, state) = burn_fla_ops::gsa::reference::recurrent(q, k, v, s, x[4].clone(), scale, state);
                (o, vec![state.keys, state.values])
            }
            Op::Abc => {
                let (o, state) = burn_fla_ops::abc::reference::recurrent(q, k, v, s, scale, abc_state(state));
                let [n, h, m] = state.normaliser.dims();
                (o, vec![state.keys, state.values, state.normaliser.reshape([n, h, m, 1])])
            }
            Op::Rwkv6 => {
                let bonus = x[4].clone().reshape([self.heads, self.keys]);
                let before = state[0].clone();
                let (o, state) = burn_fla_ops::rwkv6::reference::recurrent([q, k, v, s], bonus, scale, before);
                (o, vec![state])
            }
            Op::Ssd(groups) => {
                let [b, t, h, _] = v.dims();
                let (a, skip) = (x[4].clone().reshape([h]), x[5].clone().reshape([h]));
                let (delta, before) = (s.reshape([b, t, h]), state[0].clone());
                let (o, state) = burn_fla_ops::ssd::reference::recurrent(v, delta, a, k, q, Some(skip), groups, before);
                (o, vec![state])
            }
        }
    }
}

fn abc_state(state: &[Tensor<4>]) -> AbcState {
    let [n, h, m, _] = state[2].dims();
    AbcState { keys: state[0].clone(), values: state[1].clone(), normaliser: state[2].clone().reshape([n, h, m]) }
}

fn check(engine: Engine, cases: &[Case]) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    let mut wrong = Vec::new();
    for case in cases {
        let (found, expected) = (case.run(&device, Some(engine)), case.run(&reference_device(), None));
        let mut line = String::new();
        // What a decay's gradient is a difference of.
        let largest = |name: &str| {
            let (_, x, _) = expected.iter().find(|(n, ..)| *n == name).expect("an input");
            x.iter().fold(0.0f64, |most, x| most.max(x.abs()))
        };
        for ((name, found, output), (_, exact, _)) in found.iter().zip(&expected) {
            if found.is_empty() && exact.iter().all(|x| *x == 0.0) {
                continue;
            }
            let error = ratio(found, exact);
            line += &format!(" {name} {error:.1e}");
            // Where every decay is e^-29 or less, so is its gradient, and what is found is the rounding to 2^-11 of the products
            // whose difference it is, s ∘ ds or k ∘ dk, with |s|, |k| ≤ 1: the size of that counts.
            let vanishes = *name == "g" && case.decay.1 < -1.0;
            let of = if matches!(case.op, Op::Gsa | Op::Abc) { "s" } else { "k" };
            let small = vanishes && found.iter().zip(exact).all(|(a, b)| (a - b).abs() <= largest(of) / 1024.0);
            // With decays down to −500, one gate in hundreds has a gradient, and every other only that rounding.
            let rare = *name == "g" && case.decay.0 < -100.0;
            let bound = if rare { 2e-2 } else { case.op.bounds()[usize::from(!output)] };
            if !(error <= bound || small) {
                wrong.push(format!("{engine:?} {case:?}: {name} is off by {error:.1e}"));
            }
        }
        println!("{engine:?} {case:?}:{line}");
    }
    bridge::poison_outputs(false);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

suite!(Auto: hopper, Mma: mma; {
    every_length_is_right,
    every_size_is_right,
    every_larger_size_is_right,
    every_decay_is_right,
    packed_sequences_are_right,
    segments_are_right,
    abc_is_right,
    abc_is_right_in_segments,
    every_length_is_right_of_rwkv6,
    every_size_is_right_of_rwkv6,
    every_decay_is_right_of_rwkv6,
    packed_sequences_and_segments_are_right_of_rwkv6,
    shared_keys_are_right,
    two_runs_are_equal_bit_for_bit,
});

fn every_length_is_right(engine: Engine) {
    let lengths = [1, 2, 63, 64, 65, 131, 600];
    check(engine, &lengths.map(|tokens| Case { tokens, ..BASE }));
}

fn every_size_is_right(engine: Engine) {
    let sizes = [(16, 16, 16), (64, 64, 64), (128, 128, 64), (64, 64, 128), (48, 80, 32)];
    sizes_are_right(engine, &sizes);
}

fn every_larger_size_is_right(engine: Engine) {
    let sizes = [(128, 256, 64), (96, 176, 128), (256, 128, 48), (192, 192, 192), (256, 256, 256)];
    sizes_are_right(engine, &sizes);
}

fn sizes_are_right(engine: Engine, sizes: &[(usize, usize, usize)]) {
    check(
        engine,
        &sizes
            .iter()
            .map(|&(keys, values, slots)| Case {
                keys,
                values,
                slots,
                batch: 1,
                tokens: 100,
                gates: DType::BF16,
                ..BASE
            })
            .collect::<Vec<_>>(),
    );
}

/// Chunks are cut where the decay is strong: into 2, 4 and more spans.
fn every_decay_is_right(engine: Engine) {
    check(
        engine,
        &[
            Case { decay: (0.0, 0.0), ..BASE },
            Case { decay: (-4.0, 0.0), ..BASE },
            Case { decay: (-8.0, -1.0), ..BASE },
            Case { decay: (-30.0, 0.0), tokens: 600, ..BASE },
            Case { decay: (-30.0, 0.0), gates: DType::BF16, keys: 48, values: 80, ..BASE },
            Case { decay: (-30.0, -29.0), ..BASE },
        ],
    );
}

fn packed_sequences_are_right(engine: Engine) {
    let base = Case { batch: 1, tokens: 700, packed: Some(&[0, 64, 64, 65, 73, 140, 700]), ..BASE };
    check(
        engine,
        &[
            base,
            Case { initial: false, keys: 64, values: 48, ..base },
            Case { decay: (-20.0, 0.0), ..base },
            Case { op: Op::Abc, ..base },
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
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 32, values: 32, slots: 32, ..base },
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 32, values: 32, slots: 96, ..base },
        ],
    );
}

fn abc_is_right(engine: Engine) {
    let base = Case { op: Op::Abc, ..BASE };
    check(
        engine,
        &[
            base,
            Case { initial: false, tokens: 600, keys: 64, values: 256, ..base },
            Case { tokens: 2, ..base },
            Case { tokens: 131, slots: 16, ..base },
            Case { tokens: 131, slots: 64, ..base },
            // The values do not fit the operator of both passes.
            Case { batch: 1, tokens: 70, values: 272, ..base },
        ],
    );
}

/// So are the running sums.
fn abc_is_right_in_segments(engine: Engine) {
    let base = Case { op: Op::Abc, batch: 1, tokens: 2200, ..BASE };
    check(
        engine,
        &[
            Case { heads: 1, slots: 64, keys: 64, values: 256, ..base },
            Case { heads: 1, ..base },
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), ..base },
        ],
    );
}

const RWKV6: Case = Case { op: Op::Rwkv6, ..BASE };

fn every_length_is_right_of_rwkv6(engine: Engine) {
    let lengths = [1, 2, 63, 64, 65, 131, 600];
    check(engine, &lengths.map(|tokens| Case { tokens, ..RWKV6 }));
}

fn every_size_is_right_of_rwkv6(engine: Engine) {
    let sizes = [(16, 16), (64, 64), (48, 80), (96, 176), (128, 256), (256, 128), (256, 256), (128, 272)];
    check(
        engine,
        &sizes.map(|(keys, values)| Case { keys, values, batch: 1, tokens: 100, gates: DType::BF16, ..RWKV6 }),
    );
}

fn every_decay_is_right_of_rwkv6(engine: Engine) {
    check(
        engine,
        &[
            Case { decay: (0.0, 0.0), ..RWKV6 },
            Case { decay: (-4.0, 0.0), ..RWKV6 },
            Case { decay: (-8.0, -1.0), ..RWKV6 },
            Case { decay: (-30.0, 0.0), tokens: 600, ..RWKV6 },
            Case { decay: (-30.0, 0.0), gates: DType::BF16, keys: 48, values: 80, ..RWKV6 },
            Case { decay: (-30.0, 0.0), gates: DType::BF16, keys: 80, values: 48, ..RWKV6 },
            Case { decay: (-30.0, -29.0), ..RWKV6 },
            Case { decay: (-500.0, 0.0), ..RWKV6 },
        ],
    );
}

fn packed_sequences_and_segments_are_right_of_rwkv6(engine: Engine) {
    let base = Case { batch: 1, tokens: 700, packed: Some(&[0, 64, 64, 65, 73, 140, 700]), ..RWKV6 };
    let long = Case { batch: 1, heads: 1, tokens: 2200, decay: (-0.1, 0.0), ..RWKV6 };
    check(
        engine,
        &[
            base,
            Case { initial: false, keys: 80, values: 48, ..base },
            Case { decay: (-20.0, 0.0), ..base },
            long,
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 32, values: 32, ..long },
            Case { packed: Some(&[0, 2060, 2060, 2063, 2200]), keys: 96, values: 32, ..long },
        ],
    );
}

/// Groups of heads that share queries and keys, side by side and in turn.
fn shared_keys_are_right(engine: Engine) {
    let base = Case { op: Op::Ssd(HeadGroups::Contiguous), heads: 6, slots: 2, values: 64, ..BASE };
    let tiled = Op::Ssd(HeadGroups::Tiled);
    check(
        engine,
        &[
            base,
            Case { op: tiled, ..base },
            Case { slots: 1, heads: 4, tokens: 600, initial: false, ..base },
            Case { slots: 6, tokens: 65, ..base },
            Case { op: tiled, batch: 1, tokens: 700, packed: Some(&[0, 64, 64, 65, 73, 140, 700]), ..base },
            Case { heads: 2, slots: 1, batch: 1, tokens: 2200, decay: (-0.1, 0.0), ..base },
            // Two heads side by side, of one group and of two.
            Case { heads: 134, slots: 2, keys: 64, batch: 1, tokens: 70, ..base },
            Case { op: tiled, heads: 134, slots: 2, keys: 48, values: 32, batch: 1, tokens: 70, ..base },
            Case { op: tiled, heads: 4, values: 272, batch: 1, tokens: 70, ..base },
        ],
    );
}

fn two_runs_are_equal_bit_for_bit(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for op in [Op::Gsa, Op::Abc, Op::Rwkv6, Op::Ssd(HeadGroups::Contiguous)] {
        let shared = matches!(op, Op::Ssd(_));
        let (heads, slots) = if shared { (2, 1) } else { (1, BASE.slots) };
        let case = Case { op, heads, slots, batch: 1, tokens: 2200, ..BASE };
        let run = || case.run(&device, Some(engine)).into_iter().map(|(_, x, _)| x).collect::<Vec<_>>();
        assert_eq!(run(), run(), "{op:?}");
    }
}
