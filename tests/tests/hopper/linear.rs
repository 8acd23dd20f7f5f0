//! Products of bf16 matrices against f64.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::matmul::hopper::{product, takes};
use burn_fla_ops::{bridge, linear};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

use super::hopper;

/// bf16 numbers, as f64.
fn rounded(seed: u64, count: usize) -> Vec<f64> {
    let x: Tensor<1> = tensor(&uniform(seed, count, (-1.0, 1.0)), [count], &reference_device(), DType::BF16);
    numbers(x)
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

#[test]
fn products_equal_f64() {
    let Some(device) = hopper() else { return };
    bridge::poison_outputs(true);
    for [m, n, k] in SIZES {
        let (a, b) = (rounded(1, m * k), rounded(2, n * k));
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
                let found = numbers(product(x.clone(), y.clone(), a_rows, b_rows, dtype));
                let found: Vec<f64> = rows.iter().flat_map(|i| found[i * n..(i + 1) * n].to_vec()).collect();
                let what = format!("{m} × {n} × {k}, by rows {a_rows} {b_rows}, {dtype:?}");
                assert_close(&what, &found, &expected, bound);
            }
        }
    }
    bridge::poison_outputs(false);
}

#[test]
fn a_linear_layer_and_its_gradients_equal_f64() {
    let Some(device) = hopper() else { return };
    for (rows, inner, out, wide) in
        [(1, 64, 48, false), (100, 256, 512, true), (513, 1024, 264, true), (4096, 128, 128, false)]
    {
        let (x, w, dy) = (rounded(1, rows * inner), rounded(2, out * inner), rounded(3, rows * out));
        let run = |device: &Device, dtype, weight_dtype| {
            let x: Tensor<3> = tensor(&x, [1, rows, inner], device, dtype).require_grad();
            let w: Tensor<2> = tensor(&w, [out, inner], device, weight_dtype).require_grad();
            let y = linear(x.clone(), w.clone(), None).unwrap();
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

#[test]
fn two_products_are_equal_bit_for_bit() {
    let Some(device) = hopper() else { return };
    // Few tiles and a long contraction: it is split.
    let (m, n, k) = (256, 256, 8192);
    let a: Tensor<2> = tensor(&rounded(1, m * k), [m, k], &device, DType::BF16);
    let b: Tensor<2> = tensor(&rounded(2, n * k), [n, k], &device, DType::BF16);
    let run = || numbers(product(a.clone(), b.clone(), false, false, DType::F32));
    assert_eq!(run(), run());
}
