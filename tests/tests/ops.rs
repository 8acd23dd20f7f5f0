//! The sequence operators against their token recurrence, on every device.

#[path = "ops/delta_walk.rs"]
mod delta_walk;
#[path = "ops/family.rs"]
mod family;
#[path = "ops/list.rs"]
mod list;
#[path = "ops/one_step.rs"]
mod one_step;
#[path = "ops/running_sums.rs"]
mod running_sums;
#[path = "ops/ssd.rs"]
mod ssd;

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::cases::{RecurrenceCase, recurrence_cases};
use burn_fla_ops::{CuSeqlens, Engine, OpError, ScalarDecay, SequenceOptions, gla, linear, matmul, simple_gla};
use burn_fla_tests::{assert_close, kernel_devices, numbers, ratio, reference_device, tensor, uniform};

/// Which operator, and which of its decays.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Head,
    Token,
    Key,
}

const KINDS: [Kind; 4] = [Kind::None, Kind::Head, Kind::Token, Kind::Key];

/// Which implementation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Token by token: the oracle.
    Recurrent,
    /// The public function with [`Engine::Reference`].
    Chunked,
    /// The public function.
    Public,
}

/// What the loss uses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Output,
    State,
    Both,
}

const NAMES: [&str; 7] = ["o", "state", "dq", "dk", "dv", "dg", "dh0"];

struct Setup<'a> {
    case: &'a RecurrenceCase,
    kind: Kind,
    form: Form,
    loss: Loss,
    /// q, k, v, g, initial state.
    tracked: [bool; 5],
    /// Keys are the queries, one tensor.
    shared: bool,
    dtype: DType,
}

impl<'a> Setup<'a> {
    fn new(case: &'a RecurrenceCase, kind: Kind, form: Form, dtype: DType) -> Self {
        Self { case, kind, form, loss: Loss::Both, tracked: [true; 5], shared: false, dtype }
    }

    /// Outputs and gradients; an empty list where there is none.
    fn run(&self, device: &Device) -> Vec<Vec<f64>> {
        let c = self.case;
        let device = device.clone().autodiff();
        let (b, t, h, dk, dv) = (c.batch, c.tokens, c.heads, c.keys, c.values);
        let n = c.sequences();
        let float = |seed: u64, shape: [usize; 4]| {
            tensor(&uniform(seed, shape.iter().product(), (-1.0, 1.0)), shape, &device, self.dtype)
        };
        let track = |x: Tensor<4>, on: bool| if on { x.require_grad() } else { x };
        let q = track(float(1, [b, t, h, dk]), self.tracked[0]);
        let k = if self.shared { q.clone() } else { track(float(2, [b, t, h, dk]), self.tracked[1]) };
        let v = track(float(3, [b, t, h, dv]), self.tracked[2]);
        // Decays and states are f32 (f64 for f64) whatever the operands are.
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let state = |seed: u64| {
            let values = uniform(seed, n * h * dk * dv, (-1.0, 1.0));
            tensor(&values, [n, h, dk, dv], &device, wide)
        };
        let h0 = c.initial.then(|| track(state(4), self.tracked[4]));
        let head: Tensor<1> = tensor(&uniform(5, h, c.decay), [h], &device, wide);
        let token: Tensor<3> = tensor(&uniform(6, b * t * h, c.decay), [b, t, h], &device, wide);
        let token = if self.tracked[3] { token.require_grad() } else { token };
        let key: Tensor<4> = tensor(&uniform(7, b * t * h * dk, c.decay), [b, t, h, dk], &device, wide);
        let key = track(key, self.tracked[3]);

        let by_key = match self.kind {
            Kind::None => Tensor::zeros([b, t, h, dk], (&device, wide)),
            Kind::Head => head.clone().reshape([1, 1, h, 1]).expand([b, t, h, dk]),
            Kind::Token => token.clone().reshape([b, t, h, 1]).expand([b, t, h, dk]),
            Kind::Key => key.clone(),
        };
        let (o, end) = if self.form == Form::Recurrent {
            let first = h0.clone().unwrap_or_else(|| Tensor::zeros([n, h, dk, dv], (&device, wide)));
            recurrent(c, q.clone(), k.clone(), v.clone(), by_key, first)
        } else {
            let options = SequenceOptions {
                initial_state: h0.clone(),
                cu_seqlens: c.packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap()),
                engine: if self.form == Form::Chunked { Engine::Reference } else { Engine::Auto },
                ..Default::default()
            };
            let decay = match self.kind {
                Kind::None => ScalarDecay::None,
                Kind::Head => ScalarDecay::PerHead(head),
                Kind::Token | Kind::Key => ScalarDecay::PerToken(token.clone()),
            };
            match self.kind {
                Kind::Key => gla(q.clone(), k.clone(), v.clone(), key.clone(), options).unwrap(),
                _ => simple_gla(q.clone(), k.clone(), v.clone(), decay, options).unwrap(),
            }
        };
        let mut found = vec![numbers(o.clone()), numbers(end.clone())];
        if !self.tracked.iter().any(|t| *t) {
            return found;
        }
        let weight = float(8, [b, t, h, dv]);
        let on_o = (o * weight).cast(wide).sum();
        let on_state = (end * state(9)).sum();
        let loss = match self.loss {
            Loss::Output => on_o,
            Loss::State => on_state,
            Loss::Both => on_o + on_state,
        };
        let grads = loss.backward();
        let of = |x: &Tensor<4>| x.grad(&grads).map(numbers).unwrap_or_default();
        found.push(of(&q));
        found.push(if self.shared { Vec::new() } else { of(&k) });
        found.push(of(&v));
        found.push(match self.kind {
            Kind::Token => token.grad(&grads).map(numbers).unwrap_or_default(),
            Kind::Key => of(&key),
            _ => Vec::new(),
        });
        found.push(h0.as_ref().map(of).unwrap_or_default());
        found
    }
}

/// The recurrence of each sequence by itself.
fn recurrent(
    case: &RecurrenceCase,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<4>,
    first: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    let scale = (case.keys as f64).powf(-0.5);
    let Some(offsets) = case.packed else {
        return burn_fla_ops::gla::reference::recurrent(q, k, v, g, scale, first);
    };
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for (i, w) in offsets.windows(2).enumerate() {
        let first = first.clone().narrow(0, i, 1);
        if w[0] == w[1] {
            states.push(first);
            continue;
        }
        let cut = |x: &Tensor<4>| x.clone().narrow(1, w[0], w[1] - w[0]);
        let (o, end) = burn_fla_ops::gla::reference::recurrent(cut(&q), cut(&k), cut(&v), cut(&g), scale, first);
        outputs.push(o);
        states.push(end);
    }
    (Tensor::cat(outputs, 1), Tensor::cat(states, 0))
}

/// Compares all results. A gradient that one side does not have is zero.
fn compare(what: &str, found: &[Vec<f64>], reference: &[Vec<f64>], bound: f64) {
    compare_case(what, None, found, reference, bound, 0.0);
}

/// The same for a whole case, with one exception: where *every* decay is about -30, the gradient of a decay is of the
/// order 1e-13 and comes out as the difference of numbers of order one, so that only its absolute size is right. There,
/// and for that gradient alone, errors up to `floor` pass.
fn compare_case(
    what: &str,
    case: Option<&RecurrenceCase>,
    found: &[Vec<f64>],
    reference: &[Vec<f64>],
    bound: f64,
    floor: f64,
) {
    assert_eq!(found.len(), reference.len(), "{what}: as many results");
    for ((name, found), reference) in NAMES.iter().zip(found).zip(reference) {
        let zeros = vec![0.0; found.len().max(reference.len())];
        let found = if found.is_empty() { &zeros } else { found };
        let reference = if reference.is_empty() { &zeros } else { reference };
        let vanishes = *name == "dg" && case.is_some_and(|c| c.decay.1 < -1.0);
        // NaN is no number within the floor.
        let within = |(a, b): (&f64, &f64)| (a - b).abs() <= floor;
        if !(vanishes && found.iter().zip(reference).all(within)) {
            assert_close(&format!("{what}, {name}"), found, reference, bound);
        }
    }
}

#[test]
fn the_chunked_reference_equals_the_recurrence() {
    let device = reference_device();
    for case in recurrence_cases() {
        for kind in KINDS {
            let reference = Setup::new(&case, kind, Form::Recurrent, DType::F64).run(&device);
            let found = Setup::new(&case, kind, Form::Chunked, DType::F64).run(&device);
            compare_case(&format!("{kind:?}, {}, f64", case.name), Some(&case), &found, &reference, 1e-11, 1e-13);
            let found = Setup::new(&case, kind, Form::Chunked, DType::F32).run(&device);
            // Rounding of the running sum of decays grows with its size: 80 tokens of −30 give sums of 1e3 whose
            // differences keep seven digits less three.
            let bound = if case.decay.0 < -1.0 { 2e-4 } else { 1e-5 };
            compare_case(&format!("{kind:?}, {}, f32", case.name), Some(&case), &found, &reference, bound, 1e-6);
        }
    }
}

/// Gradients of the recurrence, which everything else is compared with, against differences of its values.
#[test]
fn gradients_of_the_recurrence_equal_finite_differences() {
    let device = reference_device().autodiff();
    let (b, t, h, dk, dv) = (1, 5, 2, 3, 4);
    let shapes = [[b, t, h, dk], [b, t, h, dk], [b, t, h, dv], [b, t, h, dk], [b, h, dk, dv]];
    let values: Vec<Vec<f64>> = (0..5)
        .map(|i| uniform(i as u64, shapes[i].iter().product(), if i == 3 { (-2.0, -0.1) } else { (-1.0, 1.0) }))
        .collect();
    let loss = |values: &[Vec<f64>]| {
        let x: Vec<Tensor<4>> =
            values.iter().zip(shapes).map(|(v, s)| tensor(v, s, &device, DType::F64).require_grad()).collect();
        let (o, end) = burn_fla_ops::gla::reference::recurrent(
            x[0].clone(),
            x[1].clone(),
            x[2].clone(),
            x[3].clone(),
            0.7,
            x[4].clone(),
        );
        let weight = tensor(&uniform(8, b * t * h * dv, (-1.0, 1.0)), [b, t, h, dv], &device, DType::F64);
        let loss = (o * weight).sum() + end.square().sum();
        (loss, x)
    };
    let (value, inputs) = loss(&values);
    let grads = value.backward();
    for (i, input) in inputs.iter().enumerate() {
        let grad = numbers(input.grad(&grads).unwrap());
        let step = 1e-6;
        let by_difference: Vec<f64> = (0..values[i].len())
            .map(|j| {
                let at = |delta: f64| {
                    let mut moved = values.clone();
                    moved[i][j] += delta;
                    numbers(loss(&moved).0)[0]
                };
                (at(step) - at(-step)) / (2.0 * step)
            })
            .collect();
        assert_close(&format!("gradient {}", NAMES[2 + i]), &grad, &by_difference, 1e-8);
    }
}

/// Kernels in f32 against the recurrence in f64, with buffers poisoned before each launch.
#[test]
fn kernels_equal_the_recurrence() {
    burn_fla_ops::bridge::poison_outputs(true);
    for (name, device) in kernel_devices() {
        for case in recurrence_cases() {
            for kind in KINDS {
                let reference = Setup::new(&case, kind, Form::Recurrent, DType::F64).run(&reference_device());
                let found = Setup::new(&case, kind, Form::Public, DType::F32).run(&device);
                compare_case(&format!("{name}, {kind:?}, {}", case.name), Some(&case), &found, &reference, 1e-5, 1e-6);
            }
        }
    }
}

/// Every way in which a graph may use an operator.
#[test]
fn the_bridge_hands_out_every_gradient() {
    let cases = recurrence_cases();
    let named = |name: &str| cases.iter().find(|c| c.name == name).unwrap();
    let dense = named("one more than a chunk");
    let dense = &RecurrenceCase { initial: true, ..dense.clone() };
    let packed = named("packed, with empty and one-token sequences");
    let all = [true; 5];
    let setups = [
        ("only o", dense, Loss::Output, all, false),
        ("only the state", dense, Loss::State, all, false),
        ("both", dense, Loss::Both, all, false),
        ("no input tracked", dense, Loss::Both, [false; 5], false),
        ("state untracked", dense, Loss::Both, [true, true, true, true, false], false),
        ("only q tracked", dense, Loss::Output, [true, false, false, false, false], false),
        ("only the decay tracked", dense, Loss::Both, [false, false, false, true, false], false),
        ("queries are keys", dense, Loss::Both, all, true),
        ("packed", packed, Loss::Both, all, false),
        ("packed, only the state", packed, Loss::State, all, false),
    ];
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    for (name, device) in devices {
        for (what, case, loss, tracked, shared) in setups {
            for kind in [Kind::Token, Kind::Key] {
                let setup = |form, dtype| Setup { loss, tracked, shared, ..Setup::new(case, kind, form, dtype) };
                let reference = setup(Form::Recurrent, DType::F64).run(&reference_device());
                let found = setup(Form::Public, DType::F32).run(&device);
                for (found, reference) in found.iter().zip(&reference) {
                    assert!(
                        !found.is_empty() || reference.iter().all(|x| *x == 0.0),
                        "{name}, {what}: a gradient is missing"
                    );
                }
                compare(&format!("{name}, {kind:?}, {what}"), &found, &reference, 1e-5);
            }
        }
    }
}

/// Also where the decay itself requires gradients: it gets none, and those of the others are what they are without.
#[test]
fn a_constant_decay_takes_no_gradient() {
    let [b, t, h, d] = [1, 70, 2, 16];
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    for (name, device) in devices {
        let device = device.autodiff();
        for dtype in [DType::F32, DType::BF16] {
            if dtype == DType::BF16 && name != "cuda" {
                continue;
            }
            let run = |tracked: bool| {
                let draw = |seed| tensor::<4>(&uniform(seed, b * t * h * d, (-1.0, 1.0)), [b, t, h, d], &device, dtype);
                let [q, k, v] = [1, 2, 3].map(|seed| draw(seed).require_grad());
                let decay = tensor::<1>(&[-0.1, -0.5], [h], &device, DType::F32).set_require_grad(tracked);
                let given = ScalarDecay::PerHead(decay.clone());
                let (o, _) = simple_gla(q.clone(), k.clone(), v.clone(), given, SequenceOptions::default()).unwrap();
                let gradients = o.powi_scalar(2).sum().backward();
                assert!(decay.grad(&gradients).is_none(), "{name}");
                [q, k, v].map(|x| numbers(x.grad(&gradients).expect("a gradient")))
            };
            assert_eq!(run(true), run(false), "{name}");
        }
    }
}

/// A sequence in one go, and token by token through the step kernel.
/// More ways of packing than a device keeps tables of, then the same again from another thread: each finds its own.
#[test]
fn packings_are_not_taken_for_each_other() {
    let [t, h, d] = [75, 1, 16];
    let run = |device: &Device, cut: usize, engine: Engine| {
        let x = |seed| tensor(&uniform(seed, t * h * d, (-1.0, 1.0)), [1, t, h, d], device, DType::F32);
        let g = tensor(&uniform(4, t * h, (-0.1, 0.0)), [1, t, h], device, DType::F32);
        let cu_seqlens = Some(CuSeqlens::new(vec![0, cut, t]).unwrap());
        let options = SequenceOptions { cu_seqlens, engine, ..Default::default() };
        numbers(simple_gla(x(1), x(2), x(3), ScalarDecay::PerToken(g), options).unwrap().0)
    };
    let expected: Vec<_> = (1..=70).map(|cut| run(&reference_device(), cut, Engine::Reference)).collect();
    for (name, device) in kernel_devices() {
        let check = |cut: usize| {
            let found = run(&device, cut, Engine::Auto);
            assert_close(&format!("{name}, cut at {cut}"), &found, &expected[cut - 1], 1e-5);
        };
        (1..=70).for_each(check);
        std::thread::scope(|threads| {
            threads.spawn(|| (1..=70).rev().for_each(check));
        });
    }
}

#[test]
fn steps_equal_the_sequence() {
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    for (name, device) in devices {
        let (b, t, h, dk, dv) = (2, 7, 3, 20, 33);
        let float = |seed, last| -> Tensor<4> {
            tensor(&uniform(seed, b * t * h * last, (-1.0, 1.0)), [b, t, h, last], &device, DType::F32)
        };
        let (q, k, v) = (float(1, dk), float(2, dk), float(3, dv));
        let g = float(4, dk).sub_scalar(1.0);
        let (o, end) = gla(q.clone(), k.clone(), v.clone(), g.clone(), SequenceOptions::default()).unwrap();
        let mut state: Option<Tensor<4>> = None;
        let mut outputs = Vec::new();
        for i in 0..t {
            let cut = |x: &Tensor<4>| x.clone().narrow(1, i, 1);
            let options = SequenceOptions { initial_state: state, ..Default::default() };
            let (o, next) = gla(cut(&q), cut(&k), cut(&v), cut(&g), options).unwrap();
            outputs.push(o);
            state = Some(next);
        }
        assert_close(&format!("{name}, o"), &numbers(Tensor::cat(outputs, 1)), &numbers(o), 1e-6);
        assert_close(&format!("{name}, state"), &numbers(state.unwrap()), &numbers(end), 1e-6);
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    let case = RecurrenceCase { tokens: 131, ..recurrence_cases()[0].clone() };
    for (_, device) in kernel_devices() {
        let run = || Setup::new(&case, Kind::Key, Form::Public, DType::F32).run(&device);
        assert_eq!(run(), run());
    }
}

/// bf16 operands where the device has them: equal to the recurrence over the rounded inputs, up to the rounding of the
/// outputs (2^-9).
#[test]
fn kernels_take_bf16() {
    for (name, device) in kernel_devices() {
        if !device.supports_dtype(DType::BF16) {
            continue;
        }
        for case in recurrence_cases().into_iter().filter(|c| c.tokens > 60 && c.decay.0 > -1.0) {
            for kind in KINDS {
                let reference = Setup::new(&case, kind, Form::Recurrent, DType::BF16).run(&reference_device());
                let found = Setup::new(&case, kind, Form::Public, DType::BF16).run(&device);
                compare(&format!("{name}, {kind:?}, {}, bf16", case.name), &found, &reference, 8e-3);
            }
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let x = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &device);
    let ok = || x([2, 3, 2, 4]);
    let options = SequenceOptions::default;
    let error = |result: Result<(Tensor<4>, Tensor<4>), OpError>| result.unwrap_err().to_string();

    let message = error(gla(ok(), x([2, 3, 2, 5]), ok(), ok(), options()));
    assert!(
        message.contains("`k`") && message.contains("[2, 3, 2, 5]") && message.contains("[2, 3, 2, 4]"),
        "{message}"
    );
    let message = error(gla(ok(), ok(), x([2, 4, 2, 4]), ok(), options()));
    assert!(message.contains("`v`"), "{message}");
    let message = error(gla(ok(), ok(), ok().cast(DType::BF16), ok(), options()));
    assert!(message.contains("`v`") && message.contains("BF16"), "{message}");
    let state = SequenceOptions { initial_state: Some(x([1, 2, 4, 4])), ..options() };
    assert!(error(gla(ok(), ok(), ok(), ok(), state)).contains("initial_state"));
    let packed = SequenceOptions { cu_seqlens: Some(CuSeqlens::new(vec![0, 3]).unwrap()), ..options() };
    assert!(error(gla(ok(), ok(), ok(), ok(), packed)).contains("batch of 1"));
    let decay = ScalarDecay::PerHead(Tensor::<1>::zeros([3], &device));
    assert!(error(simple_gla(ok(), ok(), ok(), decay, options())).contains("`decay`"));
    let chunk = SequenceOptions { chunk: Some(0), ..options() };
    assert!(error(gla(ok(), ok(), ok(), ok(), chunk)).contains("`chunk`"));
    for (name, other) in kernel_devices() {
        let message = error(gla(ok(), ok(), Tensor::zeros([2, 3, 2, 4], &other), ok(), options()));
        assert!(message.contains("`v`") && message.contains("to_device"), "{name}: {message}");
    }
    assert_eq!(ratio(&[f64::NAN], &[1.0]), f64::INFINITY);
}

/// f32 products are f32 products: on CUDA too, where tensor cores would round the operands to TF32 (1e-3).
/// Operands as the references of recurrences have them: narrowed, expanded over the leading dimensions, transposed.
#[test]
fn products_take_every_view() {
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    let (b, n, m, k) = (3, 4, 33, 20);
    let numbers_of = |seed, count| uniform(seed, count, (-1.0, 1.0));
    let (x, y, w) = (numbers_of(1, b * n * m * k), numbers_of(2, m * k), numbers_of(3, b * m * m));
    for (name, device) in devices {
        let run = |device: &Device, dtype| {
            let device = device.clone().autodiff();
            let whole: Tensor<4> = tensor(&x, [b, n, m, k], &device, dtype).require_grad();
            let one: Tensor<4> = tensor(&y, [1, 1, m, k], &device, dtype).require_grad();
            let narrowed = whole.clone().narrow(1, 2, 1);
            let expanded = one.clone().expand([b, 1, m, k]);
            // A narrowed and an expanded operand, each on both sides.
            let left = matmul(narrowed.clone(), expanded.clone().swap_dims(2, 3)).unwrap();
            let right = matmul(expanded, narrowed.swap_dims(2, 3)).unwrap();
            let z = left + right;
            let grads = (z.clone() * tensor(&w, [b, 1, m, m], &device, dtype)).sum().backward();
            [numbers(z), numbers(whole.grad(&grads).unwrap()), numbers(one.grad(&grads).unwrap())]
        };
        let (found, exact) = (run(&device, DType::F32), run(&reference_device(), DType::F64));
        for (what, (found, exact)) in ["product", "narrowed", "expanded"].iter().zip(found.iter().zip(&exact)) {
            assert_close(&format!("{name}, {what}"), found, exact, 2e-6);
        }
    }
}

#[test]
fn products_keep_f32() {
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    let sizes = [[1, 1, 1, 1], [1, 33, 70, 65], [2, 64, 128, 64], [3, 17, 259, 5]];
    for (name, device) in devices {
        let device = device.autodiff();
        for [b, m, k, n] in sizes {
            let (a, c) = (uniform(1, b * m * k, (-1.0, 1.0)), uniform(2, b * k * n, (-1.0, 1.0)));
            let w = uniform(3, b * m * n, (-1.0, 1.0));
            let run = |device: &Device, dtype| {
                let x: Tensor<3> = tensor(&a, [b, m, k], device, dtype).require_grad();
                let y: Tensor<3> = tensor(&c, [b, k, n], device, dtype).require_grad();
                let z = matmul(x.clone(), y.clone()).unwrap();
                let grads = (z.clone() * tensor(&w, [b, m, n], device, dtype)).sum().backward();
                [numbers(z), numbers(x.grad(&grads).unwrap()), numbers(y.grad(&grads).unwrap())]
            };
            let (found, exact) = (run(&device, DType::F32), run(&reference_device().autodiff(), DType::F64));
            for (what, (found, exact)) in ["product", "left", "right"].iter().zip(found.iter().zip(&exact)) {
                assert_close(&format!("{name}, {:?}, {what}", [b, m, k, n]), found, exact, 2e-6);
            }
        }
        // A linear layer over a three-dimensional input, with bias.
        let (rows, inner, out) = (6, 40, 24);
        let (a, c, e) =
            (uniform(4, rows * inner, (-1.0, 1.0)), uniform(5, out * inner, (-1.0, 1.0)), uniform(6, out, (-1.0, 1.0)));
        let run = |device: &Device, dtype| {
            let x: Tensor<3> = tensor(&a, [2, 3, inner], device, dtype).require_grad();
            let weight: Tensor<2> = tensor(&c, [out, inner], device, dtype).require_grad();
            let bias: Tensor<1> = tensor(&e, [out], device, dtype).require_grad();
            let y = linear(x.clone(), weight.clone(), Some(bias.clone())).unwrap();
            let grads = y.clone().square().sum().backward();
            [
                numbers(y),
                numbers(x.grad(&grads).unwrap()),
                numbers(weight.grad(&grads).unwrap()),
                numbers(bias.grad(&grads).unwrap()),
            ]
        };
        let (found, exact) = (run(&device, DType::F32), run(&reference_device().autodiff(), DType::F64));
        for (found, exact) in found.iter().zip(&exact) {
            assert_close(&format!("{name}, linear"), found, exact, 2e-6);
        }
    }
}
