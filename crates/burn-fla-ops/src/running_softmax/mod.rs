//! Weights and decays that turn a sum over the tokens so far into their softmax-weighted mean.
//!
//! ```text
//! z_t = log(e^{z_{t−1}} + e^{s_t})        w_t = e^{s_t − z_t}        g_t = z_{t−1} − z_t
//! ```
//!
//! A recurrence `S_t = e^{g_t} S_{t−1} + w_t v_tᵀ` is then `Σ_{j ≤ t} softmax_{j ≤ t}(s)_j v_jᵀ`, for each channel of `s` by
//! itself. ABC and LightNet are built on it.
//!
//! On devices with kernels each tensor is read and written once (see `kernels.rs`; once more where long sequences of few
//! channels are cut into segments), and 8 / 128 bytes an element are saved besides the scores: the sums before every 128th
//! token. Forward moves 2 + 2 + 4 bytes an element of bf16, backward 2 + 2 + 4 + 2.
//!
//! Peng et al.: *ABC: Attention with Bounded-memory Control* (2022); Qin et al.: *You Only Scan Once: Efficient
//! Multi-dimension Sequential Modeling with LightNet* (2024).

#[cfg(feature = "cube")]
mod backward;
#[cfg(feature = "cube")]
mod kernels;
#[cfg(feature = "cube")]
pub(crate) mod launch;
#[cfg(feature = "cube")]
pub(crate) mod operator;
pub mod reference;

use burn::tensor::{DType, Tensor};

use crate::scan::Scan;
use crate::{OpError, ScanOptions};

/// The weights `w_t = e^{s_t − z_t}` and log decays `g_t = z_{t−1} − z_t` of a running softmax over the tokens,
/// `z_t = log(e^{z_{t−1}} + e^{s_t})`. Returns `w`, `g` and the last `z`.
///
/// `g` is 0 at the first token of a sequence without a past (`z_0` = −∞): the state before it is zero, whatever decays it.
///
/// # Shapes
/// - `scores`: s, `[B, T, D]`, finite; f32, bf16 or f64
/// - `options.initial_state`: `z_0`, `[N, D]`; `None` is −∞
/// - returns `w`: `[B, T, D]` in the dtype of `scores`; `g`: `[B, T, D]`, at most 0 up to rounding, and the final `z`:
///   `[N, D]`, both f32 (f64 for f64)
///
/// # Gradients
/// With respect to `scores` and the initial state, through all outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn running_softmax(scores: Tensor<3>, options: ScanOptions) -> Result<(Tensor<3>, Tensor<3>, Tensor<2>), OpError> {
    let out = scores.dtype();
    with_weights("running_softmax", scores, out, options)
}

/// The same for the operator `op`, with the weights in `out`.
pub(crate) fn with_weights(
    op: &'static str,
    scores: Tensor<3>,
    out: DType,
    options: ScanOptions,
) -> Result<(Tensor<3>, Tensor<3>, Tensor<2>), OpError> {
    let scan = Scan::new(op, "scores", &scores, options)?;
    if scan.is_empty() {
        return Ok((scores.clone().cast(out), scores.cast(scan.dtype), scan.initial_or(f64::NEG_INFINITY)));
    }
    #[cfg(feature = "cube")]
    if scan.on_kernels(&scores) {
        let (weights, log_decay, end) = operator::run("running_softmax", &scan, scores, false, out);
        return Ok((weights.expect("the weights are an output"), log_decay, end));
    }
    let (weights, log_decay, end) = reference::doubling(scan.rows(scores), &scan);
    Ok((scan.unrows(weights).cast(out), scan.unrows(log_decay), end))
}
