//! The token shift.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::{CuSeqlens, OpError, TokenShiftOptions, token_shift};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

use super::{flat, view};

const OFFSETS: [usize; 6] = [0, 4, 4, 5, 12, 13];

fn inputs(shape: [usize; 3], sequences: usize) -> Vec<Input> {
    let range = (-1.0, 1.0);
    vec![Input::new("x", &shape, range), Input::new("initial", &[sequences, shape[2]], range)]
}

fn shift(x: Tensor<3>, initial: Option<Tensor<2>>, packed: Option<&[usize]>) -> (Tensor<3>, Tensor<2>) {
    let cu_seqlens = packed.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap());
    token_shift(x, TokenShiftOptions { initial, cu_seqlens, ..Default::default() }).unwrap()
}

#[test]
fn each_token_is_compared_with_the_one_before() {
    let device = reference_device();
    for (b, t, d) in [(1, 1, 1), (2, 1, 3), (3, 7, 5)] {
        let (x, initial) = (uniform(1, b * t * d, (-1.0, 1.0)), uniform(2, b * d, (-1.0, 1.0)));
        let expected = |first: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
            let value = |row: usize, token: usize, c: usize| x[(row * t + token) * d + c];
            let mut out = Vec::new();
            for (row, token, c) in (0..b * t * d).map(|i| (i / (t * d), i / d % t, i % d)) {
                let before = if token == 0 { first(row, c) } else { value(row, token - 1, c) };
                out.push(before - value(row, token, c));
            }
            out
        };
        let rows = || tensor(&x, [b, t, d], &device, DType::F64);
        let (delta, last) = shift(rows(), Some(tensor(&initial, [b, d], &device, DType::F64)), None);
        assert_eq!(numbers(delta), expected(&|row, c| initial[row * d + c]));
        let ends: Vec<f64> = (0..b * d).map(|i| x[(i / d * t + t - 1) * d + i % d]).collect();
        assert_eq!(numbers(last), ends);
        assert_eq!(numbers(shift(rows(), None, None).0), expected(&|_, _| 0.0));
    }
}

#[test]
fn packed_sequences_are_separate() {
    let (t, d, n) = (13, 3, OFFSETS.len() - 1);
    let packed = |x: &[Tensor<1>]| {
        let (delta, last) = shift(view(&x[0], [1, t, d]), Some(view(&x[1], [n, d])), Some(&OFFSETS));
        vec![flat(delta), flat(last)]
    };
    let separate = |x: &[Tensor<1>]| {
        let (mut deltas, mut lasts) = (Vec::new(), Vec::new());
        for (i, window) in OFFSETS.windows(2).enumerate() {
            let initial = view(&x[1], [n, d]).narrow(0, i, 1);
            if window[0] == window[1] {
                lasts.push(initial);
                continue;
            }
            let row = view(&x[0], [1, t, d]).narrow(1, window[0], window[1] - window[0]);
            let (delta, last) = shift(row, Some(initial), None);
            deltas.push(delta);
            lasts.push(last);
        }
        vec![flat(Tensor::cat(deltas, 1)), flat(Tensor::cat(lasts, 0))]
    };
    assert_agree("packed", &inputs([1, t, d], n), 0.0, packed, separate);
    assert_finite_differences("packed", &inputs([1, t, d], n), 40, 1e-9, packed);
}

#[test]
fn a_shift_goes_on_from_the_last_token() {
    let [b, t, d] = [2, 6, 3];
    let whole = |x: &[Tensor<1>]| {
        let (delta, last) = shift(view(&x[0], [b, t, d]), Some(view(&x[1], [b, d])), None);
        vec![flat(delta), flat(last)]
    };
    for first in 1..t {
        let parts = |x: &[Tensor<1>]| {
            let rows = view(&x[0], [b, t, d]);
            let (one, last) = shift(rows.clone().narrow(1, 0, first), Some(view(&x[1], [b, d])), None);
            let (two, last) = shift(rows.narrow(1, first, t - first), Some(last), None);
            vec![flat(Tensor::cat(vec![one, two], 1)), flat(last)]
        };
        assert_agree("continued", &inputs([b, t, d], b), 0.0, parts, whole);
    }
    assert_finite_differences("dense", &inputs([b, t, d], b), 40, 1e-9, whole);
}

#[test]
fn the_type_of_the_input_is_kept() {
    let device = reference_device();
    let x = uniform(3, 24, (-1.0, 1.0));
    let half = tensor(&x, [2, 4, 3], &device, DType::BF16);
    let (delta, last) = shift(half.clone(), None, None);
    assert_eq!((delta.dtype(), last.dtype()), (DType::BF16, DType::BF16));
    let single = half.cast(DType::F32);
    let (expected, end) = shift(single, None, None);
    assert_eq!(numbers(last), numbers(end));
    // One rounding to 8 bits.
    assert_close("bf16", &numbers(delta), &numbers(expected), 4e-3);
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let x = || Tensor::<3>::zeros([2, 3, 4], &device);
    let initial = Some(Tensor::zeros([1, 4], &device));
    let error = token_shift(x(), TokenShiftOptions { initial, ..Default::default() }).unwrap_err();
    assert!(matches!(error, OpError::Shape { argument: "initial", .. }), "{error}");
    let cu_seqlens = Some(CuSeqlens::new(vec![0, 6]).unwrap());
    let error = token_shift(x(), TokenShiftOptions { cu_seqlens, ..Default::default() }).unwrap_err();
    assert!(error.to_string().contains("batch of 1"), "{error}");
    let half = x().cast(DType::F16);
    let error = token_shift(half, TokenShiftOptions::default()).unwrap_err();
    assert!(matches!(error, OpError::DType { argument: "x", .. }), "{error}");
    // Nothing to shift: the initial tokens stay.
    let initial = tensor(&[1.0, 2.0], [1, 2], &device, DType::F32);
    let (delta, last) = shift(Tensor::zeros([1, 0, 2], &device), Some(initial), None);
    assert_eq!((delta.dims(), numbers(last)), ([1, 0, 2], vec![1.0, 2.0]));
}
