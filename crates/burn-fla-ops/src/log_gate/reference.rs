//! The gate in plain tensor operations.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;

/// ln σ(x) = min(x, 0) − ln(1 + e^−|x|), to 1e-7 absolute.
///
/// This form neither overflows nor loses the answer far below zero, where it is x itself. The sum inside the logarithm
/// is rounded for large x, where the answer is within 6e-8 of zero; `log1p` would keep those digits, but the
/// CPU backend has it only one element at a time: 262,144 elements take 2.1 ms this way, 3.4 ms with `log1p` and 3.5 ms
/// with Burn's own `log_sigmoid` (`log_sigmoid_time` in the suite `nn`).
pub fn log_sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let tail = x.clone().abs().neg().exp().add_scalar(1.0).log();
    x.clamp_max(0.0) - tail
}

/// `ln σ(a + b) / τ` in f32 (f64 for f64).
pub fn log_gate<const D: usize>(a: Tensor<D>, bias: Option<Tensor<1>>, normalizer: f64) -> Tensor<D> {
    let dtype = compute_dtype(a.dtype());
    let a = a.cast(dtype);
    let x = match bias {
        Some(bias) => a + bias.cast(dtype).unsqueeze(),
        None => a,
    };
    log_sigmoid(x).div_scalar(normalizer)
}
