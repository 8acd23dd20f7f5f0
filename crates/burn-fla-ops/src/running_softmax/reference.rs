//! The running softmax in plain tensor operations: token by token, and from the running log-sum-exp.

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;
use crate::logcumsumexp::reference::{doubling as log_cum_sum_exp, log_add_exp};
use crate::scan::Scan;

/// Token by token. Shapes as [`running_softmax`](crate::running_softmax()); `state` is `[B, D]`, −∞ where nothing was
/// before. Returns the weights, the log decays and the last `z`.
pub fn recurrent(scores: Tensor<3>, state: Tensor<2>) -> (Tensor<3>, Tensor<3>, Tensor<2>) {
    let out = scores.dtype();
    let dtype = compute_dtype(out);
    let [b, t, d] = scores.dims();
    let scores = scores.cast(dtype);
    let mut state = state.cast(dtype).reshape([b, 1, d]);
    let (mut weights, mut log_decays) = (Vec::with_capacity(t), Vec::with_capacity(t));
    for i in 0..t {
        let s = scores.clone().narrow(1, i, 1);
        let next = log_add_exp(s.clone(), state.clone());
        weights.push((s - next.clone()).exp());
        log_decays.push(decay(state, next.clone()));
        state = next;
    }
    (Tensor::cat(weights, 1).cast(out), Tensor::cat(log_decays, 1), state.reshape([b, d]))
}

/// All tokens at once. Weights and decays come from one `z`, so that a product of decays telescopes and the weight that
/// token `j` has at token `t` is `e^{s_j − z_t}` to the rounding of a sum.
pub(crate) fn doubling(scores: Tensor<2>, scan: &Scan) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let rows = scan.layout();
    let z = log_cum_sum_exp(scores.clone(), scan, &rows);
    let weights = (scores - z.clone()).exp();
    let before = scan.initial_or(f64::NEG_INFINITY);
    let log_decay = decay(rows.shifted_from(z.clone(), before.clone()), z.clone());
    (weights, log_decay, rows.ends(z, before))
}

/// `z_{t−1} − z_t`, or 0 where `z_{t−1}` is −∞.
fn decay<const D: usize>(before: Tensor<D>, z: Tensor<D>) -> Tensor<D> {
    let nothing = before.clone().equal_elem(f64::NEG_INFINITY);
    (before - z).mask_fill(nothing, 0.0)
}
