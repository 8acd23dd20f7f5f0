//! The recurrence of RWKV6: a decay for each key channel, read before the current token enters the state, which has a
//! weight of its own.
//!
//! ```text
//! o_t = scale · (S_{t−1} + (u ∘ k_t) v_tᵀ)ᵀ r_t
//! S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ        S: [K, V]
//! ```
//!
//! Peng et al.: *Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence* (2024).

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::parameter;
use crate::recurrence::{Decay, Problem};
use crate::{OpError, SequenceOptions};

const OP: &str = "rwkv6";

/// The recurrence of RWKV6 over whole sequences.
///
/// `o_t = scale · (S_{t−1} + (u ∘ k_t) v_tᵀ)ᵀ r_t`, `S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ`. Returns `o` and the state
/// after the last token. RWKV6 itself has a scale of 1.
///
/// # Shapes
/// - `r`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - `log_decay`, `w` above: `[B, T, H, K]`, natural logarithm of the decay, at most 0; f32 or the dtype of `r`
/// - `bonus`, `u` above: `[H, K]`, f32, bf16 or f64 (it is used in f32)
/// - returns `o`: `[B, T, H, V]` in the dtype of `r`, and the final state, f32 `[N, H, K, V]`
///
/// # Gradients
/// With respect to `r`, `k`, `v`, `log_decay`, `bonus` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn rwkv6(
    r: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<4>,
    bonus: Tensor<2>,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let [_, _, h, dk] = r.dims();
    parameter(OP, "bonus", &bonus, [h, dk], "[H, K]", &r.device())?;
    let problem = Problem::new(OP, r, k, v, Decay::Key(log_decay), options)?;
    Problem { bonus: Some(bonus), ..problem }.run()
}
