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
#[cfg(feature = "cube")]
use crate::arguments::{last_dim, on_kernels};

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
    Ok(unchecked(x, eps))
}

/// [`l2_norm`] of arguments that were checked, on the device's kernels where it has any.
///
/// With `D` channels it is the RMS norm with `eps / D` and the weight `D^(−1/2)` everywhere.
pub(crate) fn unchecked<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    #[cfg(feature = "cube")]
    if on_kernels(&x, crate::Engine::Auto) && crate::rows::fits(last_dim(&x)) {
        let (shape, dim) = (x.dims(), last_dim(&x));
        let options = (&x.device().inner(), burn::tensor::DType::F32);
        let weight = Tensor::<1>::full([dim], (dim as f64).powf(-0.5), options);
        let rows = x.reshape([-1, dim as i64]);
        let inputs = vec![Tensor::<2>::into_dispatch(rows), weight.into_dispatch()];
        let norm = crate::rms_norm::kernels::RmsNorm { eps: eps / dim as f64 };
        let mut outputs = crate::bridge::apply(norm, inputs, vec![]);
        return Tensor::<2>::from_dispatch(outputs.remove(0)).reshape(shape);
    }
    let dtype = x.dtype();
    reference::l2_norm(x, eps).cast(dtype)
}
