//! Products of bf16 matrices against f64.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::matmul::hopper::{accumulate, product, takes};
use burn_fla_ops::{Engine, Epilogue, bridge, linear_with, linears_with};
use burn_fla_tests::{assert_close, numbers, reference_device, rounded, tensor, uniform};

use super::device_for;

/// bf16 numbers, as f64.
pub(super) fn drawn(seed: u64, count: usize) -> Vec<f64> {
    rounded(&uniform(seed, count, (-1.0, 1.0)), DType::BF16)
}

/// The plan's every branch: a single tile, edges in each dimension, several tiles, narrow and wide, split contractions.
const SIZES: [[usize; 3]; 9] = [
    [1, 8, 8],
    [63, 64, 64],
    [65, 200, 136],
    [128, 256, 64],
    [131, 72, 1032],
    [300, 520, 264],
    [512, 256, 4096],
    [1000, 1000, 1000],
    [2048, 4096, 512],
];

suite!(Auto: hopper, Mma: mma; {
    products_equal_f64,
    a_linear_layer_and_its_gradients_equal_f64,
    two_products_are_equal_bit_for_bit,
    several_layers_of_one_input_equal_each_by_itself,
    a_product_is_added_to_a_sum,
});

fn products_equal_f64(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    for [m, n, k] in SIZES {
        let (a, b) = (drawn(1, m * k), drawn(2, n * k));
        // Rows that are looked at: all of a small result, the edges and a few more of a large one.
        let rows: Vec<usize> =
            if m * n * k < 4_000_000 { (0..m).collect() } else { vec![0, 1, 63, 64, 127, m / 2, m - 2, m - 1] };
        let expected: Vec<f64> = rows
            .iter()
            .flat_map(|i| (0..n).map(|j| (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum::<f64>()).collect::<Vec<_>>())
            .collect();
        for (a_rows, b_rows) in [(false, false), (false, true), (true, true), (true, false)] {
            if a_rows && m % 8 != 0 {
                continue;
            }
            let stored = |x: &[f64], across: usize, rows: bool| -> Tensor<2> {
                let x: Tensor<2> = tensor(x, [across, k], &device, DType::BF16);
                if rows { Tensor::from_data(x.transpose().into_data(), (&device, DType::BF16)) } else { x }
            };
            let (x, y) = (stored(&a, m, a_rows), stored(&b, n, b_rows));
            assert!(takes(&x, &y));
            // bf16 outputs round to 2^-9; f32 ones only differ in the order of the sum.
            for (dtype, bound) in [(DType::BF16, 2.5e-3), (DType::F32, 2e-6)] {
                let found = numbers(product(x.clone(), y.clone(), a_rows, b_rows, dtype, engine));
                let found: Vec<f64> = rows.iter().flat_map(|i| found[i * n..(i + 1) * n].to_vec()).collect();
                let what = format!("{m} × {n} × {k}, by rows {a_rows} {b_rows}, {dtype:?}");
                assert_close(&what, &found, &expected, bound);
            }
        }
    }
    bridge::poison_outputs(false);
}

fn a_linear_layer_and_its_gradients_equal_f64(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for (rows, inner, out, wide) in
        [(1, 64, 48, false), (100, 256, 512, true), (513, 1024, 264, true), (4096, 128, 128, false)]
    {
        let (x, w, dy) = (drawn(1, rows * inner), drawn(2, out * inner), drawn(3, rows * out));
        let run = |device: &Device, dtype, weight_dtype| {
            let x: Tensor<3> = tensor(&x, [1, rows, inner], device, dtype).require_grad();
            let w: Tensor<2> = tensor(&w, [out, inner], device, weight_dtype).require_grad();
            let y = linear_with(x.clone(), w.clone(), Epilogue { engine, ..Default::default() }).unwrap();
            let grads = (y.clone() * tensor(&dy, [1, rows, out], device, dtype)).sum().backward();
            let (dx, dw) = (x.grad(&grads).unwrap(), w.grad(&grads).unwrap());
            assert_eq!((dx.dtype(), dw.dtype()), (dtype, weight_dtype));
            [numbers(y), numbers(dx), numbers(dw)]
        };
        let weight_dtype = if wide { DType::F32 } else { DType::BF16 };
        let found = run(&device.clone().autodiff(), DType::BF16, weight_dtype);
        let exact = run(&reference_device().autodiff(), DType::F64, DType::F64);
        let bounds = [2.5e-3, 2.5e-3, if wide { 2e-6 } else { 2.5e-3 }];
        for ((what, bound), (found, exact)) in ["y", "dx", "dw"].iter().zip(bounds).zip(found.iter().zip(&exact)) {
            assert_close(&format!("{rows} × {out} × {inner}, {what}"), found, exact, bound);
        }
    }
}

fn two_products_are_equal_bit_for_bit(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    // Few tiles and a long contraction: it is split.
    let (m, n, k) = (256, 256, 8192);
    let a: Tensor<2> = tensor(&drawn(1, m * k), [m, k], &device, DType::BF16);
    let b: Tensor<2> = tensor(&drawn(2, n * k), [n, k], &device, DType::BF16);
    let run = || numbers(product(a.clone(), b.clone(), false, false, DType::F32, engine));
    assert_eq!(run(), run());
}

/// Their products are one launch, and the gradient of what they share is one product: of all layers, of some, of one.
fn several_layers_of_one_input_equal_each_by_itself(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    bridge::poison_outputs(true);
    for (rows, inner, outs, wide) in [
        (1, 64, &[48, 8][..], false),
        (513, 256, &[512, 16, 264], true),
        (4096, 128, &[128, 128, 256, 256, 16], true),
        (700, 72, &[1032, 200, 64, 8, 16, 24, 32], false),
    ] {
        let x = drawn(1, rows * inner);
        let weights: Vec<_> = outs.iter().enumerate().map(|(i, out)| drawn(10 + i as u64, out * inner)).collect();
        let dys: Vec<_> = outs.iter().enumerate().map(|(i, out)| drawn(20 + i as u64, rows * out)).collect();
        let run = |device: &Device, dtype, weight_dtype, used: &dyn Fn(usize) -> bool| {
            let x: Tensor<3> = tensor(&x, [1, rows, inner], device, dtype).require_grad();
            let weights: Vec<Tensor<2>> = weights
                .iter()
                .zip(outs)
                .map(|(w, out)| tensor(w, [*out, inner], device, weight_dtype).require_grad())
                .collect();
            let outputs = linears_with(x.clone(), weights.iter().map(|w| (w.clone(), None)).collect(), engine).unwrap();
            let mut loss = Tensor::<1>::zeros([1], (device, dtype));
            for (i, y) in outputs.iter().enumerate().filter(|(i, _)| used(*i)) {
                loss = loss + (y.clone() * tensor(&dys[i], [1, rows, outs[i]], device, dtype)).sum();
            }
            let grads = loss.backward();
            let mut found: Vec<_> = outputs.into_iter().map(numbers).collect();
            found.push(numbers(x.grad(&grads).unwrap()));
            found.extend(weights.iter().map(|w| w.grad(&grads).map(numbers).unwrap_or_default()));
            found
        };
        let weight_dtype = if wide { DType::F32 } else { DType::BF16 };
        for (name, used) in [
            ("all", &(|_| true) as &dyn Fn(usize) -> bool),
            ("all but the first", &|i| i > 0),
            ("the second", &|i| i == 1),
        ] {
            let found = run(&device.clone().autodiff(), DType::BF16, weight_dtype, used);
            let exact = run(&reference_device().autodiff(), DType::F64, DType::F64, used);
            for (at, (found, exact)) in found.iter().zip(&exact).enumerate() {
                // Outputs, dx, then gradients of weights; those of layers that are not used are zero or missing.
                let bound = if at > outs.len() && wide { 2e-6 } else { 2.5e-3 };
                if exact.iter().all(|x| *x == 0.0) {
                    assert!(found.iter().all(|x| *x == 0.0), "{outs:?}, {name}: {at}");
                    continue;
                }
                assert_close(&format!("{rows} × {inner} × {outs:?}, {name}: {at}"), found, exact, bound);
            }
        }
    }
    bridge::poison_outputs(false);
}

/// Whole tiles, edges, and a contraction that is split.
fn a_product_is_added_to_a_sum(engine: Engine) {
    let Some(device) = device_for(engine) else { return };
    for [m, n, k] in [[65, 200, 136], [300, 520, 264], [256, 256, 8192]] {
        let (a, b) = (drawn(1, m * k), drawn(2, n * k));
        let before = uniform(3, m * n, (-100.0, 100.0));
        let before: Vec<f64> = before.into_iter().map(|x| f64::from(x as f32)).collect();
        let [x, y] = [(&a, m), (&b, n)].map(|(numbers, rows)| tensor(numbers, [rows, k], &device, DType::BF16));
        let sum: Tensor<2> = tensor(&before, [m, n], &device, DType::F32);
        let kept = sum.clone();
        let found = numbers(accumulate(sum, x.clone(), y.clone(), false, false, engine));
        let product = numbers(product(x, y, false, false, DType::F32, engine));
        for ((found, before), product) in found.iter().zip(&before).zip(&product) {
            // One addition in f32.
            assert_eq!(*found as f32, *before as f32 + *product as f32);
        }
        assert_eq!(numbers(kept), before, "a sum that somebody else holds is not changed");
    }
}
