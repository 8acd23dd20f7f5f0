//! The gate in plain tensor operations.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;

/// ln(1 + e^x), to the last digits everywhere.
///
/// Far below zero the answer is e^x, which `log1p` keeps where the logarithm of a rounded sum would lose it; above 20 it
/// is x.
pub fn softplus<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone().clamp_max(20.0).exp().log1p() + x.sub_scalar(20.0).clamp_min(0.0)
}

/// `−e^A ∘ softplus(a + b)` in f32 (f64 for f64), A and b `[D]`.
pub fn decay_gate<const D: usize>(a: Tensor<D>, a_log: Tensor<1>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let dtype = compute_dtype(a.dtype());
    let a = a.cast(dtype);
    let x = match bias {
        Some(bias) => a + bias.cast(dtype).unsqueeze(),
        None => a,
    };
    (softplus(x) * a_log.cast(dtype).exp().unsqueeze()).neg()
}
