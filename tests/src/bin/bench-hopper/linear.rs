//! The three products of a linear layer.

use burn::tensor::{DType, Device, Distribution, Tensor, capture};
use burn_fla_ops::Engine;
use burn_fla_ops::matmul::hopper::product;
use burn_fla_tests::{numbers, ratio};

use super::timing::median;

/// Calls in one captured graph: what the host does between them is not timed.
const CALLS: usize = 8;

/// The products, with the names of the kernels that compute them: those for Hopper, those for any NVIDIA GPU since Ampere, and
/// Burn's.
pub(super) const OPERATORS: [&str; 3] = ["linear", "linear:mma", "linear:burn"];

pub(super) fn run(device: &Device, operator: &str, tokens: &[usize], shapes: &[[usize; 2]]) -> bool {
    let engine = if operator == "linear" { Engine::Auto } else { Engine::Mma };
    let burn = operator == "linear:burn";
    println!("product tokens N K ms TFLOP/s error");
    let mut all = true;
    for shape in shapes {
        for &m in tokens {
            let (n, k) = (shape[0], shape[1]);
            let random = |rows: usize, columns: usize| -> Tensor<2> {
                Tensor::random([rows, columns], Distribution::Uniform(-1.0, 1.0), (device, DType::BF16))
            };
            let (x, w, dy) = (random(m, k), random(n, k), random(m, n));
            let flops = 2.0 * (m * n * k) as f64;
            let report = |name: &str, a: &Tensor<2>, b: &Tensor<2>, a_rows: bool, b_rows: bool| {
                let call = || {
                    if !burn {
                        return product(a.clone(), b.clone(), a_rows, b_rows, DType::BF16, engine);
                    }
                    let a = if a_rows { a.clone().transpose() } else { a.clone() };
                    let b = if b_rows { b.clone() } else { b.clone().transpose() };
                    a.matmul(b)
                };
                let error = sampled_error(a, b, &call(), a_rows, b_rows);
                if error > 3e-3 {
                    println!("{name} {m} {n} {k}: WRONG, relative error {error:.1e}");
                    return false;
                }
                let mut graph = capture(device, || {
                    (1..CALLS).for_each(|_| drop(call()));
                    call()
                });
                let note = if graph.is_hardware() { "" } else { " (no graph: with the host's time)" };
                // SAFETY: the operands live as long as the graph.
                let seconds = median(device, || drop(unsafe { graph.replay() }.clone())) / CALLS as f64;
                println!("{name} {m} {n} {k} {:.4} {:.0} {error:.1e}{note}", seconds * 1e3, flops / seconds / 1e12);
                true
            };
            all &= report("y", &x, &w, false, false);
            all &= report("dx", &dy, &w, false, true);
            all &= report("dW", &dy, &x, true, true);
        }
    }
    all
}

/// The error of some elements of a product against f64.
fn sampled_error(a: &Tensor<2>, b: &Tensor<2>, c: &Tensor<2>, a_rows: bool, b_rows: bool) -> f64 {
    let [m, n] = c.dims();
    let picked = |x: &Tensor<2>, i: usize, rows: bool| -> Vec<f64> {
        numbers(if rows { x.clone().narrow(1, i, 1) } else { x.clone().narrow(0, i, 1) })
    };
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for sample in 0..6 {
        let i = (sample * 7919 + 13) % m;
        let row = picked(a, i, a_rows);
        let results = numbers(c.clone().narrow(0, i, 1));
        for other in 0..6 {
            let j = (other * 104_729 + sample + 7) % n;
            let column = picked(b, j, b_rows);
            found.push(results[j]);
            expected.push(row.iter().zip(&column).map(|(x, y)| x * y).sum());
        }
    }
    ratio(&found, &expected)
}
