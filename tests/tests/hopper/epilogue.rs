//! What follows a product before it is rounded, against plain f64 arithmetic.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::{Activation, Engine, Epilogue, bridge, linear_with, linears_with};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor};

use super::device_for;
use super::linear::drawn;

const ACTIVATIONS: [Activation; 6] = [
    Activation::Identity,
    Activation::Relu,
    Activation::ReluSquared,
    Activation::Sigmoid,
    Activation::Tanh,
    Activation::Silu,
];

/// A single row, edges in each dimension, several narrow and wide tiles, split contractions.
const SIZES: [[usize; 3]; 7] =
    [[1, 8, 8], [63, 64, 72], [65, 200, 136], [131, 72, 1032], [300, 520, 72], [64, 72, 8192], [1030, 1000, 32]];

/// `act(z)` and `act'(z)`.
fn activate(z: f64, activation: Activation) -> (f64, f64) {
    let s = 1.0 / (1.0 + (-z).exp());
    let positive = z.max(0.0);
    match activation {
        Activation::Identity => (z, 1.0),
        Activation::Relu => (positive, if z > 0.0 { 1.0 } else { 0.0 }),
        Activation::ReluSquared => (positive * positive, 2.0 * positive),
        Activation::Sigmoid => (s, s * (1.0 - s)),
        Activation::Tanh => (z.tanh(), 1.0 - z.tanh() * z.tanh()),
        Activation::Silu => (z * s, s * (1.0 + z * (1.0 - s))),
    }
}

/// `a[m, k] · b[n, k]ᵀ`, each operand as it is stored or transposed.
fn product(a: impl Fn(usize, usize) -> f64, b: impl Fn(usize, usize) -> f64, [m, n, k]: [usize; 3]) -> Vec<f64> {
    let row = |i: usize| (0..n).map(move |j| (i, j)).collect::<Vec<_>>();
    (0..m).flat_map(row).map(|(i, j)| (0..k).map(|l| a(i, l) * b(j, l)).sum()).collect()
}

/// A problem with operands that give z of the order of one.
struct Problem {
    sizes: [usize; 3],
    x: Vec<f64>,
    w: Vec<f64>,
    bias: Vec<f64>,
    residual: Vec<f64>,
    dy: Vec<f64>,
}

impl Problem {
    fn new([m, n, k]: [usize; 3]) -> Self {
        // A power of two, so that what is rounded stays so.
        let scale = 0.5f64.powi((k as f64).log2() as i32 / 2);
        Self {
            sizes: [m, n, k],
            x: drawn(1, m * k),
            w: drawn(2, n * k).into_iter().map(|w| w * scale).collect(),
            bias: drawn(3, n),
            residual: drawn(4, m * n),
            dy: drawn(5, m * n),
        }
    }

    /// y, dx, dW, db, dr by hand.
    fn exact(&self, activation: Activation, bias: bool, residual: bool) -> [Vec<f64>; 5] {
        let [m, n, k] = self.sizes;
        let (x, w) = (|i: usize, l: usize| self.x[i * k + l], |j: usize, l: usize| self.w[j * k + l]);
        let z = product(x, w, [m, n, k]);
        let (mut y, mut dz) = (vec![0.0; m * n], vec![0.0; m * n]);
        for (at, z) in z.into_iter().enumerate() {
            let (value, slope) = activate(z + if bias { self.bias[at % n] } else { 0.0 }, activation);
            y[at] = value + if residual { self.residual[at] } else { 0.0 };
            dz[at] = self.dy[at] * slope;
        }
        let dx = product(|i, j| dz[i * n + j], |l, j| w(j, l), [m, k, n]);
        let dw = product(|j, i| dz[i * n + j], |l, i| x(i, l), [n, k, m]);
        let db = (0..n).map(|j| (0..m).map(|i| dz[i * n + j]).sum()).collect();
        [y, dx, dw, db, self.dy.clone()]
    }

    fn found(
        &self,
        device: &Device,
        engine: Engine,
        activation: Activation,
        bias: bool,
        residual: bool,
    ) -> [Vec<f64>; 5] {
        let [m, n, k] = self.sizes;
        let device = device.clone().autodiff();
        let x: Tensor<3> = tensor(&self.x, [1, m, k], &device, DType::BF16).require_grad();
        let w: Tensor<2> = tensor(&self.w, [n, k], &device, DType::F32).require_grad();
        let b: Tensor<1> = tensor(&self.bias, [n], &device, DType::F32).require_grad();
        let r: Tensor<3> = tensor(&self.residual, [1, m, n], &device, DType::BF16).require_grad();
        let epilogue =
            Epilogue { bias: bias.then(|| b.clone()), activation, residual: residual.then(|| r.clone()), engine };
        let y = linear_with(x.clone(), w.clone(), epilogue).unwrap();
        let grads = (y.clone() * tensor(&self.dy, [1, m, n], &device, DType::BF16)).sum().backward();
        [
            numbers(y),
            numbers(x.grad(&grads).unwrap()),
            numbers(w.grad(&grads).unwrap()),
            b.grad(&grads).map(numbers).unwrap_or_default(),
            r.grad(&grads).map(numbers).unwrap_or_default(),
        ]
    }
}

suite!(Auto: hopper, Mma: mma; {
    layers_with_an_epilogue_equal_f64,
    an_epilogue_is_the_steps_one_after_the_other,
    a_run_with_an_epilogue_repeats_to_the_last_bit,
    biases_of_several_layers_equal_f64,
});

fn layers_with_an_epilogue_equal_f64(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    for (at, sizes) in SIZES.into_iter().enumerate() {
        let problem = Problem::new(sizes);
        for (number, activation) in ACTIVATIONS.into_iter().enumerate() {
            for (turn, (bias, residual)) in
                [(true, false), (false, true), (true, true), (false, false)].into_iter().enumerate()
            {
                // One size takes most, the others take turns: each is a kernel of its own, which takes a second to compile.
                let most = sizes == [65, 200, 136] && turn % 2 == 0;
                if !most && (at + number + turn) % 8 != 0 {
                    continue;
                }
                let found = problem.found(&device, engine, activation, bias, residual);
                let exact = problem.exact(activation, bias, residual);
                // Results are rounded to 2^-9, and so is what tells the slope; then dz once more.
                for ((what, bound), (found, exact)) in
                    [("y", 2.5e-3), ("dx", 5e-3), ("dw", 5e-3), ("db", 5e-3), ("dr", 1e-6)]
                        .into_iter()
                        .zip(found.iter().zip(&exact))
                {
                    if !found.is_empty() {
                        let what = format!("{sizes:?} {activation:?} bias {bias} residual {residual}: {what}");
                        assert_close(&what, found, exact, bound);
                    }
                }
            }
        }
    }
    bridge::poison_outputs(false);
}

/// The function of a layer is one, whichever way it is computed: up to the roundings between the steps.
fn an_epilogue_is_the_steps_one_after_the_other(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    let problem = Problem::new([513, 264, 512]);
    let [m, n, k] = problem.sizes;
    let x: Tensor<2> = tensor(&problem.x, [m, k], &device, DType::BF16);
    let w: Tensor<2> = tensor(&problem.w, [n, k], &device, DType::F32);
    let b: Tensor<1> = tensor(&problem.bias, [n], &device, DType::F32);
    let r: Tensor<2> = tensor(&problem.residual, [m, n], &device, DType::BF16);
    for activation in ACTIVATIONS {
        let epilogue = Epilogue { bias: Some(b.clone()), activation, residual: Some(r.clone()), engine };
        let at_once = linear_with(x.clone(), w.clone(), epilogue).unwrap();
        let plain = linear_with(x.clone(), w.clone(), Epilogue { engine, ..Default::default() }).unwrap()
            + b.clone().cast(DType::BF16).unsqueeze();
        let steps = activation.apply(plain) + r.clone();
        assert_close(&format!("{activation:?}"), &numbers(at_once), &numbers(steps), 6e-3);
    }
}

fn a_run_with_an_epilogue_repeats_to_the_last_bit(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for sizes in [[131, 264, 256], [256, 256, 8192]] {
        let problem = Problem::new(sizes);
        let run = || problem.found(&device, engine, Activation::Silu, true, true);
        assert_eq!(run(), run());
    }
}

/// Biases of several layers of one input, which are one launch.
fn biases_of_several_layers_equal_f64(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    for (rows, inner, outs) in [(1, 64, &[48, 8][..]), (513, 256, &[512, 16, 264]), (130, 4096, &[64, 64])] {
        let x = drawn(1, rows * inner);
        let weights: Vec<_> = outs.iter().enumerate().map(|(i, out)| drawn(10 + i as u64, out * inner)).collect();
        let biases: Vec<_> = outs.iter().enumerate().map(|(i, out)| drawn(20 + i as u64, *out)).collect();
        let dys: Vec<_> = outs.iter().enumerate().map(|(i, out)| drawn(30 + i as u64, rows * out)).collect();
        let run = |device: &Device, dtype, wide| {
            let device = device.clone().autodiff();
            let x: Tensor<2> = tensor(&x, [rows, inner], &device, dtype).require_grad();
            let layer = |(i, out): (usize, &usize)| -> (Tensor<2>, Option<Tensor<1>>) {
                let w: Tensor<2> = tensor(&weights[i], [*out, inner], &device, wide).require_grad();
                let b: Tensor<1> = tensor(&biases[i], [*out], &device, wide).require_grad();
                (w, Some(b))
            };
            let layers: Vec<_> = outs.iter().enumerate().map(layer).collect();
            let outputs = linears_with(x.clone(), layers.clone(), engine).unwrap();
            let mut loss = Tensor::<1>::zeros([1], (&device, dtype));
            for (i, y) in outputs.iter().enumerate() {
                loss = loss + (y.clone() * tensor(&dys[i], [rows, outs[i]], &device, dtype)).sum();
            }
            let grads = loss.backward();
            let mut found: Vec<_> = outputs.into_iter().map(numbers).collect();
            found.push(numbers(x.grad(&grads).unwrap()));
            for (w, b) in layers {
                found.push(numbers(w.grad(&grads).unwrap()));
                found.push(numbers(b.unwrap().grad(&grads).unwrap()));
            }
            found
        };
        let found = run(&device, DType::BF16, DType::F32);
        let exact = run(&reference_device(), DType::F64, DType::F64);
        for (at, (found, exact)) in found.iter().zip(&exact).enumerate() {
            assert_close(&format!("{rows} × {inner} × {outs:?}: {at}"), found, exact, 2.5e-3);
        }
    }
    bridge::poison_outputs(false);
}
