//! The delta rule: each key overwrites what the state holds for it.
//!
//! ```text
//! S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ        S: [K, V]
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! Schlag, Irie, Schmidhuber: *Linear Transformers Are Secretly Fast Weight Programmers* (2021); over whole sequences:
//! Yang, Wang, Zhang, Shen, Kim: *Parallelizing Linear Transformers with the Delta Rule over Sequence Length* (2024).

use burn::tensor::Tensor;

use crate::delta::Arguments;
use crate::{DeltaOptions, OpError};

/// The delta rule over whole sequences.
///
/// `S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the state after the last
/// token. The state stays bounded where `β ‖k‖²` is at most 2: with keys of norm 1 (see
/// [`DeltaOptions::l2_norm`]), `β` between 0 and 2.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, HV, V]`, all of one dtype (f32 or bf16; f64 where the device has it). `HV` is
///   a multiple of `H`: value head `i` uses key head `⌊i · H / HV⌋`
/// - `beta`: `[B, T, HV]`, f32 or the dtype of `q`
/// - returns `o`: `[B, T, HV, V]` in the dtype of `q`, and the final state, f32 `[N, HV, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, `beta` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn delta_rule(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    beta: Tensor<3>,
    options: DeltaOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    Arguments { op: "delta_rule", q, k, v, p: None, gate: None, beta, options }.run()
}
