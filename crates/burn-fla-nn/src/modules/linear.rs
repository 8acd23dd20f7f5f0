//! Linear map.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops::{self as ops, Activation, Epilogue};

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
        let (weight, bias) = self.for_input(x.dtype());
        Ok(ops::linear(x, weight, bias)?)
    }

    /// act(x Wᵀ + b), which on a Hopper GPU is one kernel.
    ///
    /// # Shapes
    /// As [`Linear::forward`].
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn activated<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Result<Tensor<D>, NnError> {
        let (weight, bias) = self.for_input(x.dtype());
        Ok(ops::linear_with(x, weight, Epilogue { bias, activation, ..Default::default() })?)
    }

    /// W and b as they stand beside an input of `dtype`: with bf16 they stay f32, and W is rounded once for both directions.
    fn for_input(&self, dtype: DType) -> (Tensor<2>, Option<Tensor<1>>) {
        let to = if dtype == DType::BF16 { DType::F32 } else { dtype };
        (self.weight.val().cast(to), self.bias.as_ref().map(|bias| bias.val().cast(to)))
    }

    /// W of [`Linear::for_input`].
    pub(crate) fn weight_for(&self, dtype: DType) -> Tensor<2> {
        self.for_input(dtype).0
    }
}

/// Several maps of one input, whose gradient is then one product.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn project<const N: usize, const D: usize>(
    maps: [&Linear; N],
    x: Tensor<D>,
) -> Result<[Tensor<D>; N], NnError> {
    let outputs = project_all(&maps, x)?;
    Ok(outputs.try_into().unwrap_or_else(|_| unreachable!("an output for each map")))
}

/// [`project`], where the number of maps is not known before.
pub(crate) fn project_all<const D: usize>(maps: &[&Linear], x: Tensor<D>) -> Result<Vec<Tensor<D>>, NnError> {
    let layers = maps.iter().map(|map| map.for_input(x.dtype())).collect();
    Ok(ops::linears(x, layers)?)
}
