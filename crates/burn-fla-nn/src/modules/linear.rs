//! Linear map.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops as ops;

use crate::{Init, NnError, ParamScope};

/// y = x Wᵀ (+ b), with W stored `[out, in]` as in PyTorch.
#[derive(Module, Debug)]
pub struct Linear {
    /// W, `[out, in]`.
    pub weight: Param<Tensor<2>>,
    /// b, `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// A map of `input` to `output` features: W from N(0, std), b zero.
    pub fn new(scope: &ParamScope<'_, '_>, input: usize, output: usize, bias: bool) -> Self {
        Self { weight: scope.normal("weight", [output, input]), bias: bias.then(|| scope.zeros("bias", [output])) }
    }

    /// A map of `input` to `output` features that starts as told; without a bias where `bias` is `None`.
    pub fn start(
        scope: &ParamScope<'_, '_>,
        input: usize,
        output: usize,
        weight: &Init<'_>,
        bias: Option<&Init<'_>>,
    ) -> Self {
        Self {
            weight: scope.start("weight", [output, input], weight),
            bias: bias.map(|bias| scope.start("bias", [output], bias)),
        }
    }

    /// # Shapes
    /// - input `[..., in]`, f32 or bf16
    /// - output `[..., out]`, the input's type
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, NnError> {
        let dtype = x.dtype();
        let bias = self.bias.as_ref().map(|b| b.val().cast(dtype));
        // A bf16 product takes the f32 weight as it is and rounds it once for both directions.
        let weight = self.weight.val();
        let weight = if dtype == DType::BF16 { weight } else { weight.cast(dtype) };
        Ok(ops::linear(x, weight, bias)?)
    }
}
