//! The running log-sum-exp in plain tensor operations: token by token, and in steps over distances 1, 2, 4, ….

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;
use crate::scan::{Rows, Scan};

/// Token by token: `z_t = log(e^{z_{t−1}} + e^{x_t})`.
///
/// Shapes as [`logcumsumexp`](crate::logcumsumexp()); `state` is `[B, D]`. Returns `z` and its last value.
pub fn recurrent(x: Tensor<3>, state: Tensor<2>) -> (Tensor<3>, Tensor<2>) {
    let dtype = compute_dtype(x.dtype());
    let [b, t, d] = x.dims();
    let x = x.cast(dtype);
    let mut state = state.cast(dtype).reshape([b, 1, d]);
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        state = log_add_exp(x.clone().narrow(1, i, 1), state);
        outputs.push(state.clone());
    }
    (Tensor::cat(outputs, 1), state.reshape([b, d]))
}

/// With `z` over the last `w` tokens, that over `2w` is `log(e^{z_t} + e^{z_{t−w}})`.
pub(crate) fn doubling(x: Tensor<2>, scan: &Scan, rows: &Rows) -> Tensor<2> {
    let mut z = x;
    for distance in rows.distances() {
        z = log_add_exp(z.clone(), rows.shifted(z, distance, f64::NEG_INFINITY));
    }
    match scan.initial() {
        Some(initial) => log_add_exp(z, rows.spread(initial)),
        None => z,
    }
}

/// `log(e^a + e^b)` for finite `a`; `b` may be −∞.
pub(crate) fn log_add_exp<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    // The result does not depend on what is taken out, so it carries no gradient.
    let larger = a.clone().detach().max_pair(b.clone().detach());
    let sum = (a - larger.clone()).exp() + (b - larger.clone()).exp();
    larger + sum.log()
}
