//! The recurrence of RWKV7: a decay for each key channel, and a delta rule whose removal and replacement differ.
//!
//! ```text
//! S_t = diag(e^{w_t}) S_{t−1} − (κ_t ∘ a_t) (κ_tᵀ S_{t−1}) + k_t v_tᵀ        S: [K, V]
//! o_t = scale · S_tᵀ r_t
//! ```
//!
//! `κ_t` is the removal key, of length 1, and `a_t` the rate in each channel at which its value is taken away. It is
//! [`dplr`](crate::dplr()) with `a = −κ` and `b = κ ∘ a`.
//!
//! Peng et al.: *RWKV-7 "Goose" with Expressive Dynamic State Evolution* (2025).

use burn::tensor::Tensor;

use crate::chunked::compute_dtype;
use crate::{OpError, SequenceOptions, dplr};

/// The recurrence of RWKV7 over whole sequences.
///
/// `S_t = diag(e^{w_t}) S_{t−1} − (κ_t ∘ a_t) (κ_tᵀ S_{t−1}) + k_t v_tᵀ`, `o_t = scale · S_tᵀ r_t`. Returns `o` and the
/// state after the last token. RWKV7 itself has a scale of 1.
///
/// # Shapes
/// - `r`, `k`, `kk` (`κ` above), `a`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the
///   device has it)
/// - `log_decay`, `w` above: `[B, T, H, K]`, natural logarithm of the decay, at most 0; f32 or the dtype of `r`
/// - returns `o`: `[B, T, H, V]` in the dtype of `r`, and the final state, f32 `[N, H, K, V]`
///
/// # Gradients
/// With respect to `r`, `log_decay`, `k`, `v`, `kk`, `a` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn rwkv7(
    r: Tensor<4>,
    log_decay: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    kk: Tensor<4>,
    a: Tensor<4>,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let problem = dplr::checked("rwkv7", r, k, v, [("kk", &kk), ("a", &a)], log_decay, options)?;
    #[cfg(feature = "cube")]
    if dplr::takes(&problem.0) {
        return Ok(dplr::on_kernels(problem, crate::delta_walk::Form::Removal, kk, a));
    }
    // The product in the dtype that the recurrence is computed in: it is not rounded to bf16.
    let dtype = compute_dtype(kk.dtype());
    let kk = kk.cast(dtype);
    Ok(dplr::run(problem, kk.clone().neg(), kk * a.cast(dtype)))
}
