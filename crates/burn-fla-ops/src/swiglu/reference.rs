//! SwiGLU in plain tensor operations.

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::chunked::compute_dtype;

/// `y = silu(gate) ∘ up`, computed in f32 (f64 for f64), output in `gate`'s dtype.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    let out = gate.dtype();
    let dtype = compute_dtype(out);
    (silu(gate.cast(dtype)) * up.cast(dtype)).cast(out)
}
