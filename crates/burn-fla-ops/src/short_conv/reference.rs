//! The short convolution in plain tensor operations: shifted slices and multiply-adds.

use burn::tensor::Tensor;
use burn::tensor::activation::silu as silu_op;

use crate::CuSeqlens;
use crate::chunked::compute_dtype;

/// `y_t = act(Σ_j w_j ∘ x_{t−W+1+j} + b)` and the last `W` inputs of each sequence.
///
/// Shapes as [`short_conv`](crate::short_conv()); `history` is `[N, D, W]` in `x`'s dtype. Computed in f32 (f64 for f64),
/// both outputs in `x`'s dtype.
pub fn short_conv(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    silu: bool,
    history: Tensor<3>,
    packed: Option<&CuSeqlens>,
) -> (Tensor<3>, Tensor<3>) {
    let Some(packed) = packed else {
        return dense(x, weight, bias, silu, history);
    };
    let mut outputs = Vec::new();
    let mut caches = Vec::new();
    for (i, window) in packed.offsets().windows(2).enumerate() {
        let history = history.clone().narrow(0, i, 1);
        if window[0] == window[1] {
            caches.push(history);
            continue;
        }
        let row = x.clone().narrow(1, window[0], window[1] - window[0]);
        let (y, cache) = dense(row, weight.clone(), bias.clone(), silu, history);
        outputs.push(y);
        caches.push(cache);
    }
    let y = if outputs.is_empty() { x } else { Tensor::cat(outputs, 1) };
    (y, Tensor::cat(caches, 0))
}

fn dense(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    silu: bool,
    history: Tensor<3>,
) -> (Tensor<3>, Tensor<3>) {
    let out = x.dtype();
    let dtype = compute_dtype(out);
    let [_, t, d] = x.dims();
    let width = weight.dims()[1];
    if t == 0 {
        return (x, history);
    }
    // [B, W + T, D]: row W + t is x_t.
    let rows = Tensor::cat(vec![history.swap_dims(1, 2), x], 1);
    let cache = rows.clone().narrow(1, t, width).swap_dims(1, 2);
    let rows = rows.cast(dtype);
    let weight = weight.cast(dtype);
    let tap = |j: usize| rows.clone().narrow(1, j + 1, t) * weight.clone().narrow(1, j, 1).reshape([1, 1, d]);
    let mut y = tap(0);
    for j in 1..width {
        y = y + tap(j);
    }
    if let Some(bias) = bias {
        y = y + bias.cast(dtype).reshape([1, 1, d]);
    }
    let y = if silu { silu_op(y) } else { y };
    (y.cast(out), cache)
}
