//! L2 norm over the last dimension.
//!
//! ```text
//! y = x · (Σ x² + eps)^(−1/2)
//! ```
//!
//! Backward, with `r = (Σ x² + eps)^(−1/2)`: `dx = r · (dy − y · Σ dy ∘ y)`.

pub mod reference;

use burn::tensor::Tensor;

use crate::OpError;
use crate::arguments::{activation, positive_eps};

/// The `eps` of the norms that the operators of the delta family take inside.
pub const EPS: f64 = 1e-6;

/// L2 norm over the last dimension, `y = x · (Σ x² + eps)^(−1/2)`.
///
/// # Shapes
/// - `x`: `[…, D]`, f32, bf16 or f64
/// - returns `y`: `[…, D]` in the dtype of `x`, computed in f32 (f64 for f64)
///
/// # Gradients
/// With respect to `x`.
///
/// # Errors
/// [`OpError`] where the dtype is another, or where `eps` is not positive.
pub fn l2_norm<const D: usize>(x: Tensor<D>, eps: f64) -> Result<Tensor<D>, OpError> {
    const OP: &str = "l2_norm";
    activation(OP, "x", &x)?;
    positive_eps(OP, eps)?;
    if x.shape().num_elements() == 0 {
        return Ok(x);
    }
    let dtype = x.dtype();
    Ok(reference::l2_norm(x, eps).cast(dtype))
}
