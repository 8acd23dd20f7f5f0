//! The delta rule token by token, in plain tensor operations: the oracle of its family.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;
use crate::matmul::product;

/// `r_t = v_t − S̃ᵀ p_t`, `S_t = e^{g_t} ∘ S_{t−1} + β_t k_t r_tᵀ`, `o_t = scale · S_tᵀ q_t`, where `S̃` is the state before
/// the decay where `p` is given, and otherwise `p_t = k_t` and `S̃` is the state after the decay.
///
/// # Shapes
/// - `q`, `k`, `p`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, at least one token
/// - `log_decay`: `[B, T, H, K]`, or `[B, T, H, 1]` for a decay by token; `beta`: `[B, T, H, 1]`
/// - `state`: `[B, H, K, V]`
/// - returns the outputs `[B, T, H, V]` in the dtype of `q`, and the last state
#[allow(clippy::too_many_arguments)]
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    p: Option<Tensor<4>>,
    log_decay: Option<Tensor<4>>,
    beta: Tensor<4>,
    scale: f64,
    state: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    let dtype = compute_dtype(q.dtype());
    let [b, t, h, _] = q.dims();
    let dv = v.dims()[3];
    let out = q.dtype();
    let at = |x: &Tensor<4>, i: usize| {
        let width = x.dims()[3];
        x.clone().narrow(1, i, 1).reshape([b, h, 1, width]).cast(dtype)
    };
    let mut state = state.cast(dtype);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let decayed = match &log_decay {
            Some(g) => at(g, i).exp().swap_dims(2, 3) * state.clone(),
            None => state.clone(),
        };
        let key = at(&k, i);
        let read = match &p {
            Some(p) => product(at(p, i), state),
            None => product(key.clone(), decayed.clone()),
        };
        let write = (at(&v, i) - read) * at(&beta, i);
        state = decayed + product(key.swap_dims(2, 3), write);
        let o = product(at(&q, i), state.clone()).mul_scalar(scale);
        outputs.push(o.reshape([b, 1, h, dv]));
    }
    (Tensor::cat(outputs, 1).cast(out), state)
}
