//! A map through a few features.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops::Activation;

use super::Linear;
use crate::{Init, NnError, ParamScope};

/// What stands between the two maps of a [`LowRank`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    /// Nothing.
    Nothing,
    /// tanh
    Tanh,
    /// σ
    Sigmoid,
}

/// The two maps of a [`LowRank`], by their places in the format's sequence.
#[derive(Module, Debug)]
pub struct LowRankMaps {
    /// `[rank, in]`
    pub _0: Linear,
    /// `[out, rank]`
    pub _2: Linear,
}

/// y = W₂ f(W₀ x) (+ b): the LoRA of RWKV. W₀ starts at zero and W₂ orthogonal with a gain of 0.1, so that y starts as
/// its bias.
#[derive(Module, Debug)]
pub struct LowRank {
    /// The maps.
    pub lora: LowRankMaps,
    #[module(skip)]
    between: Between,
}

impl LowRank {
    /// A map of `input` to `output` features through `rank`; without a bias where `bias` is `None`.
    pub fn new(
        scope: &ParamScope<'_, '_>,
        [input, rank, output]: [usize; 3],
        between: Between,
        bias: Option<&Init<'_>>,
    ) -> Self {
        let scope = scope.at("lora");
        let gain = 0.1 * (rank as f64 / output as f64).sqrt().max(1.0);
        Self {
            lora: LowRankMaps {
                _0: Linear::start(&scope.at(0), input, rank, &Init::Constant(0.0), None),
                _2: Linear::start(&scope.at(2), rank, output, &Init::Orthogonal(gain), bias),
            },
            between,
        }
    }

    /// # Shapes
    /// - input `[..., in]`, f32 or bf16
    /// - output `[..., out]`, the input's type
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, NnError> {
        let between = match self.between {
            Between::Nothing => Activation::Identity,
            Between::Tanh => Activation::Tanh,
            Between::Sigmoid => Activation::Sigmoid,
        };
        self.lora._2.forward(self.lora._0.activated(x, between)?)
    }
}
