//! Attention with bounded-memory control token by token.

use burn::tensor::Tensor;

use super::AbcState;
use crate::chunked::compute_dtype;
use crate::gsa::{GsaState, reference as gsa};
use crate::running_softmax::reference as running_softmax;

/// Token by token: the running softmax of the scores, then both memories.
///
/// Shapes as [`abc`](crate::abc()), `N` = `B`. Returns the outputs and the last state.
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scores: Tensor<4>,
    scale: f64,
    state: AbcState,
) -> (Tensor<4>, AbcState) {
    let [b, t, h, m] = scores.dims();
    let scores = scores.cast(compute_dtype(q.dtype())).reshape([b, t, h * m]);
    let (weights, log_decay, normaliser) = running_softmax::recurrent(scores, state.normaliser.reshape([b, h * m]));
    let by_slot = |x: Tensor<3>| x.reshape([b, t, h, m]);
    let memory = GsaState { keys: state.keys, values: state.values };
    let (o, memory) = gsa::recurrent(q, k, v, by_slot(weights), by_slot(log_decay), scale, memory);
    (o, AbcState { keys: memory.keys, values: memory.values, normaliser: normaliser.reshape([b, h, m]) })
}
