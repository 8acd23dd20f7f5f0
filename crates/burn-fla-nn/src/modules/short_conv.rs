//! Short depthwise convolution.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, CuSeqlens, Engine, ShortConvOptions};

use crate::{Init, NnError, ParamScope};

/// y_t = silu(Σ_j w\[:, j\] ⊙ x_{t−W+1+j} + b): each channel mixed over its last W tokens.
#[derive(Module, Debug)]
pub struct ShortConv {
    /// w, `[channels, 1, W]`: the layout of PyTorch's depthwise Conv1d.
    pub weight: Param<Tensor<3>>,
    /// b, `[channels]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Whether silu follows.
    pub silu: bool,
}

/// The widest short convolution that the operator takes.
const LARGEST_CONV: usize = 16;

/// Checks `conv_size`, where a layer has short convolutions.
pub(crate) fn check_conv(conv_size: Option<usize>) -> Result<(), NnError> {
    conv_size.map_or(Ok(()), |size| check_conv_of("conv_size", size))
}

/// Checks the field that gives the width of a short convolution.
pub(crate) fn check_conv_of(field: &str, size: usize) -> Result<(), NnError> {
    if (1..=LARGEST_CONV).contains(&size) {
        return Ok(());
    }
    Err(NnError::config(field, format!("must be from 1 to {LARGEST_CONV}, and it is {size}")))
}

impl ShortConv {
    /// A convolution over `size` tokens, taps from N(0, std).
    pub fn new(scope: &ParamScope<'_, '_>, channels: usize, size: usize) -> Self {
        Self::starting(scope, [channels, size], &Init::Normal, None)
    }

    /// A convolution of `channels` over `size` tokens whose taps, and bias where it has one, start as given.
    pub fn starting(
        scope: &ParamScope<'_, '_>,
        [channels, size]: [usize; 2],
        taps: &Init<'_>,
        bias: Option<&Init<'_>>,
    ) -> Self {
        Self {
            weight: scope.start("weight", [channels, 1, size], taps),
            bias: bias.map(|init| scope.start("bias", [channels], init)),
            silu: true,
        }
    }

    /// Without silu.
    pub fn linear(self) -> Self {
        Self { silu: false, ..self }
    }

    /// The convolved sequence, and the last W inputs of each sequence to go on from.
    ///
    /// # Shapes
    /// - `x` and the output `[batch, tokens, channels]`
    /// - `cache` `[sequences, channels, W]`; `None`: zeros
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        cache: Option<Tensor<3>>,
        cu_seqlens: Option<CuSeqlens>,
        engine: Engine,
    ) -> Result<(Tensor<3>, Tensor<3>), NnError> {
        let weight = self.weight.val();
        let [channels, _, size] = weight.dims();
        let weight = weight.reshape([channels, size]).cast(x.dtype());
        let bias = self.bias.as_ref().map(|bias| bias.val().cast(x.dtype()));
        Ok(ops::short_conv(x, weight, bias, ShortConvOptions { silu: self.silu, initial: cache, cu_seqlens, engine })?)
    }
}
