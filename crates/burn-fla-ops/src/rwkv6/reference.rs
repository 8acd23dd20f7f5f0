//! Two forms of the recurrence of RWKV6 in plain tensor operations: the token recurrence, which is the oracle, and the
//! chunked form. Both take `r`, `k`, `v` and the log decay as one list, in this order.

use burn::tensor::Tensor;

use crate::chunked::{compute_dtype, merge, pass_states, split};
use crate::key_decay::{KeyDecay, Reads};
use crate::matmul::product;

/// Token by token: `o_t = scale (S_{t−1}ᵀ r_t + (r_t · (u ∘ k_t)) v_t)`, `S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ`.
///
/// Shapes as [`rwkv6`](crate::rwkv6()); `state` is `[B, H, K, V]`. Returns the outputs and the last state.
pub fn recurrent(inputs: [Tensor<4>; 4], bonus: Tensor<2>, scale: f64, state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let out_dtype = inputs[0].dtype();
    let dtype = compute_dtype(out_dtype);
    let [r, k, v, w] = inputs.map(|x| x.cast(dtype));
    let [b, t, h, dk] = r.dims();
    let dv = v.dims()[3];
    let u = bonus.cast(dtype).reshape([1, h, dk, 1]);
    let mut state = state.cast(dtype);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let r_i = r.clone().narrow(1, i, 1).reshape([b, h, 1, dk]);
        let k_i = k.clone().narrow(1, i, 1).reshape([b, h, dk, 1]);
        let v_i = v.clone().narrow(1, i, 1).reshape([b, h, 1, dv]);
        let decay = w.clone().narrow(1, i, 1).reshape([b, h, dk, 1]).exp();
        let update = k_i * v_i;
        let read = state.clone() + update.clone() * u.clone();
        outputs.push(product(r_i, read).mul_scalar(scale).reshape([b, 1, h, dv]));
        state = state * decay + update;
    }
    (Tensor::cat(outputs, 1).cast(out_dtype), state)
}

/// The chunked form of [`recurrent`]: inside a chunk
/// `o_i = scale (S₀ᵀ (r_i ∘ e^{G_{i−1}}) + Σ_{j < i} A_ij v_j + (r_i · (u ∘ k_i)) v_i)` with
/// `A_ij = Σ_c r_ic k_jc e^{G_{i−1,c} − G_jc}`.
pub fn chunked(
    inputs: [Tensor<4>; 4],
    bonus: Tensor<2>,
    scale: f64,
    state: Tensor<4>,
    chunk: usize,
) -> (Tensor<4>, Tensor<4>) {
    let out_dtype = inputs[0].dtype();
    let dtype = compute_dtype(out_dtype);
    let [r, k, v, w] = inputs.map(|x| x.cast(dtype));
    let [b, t, h, dk] = r.dims();
    let dv = v.dims()[3];
    let r = r.mul_scalar(scale);
    let u = bonus.cast(dtype).reshape([1, 1, h, dk]);
    let current = (r.clone() * k.clone() * u).sum_dim(3) * v.clone();

    let (r, k, v) = (split(r, chunk), split(k, chunk), split(v, chunk));
    let decay = KeyDecay::new(split(w, chunk));
    let scores = decay.scores(&r, &k, Reads::Previous);
    let local = product((k * decay.to_the_end()).swap_dims(2, 3), v.clone());
    let first = state.cast(dtype).reshape([b * h, 1, dk, dv]);
    let (starts, end) = pass_states(local, decay.last().exp().swap_dims(2, 3), first);
    let o = product(r * decay.sum(Reads::Previous).exp(), starts) + product(scores, v);
    ((merge(o, b, t) + current).cast(out_dtype), end.reshape([b, h, dk, dv]))
}
