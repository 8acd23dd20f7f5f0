//! Gated linear attention: a decay for each key channel.
//!
//! ```text
//! S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ        S: [K, V]
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! Yang, Wang, Shen, Panda, Kim: *Gated Linear Attention Transformers with Hardware-Efficient Training* (2023).

pub mod reference;

use burn::tensor::Tensor;

use crate::recurrence::{Decay, Problem};
use crate::{OpError, SequenceOptions};

/// Gated linear attention over whole sequences.
///
/// `S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the state after the last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - `log_decay`: `[B, T, H, K]`, natural logarithm of the decay, at most 0; f32 or the dtype of `q`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state, f32 `[N, H, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, `log_decay` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn gla(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<4>,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    Problem::new("gla", q, k, v, Decay::Key(log_decay), options)?.run()
}
