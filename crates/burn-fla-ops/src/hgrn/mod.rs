//! The element-wise gated recurrence of HGRN.
//!
//! ```text
//! h_t = e^{g_t} h_{t−1} + x_t        every channel by itself
//! ```
//!
//! Backward, with `dh` the gradient of the outputs and `z_T = dh_T` plus that of the final state:
//! `z_t = dh_t + e^{g_{t+1}} z_{t+1}`, `dx_t = z_t`, `dg_t = e^{g_t} z_t h_{t−1}`, and the initial state receives
//! `e^{g_1} z_1`.
//!
//! Qin, Yang, Zhong: *Hierarchically Gated Recurrent Neural Network for Sequence Modeling* (2023).

pub mod reference;

use burn::tensor::Tensor;

use crate::bridge::{same_device, same_shape};
use crate::scan::Scan;
use crate::{OpError, ScanOptions};

/// The element-wise gated recurrence over whole sequences, `h_t = e^{g_t} h_{t−1} + x_t`. Returns `h` and its value after
/// the last token.
///
/// # Shapes
/// - `x`: `[B, T, D]`, f32, bf16 or f64
/// - `log_decay`: `[B, T, D]`, natural logarithm of the decay, at most 0; f32 or the dtype of `x`
/// - `options.initial_state`: `[N, D]`, zero where it is `None`
/// - returns `h`: `[B, T, D]` in the dtype of `x`, and the final state, f32 `[N, D]` (f64 for f64)
///
/// # Gradients
/// With respect to `x`, `log_decay` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn hgrn(x: Tensor<3>, log_decay: Tensor<3>, options: ScanOptions) -> Result<(Tensor<3>, Tensor<2>), OpError> {
    const OP: &str = "hgrn";
    let scan = Scan::new(OP, "x", &x, options)?;
    same_shape(OP, "log_decay", &log_decay, x.dims(), "[B, T, D]")?;
    same_device(OP, "log_decay", &log_decay, scan.device())?;
    if scan.is_empty() {
        return Ok((x, scan.initial_or(0.0)));
    }
    let out = x.dtype();
    let (h, end) = reference::doubling(scan.rows(x), scan.rows(log_decay), &scan);
    Ok((scan.unrows(h).cast(out), end))
}
