//! Kimi delta attention: the gated delta rule with a decay for each key channel.
//!
//! ```text
//! S̃_t = diag(e^{g_t}) S_{t−1}                        S: [K, V]
//! S_t = S̃_t + β_t k_t (v_t − S̃_tᵀ k_t)ᵀ
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! Kimi Team: *Kimi Linear: An Expressive, Efficient Attention Architecture* (2025).

use burn::tensor::Tensor;

use crate::delta::{Arguments, Gate};
use crate::{DeltaOptions, OpError};

/// Kimi delta attention over whole sequences.
///
/// `S̃_t = diag(e^{g_t}) S_{t−1}`, `S_t = S̃_t + β_t k_t (v_t − S̃_tᵀ k_t)ᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the
/// state after the last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, HV, V]`, all of one dtype (f32 or bf16; f64 where the device has it). `HV` is
///   a multiple of `H`: value head `i` uses key head `⌊i · H / HV⌋`
/// - `log_decay`: `[B, T, HV, K]`, natural logarithm of the decay, at most 0; `beta`: `[B, T, HV]`; f32 or the dtype of `q`
/// - returns `o`: `[B, T, HV, V]` in the dtype of `q`, and the final state, f32 `[N, HV, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, `log_decay`, `beta` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn kda(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<4>,
    beta: Tensor<3>,
    options: DeltaOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let gate = Some(Gate::Key(log_decay));
    Arguments { op: "kda", q, k, v, p: None, gate, beta, options }.run()
}
