//! The logarithm of a running sum of exponentials, along time.
//!
//! ```text
//! z_t = log(e^{z_{t−1}} + e^{x_t}) = log(e^{z_0} + Σ_{j ≤ t} e^{x_j})        every channel by itself
//! ```
//!
//! Backward, from right to left: `c_t = dz_t + e^{z_t − z_{t+1}} c_{t+1}`, `dx_t = e^{x_t − z_t} c_t`. All exponents are
//! at most zero.
//!
//! On devices with kernels it is that of [`running_softmax`](crate::running_softmax()) with another output.

pub mod reference;

use burn::tensor::Tensor;

use crate::scan::Scan;
use crate::{OpError, ScanOptions};

/// `z_t = log(e^{z_{t−1}} + e^{x_t})` over whole sequences. Returns `z` and its value after the last token.
///
/// Nothing overflows: sums are taken relative to the larger term. `x` is to be finite; as far below zero as the dtype
/// goes is fine, and so is a `z_0` of −∞, which says that there was nothing before.
///
/// # Shapes
/// - `x`: `[B, T, D]`, f32, bf16 or f64
/// - `options.initial_state`: `z_0`, `[N, D]`; `None` is −∞
/// - returns `z`: `[B, T, D]` and the final value `[N, D]`, both f32 (f64 for f64), because differences of `z` matter
///
/// # Gradients
/// With respect to `x` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn logcumsumexp(x: Tensor<3>, options: ScanOptions) -> Result<(Tensor<3>, Tensor<2>), OpError> {
    let scan = Scan::new("logcumsumexp", "x", &x, options)?;
    if scan.is_empty() {
        return Ok((x.cast(scan.dtype), scan.initial_or(f64::NEG_INFINITY)));
    }
    #[cfg(feature = "cube")]
    if scan.on_kernels(&x) {
        let (_, z, end) = crate::running_softmax::operator::run("logcumsumexp", &scan, x, true, scan.dtype);
        return Ok((z, end));
    }
    let rows = scan.layout();
    let z = reference::doubling(scan.rows(x), &scan, &rows);
    let end = rows.ends(z.clone(), scan.initial_or(f64::NEG_INFINITY));
    Ok((scan.unrows(z), end))
}
