//! Root mean square norm, plain, with a residual, and gated.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, Engine, GateActivation};

use crate::{NnError, ParamScope};

/// y = x / √(mean(x²) + ε) ⊙ w over the last dimension, statistics in f32 (Zhang and Sennrich 2019).
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// w, `[width]`.
    pub weight: Param<Tensor<1>>,
    /// ε.
    pub eps: f64,
}

impl RmsNorm {
    /// A norm over `width` features with w = 1.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, eps: f64) -> Self {
        Self { weight: scope.ones("weight", [width]), eps }
    }

    /// # Shapes
    /// - input and output `[..., width]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, engine: Engine) -> Result<Tensor<D>, NnError> {
        Ok(ops::rms_norm(x, Some(self.weight.val()), self.eps, engine)?)
    }

    /// With s = `x` + `residual`: (norm(s), s), both in the type of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward_add<const D: usize>(
        &self,
        x: Tensor<D>,
        residual: Tensor<D>,
        engine: Engine,
    ) -> Result<(Tensor<D>, Tensor<D>), NnError> {
        Ok(ops::add_rms_norm(x, residual, self.weight.val(), self.eps, engine)?)
    }
}

/// The norm on the output of a mixer: norm(o), times silu(gate) when there is a gate.
///
/// `norm` is `None` for a norm without a weight.
pub(crate) fn output_norm<const D: usize>(
    o: Tensor<D>,
    gate: Option<Tensor<D>>,
    norm: Option<&RmsNorm>,
    eps: f64,
    engine: Engine,
) -> Result<Tensor<D>, NnError> {
    let weight = norm.map(|n| n.weight.val());
    Ok(match gate {
        Some(gate) => ops::gated_rms_norm(o, gate, weight, eps, GateActivation::Silu, engine)?,
        None => ops::rms_norm(o, weight, eps, engine)?,
    })
}
