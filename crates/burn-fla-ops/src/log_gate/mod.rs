//! The log of a sigmoid gate, which is a decay that a layer learns from its input.
//!
//! ```text
//! g = ln σ(a + b) / τ ,    ln σ(x) = min(x, 0) − ln(1 + e^{−|x|})
//! ```
//!
//! Backward: `da = dg ∘ σ(−(a + b)) / τ`, `db = Σ_rows da`.

#[cfg(feature = "cube")]
mod kernels;
pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::{activation, last_dim, on_kernels, parameter};
use crate::{Engine, OpError};

/// The log decay `g = ln σ(a + b) / τ`, never above 0.
///
/// # Shapes
/// - `a`: `[…, D]`, f32, bf16 or f64
/// - `bias`: b, `[D]`, any of these dtypes
/// - `normalizer`: τ; the decay of a token is the τ-th root of the gate
/// - returns g `[…, D]`, f32 (f64 for f64), computed in that
///
/// # Gradients
/// With respect to `a` and `bias`; nothing is kept for them but these.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, or where τ is not above 0.
pub fn log_gate<const D: usize>(
    a: Tensor<D>,
    bias: Option<Tensor<1>>,
    normalizer: f64,
    engine: Engine,
) -> Result<Tensor<D>, OpError> {
    const OP: &str = "log_gate";
    activation(OP, "a", &a)?;
    if let Some(bias) = &bias {
        parameter(OP, "bias", bias, [last_dim(&a)], "[D]", &a.device())?;
    }
    if !(normalizer > 0.0 && normalizer.is_finite()) {
        let reason = format!("is {normalizer}, but it must be above 0");
        return Err(OpError::Option { op: OP, option: "normalizer", reason });
    }
    #[cfg(feature = "cube")]
    if on_kernels(&a, engine) && a.shape().num_elements() > 0 && crate::rows::fits(last_dim(&a)) {
        let (shape, dim) = (a.dims(), last_dim(&a));
        let bias = bias.map(|bias| bias.cast(burn::tensor::DType::F32));
        let has_bias = bias.is_some();
        let rows = Tensor::<2>::into_dispatch(a.reshape([-1, dim as i64]));
        let inputs = std::iter::once(rows).chain(bias.map(Tensor::into_dispatch)).collect();
        let operator = kernels::LogGate { normalizer, has_bias };
        let mut outputs = crate::bridge::apply(operator, inputs, vec![]);
        return Ok(Tensor::<2>::from_dispatch(outputs.remove(0)).reshape(shape));
    }
    let _ = on_kernels(&a, engine);
    Ok(reference::log_gate(a, bias, normalizer))
}
