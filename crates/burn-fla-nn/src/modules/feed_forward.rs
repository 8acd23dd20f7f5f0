//! The feed-forward networks of the architectures.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{GatedMlp, MlpActivation};
use crate::layers::SequenceContext;
use crate::{NnError, ParamScope};

/// Configuration of a [`FeedForward`].
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardConfig {
    /// A [`GatedMlp`] of this many hidden features.
    Gated {
        /// Hidden features.
        intermediate_size: usize,
        /// What the gate passes through.
        activation: MlpActivation,
    },
}

/// The feed-forward network of a layer.
#[derive(Module, Debug)]
pub enum FeedForward {
    /// SwiGLU.
    Gated(GatedMlp),
}

impl FeedForwardConfig {
    pub(crate) fn build(&self, scope: &ParamScope<'_, '_>, width: usize) -> FeedForward {
        match self {
            Self::Gated { intermediate_size, activation } => {
                FeedForward::Gated(GatedMlp::new(scope, width, *intermediate_size, *activation))
            }
        }
    }
}

impl FeedForward {
    /// The output `[B, T, hidden]`, and the last token of each sequence `[N, hidden]` for the networks that shift
    /// tokens, when the context keeps states.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<Tensor<2>>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<Tensor<2>>), NnError> {
        match self {
            Self::Gated(network) => {
                if past.is_some() {
                    return Err(NnError::argument("state", "a gated feed-forward network keeps none"));
                }
                Ok((network.forward(x, context.engine())?, None))
            }
        }
    }
}
