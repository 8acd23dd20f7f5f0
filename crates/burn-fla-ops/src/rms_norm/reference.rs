//! RMS norm in plain tensor operations.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;

/// `y = x · (mean(x²) + eps)^(−1/2) ∘ w` over the last dimension; statistics in f32 (f64 for f64), output in `x`'s dtype.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Option<Tensor<1>>, eps: f64) -> Tensor<D> {
    let out = x.dtype();
    normalise(x, weight, eps).cast(out)
}

/// `s = x + residual`, `y = rms_norm(s)`. Returns `y` in `x`'s dtype and `s` in that of `residual`.
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    residual: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let (out, stream) = (x.dtype(), residual.dtype());
    let dtype = compute_dtype(out);
    let sum = x.cast(dtype) + residual.cast(dtype);
    let y = normalise(sum.clone(), Some(weight), eps).cast(out);
    (y, sum.cast(stream))
}

/// The norm in the dtype in which it is computed.
pub(crate) fn normalise<const D: usize>(x: Tensor<D>, weight: Option<Tensor<1>>, eps: f64) -> Tensor<D> {
    let dtype = compute_dtype(x.dtype());
    let x = x.cast(dtype);
    let mean = (x.clone() * x.clone()).mean_dim(D - 1);
    let y = x * mean.add_scalar(eps).sqrt().recip();
    match weight {
        Some(weight) => y * weight.cast(dtype).unsqueeze::<D>(),
        None => y,
    }
}
