//! RMS norm over the last dimension, alone and together with the addition of the residual stream before it.
//!
//! ```text
//! y = x · rstd ∘ w        rstd = (mean(x²) + eps)^(−1/2)
//! ```
//!
//! Backward, with `c = w ∘ dy` and `n = x · rstd`: `dx = rstd · (c − n · mean(c ∘ n))`, `dw = Σ_rows dy ∘ n`.
//!
//! Zhang, Sennrich: *Root Mean Square Layer Normalization* (2019).

#[cfg(feature = "cube")]
pub(crate) mod kernels;
pub mod reference;
#[cfg(feature = "cube")]
mod residual;

use burn::tensor::{DType, Tensor};

use crate::arguments::{activation, last_dim, on_kernels, parameter, positive_eps};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::{Engine, OpError};

/// Root-mean-square norm over the last dimension, `y = x · (mean(x²) + eps)^(−1/2) ∘ w`.
///
/// # Shapes
/// - `x`: `[…, D]`, f32, bf16 or f64
/// - `weight`: `[D]`, any of these dtypes (it is used in f32); `None` is a norm without a weight
/// - returns `y`: `[…, D]` in the dtype of `x`; statistics and product are taken in f32 (f64 for f64)
///
/// # Gradients
/// With respect to `x` and `weight`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, or where `eps` is not positive.
pub fn rms_norm<const D: usize>(
    x: Tensor<D>,
    weight: Option<Tensor<1>>,
    eps: f64,
    engine: Engine,
) -> Result<Tensor<D>, OpError> {
    const OP: &str = "rms_norm";
    activation(OP, "x", &x)?;
    positive_eps(OP, eps)?;
    if let Some(weight) = &weight {
        parameter(OP, "weight", weight, [last_dim(&x)], "[D]", &x.device())?;
    }
    if x.shape().num_elements() == 0 {
        return Ok(x);
    }
    #[cfg(feature = "cube")]
    if on_kernels(&x, engine) && crate::rows::fits(last_dim(&x)) {
        let (shape, dim) = (x.dims(), last_dim(&x));
        let weight = crate::arguments::weight_or_ones(weight, dim, &x.device());
        let rows = x.reshape([-1, dim as i64]);
        let inputs = vec![Tensor::<2>::into_dispatch(rows), weight.into_dispatch()];
        let mut outputs = crate::bridge::apply(kernels::RmsNorm { eps }, inputs, vec![]);
        return Ok(Tensor::<2>::from_dispatch(outputs.remove(0)).reshape(shape));
    }
    let _ = on_kernels(&x, engine);
    Ok(reference::rms_norm(x, weight, eps))
}

/// The residual stream and its norm in one pass: `s = x + residual`, `y = rms_norm(s)`. Returns `(y, s)`.
///
/// # Shapes
/// - `x`: `[…, D]`, f32, bf16 or f64
/// - `residual`: `[…, D]` in the dtype of `x`, or f32 (a residual stream kept in f32 under bf16 layers)
/// - `weight`: `[D]`
/// - returns `y` in the dtype of `x`, and `s` in that of `residual`; `y` is the norm of the sum before it is rounded
///
/// # Gradients
/// With respect to `x`, `residual` and `weight`, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, or where `eps` is not positive.
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    residual: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
    engine: Engine,
) -> Result<(Tensor<D>, Tensor<D>), OpError> {
    const OP: &str = "add_rms_norm";
    activation(OP, "x", &x)?;
    positive_eps(OP, eps)?;
    same_shape(OP, "residual", &residual, x.dims(), "the shape of x")?;
    if residual.dtype() != DType::F32 || x.dtype() == DType::F64 {
        same_dtype(OP, "residual", &residual, x.dtype())?;
    }
    same_device(OP, "residual", &residual, &x.device())?;
    parameter(OP, "weight", &weight, [last_dim(&x)], "[D]", &x.device())?;
    if x.shape().num_elements() == 0 {
        return Ok((x, residual));
    }
    #[cfg(feature = "cube")]
    if on_kernels(&x, engine) && crate::rows::fits(last_dim(&x)) {
        let (shape, dim) = (x.dims(), last_dim(&x));
        let rows = |x: Tensor<D>| Tensor::<2>::into_dispatch(x.reshape([-1, dim as i64]));
        let inputs = vec![rows(x), rows(residual), weight.cast(DType::F32).into_dispatch()];
        let mut outputs = crate::bridge::apply(residual::AddRmsNorm { eps }, inputs, vec![]).into_iter();
        let mut next = || {
            let output = outputs.next().expect("two outputs");
            Tensor::<2>::from_dispatch(output).reshape(shape)
        };
        return Ok((next(), next()));
    }
    let _ = on_kernels(&x, engine);
    Ok(reference::add_rms_norm(x, residual, weight, eps))
}
