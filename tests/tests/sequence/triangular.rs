//! The L2 norm and the inverse of unit lower triangular matrices.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::{l2_norm, triangular};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor};

use super::{flat, view};

#[test]
fn l2_norm_is_the_equation() {
    let shape = [3, 5, 2, 7];
    let inputs = [Input::new("x", &shape, (-1.0, 1.0))];
    assert_agree(
        "l2_norm",
        &inputs,
        1e-14,
        |x| vec![flat(l2_norm(view(&x[0], shape), 1e-2).unwrap())],
        |x| {
            let x: Tensor<2> = view(&x[0], [30, 7]);
            vec![flat(x.clone() / (x.powi_scalar(2).sum_dim(1) + 1e-2).sqrt())]
        },
    );
    let zero = Tensor::<2>::zeros([2, 3], (&reference_device(), DType::BF16));
    let y = l2_norm(zero, 1e-6).unwrap();
    assert_eq!((y.dtype(), numbers(y)), (DType::BF16, vec![0.0; 6]));
}

/// `(I + A)⁻¹` by substitution row by row.
fn substitution(a: &[f64], size: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; size * size];
    for i in 0..size {
        for j in 0..=i {
            let known: f64 = (j..i).map(|m| a[i * size + m] * inverse[m * size + j]).sum();
            inverse[i * size + j] = f64::from(u8::from(i == j)) - known;
        }
    }
    inverse
}

#[test]
fn the_triangular_inverse_is_substitution() {
    let device = reference_device();
    for size in [1, 2, 3, 16, 31, 64, 100] {
        // Random entries; all keys the same, with β = 1 and 2, where powers of A reach 1e18 and 1e30.
        let lower = |value: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..size * size).map(|at| if at / size > at % size { value(at) } else { f64::NAN }).collect()
        };
        let random = burn_fla_tests::uniform(3, size * size, (-0.3, 0.3));
        for (what, a) in [("random", lower(&|at| random[at])), ("ones", lower(&|_| 1.0)), ("twos", lower(&|_| 2.0))] {
            let strict: Vec<f64> = a.iter().map(|x| if x.is_nan() { 0.0 } else { *x }).collect();
            let expected = substitution(&strict, size);
            for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
                let found = triangular::inverse(tensor(&a, [1, 1, size, size], &device, dtype)).unwrap();
                assert_close(&format!("{what}, {size}, {dtype:?}"), &numbers(found), &expected, bound);
            }
        }
    }
}

#[test]
fn the_triangular_inverse_has_its_gradient() {
    let shape = [2, 1, 11, 11];
    let inputs = [Input::new("a", &shape, (-0.5, 0.5))];
    let inverse = |x: &[Tensor<1>]| vec![flat(triangular::inverse(view(&x[0], shape)).unwrap())];
    assert_finite_differences("inverse", &inputs, 100, 1e-8, inverse);
}

#[test]
fn wrong_arguments_are_named() {
    let x = |dtype| Tensor::<4>::zeros([2, 4, 1, 5], (&reference_device(), dtype));
    for (message, words) in [
        (l2_norm(x(DType::F16), 1e-6).unwrap_err().to_string(), ["l2_norm", "F16"]),
        (l2_norm(x(DType::F32), 0.0).unwrap_err().to_string(), ["eps", "positive"]),
        (triangular::inverse(x(DType::F32)).unwrap_err().to_string(), ["square", "[2, 4, 1, 5]"]),
        (triangular::inverse(x(DType::F16)).unwrap_err().to_string(), ["triangular::inverse", "F16"]),
    ] {
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}
