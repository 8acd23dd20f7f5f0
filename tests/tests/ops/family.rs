//! What runs on the kernels of the linear recurrences under another name, on every device with kernels: the slot memories
//! `gsa` and `abc`, `rwkv6` and `ssd`, against their recurrence in f64.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::{
    AbcOptions, AbcState, CuSeqlens, GsaOptions, GsaState, HeadGroups, SequenceOptions, SsdOptions, abc, bridge, gsa,
    rwkv6, ssd,
};
use burn_fla_tests::agree::{Evaluation, Input, evaluate, flat, view};
use burn_fla_tests::{assert_close, kernel_devices, reference_device};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Gsa,
    Abc,
    Rwkv6,
    Ssd,
}

const OPS: [Op; 4] = [Op::Gsa, Op::Abc, Op::Rwkv6, Op::Ssd];
const SCALE: f64 = 0.7;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
    slots: usize,
    decay: (f64, f64),
    packed: Option<&'static [usize]>,
    initial: bool,
}

const BASE: Case = Case {
    batch: 2,
    tokens: 64,
    heads: 1,
    keys: 16,
    values: 24,
    slots: 8,
    decay: (-0.5, 0.0),
    packed: None,
    initial: true,
};

fn cases() -> Vec<Case> {
    let one = Case { batch: 1, ..BASE };
    let mut cases: Vec<Case> = [1, 63, 64, 65, 131].map(|tokens| Case { tokens, ..BASE }).to_vec();
    cases.extend([
        Case { tokens: 70, initial: false, ..BASE },
        Case { tokens: 70, keys: 5, values: 7, slots: 3, ..one },
        Case { tokens: 67, keys: 72, values: 100, slots: 65, ..one },
        Case { tokens: 20, slots: 1, ..one },
        Case { tokens: 80, decay: (0.0, 0.0), ..BASE },
        Case { tokens: 80, decay: (-30.0, 0.0), ..BASE },
        Case { tokens: 80, decay: (-30.0, -29.0), ..BASE },
        Case { tokens: 140, batch: 1, heads: 2, packed: Some(&[0, 64, 64, 65, 73, 140]), ..BASE },
        Case { tokens: 3, batch: 1, heads: 2, packed: Some(&[0, 1, 2, 3]), ..BASE },
    ]);
    cases
}

impl Case {
    fn sequences(&self) -> usize {
        self.packed.map_or(self.batch, |offsets| offsets.len() - 1)
    }

    /// Inputs by token, then states.
    fn shapes(&self, op: Op) -> Vec<(&'static str, [usize; 4], (f64, f64))> {
        let &Case { batch, tokens, heads, keys, values, slots, .. } = self;
        let (n, unit) = (self.sequences(), (-1.0, 1.0));
        let token = |width| [batch, tokens, heads, width];
        let mut shapes = vec![("q", token(keys), unit), ("k", token(keys), unit), ("v", token(values), unit)];
        match op {
            Op::Gsa => {
                shapes.push(("s", token(slots), (0.0, 1.0)));
                shapes.push(("log_decay", token(slots), self.decay));
            }
            Op::Abc => shapes.push(("s", token(slots), (-4.0, 4.0))),
            Op::Rwkv6 => {
                shapes.push(("log_decay", token(keys), self.decay));
                shapes.push(("bonus", [1, 1, heads, keys], unit));
                shapes.push(("state", [n, heads, keys, values], unit));
                return shapes;
            }
            // One group of queries and keys for all heads.
            Op::Ssd => {
                shapes[0].1[2] = 1;
                shapes[1].1[2] = 1;
                shapes.push(("delta", token(1), (0.0, 1.0)));
                shapes.push(("a", [1, 1, heads, 1], self.decay));
                shapes.push(("D", [1, 1, heads, 1], unit));
                shapes.push(("state", [n, heads, keys, values], unit));
                return shapes;
            }
        }
        shapes.push(("state keys", [n, heads, keys, slots], unit));
        shapes.push(("state values", [n, heads, slots, values], unit));
        if op == Op::Abc {
            shapes.push(("normaliser", [n, heads, slots, 1], unit));
        }
        shapes
    }

    fn inputs(&self, op: Op) -> Vec<Input> {
        self.shapes(op).into_iter().map(|(name, shape, range)| Input::new(name, &shape, range)).collect()
    }

    fn views(&self, op: Op, x: &[Tensor<1>]) -> (Vec<Tensor<4>>, Vec<Tensor<4>>) {
        let mut x: Vec<Tensor<4>> = x.iter().zip(self.shapes(op)).map(|(x, (_, shape, _))| view(x, shape)).collect();
        let inputs = match op {
            Op::Gsa | Op::Rwkv6 => 5,
            Op::Abc => 4,
            Op::Ssd => 6,
        };
        let state = x.split_off(inputs);
        (x, state)
    }

    /// The public function.
    fn public(&self, op: Op, x: &[Tensor<1>]) -> Vec<Tensor<1>> {
        let (x, state) = self.views(op, x);
        let state = self.initial.then_some(state);
        let cu_seqlens = self.packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap());
        let (scale, [q, k, v, s]) = (Some(SCALE), [0, 1, 2, 3].map(|i: usize| x[i].clone()));
        match op {
            Op::Gsa => {
                let initial_state = state.map(|s| GsaState { keys: s[0].clone(), values: s[1].clone() });
                let options = GsaOptions { scale, initial_state, cu_seqlens, ..Default::default() };
                let (o, state) = gsa(q, k, v, s, x[4].clone(), options).unwrap();
                vec![flat(o), flat(state.keys), flat(state.values)]
            }
            Op::Abc => {
                let initial_state = state.map(|s| abc_state(&s));
                let options = AbcOptions { scale, initial_state, cu_seqlens, ..Default::default() };
                let (o, state) = abc(q, k, v, s, options).unwrap();
                vec![flat(o), flat(state.keys), flat(state.values), flat(state.normaliser)]
            }
            Op::Rwkv6 => {
                let initial_state = state.map(|s| s[0].clone());
                let options = SequenceOptions { scale, initial_state, cu_seqlens, ..Default::default() };
                let bonus = x[4].clone().reshape([self.heads, self.keys]);
                let (o, state) = rwkv6(q, k, v, s, bonus, options).unwrap();
                vec![flat(o), flat(state)]
            }
            Op::Ssd => {
                let (skip, initial_state) = (Some(flat(x[5].clone())), state.map(|s| s[0].clone()));
                let options = SsdOptions { skip, initial_state, cu_seqlens, ..Default::default() };
                let delta = s.reshape([self.batch, self.tokens, self.heads]);
                let (o, state) = ssd(v, delta, flat(x[4].clone()), k, q, options).unwrap();
                vec![flat(o), flat(state)]
            }
        }
    }

    /// The recurrence, sequence by sequence.
    fn recurrent(&self, op: Op, x: &[Tensor<1>]) -> Vec<Tensor<1>> {
        let (x, state) = self.views(op, x);
        let state: Vec<Tensor<4>> = match (self.initial, op) {
            (true, _) => state,
            (false, Op::Gsa | Op::Rwkv6 | Op::Ssd) => state.iter().map(Tensor::zeros_like).collect(),
            (false, Op::Abc) => {
                let nothing = Tensor::full(state[2].dims(), f64::NEG_INFINITY, (&state[2].device(), state[2].dtype()));
                vec![state[0].zeros_like(), state[1].zeros_like(), nothing]
            }
        };
        // Rows of a batch have one length and stay together.
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
            let (o, after) = token_by_token(op, &piece, &before);
            outputs.push(o);
            ends.push(after);
        }
        let ends = (0..state.len()).map(|i| flat(Tensor::cat(ends.iter().map(|s| s[i].clone()).collect(), 0)));
        [flat(Tensor::cat(outputs, 1))].into_iter().chain(ends).collect()
    }
}

fn token_by_token(op: Op, x: &[Tensor<4>], state: &[Tensor<4>]) -> (Tensor<4>, Vec<Tensor<4>>) {
    let [q, k, v, s] = [0, 1, 2, 3].map(|i: usize| x[i].clone());
    match op {
        Op::Gsa => {
            let state = GsaState { keys: state[0].clone(), values: state[1].clone() };
            let (o, state) = burn_fla_ops::gsa::reference::recurrent(q, k, v, s, x[4].clone(), SCALE, state);
            (o, vec![state.keys, state.values])
        }
        Op::Abc => {
            let (o, state) = burn_fla_ops::abc::reference::recurrent(q, k, v, s, SCALE, abc_state(state));
            let [n, h, m] = state.normaliser.dims();
            (o, vec![state.keys, state.values, state.normaliser.reshape([n, h, m, 1])])
        }
        Op::Rwkv6 => {
            let [_, _, h, dk] = x[4].dims();
            let bonus = x[4].clone().reshape([h, dk]);
            let (o, state) = burn_fla_ops::rwkv6::reference::recurrent([q, k, v, s], bonus, SCALE, state[0].clone());
            (o, vec![state])
        }
        Op::Ssd => {
            use burn_fla_ops::ssd::reference::recurrent;
            let [b, t, h, _] = v.dims();
            let (delta, a, skip) = (s.reshape([b, t, h]), flat(x[4].clone()), Some(flat(x[5].clone())));
            let (o, state) = recurrent(v, delta, a, k, q, skip, HeadGroups::Contiguous, state[0].clone());
            (o, vec![state])
        }
    }
}

fn abc_state(state: &[Tensor<4>]) -> AbcState {
    let [n, h, m, _] = state[2].dims();
    AbcState { keys: state[0].clone(), values: state[1].clone(), normaliser: state[2].clone().reshape([n, h, m]) }
}

fn compare(what: &str, inputs: &[Input], found: &Evaluation, exact: &Evaluation, bound: f64) {
    for (i, (a, b)) in found.outputs.iter().zip(&exact.outputs).enumerate() {
        assert_close(&format!("{what}, output {i}"), a, b, bound);
    }
    for (i, input) in inputs.iter().enumerate() {
        let (mut a, mut b) = (found.gradients[i].clone(), exact.gradients[i].clone());
        // A gradient that one side does not have is zero.
        let size = a.len().max(b.len());
        a.resize(size, 0.0);
        b.resize(size, 0.0);
        // Where every decay is about −30, its gradient is about 0: the difference of sums of what the keys' gradients are.
        let vanishes = input.name == "log_decay" && b.iter().all(|b| b.abs() < 1e-9);
        let scale = exact.gradients[1].iter().fold(1.0f64, |most, x| most.max(x.abs()));
        if vanishes && a.iter().all(|a| a.abs() < 1e-6 * scale) {
            continue;
        }
        // These are sums over tokens of what the named input's gradients are made of, which cancel in them: they have
        // its scale.
        let scale_of = match input.name {
            "normaliser" => Some("s"),
            "a" => Some("delta"),
            _ => None,
        };
        if let Some(other) = inputs.iter().position(|input| Some(input.name) == scale_of) {
            a.extend(&found.gradients[other]);
            b.extend(&exact.gradients[other]);
        }
        assert_close(&format!("{what}, gradient of {}", input.name), &a, &b, bound);
    }
}

#[test]
fn kernels_equal_the_recurrence() {
    bridge::poison_outputs(true);
    for (name, device) in kernel_devices() {
        for case in cases() {
            for op in OPS {
                let inputs = case.inputs(op);
                let exact = evaluate(&inputs, &reference_device(), DType::F64, |x| case.recurrent(op, x));
                let found = evaluate(&inputs, &device, DType::F32, |x| case.public(op, x));
                compare(&format!("{name}, {op:?}, {case:?}"), &inputs, &found, &exact, 1e-5);
            }
        }
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    let case = Case { tokens: 131, ..BASE };
    for (_, device) in kernel_devices() {
        for op in OPS {
            let run = || evaluate(&case.inputs(op), &device, DType::F32, |x| case.public(op, x));
            let (first, second) = (run(), run());
            assert_eq!((first.outputs, first.gradients), (second.outputs, second.gradients), "{op:?}");
        }
    }
}
