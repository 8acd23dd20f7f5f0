//! The feed-forward networks of the architectures.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{GatedMlp, MlpActivation, Rwkv6ChannelMix, Rwkv7ChannelMix};
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
    /// A [`Rwkv6ChannelMix`] of this many hidden features.
    Rwkv6 {
        /// Hidden features.
        intermediate_size: usize,
    },
    /// A [`Rwkv7ChannelMix`] of this many hidden features.
    Rwkv7 {
        /// Hidden features.
        intermediate_size: usize,
        /// The layer it is in, from 0, and how many there are: they decide how it starts.
        layer: [usize; 2],
    },
}

/// The feed-forward network of a layer.
#[derive(Module, Debug)]
pub enum FeedForward {
    /// SwiGLU.
    Gated(GatedMlp),
    /// The channel mix of RWKV6.
    Rwkv6(Rwkv6ChannelMix),
    /// The channel mix of RWKV7.
    Rwkv7(Rwkv7ChannelMix),
}

impl FeedForwardConfig {
    /// The same network in layer `index` of `layers`.
    pub(crate) fn in_layer(&self, index: usize, layers: usize) -> Self {
        match *self {
            Self::Rwkv7 { intermediate_size, .. } => Self::Rwkv7 { intermediate_size, layer: [index, layers] },
            ref other => other.clone(),
        }
    }

    pub(crate) fn build(&self, scope: &ParamScope<'_, '_>, width: usize) -> FeedForward {
        match self {
            Self::Gated { intermediate_size, activation } => {
                FeedForward::Gated(GatedMlp::new(scope, width, *intermediate_size, *activation))
            }
            Self::Rwkv6 { intermediate_size } => {
                FeedForward::Rwkv6(Rwkv6ChannelMix::new(scope, width, *intermediate_size))
            }
            Self::Rwkv7 { intermediate_size, layer } => {
                FeedForward::Rwkv7(Rwkv7ChannelMix::new(scope, width, *intermediate_size, *layer))
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
            Self::Rwkv6(network) => {
                let (y, last) = network.forward(x, past, context)?;
                Ok((y, context.keep_state().then_some(last)))
            }
            Self::Rwkv7(network) => {
                let (y, last) = network.forward(x, past, context)?;
                Ok((y, context.keep_state().then_some(last)))
            }
        }
    }
}
