//! Comba: the gated delta rule with feedback from the state before its decay, through a vector of its own.
//!
//! ```text
//! S_t = e^{g_t} S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ p_t)ᵀ        S: [K, V], g_t a scalar
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! Hu, Pan, Du, Sun, Tang, Yuan, et al.: *Comba: Improving Bilinear RNNs with Closed-loop Control* (2025).

use burn::tensor::Tensor;

use crate::delta::{Arguments, Gate};
use crate::{DeltaOptions, OpError};

/// Comba over whole sequences.
///
/// `S_t = e^{g_t} S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ p_t)ᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the state after the
/// last token. [`DeltaOptions::l2_norm`] normalises `p` too.
///
/// # Shapes
/// - `q`, `k`, `p`: `[B, T, H, K]`; `v`: `[B, T, HV, V]`, all of one dtype (f32 or bf16; f64 where the device has it).
///   `HV` is a multiple of `H`: value head `i` uses key head `⌊i · H / HV⌋`
/// - `log_decay`: `[B, T, HV]`, natural logarithm of the decay, at most 0; `beta`: `[B, T, HV]`; f32 or the dtype of `q`
/// - returns `o`: `[B, T, HV, V]` in the dtype of `q`, and the final state, f32 `[N, HV, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `p`, `v`, `log_decay`, `beta` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn comba(
    q: Tensor<4>,
    k: Tensor<4>,
    p: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<3>,
    beta: Tensor<3>,
    options: DeltaOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let gate = Some(Gate::Token(log_decay));
    Arguments { op: "comba", q, k, v, p: Some(p), gate, beta, options }.run()
}
