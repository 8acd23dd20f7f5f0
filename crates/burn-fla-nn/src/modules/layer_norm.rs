//! Layer norm and group norm.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};

use crate::{Init, NnError, ParamScope};

/// (x − mean(x)) / √(var(x) + ε) over the last dimension, the variance biased; `x` is f32.
fn standardise<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = centred.clone().square().mean_dim(D - 1);
    centred / (variance + eps).sqrt()
}

/// y = (x − mean(x)) / √(var(x) + ε) ⊙ w (+ b) over the last dimension, statistics in f32 (Ba, Kiros, Hinton 2016).
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// w, `[width]`.
    pub weight: Param<Tensor<1>>,
    /// b, `[width]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// ε.
    pub eps: f64,
}

impl LayerNorm {
    /// A norm over `width` features with w = 1 and b = 0.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, bias: bool, eps: f64) -> Self {
        Self { weight: scope.ones("weight", [width]), bias: bias.then(|| scope.zeros("bias", [width])), eps }
    }

    /// # Shapes
    /// - input and output `[..., width]`, f32 or bf16
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, NnError> {
        let dtype = x.dtype();
        Ok(self.normed(x.cast(DType::F32))?.cast(dtype))
    }

    /// With s = `x` + `residual`: (norm(s), s), both in the type of `x`. The norm is that of the unrounded sum.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward_add<const D: usize>(
        &self,
        x: Tensor<D>,
        residual: Tensor<D>,
    ) -> Result<(Tensor<D>, Tensor<D>), NnError> {
        if x.dims() != residual.dims() {
            return Err(NnError::argument(
                "residual",
                format!("the shape is {:?}, and that of x is {:?}", residual.dims(), x.dims()),
            ));
        }
        let dtype = x.dtype();
        let sum = x.cast(DType::F32) + residual.cast(DType::F32);
        Ok((self.normed(sum.clone())?.cast(dtype), sum.cast(dtype)))
    }

    fn normed<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, NnError> {
        let width = self.weight.dims()[0];
        if x.dims()[D - 1] != width {
            return Err(NnError::argument(
                "x",
                format!("the shape is {:?}, and {width} features are expected", x.dims()),
            ));
        }
        let y = standardise(x, self.eps) * self.weight.val().unsqueeze();
        Ok(match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        })
    }
}

/// Layer norm of each head by itself, with a weight and bias for each of its features: group norm with the heads as
/// groups (Wu and He 2018).
#[derive(Module, Debug)]
pub struct GroupNorm {
    /// w, `[H·V]`.
    pub weight: Param<Tensor<1>>,
    /// b, `[H·V]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// ε.
    pub eps: f64,
}

impl GroupNorm {
    /// A norm over `width` features of all heads with w = 1 and b = 0.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, bias: bool, eps: f64) -> Self {
        Self::start(scope, width, 1.0, bias, eps)
    }

    /// A norm over `width` features of all heads with w = `weight` and b = 0.
    pub fn start(scope: &ParamScope<'_, '_>, width: usize, weight: f64, bias: bool, eps: f64) -> Self {
        Self {
            weight: scope.start("weight", [width], &Init::Constant(weight)),
            bias: bias.then(|| scope.zeros("bias", [width])),
            eps,
        }
    }

    /// # Shapes
    /// - input and output `[B, T, H, V]`, f32 or bf16
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: Tensor<4>) -> Result<Tensor<4>, NnError> {
        let dtype = x.dtype();
        let [_, _, heads, width] = x.dims();
        let features = self.weight.dims()[0];
        if heads * width != features {
            return Err(NnError::argument(
                "x",
                format!("the shape is {:?}, and {features} features are expected over all heads", x.dims()),
            ));
        }
        let y = standardise(x.cast(DType::F32), self.eps) * self.weight.val().reshape([1, 1, heads, width]);
        let y = match &self.bias {
            Some(bias) => y + bias.val().reshape([1, 1, heads, width]),
            None => y,
        };
        Ok(y.cast(dtype))
    }
}
