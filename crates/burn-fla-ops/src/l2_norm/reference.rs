//! L2 norm in plain tensor operations.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;

/// `y = x · (Σ x² + eps)^(−1/2)` over the last dimension, in the dtype in which it is computed: f64 for f64, f32 otherwise.
pub fn l2_norm<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let x = x.clone().cast(compute_dtype(x.dtype()));
    let squares = (x.clone() * x.clone()).sum_dim(D - 1);
    x * squares.add_scalar(eps).sqrt().recip()
}
