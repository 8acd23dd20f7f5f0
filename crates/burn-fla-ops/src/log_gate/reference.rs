//! The gate in plain tensor operations.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;

/// `ln σ(a + b) / τ` in f32 (f64 for f64).
pub fn log_gate<const D: usize>(a: Tensor<D>, bias: Option<Tensor<1>>, normalizer: f64) -> Tensor<D> {
    let dtype = compute_dtype(a.dtype());
    let a = a.cast(dtype);
    let x = match bias {
        Some(bias) => a + bias.cast(dtype).unsqueeze(),
        None => a,
    };
    // This form neither overflows nor loses the answer far below zero, where it is x itself. For large x the sum inside of
    // the logarithm is rounded, where the answer is within 6e-8 of zero: with `log1p` the CPU backend takes 1.6 times as
    // long.
    let tail = x.clone().abs().neg().exp().add_scalar(1.0).log();
    (x.clamp_max(0.0) - tail).div_scalar(normalizer)
}
