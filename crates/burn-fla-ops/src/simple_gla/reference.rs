//! Two forms of linear attention with a scalar decay in plain tensor operations: the token recurrence, which is the
//! oracle, and the chunked form, which devices without kernels run.

use burn::tensor::Tensor;

use crate::chunked::{compute_dtype, lower, merge, pass_states, running_sum, split};
use crate::matmul::product;

/// Token by token: `S_t = e^{g_t} S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.
///
/// Shapes as [`simple_gla`](crate::simple_gla()); `log_decay` is `[B, T, H]`, `state` `[B, H, K, V]`.
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<3>,
    scale: f64,
    state: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    let [b, t, h, dk] = q.dims();
    let by_key = log_decay.reshape([b, t, h, 1]).expand([b, t, h, dk]);
    crate::gla::reference::recurrent(q, k, v, by_key, scale, state)
}

/// The chunked form of [`recurrent`]: inside a chunk
/// `o_i = scale (e^{G_i} S₀ᵀ q_i + Σ_{j ≤ i} e^{G_i − G_j} (q_i · k_j) v_j)`.
pub fn chunked(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<3>,
    scale: f64,
    state: Tensor<4>,
    chunk: usize,
) -> (Tensor<4>, Tensor<4>) {
    let dtype = compute_dtype(q.dtype());
    let out_dtype = q.dtype();
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let q = split(q.cast(dtype), chunk).mul_scalar(scale);
    let k = split(k.cast(dtype), chunk);
    let v = split(v.cast(dtype), chunk);
    let sum = running_sum(split(log_decay.cast(dtype).reshape([b, t, h, 1]), chunk));
    let last = sum.clone().narrow(2, chunk - 1, 1);

    let triangle = lower(chunk, &sum.device(), dtype).reshape([1, 1, chunk, chunk]);
    // The exponent is set to zero above the diagonal before the exponential, the product after it.
    let exponent = (sum.clone() - sum.clone().swap_dims(2, 3)) * triangle.clone();
    let scores = product(q.clone(), k.clone().swap_dims(2, 3)) * exponent.exp() * triangle;

    let decayed_k = k * (last.clone() - sum.clone()).exp();
    let local = product(decayed_k.swap_dims(2, 3), v.clone());
    let first = state.cast(dtype).reshape([b * h, 1, dk, dv]);
    let (starts, end) = pass_states(local, last.exp(), first);
    let o = product(q * sum.exp(), starts) + product(scores, v);
    (merge(o, b, t).cast(out_dtype), end.reshape([b, h, dk, dv]))
}
