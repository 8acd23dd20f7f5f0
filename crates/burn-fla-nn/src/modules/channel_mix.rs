//! The feed-forward networks of RWKV: each token is mixed with the one before it.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_fla_ops::Activation;

use super::Linear;
use crate::layers::SequenceContext;
use crate::{Init, NnError, ParamScope};

/// `x` moved towards the token before it, x + δ ⊙ `part` with δ_t = x_{t−1} − x_t, in the type of `x`.
pub(crate) fn lerp(x: &Tensor<3>, delta: &Tensor<3>, part: Tensor<3>) -> Tensor<3> {
    x.clone() + delta.clone() * part.cast(x.dtype())
}

/// y = W (x + δ ⊙ μ).
#[derive(Module, Debug)]
pub struct LerpLinear {
    /// W, `[out, in]`.
    pub linear: Linear,
    /// μ, `[in]`.
    pub mu: Param<Tensor<1>>,
}

impl LerpLinear {
    /// A map of `input` to `output` features: W as told, μ zero.
    pub fn new(scope: &ParamScope<'_, '_>, input: usize, output: usize, weight: &Init<'_>) -> Self {
        Self { linear: Linear::start(&scope.at("linear"), input, output, weight, None), mu: scope.zeros("mu", [input]) }
    }

    /// # Shapes
    /// - `x` and `delta` `[B, T, in]`
    /// - output `[B, T, out]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: &Tensor<3>, delta: &Tensor<3>) -> Result<Tensor<3>, NnError> {
        self.activated(x, delta, Activation::Identity)
    }

    /// act(y).
    ///
    /// # Shapes
    /// As [`LerpLinear::forward`].
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn activated(&self, x: &Tensor<3>, delta: &Tensor<3>, activation: Activation) -> Result<Tensor<3>, NnError> {
        self.linear.activated(lerp(x, delta, self.mu.val().unsqueeze()), activation)
    }
}

/// y = σ(W_r (x + δ ⊙ μ_r)) ⊙ W_v max(W_k (x + δ ⊙ μ_k), 0)² (Peng et al. 2024).
#[derive(Module, Debug)]
pub struct Rwkv6ChannelMix {
    /// W_k `[intermediate, width]`, μ_k.
    pub key: LerpLinear,
    /// W_v `[width, intermediate]`.
    pub value: Linear,
    /// W_r `[width, width]`, μ_r.
    pub receptance: LerpLinear,
}

impl Rwkv6ChannelMix {
    /// A network of `intermediate` hidden features.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, intermediate: usize) -> Self {
        Self {
            key: LerpLinear::new(&scope.at("key"), width, intermediate, &Init::Normal),
            value: Linear::new(&scope.at("value"), intermediate, width, false),
            receptance: LerpLinear::new(&scope.at("receptance"), width, width, &Init::Normal),
        }
    }

    /// The output, and the last token of each sequence.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, width]`
    /// - `past`, the token before the first of each sequence, and the last token `[N, width]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<Tensor<2>>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Tensor<2>), NnError> {
        let (delta, last) = context.token_shift(x.clone(), past)?;
        let key = self.key.activated(&x, &delta, Activation::ReluSquared)?;
        let receptance = self.receptance.activated(&x, &delta, Activation::Sigmoid)?;
        Ok((receptance * self.value.forward(key)?, last))
    }
}

/// y = W_v max(W_k (x + δ ⊙ x_k), 0)² (Peng et al. 2025).
#[derive(Module, Debug)]
pub struct Rwkv7ChannelMix {
    /// `[width]`: how far each feature is moved towards the token before.
    pub x_k: Param<Tensor<1>>,
    /// W_k `[intermediate, width]`.
    pub key: Linear,
    /// W_v `[width, intermediate]`.
    pub value: Linear,
}

impl Rwkv7ChannelMix {
    /// A network of `intermediate` hidden features, for layer `layer` of `layers`: W_k orthogonal, W_v zero, and with
    /// ρ = 1 − layer / layers x_k = 1 − (n / width)^(ρ⁴) in feature n.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, intermediate: usize, [layer, layers]: [usize; 2]) -> Self {
        let power = (1.0 - layer as f64 / layers as f64).powi(4);
        let x_k = |n: usize| 1.0 - (n as f64 / width as f64).powf(power);
        Self {
            x_k: scope.start("x_k", [width], &Init::Values(&x_k)),
            key: Linear::start(&scope.at("key"), width, intermediate, &Init::Orthogonal(1.0), None),
            value: Linear::start(&scope.at("value"), intermediate, width, &Init::Constant(0.0), None),
        }
    }

    /// The output, and the last token of each sequence.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, width]`
    /// - `past`, the token before the first of each sequence, and the last token `[N, width]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<Tensor<2>>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Tensor<2>), NnError> {
        let (delta, last) = context.token_shift(x.clone(), past)?;
        let mixed = lerp(&x, &delta, self.x_k.val().unsqueeze());
        let key = self.key.activated(mixed, Activation::ReluSquared)?;
        Ok((self.value.forward(key)?, last))
    }
}
