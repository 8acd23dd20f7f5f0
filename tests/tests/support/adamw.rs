//! The update of all parameters: kernels and tensor operations against the equations in f64.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::bridge::poison_outputs;
use burn_fla_ops::{AdamWOptions, AdamWSlot, AdamWStep, Engine, OpError, adamw};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor, uniform};

/// More parameters than any launch takes, of sizes that end inside and outside of vectors, planes, cubes and parts.
fn sizes() -> Vec<usize> {
    let mut sizes = vec![1, 2, 3, 35, 4096, 0, 20_003, 60_000, 1023, 1025, 256, 257];
    sizes.extend((0..60).map(|i| 4 * i + 4));
    sizes
}

/// A learning rate scale and a weight decay for parameter `at`: three groups.
fn rule(at: usize) -> (f64, f64) {
    [(1.0, 0.1), (0.5, 0.0), (2.0, 0.3)][at % 3]
}

const OPTIONS: AdamWOptions = AdamWOptions {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    max_norm: 0.0,
    skip_non_finite: true,
    engine: Engine::Auto,
};

/// Parameters with their moments as numbers, of which a slot can be made.
#[derive(Clone, Debug, PartialEq)]
struct Plain {
    values: Vec<Vec<f64>>,
    first: Vec<Vec<f64>>,
    second: Vec<Vec<f64>>,
    counters: Vec<f64>,
}

impl Plain {
    fn start() -> Self {
        let sizes = sizes();
        // Small enough that an update of about the learning rate is most of the new value.
        let values = sizes.iter().enumerate().map(|(at, n)| uniform(at as u64, *n, (-0.02, 0.02)));
        let zeros: Vec<Vec<f64>> = sizes.iter().map(|n| vec![0.0; *n]).collect();
        Self { values: values.collect(), first: zeros.clone(), second: zeros, counters: vec![0.0; 5] }
    }

    /// The documented equations.
    fn step(&mut self, grads: &[Vec<f64>], options: &AdamWOptions) -> f64 {
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = if options.max_norm > 0.0 { (options.max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let (beta1, beta2) = (options.beta1, options.beta2);
        self.counters[0] = beta1 * self.counters[0] + 1.0 - beta1;
        self.counters[1] = beta2 * self.counters[1] + 1.0 - beta2;
        for (at, grads) in grads.iter().enumerate() {
            let (lr_scale, decay) = rule(at);
            let lr = options.lr * lr_scale;
            for (i, g) in grads.iter().enumerate() {
                let g = g * clip;
                let (m, v) = (&mut self.first[at][i], &mut self.second[at][i]);
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let change = (*m / self.counters[0]) / ((*v / self.counters[1]).sqrt() + options.eps);
                self.values[at][i] = self.values[at][i] * (1.0 - lr * decay) - lr * change;
            }
        }
        norm
    }
}

fn gradient(step: u64) -> Vec<Vec<f64>> {
    // In f32, as the optimiser gets them.
    let round = |x: Vec<f64>| x.into_iter().map(|x| f64::from(x as f32)).collect();
    sizes().iter().enumerate().map(|(at, n)| round(uniform(1000 * (step + 1) + at as u64, *n, (-0.1, 0.1)))).collect()
}

/// The same on a device.
struct State {
    values: Vec<Tensor<1>>,
    first: Vec<Tensor<1>>,
    second: Vec<Tensor<1>>,
    counters: Tensor<1>,
}

impl State {
    fn new(plain: &Plain, device: &Device) -> Self {
        let all = |lists: &[Vec<f64>]| lists.iter().map(|list| flat(list, device)).collect();
        Self {
            values: all(&plain.values),
            first: all(&plain.first),
            second: all(&plain.second),
            counters: flat(&plain.counters, device),
        }
    }

    /// One update; the norm.
    fn step(&mut self, grads: &[Vec<f64>], options: AdamWOptions) -> f64 {
        let device = self.counters.device();
        let mut slots = Vec::new();
        let State { values, first, second, .. } = self;
        let moments = first.drain(..).zip(second.drain(..));
        for (at, (value, (first, second))) in values.drain(..).zip(moments).enumerate() {
            let (lr_scale, weight_decay) = rule(at);
            slots.push(AdamWSlot { value, grad: flat(&grads[at], &device), first, second, lr_scale, weight_decay });
        }
        let AdamWStep { updated, counters, norm } = adamw(slots, self.counters.clone(), options).unwrap();
        for one in updated {
            self.values.push(one.value);
            self.first.push(one.first);
            self.second.push(one.second);
        }
        self.counters = counters;
        numbers(norm)[0]
    }

    fn read(&self) -> Plain {
        let all = |list: &[Tensor<1>]| list.iter().map(|x| numbers(x.clone())).collect();
        Plain {
            values: all(&self.values),
            first: all(&self.first),
            second: all(&self.second),
            counters: numbers(self.counters.clone()),
        }
    }
}

fn flat(values: &[f64], device: &Device) -> Tensor<1> {
    tensor(values, [values.len()], device, DType::F32)
}

fn devices() -> Vec<(&'static str, Device)> {
    kernel_devices().into_iter().chain([("flex", reference_device())]).collect()
}

fn assert_plain(what: &str, found: &Plain, expected: &Plain, bound: f64) {
    for (part, a, b) in [
        ("values", &found.values, &expected.values),
        ("first moments", &found.first, &expected.first),
        ("second moments", &found.second, &expected.second),
    ] {
        for (at, (a, b)) in a.iter().zip(b).enumerate() {
            assert_close(&format!("{what}: {part} of {at}, {} numbers", b.len()), a, b, bound);
        }
    }
    assert_close(&format!("{what}: counters"), &found.counters, &expected.counters, bound);
}

#[test]
fn updates_follow_the_equations() {
    for (name, device) in devices() {
        poison_outputs(true);
        let ways = [(0.0, true), (1.0, true), (1.0, false), (1e6, false)].map(|way| (way, Engine::Auto));
        for ((max_norm, skip_non_finite), engine) in ways.into_iter().chain([((1.0, true), Engine::Reference)]) {
            let what = format!("{name}, {engine:?}, norm to {max_norm}");
            let options = AdamWOptions { max_norm, skip_non_finite, engine, ..OPTIONS };
            let mut plain = Plain::start();
            let mut state = State::new(&plain, &device);
            for step in 0..4 {
                let options = AdamWOptions { lr: 0.01 * (1.0 + step as f64), ..options };
                let grads = gradient(step);
                let exact = plain.step(&grads, &options);
                let norm = state.step(&grads, options);
                assert!((norm / exact - 1.0).abs() < 1e-6, "{what}: norm {norm}, not {exact}");
            }
            // Some roundings of f32 a step.
            assert_plain(&what, &state.read(), &plain, 5e-7);
        }
        poison_outputs(false);
    }
}

#[test]
fn two_runs_are_equal_to_the_last_bit() {
    for (name, device) in devices() {
        let run = || {
            let mut state = State::new(&Plain::start(), &device);
            let norms = [0, 1].map(|step| state.step(&gradient(step), AdamWOptions { max_norm: 1.0, ..OPTIONS }));
            (state.read(), norms)
        };
        assert_eq!(run(), run(), "{name}");
    }
}

#[test]
fn a_number_that_is_not_finite_stops_all() {
    let sizes = sizes();
    let last = sizes.len() - 1;
    for (name, device) in devices() {
        let mut state = State::new(&Plain::start(), &device);
        state.step(&gradient(0), OPTIONS);
        let before = state.read();
        let mut skips = 0.0;
        for (at, i) in [(0, 0), (3, 34), (6, 20_002), (7, 30_001), (8, 1022), (last, sizes[last] - 1)] {
            for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30] {
                // 1e30 is finite, but its square is not in f32: that norm cannot be clipped either.
                let mut grads = gradient(1);
                grads[at][i] = poison;
                state.step(&grads, AdamWOptions { max_norm: 1.0, ..OPTIONS });
                skips += 1.0;
            }
        }
        let after = state.read();
        let counters = [before.counters[0], before.counters[1], skips, skips, skips];
        assert_eq!(after, Plain { counters: counters.to_vec(), ..before }, "{name}");
        state.step(&gradient(1), OPTIONS);
        let counters = state.read().counters;
        assert_eq!(counters[2..], [0.0, skips, skips], "{name}: the row ends, the counts stay");
    }
}

#[test]
fn what_others_hold_is_not_touched() {
    for (name, device) in devices() {
        let mut state = State::new(&Plain::start(), &device);
        state.step(&gradient(0), OPTIONS);
        let before = state.read();
        let held = State {
            values: state.values.clone(),
            first: state.first.clone(),
            second: state.second.clone(),
            counters: state.counters.clone(),
        };
        state.step(&gradient(1), OPTIONS);
        assert_eq!(held.read(), before, "{name}");
        let mut again = held;
        again.step(&gradient(1), OPTIONS);
        assert_eq!(again.read(), state.read(), "{name}: in place or not, the bits are equal");
    }
}

#[test]
fn nothing_to_update_is_no_error() {
    for (name, device) in devices() {
        poison_outputs(true);
        let zeros = || Tensor::zeros([5], (&device, DType::F32));
        let step = adamw(Vec::new(), zeros(), OPTIONS).unwrap();
        assert!(step.updated.is_empty(), "{name}");
        assert_eq!(numbers(step.norm), [0.0], "{name}");
        let empty = || Tensor::zeros([0], (&device, DType::F32));
        let (value, grad, first, second) = (empty(), empty(), empty(), empty());
        let slot = AdamWSlot { value, grad, first, second, lr_scale: 1.0, weight_decay: 0.1 };
        let step = adamw(vec![slot], zeros(), OPTIONS).unwrap();
        assert_eq!((step.updated.len(), numbers(step.norm)), (1, vec![0.0]), "{name}");
    }
}

#[test]
fn wrong_slots_and_options_are_named() {
    let device = reference_device();
    let ones = |n: usize| Tensor::<1>::ones([n], (&device, DType::F32));
    let slot = |value, grad, first, second| AdamWSlot { value, grad, first, second, lr_scale: 1.0, weight_decay: 0.0 };
    let named = |slot: AdamWSlot, options: AdamWOptions, argument: &str| {
        let error: OpError = adamw(vec![slot], ones(5), options).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("adamw") && message.contains(&format!("`{argument}`")), "{message}");
    };
    named(slot(ones(3), ones(4), ones(3), ones(3)), OPTIONS, "grad");
    named(slot(ones(3), ones(3), ones(2), ones(3)), OPTIONS, "first");
    named(slot(ones(3), ones(3), ones(3), ones(3).cast(DType::BF16)), OPTIONS, "second");
    named(slot(ones(3).cast(DType::F64), ones(3), ones(3), ones(3)), OPTIONS, "value");
    let good = || slot(ones(3), ones(3), ones(3), ones(3));
    named(good(), AdamWOptions { beta1: 1.0, ..OPTIONS }, "beta1");
    named(good(), AdamWOptions { beta2: -0.1, ..OPTIONS }, "beta2");
    named(good(), AdamWOptions { eps: f64::NAN, ..OPTIONS }, "eps");
    named(good(), AdamWOptions { max_norm: -1.0, ..OPTIONS }, "max_norm");
    named(good(), AdamWOptions { lr: f64::INFINITY, ..OPTIONS }, "lr");
    let tracked = Tensor::<1>::ones([3], (&device.clone().autodiff(), DType::F32));
    named(slot(tracked, ones(3), ones(3), ones(3)), OPTIONS, "value");
    assert!(adamw(vec![good()], ones(4), OPTIONS).unwrap_err().to_string().contains("`counters`"));
}
