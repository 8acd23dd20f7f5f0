//! Root mean square norm, plain, with a residual, and gated.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops::{self as ops, Engine, GateActivation};

use super::LayerNorm;
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

    /// Each head normalised by itself, w over all heads.
    ///
    /// # Shapes
    /// - input and output `[B, T, H, K]`, with w `[H·K]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward_heads(&self, x: Tensor<4>, engine: Engine) -> Result<Tensor<4>, NnError> {
        let dtype = x.dtype();
        let [_, _, heads, width] = x.dims();
        let features = self.weight.dims()[0];
        if heads * width != features {
            let message = format!("the shape is {:?}, and {features} features are expected over all heads", x.dims());
            return Err(NnError::argument("x", message));
        }
        let y = ops::rms_norm(x.cast(DType::F32), None, self.eps, engine)?;
        Ok((y * self.weight.val().reshape([1, 1, heads, width])).cast(dtype))
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

/// Which norm a model has around its mixers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// [`RmsNorm`].
    Rms,
    /// [`LayerNorm`].
    Layer {
        /// Whether it has a bias.
        bias: bool,
    },
}

/// A norm around the mixers.
#[derive(Module, Debug)]
pub enum Norm {
    /// Root mean square norm.
    Rms(RmsNorm),
    /// Layer norm.
    Layer(LayerNorm),
}

impl NormKind {
    /// A norm over `width` features that starts as the identity.
    pub(crate) fn build(self, scope: &ParamScope<'_, '_>, width: usize, eps: f64) -> Norm {
        match self {
            Self::Rms => Norm::Rms(RmsNorm::new(scope, width, eps)),
            Self::Layer { bias } => Norm::Layer(LayerNorm::new(scope, width, bias, eps)),
        }
    }
}

impl Norm {
    /// # Shapes
    /// - input and output `[B, T, width]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: Tensor<3>, engine: Engine) -> Result<Tensor<3>, NnError> {
        match self {
            Self::Rms(norm) => norm.forward(x, engine),
            Self::Layer(norm) => norm.forward(x),
        }
    }

    /// With s = `x` + `residual`: (norm(s), s), both in the type of `x`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward_add(
        &self,
        x: Tensor<3>,
        residual: Tensor<3>,
        engine: Engine,
    ) -> Result<(Tensor<3>, Tensor<3>), NnError> {
        match self {
            Self::Rms(norm) => norm.forward_add(x, residual, engine),
            Self::Layer(norm) => norm.forward_add(x, residual),
        }
    }

    /// A device the norm is on.
    pub(crate) fn device(&self) -> burn::tensor::Device {
        match self {
            Self::Rms(norm) => norm.weight.device(),
            Self::Layer(norm) => norm.weight.device(),
        }
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
