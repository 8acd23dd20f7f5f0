//! Two forms of gated linear attention in plain tensor operations: the token recurrence, which is the oracle, and the
//! chunked form, which devices without kernels run.

use burn::tensor::{Int, Tensor};

use crate::chunked::{compute_dtype, lower, merge, pass_states, running_sum, split};

/// Rows of a sub-block whose decays are taken pair by pair in the exact form.
pub(crate) const SUB_BLOCK: usize = 16;

/// The sum of log decays over a chunk down to which the factored form of the scores is used.
///
/// It multiplies queries by `e^{G − R}` and keys by `e^{R − G}`, `R` the sum in the middle of the chunk: exponents reach
/// at most 60 in magnitude, and `e^{120}` times ordinary queries and keys would leave f32 only in the masked triangle,
/// where each factor alone is still finite. Below that the exact form takes over, whose exponents are never positive.
pub(crate) const FACTORED_DOWN_TO: f64 = -60.0;

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
        outputs.push(q_i.matmul(state.clone()).mul_scalar(scale).reshape([b, 1, h, dv]));
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
    let sum = running_sum(split(log_decay.cast(dtype), chunk));
    let last = sum.clone().narrow(2, chunk - 1, 1);

    // A look at the data, not at the clock: it costs a read of one number, and both forms give the same answer.
    let lowest = last.clone().inner().min().into_scalar::<f64>();
    let scores = if lowest >= FACTORED_DOWN_TO {
        factored_scores(q.clone(), k.clone(), sum.clone())
    } else {
        exact_scores(q.clone(), k.clone(), sum.clone())
    };
    let decayed_k = k * (last.clone() - sum.clone()).exp();
    let local = decayed_k.swap_dims(2, 3).matmul(v.clone());
    let first = state.cast(dtype).reshape([b * h, 1, dk, dv]);
    let (starts, end) = pass_states(local, last.exp().swap_dims(2, 3), first);
    let o = (q * sum.exp()).matmul(starts) + scores.matmul(v);
    (merge(o, b, t).cast(out_dtype), end.reshape([b, h, dk, dv]))
}

/// `A` as one product of factors around the middle of the chunk.
fn factored_scores(q: Tensor<4>, k: Tensor<4>, sum: Tensor<4>) -> Tensor<4> {
    let [_, _, c, _] = q.dims();
    // Any reference gives the same answer: it carries no gradient.
    let middle = sum.clone().narrow(2, c / 2, 1).detach();
    let relative = sum - middle;
    let rows = q * relative.clone().exp();
    let columns = k * relative.neg().exp();
    masked(rows.matmul(columns.swap_dims(2, 3)))
}

/// Zero above the diagonal, by selection: what stands there may be huge.
pub(crate) fn masked(scores: Tensor<4>) -> Tensor<4> {
    let [bh, n, c, _] = scores.dims();
    let rows = Tensor::<1, Int>::arange(0..c as i64, &scores.device()).reshape([c, 1]);
    let columns = Tensor::<1, Int>::arange(0..c as i64, &scores.device()).reshape([1, c]);
    let above = rows.expand([c, c]).lower(columns.expand([c, c])).reshape([1, 1, c, c]);
    scores.mask_fill(above.expand([bh, n, c, c]), 0.0)
}

/// `A` in blocks of 16 rows with no exponent above zero: towards earlier blocks by factors around the block's start,
/// inside the block pair by pair.
fn exact_scores(q: Tensor<4>, k: Tensor<4>, sum: Tensor<4>) -> Tensor<4> {
    let [bh, n, c, d] = q.dims();
    let (device, dtype) = (q.device(), q.dtype());
    let mut rows = Vec::new();
    for start in (0..c).step_by(SUB_BLOCK) {
        let size = SUB_BLOCK.min(c - start);
        let q_a = q.clone().narrow(2, start, size);
        let g_a = sum.clone().narrow(2, start, size);
        let mut parts = Vec::new();
        if start > 0 {
            // The sum just before the block: e^{G_i − R} and e^{R − G_j} are both at most one.
            let reference = sum.clone().narrow(2, start - 1, 1);
            let before = sum.clone().narrow(2, 0, start);
            let columns = k.clone().narrow(2, 0, start) * (reference.clone() - before).exp();
            let block = q_a.clone() * (g_a.clone() - reference).exp();
            parts.push(block.matmul(columns.swap_dims(2, 3)));
        }
        let pairs = [bh, n * size, size, d];
        let g_i = g_a.clone().reshape([bh, n * size, 1, d]).expand(pairs);
        let k_a = k.clone().narrow(2, start, size);
        let repeat = |x: Tensor<4>| {
            let x = x.reshape([bh * n, 1, size, d]).expand([bh * n, size, size, d]);
            x.reshape(pairs)
        };
        let triangle = lower(size, &device, dtype).reshape([1, size, size, 1]);
        let triangle = triangle.expand([n, size, size, 1]).reshape([1, n * size, size, 1]);
        // The exponent is set to zero above the diagonal before the exponential, the product after it.
        let exponent = (g_i - repeat(g_a)) * triangle.clone();
        let q_i = q_a.reshape([bh, n * size, 1, d]).expand(pairs);
        let inside = (q_i * repeat(k_a) * exponent.exp() * triangle).sum_dim(3);
        parts.push(inside.reshape([bh, n, size, size]));
        if start + size < c {
            parts.push(Tensor::zeros([bh, n, size, c - start - size], (&device, dtype)));
        }
        rows.push(Tensor::cat(parts, 3));
    }
    Tensor::cat(rows, 2)
}
