//! The element-wise recurrence in plain tensor operations: token by token, and in steps over distances 1, 2, 4, ….

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;
use crate::scan::Scan;

/// Token by token: `h_t = e^{g_t} h_{t−1} + x_t`.
///
/// Shapes as [`hgrn`](crate::hgrn()); `state` is `[B, D]`. Returns the outputs and the last state.
pub fn recurrent(x: Tensor<3>, log_decay: Tensor<3>, state: Tensor<2>) -> (Tensor<3>, Tensor<2>) {
    let out = x.dtype();
    let dtype = compute_dtype(out);
    let [b, t, d] = x.dims();
    let (x, decay) = (x.cast(dtype), log_decay.cast(dtype).exp());
    let mut state = state.cast(dtype).reshape([b, 1, d]);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        state = state * decay.clone().narrow(1, i, 1) + x.clone().narrow(1, i, 1);
        outputs.push(state.clone());
    }
    (Tensor::cat(outputs, 1).cast(out), state.reshape([b, d]))
}

/// With `h` and `g` the recurrence and the sum of log decays over the last `w` tokens, those over `2w` are
/// `h_t + e^{g_t} h_{t−w}` and `g_t + g_{t−w}`. Sums of log decays only, no differences: what is far below zero costs the
/// rest no digits.
pub(crate) fn doubling(x: Tensor<2>, log_decay: Tensor<2>, scan: &Scan) -> (Tensor<2>, Tensor<2>) {
    let rows = scan.layout();
    let (mut h, mut g) = (x, log_decay);
    for distance in rows.distances() {
        h = h.clone() + g.clone().exp() * rows.shifted(h, distance, 0.0);
        g = g.clone() + rows.shifted(g, distance, 0.0);
    }
    if let Some(initial) = scan.initial() {
        h = h + g.exp() * rows.spread(initial);
    }
    let end = rows.ends(h.clone(), scan.initial_or(0.0));
    (h, end)
}
