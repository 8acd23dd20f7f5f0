//! The gated delta rule: the state decays before each key overwrites what it holds for it.
//!
//! ```text
//! S_t = e^{g_t} S_{t−1} + β_t k_t (v_t − e^{g_t} S_{t−1}ᵀ k_t)ᵀ        S: [K, V], g_t a scalar
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! Yang, Kautz, Hatamizadeh: *Gated Delta Networks: Improving Mamba2 with Delta Rule* (2024).

use burn::tensor::Tensor;

use crate::delta::{Arguments, Gate};
use crate::{DeltaOptions, OpError};

/// The gated delta rule over whole sequences.
///
/// `S_t = e^{g_t} S_{t−1} + β_t k_t (v_t − e^{g_t} S_{t−1}ᵀ k_t)ᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the state
/// after the last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, HV, V]`, all of one dtype (f32 or bf16; f64 where the device has it). `HV` is
///   a multiple of `H`: value head `i` uses key head `⌊i · H / HV⌋`
/// - `log_decay`: `[B, T, HV]`, natural logarithm of the decay, at most 0; `beta`: `[B, T, HV]`; f32 or the dtype of `q`
/// - returns `o`: `[B, T, HV, V]` in the dtype of `q`, and the final state, f32 `[N, HV, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, `log_decay`, `beta` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn gated_delta_rule(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<3>,
    beta: Tensor<3>,
    options: DeltaOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let gate = Some(Gate::Token(log_decay));
    Arguments { op: "gated_delta_rule", q, k, v, p: None, gate, beta, options }.run()
}
