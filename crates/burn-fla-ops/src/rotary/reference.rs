//! The rotary embedding in plain tensor operations.

use burn::tensor::{Int, Tensor};

use crate::chunked::compute_dtype;

/// `y₁ = x₁ ∘ cos_p − x₂ ∘ sin_p`, `y₂ = x₁ ∘ sin_p + x₂ ∘ cos_p` on the halves `x₁`, `x₂` of the last dimension.
pub fn rotary(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, positions: Tensor<2, Int>) -> Tensor<4> {
    let out = x.dtype();
    let dtype = compute_dtype(out);
    let [b, t, _, d] = x.dims();
    let positions = positions.reshape([b * t]);
    let row = |table: Tensor<2>| {
        let table = table.cast(dtype).select(0, positions.clone());
        table.reshape([b, t, 1, d / 2])
    };
    let (cos, sin) = (row(cos), row(sin));
    let x = x.cast(dtype);
    let x1 = x.clone().narrow(3, 0, d / 2);
    let x2 = x.narrow(3, d / 2, d / 2);
    let y1 = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let y2 = x1 * sin + x2 * cos;
    Tensor::cat(vec![y1, y2], 3).cast(out)
}
