//! Two forms of the diagonal-plus-low-rank delta rule in plain tensor operations: the token recurrence, which is the
//! oracle, and the chunked form.
//!
//! Both take `q`, `k`, `v`, `a`, `b` and the log decay as one list, in this order.

use burn::tensor::Tensor;

use crate::chunked::{compute_dtype, merge, split};
use crate::key_decay::{KeyDecay, Reads};
use crate::matmul::product;
use crate::triangular;

/// Token by token: `S_t = diag(e^{g_t}) S_{t−1} + b_t (a_tᵀ S_{t−1}) + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.
///
/// Shapes as [`dplr`](crate::dplr()); `state` is `[B, H, K, V]`. Returns the outputs and the last state.
pub fn recurrent(inputs: [Tensor<4>; 6], scale: f64, state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let out_dtype = inputs[0].dtype();
    let dtype = compute_dtype(out_dtype);
    let [q, k, v, a, b, g] = inputs.map(|x| x.cast(dtype));
    let [batch, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let mut state = state.cast(dtype);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let row = |x: &Tensor<4>| x.clone().narrow(1, i, 1).reshape([batch, h, 1, x.dims()[3]]);
        let column = |x: &Tensor<4>| x.clone().narrow(1, i, 1).reshape([batch, h, dk, 1]);
        let read = product(row(&a), state.clone());
        state = state * column(&g).exp() + column(&b) * read + column(&k) * row(&v);
        outputs.push(product(row(&q), state.clone()).mul_scalar(scale).reshape([batch, 1, h, dv]));
    }
    (Tensor::cat(outputs, 1).cast(out_dtype), state)
}

/// The chunked form of [`recurrent`].
///
/// With `p_j = S_{j−1}ᵀ a_j`, what `a_j` reads, a chunk that starts from `S` has
/// `o_i = scale (Sᵀ (q_i ∘ e^{G_i}) + Σ_{j ≤ i} (q_i k_j) v_j + (q_i b_j) p_j)` and
/// `p_i = Sᵀ (a_i ∘ e^{G_{i−1}}) + Σ_{j < i} (a_i k_j) v_j + (a_i b_j) p_j`, where the products in parentheses carry the
/// decay between their rows. The second is solved for `p` by `M = (I − (a b))^{−1}`, so `p = u + w S` with
/// `w = M (a ∘ e^{G_{i−1}})` and `u = M (a k) v`.
pub fn chunked(inputs: [Tensor<4>; 6], scale: f64, state: Tensor<4>, chunk: usize) -> (Tensor<4>, Tensor<4>) {
    let out_dtype = inputs[0].dtype();
    let dtype = compute_dtype(out_dtype);
    let [batch, t, h, dk] = inputs[0].dims();
    let dv = inputs[2].dims()[3];
    let [q, k, v, a, b, g] = inputs.map(|x| split(x.cast(dtype), chunk));
    let q = q.mul_scalar(scale);
    let decay = KeyDecay::new(g);
    let (updated, previous) = (Reads::Updated, Reads::Previous);

    let inverse = triangular::unchecked(decay.scores(&a, &b, previous).neg());
    let u = product(inverse.clone(), product(decay.scores(&a, &k, previous), v.clone()));
    let w = product(inverse, a.clone() * decay.sum(previous).exp());

    let rest = decay.to_the_end();
    let k_end = (k.clone() * rest.clone()).swap_dims(2, 3);
    let b_end = (b.clone() * rest).swap_dims(2, 3);
    let local = product(k_end, v.clone()) + product(b_end.clone(), u.clone());
    let identity = Tensor::<2>::eye(dk, &q.device()).cast(dtype).reshape([1, 1, dk, dk]);
    let transition = identity * decay.last().exp() + product(b_end, w.clone());
    let first = state.cast(dtype).reshape([batch * h, 1, dk, dv]);
    let (starts, end) = pass_through(transition, local, first);

    let p = u + product(w, starts.clone());
    let o = product(q.clone() * decay.sum(updated).exp(), starts)
        + product(decay.scores(&q, &k, updated), v)
        + product(decay.scores(&q, &b, updated), p);
    (merge(o, batch, t).cast(out_dtype), end.reshape([batch, h, dk, dv]))
}

/// Passes the state from chunk to chunk: `S_{m+1} = transition_m S_m + local_m`.
///
/// `transition` is `[B·H, n, K, K]`, `local` `[B·H, n, K, V]`, `first` `[B·H, 1, K, V]`. Returns the state before each
/// chunk, and the one after the last.
fn pass_through(transition: Tensor<4>, local: Tensor<4>, first: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let n = local.dims()[1];
    let mut state = first;
    let mut starts = Vec::with_capacity(n);
    for m in 0..n {
        starts.push(state.clone());
        state = product(transition.clone().narrow(1, m, 1), state) + local.clone().narrow(1, m, 1);
    }
    (Tensor::cat(starts, 1), state)
}
