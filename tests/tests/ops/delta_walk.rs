//! The kernels of the delta rules and of their relatives, in f32, against the token recurrence in f64.

// The suite of the references uses more of it.
#[allow(dead_code)]
#[path = "../sequence/delta_problem.rs"]
mod delta_problem;

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::{CuSeqlens, Engine, SequenceOptions, dplr, rwkv7};
use burn_fla_tests::agree::{Input, view};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor, uniform};

use self::delta_problem::{OPS, Op, Problem};

type Pair = (Tensor<4>, Tensor<4>);

/// One problem as flat inputs, the public function and the recurrence of it. The last input is the state.
struct Case {
    name: String,
    inputs: Vec<Input>,
    public: Box<dyn Fn(&[Tensor<1>]) -> Pair>,
    oracle: Box<dyn Fn(&[Tensor<1>]) -> Pair>,
}

/// What the loss uses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Output,
    State,
    Both,
}

impl Case {
    /// An operator of the delta rule.
    fn delta(problem: Problem) -> Self {
        let (left, right) = (problem.clone(), problem.clone());
        Self {
            name: format!("{problem:?}"),
            inputs: problem.inputs(),
            public: Box::new(move |x| left.public(&left.views(x)).expect("a result")),
            oracle: Box::new(move |x| right.oracle(&right.views(x))),
        }
    }

    /// `dplr`, or `rwkv7`, whose factors are other: sizes are B, T, H, K, V.
    fn low_rank(removal: bool, [b, t, h, k, v]: [usize; 5], decay: (f64, f64), packed: Option<Vec<usize>>) -> Self {
        let n = packed.as_ref().map_or(b, |offsets| offsets.len() - 1);
        // Vectors so short that the transition does not make states longer.
        let short = 1.0 / (k as f64).sqrt();
        let keys = [b, t, h, k];
        let mut inputs = vec![
            Input::new("q", &keys, (-1.0, 1.0)),
            Input::new("k", &keys, (-short, short)),
            Input::new("v", &[b, t, h, v], (-1.0, 1.0)),
            Input::new("g", &keys, decay),
        ];
        if removal {
            inputs.push(Input::new("kk", &keys, (-short, short)));
            inputs.push(Input::new("rate", &keys, (0.0, 1.0)));
        } else {
            inputs.push(Input::new("a", &keys, (-short, short)));
            inputs.push(Input::new("b", &keys, (-short, short)));
        }
        inputs.push(Input::new("state", &[n, h, k, v], (-1.0, 1.0)));
        let views = move |x: &[Tensor<1>]| {
            let keys = |i: usize| view(&x[i], keys);
            ([keys(0), keys(1), view(&x[2], [b, t, h, v]), keys(3), keys(4), keys(5)], view(&x[6], [n, h, k, v]))
        };
        let offsets = packed.clone();
        Self {
            name: format!("{}, {b} {t} {h} {k} {v}, {decay:?}, {packed:?}", if removal { "rwkv7" } else { "dplr" }),
            inputs,
            public: Box::new(move |x| {
                let ([q, k, v, g, a, b], state) = views(x);
                let options = SequenceOptions {
                    scale: Some(0.7),
                    initial_state: Some(state),
                    cu_seqlens: packed.clone().map(|offsets| CuSeqlens::new(offsets).expect("offsets")),
                    ..Default::default()
                };
                let result = if removal { rwkv7(q, g, k, v, a, b, options) } else { dplr(q, k, v, a, b, g, options) };
                result.expect("a result")
            }),
            oracle: Box::new(move |x| {
                let ([q, k, v, g, a, b], state) = views(x);
                let (a, b) = if removal { (a.clone().neg(), a * b) } else { (a, b) };
                let (mut outputs, mut states) = (Vec::new(), Vec::new());
                let offsets = offsets.clone().unwrap_or_else(|| vec![0, t]);
                for (i, pair) in offsets.windows(2).enumerate() {
                    let first = if offsets.len() > 2 { state.clone().narrow(0, i, 1) } else { state.clone() };
                    if pair[0] == pair[1] {
                        states.push(first);
                        continue;
                    }
                    let cut = |x: &Tensor<4>| x.clone().narrow(1, pair[0], pair[1] - pair[0]);
                    let inputs = [&q, &k, &v, &a, &b, &g].map(cut);
                    let (o, end) = burn_fla_ops::dplr::reference::recurrent(inputs, 0.7, first);
                    outputs.push(o);
                    states.push(end);
                }
                (Tensor::cat(outputs, 1), Tensor::cat(states, 0))
            }),
        }
    }

    /// Both outputs, and the gradient of every input: empty where there is none.
    fn run(
        &self,
        oracle: bool,
        device: &Device,
        dtype: DType,
        tracked: impl Fn(&str) -> bool,
        loss: Loss,
    ) -> Vec<Vec<f64>> {
        let device = device.clone().autodiff();
        // Decays, strengths and states are f32 whatever the operands are; the recurrence is f64 throughout.
        let wide = if oracle { DType::F64 } else { DType::F32 };
        let leaves: Vec<Tensor<1>> = self
            .inputs
            .iter()
            .map(|input| {
                let narrow = !["g", "beta", "state"].contains(&input.name);
                let held = if narrow { dtype } else { DType::F32 };
                // The numbers that both sides hold.
                let rounded: Tensor<1> = tensor(&input.values, [input.values.len()], &reference_device(), held);
                let held = if oracle { DType::F64 } else { held };
                let leaf: Tensor<1> = tensor(&numbers(rounded), [input.values.len()], &device, held);
                if tracked(input.name) { leaf.require_grad() } else { leaf }
            })
            .collect();
        let (o, end) = if oracle { (self.oracle)(&leaves) } else { (self.public)(&leaves) };
        let mut found = vec![numbers(o.clone()), numbers(end.clone())];
        if !self.inputs.iter().any(|input| tracked(input.name)) {
            return found;
        }
        let weight = |seed, like: &Tensor<4>| -> Tensor<4> {
            let count = like.shape().num_elements();
            // In a dtype that every side holds exactly.
            let rounded: Tensor<4> =
                tensor(&uniform(seed, count, (-1.0, 1.0)), like.dims(), &reference_device(), DType::BF16);
            tensor(&numbers(rounded), like.dims(), &device, like.dtype())
        };
        let on_o = (o.clone() * weight(8, &o)).cast(wide).sum();
        let on_end = (end.clone() * weight(9, &end)).sum();
        let loss = match loss {
            Loss::Output => on_o,
            Loss::State => on_end,
            Loss::Both => on_o + on_end,
        };
        // Not every operator uses every input.
        if !loss.is_tracked() {
            return found;
        }
        let grads = loss.backward();
        found.extend(leaves.iter().map(|leaf| leaf.grad(&grads).map(numbers).unwrap_or_default()));
        found
    }

    fn compare(&self, what: &str, found: &[Vec<f64>], reference: &[Vec<f64>], bound: f64) {
        assert!(found.len() >= reference.len(), "{what}: as many results");
        let names = ["o", "end"].into_iter().chain(self.inputs.iter().map(|input| input.name));
        for (name, (found, reference)) in names.zip(found.iter().zip(reference)) {
            let zeros = vec![0.0; found.len().max(reference.len())];
            let found = if found.is_empty() { &zeros } else { found };
            let reference = if reference.is_empty() { &zeros } else { reference };
            // Where nothing outlives a token the gradient of a decay is of order 1e-13, made of terms of order one.
            let vanishes = name == "g" && reference.iter().all(|x| x.abs() < 1e-9);
            if !(vanishes && found.iter().all(|x| x.abs() < 1e-6)) {
                assert_close(&format!("{what}, {name} of {}", self.name), found, reference, bound);
            }
        }
    }

    /// The kernels in f32 against the recurrence in f64, everything tracked, buffers poisoned before each launch.
    fn check(&self, bound: f64) {
        burn_fla_ops::bridge::poison_outputs(true);
        let reference = self.run(true, &reference_device(), DType::F32, |_| true, Loss::Both);
        for (name, device) in kernel_devices() {
            let found = self.run(false, &device, DType::F32, |_| true, Loss::Both);
            self.compare(name, &found, &reference, bound);
        }
    }
}

fn small(op: Op, tokens: usize) -> Problem {
    Problem { keys: 16, values: 20, ..Problem::new(op, tokens) }
}

/// Every operator.
fn all(tokens: usize) -> Vec<Case> {
    let delta = OPS.into_iter().map(|op| Case::delta(small(op, tokens)));
    let sizes = [2, tokens, 2, 16, 20];
    let others = [false, true].into_iter().map(|removal| Case::low_rank(removal, sizes, (-0.6, 0.0), None));
    delta.chain(others).collect()
}

#[test]
fn delta_kernels_equal_the_recurrence() {
    for tokens in [1, 63, 64, 65, 131] {
        all(tokens).iter().for_each(|case| case.check(1e-5));
    }
}

#[test]
fn delta_kernels_take_every_size() {
    // Every size once or twice, and every form at several: each case is a handful of kernels to compile.
    let tokens = 19;
    for ([keys, values], op) in [
        ([1, 1], Op::Delta),
        ([5, 3], Op::Kda),
        ([48, 96], Op::Gated),
        ([100, 72], Op::Comba),
        ([256, 300], Op::Kda),
        ([3, 512], Op::Gated),
    ] {
        // A norm over one channel has no gradient to compare.
        let problem = Problem { keys, values, batch: 1, l2_norm: keys > 1, ..Problem::new(op, tokens) };
        Case::delta(problem).check(1e-5);
    }
    for ([keys, values], removal) in [([5, 3], true), ([64, 64], true), ([128, 96], false)] {
        Case::low_rank(removal, [1, tokens, 1, keys, values], (-0.6, 0.0), None).check(1e-5);
    }
    // Norms taken elsewhere, one value head a key head, a scale and chunks of one's own.
    for op in [Op::Gated, Op::Comba] {
        let base = Problem { groups: 1, heads: 3, l2_norm: false, scale: Some(1.0), ..small(op, 40) };
        for chunk in [1, 12] {
            Case::delta(Problem { chunk: Some(chunk), ..base.clone() }).check(1e-5);
        }
    }
}

#[test]
fn delta_kernels_are_exact_for_every_decay() {
    for decay in [(0.0, 0.0), (-30.0, 0.0), (-30.0, -29.0), (-300.0, 0.0)] {
        for op in [Op::Gated, Op::Kda, Op::Comba, Op::Product(2)] {
            Case::delta(Problem { decay, ..small(op, 70) }).check(1e-5);
        }
        for removal in [false, true] {
            Case::low_rank(removal, [1, 70, 2, 16, 20], decay, None).check(1e-5);
        }
    }
}

/// All keys equal, with the strengths that overwrite and that reflect.
#[test]
fn delta_kernels_take_keys_that_repeat() {
    for op in [Op::Delta, Op::Gated, Op::Kda] {
        for beta in [1.0, 2.0] {
            let mut case = Case::delta(Problem { decay: (-0.05, 0.0), ..small(op, 131) });
            let width = 16;
            let key = case.inputs[1].values[..width].to_vec();
            case.inputs[1].values.chunks_mut(width).for_each(|row| row.copy_from_slice(&key));
            case.inputs[5].values.fill(beta);
            case.check(1e-5);
        }
    }
}

#[test]
fn delta_kernels_keep_packed_sequences_separate() {
    let packed = Some(vec![0, 0, 64, 65, 65, 73, 140]);
    for op in OPS {
        Case::delta(Problem { packed: packed.clone(), batch: 1, ..small(op, 140) }).check(1e-5);
    }
    for removal in [false, true] {
        Case::low_rank(removal, [1, 140, 2, 16, 20], (-0.6, 0.0), packed.clone()).check(1e-5);
        let single = Some(vec![0, 1, 2, 3]);
        Case::low_rank(removal, [1, 3, 2, 16, 20], (-0.6, 0.0), single).check(1e-5);
    }
}

/// Every way in which a graph may use an operator.
#[test]
fn delta_kernels_hand_out_every_gradient() {
    let mut cases = all(70);
    cases.push(Case::delta(Problem { packed: Some(vec![0, 9, 70]), batch: 1, ..small(Op::Kda, 70) }));
    for case in cases {
        let mut ways: Vec<(String, Vec<&str>, Loss)> = Vec::new();
        let names: Vec<&str> = case.inputs.iter().map(|input| input.name).collect();
        for loss in [Loss::Output, Loss::State] {
            ways.push((format!("{loss:?}"), names.clone(), loss));
        }
        ways.push(("nothing tracked".into(), Vec::new(), Loss::Both));
        ways.extend(names.iter().map(|name| (format!("only {name} tracked"), vec![*name], Loss::Both)));
        for (what, tracked, loss) in ways {
            let tracked = |name: &str| tracked.contains(&name);
            let reference = case.run(true, &reference_device(), DType::F32, tracked, loss);
            for (name, device) in kernel_devices() {
                let found = case.run(false, &device, DType::F32, tracked, loss);
                case.compare(&format!("{name}, {what}"), &found, &reference, 1e-5);
            }
        }
    }
}

/// Queries, keys and values are one tensor, which the kernels must not write over.
#[test]
fn delta_kernels_take_one_tensor_for_all() {
    for op in [Op::Delta, Op::Kda, Op::Comba] {
        let problem = Problem { groups: 1, heads: 2, values: 16, l2_norm: false, ..small(op, 67) };
        let mut case = Case::delta(problem.clone());
        let (left, right) = (problem.clone(), problem);
        let one = |mut x: delta_problem::Views| {
            (x.k, x.v, x.p) = (x.q.clone(), x.q.clone(), x.q.clone());
            x
        };
        case.public = Box::new(move |x| left.public(&one(left.views(x))).expect("a result"));
        case.oracle = Box::new(move |x| right.oracle(&one(right.views(x))));
        case.check(1e-5);
        // Without gradients nothing is saved, and the tensor is still the caller's.
        for (name, device) in kernel_devices() {
            let found = case.run(false, &device, DType::F32, |_| false, Loss::Both);
            let reference = case.run(true, &reference_device(), DType::F32, |_| false, Loss::Both);
            case.compare(name, &found, &reference, 1e-5);
        }
    }
}

/// A sequence in one go, and token by token, from states that the caller keeps and from states that it gives away.
#[test]
fn delta_steps_equal_the_sequence() {
    for (name, device) in kernel_devices() {
        for case in all(7) {
            let whole: Vec<Tensor<1>> = case
                .inputs
                .iter()
                .map(|input| tensor(&input.values, [input.values.len()], &device, DType::F32))
                .collect();
            let (o, end) = (case.public)(&whole);
            let (again, _) = (case.public)(&whole);
            assert_eq!(numbers(o.clone()), numbers(again), "{name}: inputs are as they were, {}", case.name);
            drop((o, end));
        }
        let [b, t, h, k, v] = [2, 7, 3, 20, 33];
        let draw = |seed, shape: [usize; 4]| -> Tensor<4> {
            tensor(&uniform(seed, shape.iter().product(), (-0.3, 0.3)), shape, &device, DType::F32)
        };
        let inputs = [1, 2, 3, 4, 5].map(|seed| draw(seed, [b, t, h, k]));
        let values = draw(6, [b, t, h, v]);
        let call = |x: &[Tensor<4>; 5], v: Tensor<4>, state: Option<Tensor<4>>| {
            let [r, k, kk, a, g] = x.clone();
            let options = SequenceOptions { initial_state: state, ..Default::default() };
            rwkv7(r, g.sub_scalar(1.0), k, v, kk, a, options).expect("a result")
        };
        let (o, end) = call(&inputs, values.clone(), None);
        for kept in [false, true] {
            let (mut state, mut outputs, mut history) = (None, Vec::new(), Vec::new());
            for i in 0..t {
                let cut = |x: &Tensor<4>| x.clone().narrow(1, i, 1);
                let (o, next) = call(&inputs.each_ref().map(cut), cut(&values), state.take());
                outputs.push(o);
                if kept {
                    history.push((next.clone(), numbers(next.clone())));
                }
                state = Some(next);
            }
            assert_close(&format!("{name}, o"), &numbers(Tensor::cat(outputs, 1)), &numbers(o.clone()), 1e-6);
            assert_close(&format!("{name}, state"), &numbers(state.expect("a state")), &numbers(end.clone()), 1e-6);
            for (state, then) in history {
                assert_eq!(numbers(state), then, "{name}: a state that is kept is not written over");
            }
        }
    }
}

#[test]
fn two_runs_of_the_delta_kernels_are_equal_bit_for_bit() {
    for (_, device) in kernel_devices() {
        for case in all(131) {
            let run = || case.run(false, &device, DType::F32, |_| true, Loss::Both);
            assert_eq!(run(), run(), "{}", case.name);
        }
    }
}

/// bf16 operands where the device has them, against the recurrence over the rounded inputs: up to the rounding of what is
/// written (2^-9), and of gradients that are sums of two such.
#[test]
fn delta_kernels_take_bf16() {
    for (name, device) in kernel_devices() {
        if !device.supports_dtype(DType::BF16) {
            continue;
        }
        for case in all(65) {
            let reference = case.run(true, &reference_device(), DType::BF16, |_| true, Loss::Both);
            let found = case.run(false, &device, DType::BF16, |_| true, Loss::Both);
            case.compare(name, &found, &reference, 8e-3);
        }
    }
}

/// A state wider than the kernels take runs in tensor operations, as does everything on request.
#[test]
fn what_the_delta_kernels_do_not_take_runs_in_tensor_operations() {
    for (name, device) in kernel_devices() {
        let draw = |seed, width| -> Tensor<4> {
            tensor(&uniform(seed, 9 * width, (-0.3, 0.3)), [1, 9, 1, width], &device, DType::F32)
        };
        for (k, v) in [(257, 4), (4, 513), (16, 16)] {
            let run = |engine| {
                let options = SequenceOptions { engine, ..Default::default() };
                let x = [1, 2, 3, 4].map(|seed| draw(seed, k));
                let g = draw(5, k).sub_scalar(0.5);
                let [q, key, a, b] = x;
                let (o, end) = dplr(q, key, draw(6, v), a, b, g, options).expect("a result");
                (numbers(o), numbers(end))
            };
            let (found, reference) = (run(Engine::Auto), run(Engine::Reference));
            assert_close(&format!("{name}, {k} {v}, o"), &found.0, &reference.0, 1e-5);
            assert_close(&format!("{name}, {k} {v}, state"), &found.1, &reference.1, 1e-5);
        }
    }
}
