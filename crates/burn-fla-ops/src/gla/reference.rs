//! Two forms of gated linear attention in plain tensor operations: the token recurrence, which is the oracle, and the
//! chunked form, which devices without kernels run.

use burn::tensor::Tensor;

use crate::chunked::{compute_dtype, merge, pass_states, split};
use crate::key_decay::{KeyDecay, Reads};
use crate::matmul::product;

/// Token by token: `S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.
///
/// Shapes as [`gla`](crate::gla()); `state` is `[B, H, K, V]`. Returns the outputs and the last state.
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<4>,
    scale: f64,
    state: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    let dtype = compute_dtype(q.dtype());
    let out_dtype = q.dtype();
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let (q, k, v, g) = (q.cast(dtype), k.cast(dtype), v.cast(dtype), log_decay.cast(dtype));
    let mut state = state.cast(dtype);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let q_i = q.clone().narrow(1, i, 1).reshape([b, h, 1, dk]);
        let k_i = k.clone().narrow(1, i, 1).reshape([b, h, dk, 1]);
        let v_i = v.clone().narrow(1, i, 1).reshape([b, h, 1, dv]);
        let decay = g.clone().narrow(1, i, 1).reshape([b, h, dk, 1]).exp();
        state = state * decay + k_i * v_i;
        outputs.push(product(q_i, state.clone()).mul_scalar(scale).reshape([b, 1, h, dv]));
    }
    (Tensor::cat(outputs, 1).cast(out_dtype), state)
}

/// The chunked form of [`recurrent`]: inside a chunk `o_i = scale (S₀ᵀ (q_i ∘ e^{G_i}) + Σ_{j ≤ i} A_ij v_j)` with
/// `A_ij = Σ_c q_ic k_jc e^{G_ic − G_jc}`.
pub fn chunked(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<4>,
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
    let decay = KeyDecay::new(split(log_decay.cast(dtype), chunk));

    let scores = decay.scores(&q, &k, Reads::Updated);
    let local = product((k * decay.to_the_end()).swap_dims(2, 3), v.clone());
    let first = state.cast(dtype).reshape([b * h, 1, dk, dv]);
    let (starts, end) = pass_states(local, decay.last().exp().swap_dims(2, 3), first);
    let o = product(q * decay.sum(Reads::Updated).exp(), starts) + product(scores, v);
    (merge(o, b, t).cast(out_dtype), end.reshape([b, h, dk, dv]))
}
