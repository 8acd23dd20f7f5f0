//! The log decay of a step size: the gate of Mamba2, of the gated delta rule and of what is built over it.
//!
//! ```text
//! g = −e^A ∘ softplus(a + b) ,    softplus(x) = max(x, 0) + ln(1 + e^{−|x|})
//! ```
//!
//! Backward, with `x = a + b`: `da = −e^A ∘ σ(x) ∘ dg`, `db = Σ_rows da`, `dA = Σ_rows g ∘ dg`.
//!
//! Dao, Gu: *Transformers are SSMs* (2024); Yang, Kautz, Hatamizadeh: *Gated Delta Networks* (2024).

#[cfg(feature = "cube")]
mod kernels;
pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::{activation, last_dim, on_kernels, parameter};
use crate::{Engine, OpError};

/// The parameters of [`decay_gate`](crate::decay_gate()), for operators that apply it to their log decays.
#[derive(Clone, Debug)]
pub struct DecayGate {
    /// A, `[D]` or, for each of as many channels side by side, `[H]`.
    pub a_log: Tensor<1>,
    /// b, `[D]`.
    pub bias: Option<Tensor<1>>,
}

/// The log decay `g = −e^A ∘ softplus(a + b)`, at most 0.
///
/// # Shapes
/// - `a`: `[…, D]`, f32, bf16 or f64
/// - `gate`: A, `[D]` or `[H]` with `H` a divisor of `D` (`A_i` is that of channels `i D / H` to `(i + 1) D / H − 1`); b, `[D]`;
///   any of these dtypes
/// - returns g `[…, D]`, f32 (f64 for f64), computed in that
///
/// # Gradients
/// With respect to `a`, A and b; nothing is kept for them but these.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn decay_gate<const D: usize>(a: Tensor<D>, gate: DecayGate, engine: Engine) -> Result<Tensor<D>, OpError> {
    const OP: &str = "decay_gate";
    let DecayGate { a_log, bias } = gate;
    activation(OP, "a", &a)?;
    let (dim, heads) = (last_dim(&a), last_dim(&a_log));
    if heads == 0 || !dim.is_multiple_of(heads) {
        let expected = format!("[D] = [{dim}], or [H] with H a divisor of it");
        return Err(OpError::Shape { op: OP, argument: "a_log", found: vec![heads], expected });
    }
    parameter(OP, "a_log", &a_log, [heads], "[H]", &a.device())?;
    if let Some(bias) = &bias {
        parameter(OP, "bias", bias, [dim], "[D]", &a.device())?;
    }
    // By channel, so that what is summed over is rows alone.
    let a_log = match dim / heads {
        1 => a_log,
        each => a_log.reshape([heads, 1]).expand([heads, each]).reshape([dim]),
    };
    #[cfg(feature = "cube")]
    if on_kernels(&a, engine) && a.shape().num_elements() > 0 && crate::rows::fits(dim) {
        let shape = a.dims();
        let parameter = |x: Tensor<1>| Tensor::into_dispatch(x.cast(burn::tensor::DType::F32));
        let operator = kernels::DecayGate { has_bias: bias.is_some() };
        let rows = Tensor::<2>::into_dispatch(a.reshape([-1, dim as i64]));
        let inputs = [rows, parameter(a_log)].into_iter().chain(bias.map(parameter)).collect();
        let mut outputs = crate::bridge::apply(operator, inputs, vec![]);
        return Ok(Tensor::<2>::from_dispatch(outputs.remove(0)).reshape(shape));
    }
    let _ = on_kernels(&a, engine);
    Ok(reference::decay_gate(a, a_log, bias))
}
