//! Linear attention with its normaliser token by token: the oracle. The chunked form is that of
//! [`simple_gla`](crate::simple_gla::reference) without decay.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;

/// `S_t = S_{t−1} + k_t v_tᵀ`, `z_t = z_{t−1} + k_t`, `o_t = scale · S_tᵀ q_t / (scale · z_tᵀ q_t + eps)`.
///
/// Shapes as [`linear_attn`](crate::linear_attn()); `state` is S `[B, H, K, V]`, `normalizer` z `[B, H, K]`. Returns the
/// outputs and the last of both.
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    eps: f64,
    state: Tensor<4>,
    normalizer: Tensor<3>,
) -> (Tensor<4>, Tensor<4>, Tensor<3>) {
    let out = q.dtype();
    let dtype = compute_dtype(out);
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let (q, k, v) = (q.cast(dtype), k.cast(dtype), v.cast(dtype));
    let mut state = state.cast(dtype);
    let mut normalizer = normalizer.cast(dtype);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let q_i = q.clone().narrow(1, i, 1).reshape([b, h, dk, 1]).mul_scalar(scale);
        let k_i = k.clone().narrow(1, i, 1).reshape([b, h, dk, 1]);
        let v_i = v.clone().narrow(1, i, 1).reshape([b, h, 1, dv]);
        normalizer = normalizer + k_i.clone().reshape([b, h, dk]);
        state = state + k_i * v_i;
        let sum = (normalizer.clone().reshape([b, h, dk, 1]) * q_i.clone()).sum_dim(2);
        let o = (state.clone() * q_i).sum_dim(2) / sum.add_scalar(eps);
        outputs.push(o.reshape([b, 1, h, dv]));
    }
    (Tensor::cat(outputs, 1).cast(out), state, normalizer)
}
