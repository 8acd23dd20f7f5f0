//! Gated slot attention in plain tensor operations: the token recurrence of both memories, and the chunked form of the
//! first, which is read along the slots. The chunked form of the second is that of gated linear attention.

use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

use super::GsaState;
use crate::chunked::{compute_dtype, lower, merge, pass_states, running_sum, split};
use crate::key_decay::{FACTORED_DOWN_TO, SUB_BLOCK};
use crate::matmul::product;

/// Token by token, both memories and the softmax between them.
///
/// Shapes as [`gsa`](crate::gsa()), `N` = `B`. Returns the outputs and the last state.
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    slots: Tensor<4>,
    log_decay: Tensor<4>,
    scale: f64,
    state: GsaState,
) -> (Tensor<4>, GsaState) {
    let out = q.dtype();
    let dtype = compute_dtype(out);
    let [b, t, h, _] = q.dims();
    let [q, k, v, s, decay] = [q, k, v, slots, log_decay].map(|x| x.cast(dtype));
    let decay = decay.exp();
    let (mut keys, mut values) = (state.keys.cast(dtype), state.values.cast(dtype));
    let row = |x: &Tensor<4>, i| {
        let d = x.dims()[3];
        x.clone().narrow(1, i, 1).reshape([b, h, 1, d])
    };
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let (s, decay) = (row(&s, i), row(&decay, i));
        keys = keys * decay.clone() + row(&k, i).swap_dims(2, 3) * s.clone();
        let p = softmax(product(row(&q, i), keys.clone()).mul_scalar(scale), 3);
        values = values * decay.swap_dims(2, 3) + s.swap_dims(2, 3) * row(&v, i);
        outputs.push(product(p, values.clone()).swap_dims(1, 2));
    }
    (Tensor::cat(outputs, 1).cast(out), GsaState { keys, values })
}

/// The first memory and its scores, `Hk_t = Hk_{t−1} diag(e^{g_t}) + k_t s_tᵀ`, `ok_t = scale Hk_tᵀ q_t`, in chunks:
/// `ok_i = e^{G_i} ∘ (Hk₀ᵀ q_i) + Σ_{j ≤ i} A_ij e^{G_i − G_j} ∘ s_j` with `A_ij = q_i · k_j`.
///
/// Shapes as [`gsa`](crate::gsa()), all in the dtype of computation; `state` is `[B, H, K, M]`. Returns `ok`,
/// `[B, T, H, M]`, and the last state.
pub(crate) fn read_slots(
    q: Tensor<4>,
    k: Tensor<4>,
    slots: Tensor<4>,
    log_decay: Tensor<4>,
    scale: f64,
    state: Tensor<4>,
    chunk: usize,
) -> (Tensor<4>, Tensor<4>) {
    let [b, t, h, dk] = q.dims();
    let m = slots.dims()[3];
    let q = split(q, chunk).mul_scalar(scale);
    let k = split(k, chunk);
    let s = split(slots, chunk);
    let sum = running_sum(split(log_decay, chunk));
    let last = sum.clone().narrow(2, chunk - 1, 1);
    let local = product(k.clone().swap_dims(2, 3), s.clone() * (last.clone() - sum.clone()).exp());
    let (starts, end) = pass_states(local, last.clone().exp(), state.reshape([b * h, 1, dk, m]));
    let before = product(q.clone(), starts) * sum.clone().exp();
    let scores = product(q, k.swap_dims(2, 3)).tril(0);

    // A look at the data, not at the clock, as in gated linear attention.
    let inside = if last.inner().min().into_scalar::<f64>() >= FACTORED_DOWN_TO {
        factored(scores, s, sum)
    } else {
        exact(scores, s, sum)
    };
    (merge(before + inside, b, t), end.reshape([b, h, dk, m]))
}

/// `Σ_j A_ij e^{G_i − G_j} ∘ s_j` as one product, with factors around the middle of the chunk.
fn factored(scores: Tensor<4>, s: Tensor<4>, sum: Tensor<4>) -> Tensor<4> {
    // Any reference gives the same answer: it carries no gradient.
    let middle = sum.clone().narrow(2, sum.dims()[2] / 2, 1).detach();
    let relative = sum - middle;
    product(scores, s * relative.clone().neg().exp()) * relative.exp()
}

/// The same in blocks of 16 rows with no exponent above zero: from earlier blocks by factors around the block's start,
/// inside the block pair by pair.
fn exact(scores: Tensor<4>, s: Tensor<4>, sum: Tensor<4>) -> Tensor<4> {
    let [bh, n, c, m] = s.dims();
    let mut rows = Vec::new();
    for start in (0..c).step_by(SUB_BLOCK) {
        let size = SUB_BLOCK.min(c - start);
        let scores_a = scores.clone().narrow(2, start, size);
        let g_a = sum.clone().narrow(2, start, size);
        let s_a = s.clone().narrow(2, start, size);
        let pairs = [bh, n, size, size, m];
        let triangle = lower(size, &s.device(), s.dtype()).reshape([1, 1, size, size, 1]);
        let g_i = g_a.clone().reshape([bh, n, size, 1, m]).expand(pairs);
        let g_j = g_a.clone().reshape([bh, n, 1, size, m]).expand(pairs);
        // The exponent is set to zero above the diagonal, where the scores are zero.
        let decay = ((g_i - g_j) * triangle.expand(pairs)).exp();
        let inside = scores_a.clone().narrow(3, start, size).reshape([bh, n, size, size, 1]).expand(pairs)
            * s_a.reshape([bh, n, 1, size, m]).expand(pairs)
            * decay;
        let mut row = inside.sum_dim(3).reshape([bh, n, size, m]);
        if start > 0 {
            // The sum just before the block: e^{G_i − R} and e^{R − G_j} are both at most one.
            let reference = sum.clone().narrow(2, start - 1, 1);
            let before = s.clone().narrow(2, 0, start) * (reference.clone() - sum.clone().narrow(2, 0, start)).exp();
            row = row + product(scores_a.narrow(3, 0, start), before) * (g_a - reference).exp();
        }
        rows.push(row);
    }
    Tensor::cat(rows, 2)
}
