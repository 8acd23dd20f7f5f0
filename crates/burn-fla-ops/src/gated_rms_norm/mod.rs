//! RMS norm over the last dimension, then a gate.
//!
//! ```text
//! y = (x · rstd ∘ w) ∘ act(g)        rstd = (mean(x²) + eps)^(−1/2), act = silu or sigmoid
//! ```
//!
//! [`grouped_gated_rms_norm`] normalises groups of channels, with the gate before or after the norm.
//!
//! Backward, with `n = x · rstd` and `m = dy ∘ act(g)`: `dg = dy ∘ n ∘ w ∘ act'(g)`, `dw = Σ_rows m ∘ n`, and with
//! `c = w ∘ m`: `dx = rstd · (c − n · mean(c ∘ n))`.

mod grouped;
#[cfg(feature = "cube")]
mod kernels;
pub mod reference;

pub use grouped::{GroupedGatedNorm, grouped_gated_rms_norm};

use burn::tensor::Tensor;

use crate::arguments::{activation, last_dim, on_kernels, parameter, positive_eps};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::{Engine, OpError};

/// The activation of the gate of [`gated_rms_norm`](crate::gated_rms_norm()).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GateActivation {
    /// `g · sigmoid(g)`.
    #[default]
    Silu,
    /// `sigmoid(g)`.
    Sigmoid,
}

/// RMS norm over the last dimension, then a gate: `y = (x · (mean(x²) + eps)^(−1/2) ∘ w) ∘ act(gate)`.
///
/// # Shapes
/// - `x`, `gate`: `[…, D]` of one dtype, f32, bf16 or f64
/// - `weight`: `[D]`, any of these dtypes (it is used in f32); `None` is a norm without a weight
/// - returns `y`: `[…, D]` in the dtype of `x`; everything is computed in f32 (f64 for f64)
///
/// # Gradients
/// With respect to `x`, `gate` and `weight`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, or where `eps` is not positive.
pub fn gated_rms_norm<const D: usize>(
    x: Tensor<D>,
    gate: Tensor<D>,
    weight: Option<Tensor<1>>,
    eps: f64,
    act: GateActivation,
    engine: Engine,
) -> Result<Tensor<D>, OpError> {
    const OP: &str = "gated_rms_norm";
    activation(OP, "x", &x)?;
    positive_eps(OP, eps)?;
    same_shape(OP, "gate", &gate, x.dims(), "the shape of x")?;
    same_dtype(OP, "gate", &gate, x.dtype())?;
    same_device(OP, "gate", &gate, &x.device())?;
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
        let rows = |x: Tensor<D>| Tensor::<2>::into_dispatch(x.reshape([-1, dim as i64]));
        let inputs = vec![rows(x), rows(gate), weight.into_dispatch()];
        let mut outputs = crate::bridge::apply(kernels::GatedRmsNorm { eps, act }, inputs, vec![]);
        return Ok(Tensor::<2>::from_dispatch(outputs.remove(0)).reshape(shape));
    }
    let _ = on_kernels(&x, engine);
    Ok(reference::gated_rms_norm(x, gate, weight, eps, act))
}
