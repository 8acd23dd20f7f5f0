//! One layer of a model: a mixer and a feed-forward network, each behind a norm.

use burn::module::Module;
use burn::tensor::Tensor;

use super::config::CommonConfig;
use crate::layers::{
    Attention, AttentionConfig, Gla, GlaConfig, LayerState, Retention, RetentionConfig, SequenceContext,
};
use crate::modules::{GatedMlp, RmsNorm};
use crate::{NnError, ParamScope};

/// Configuration of a [`Mixer`]: which token mixer a layer has.
#[derive(Clone, Debug)]
pub enum MixerConfig {
    /// Softmax attention.
    Attention(AttentionConfig),
    /// Multi-scale retention.
    Retention(RetentionConfig),
    /// Gated linear attention.
    Gla(GlaConfig),
}

/// The token mixer of a layer.
// A model has a few dozen of them, beside gigabytes of weights: no box is needed around the larger ones.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum Mixer {
    /// Softmax attention.
    Attention(Attention),
    /// Multi-scale retention.
    Retention(Retention),
    /// Gated linear attention.
    Gla(Gla),
}

impl MixerConfig {
    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        match self {
            Self::Attention(config) => config.check(),
            Self::Retention(config) => config.check().map(drop),
            Self::Gla(config) => config.check().map(drop),
        }
    }

    fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Mixer, NnError> {
        Ok(match self {
            Self::Attention(config) => Mixer::Attention(config.build(scope)?),
            Self::Retention(config) => Mixer::Retention(config.build(scope)?),
            Self::Gla(config) => Mixer::Gla(config.build(scope)?),
        })
    }
}

impl Mixer {
    /// The mixed sequence, and what to go on from when the context keeps states.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, hidden]`
    ///
    /// # Errors
    /// A state of another kind of layer; shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<LayerState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<LayerState>), NnError> {
        match self {
            Self::Attention(layer) => layer.forward(x, past, context),
            Self::Retention(layer) => layer.forward(x, past, context),
            Self::Gla(layer) => layer.forward(x, past, context),
        }
    }
}

/// h ← h + mixer(norm(h)), then h ← h + mlp(norm(h)).
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before the mixer.
    pub attn_norm: RmsNorm,
    /// The mixer.
    pub attn: Mixer,
    /// Norm before the feed-forward network.
    pub mlp_norm: RmsNorm,
    /// The feed-forward network.
    pub mlp: GatedMlp,
}

/// The residual stream between two blocks, with what the last network gave not yet added: the addition belongs to the
/// next norm, which makes one pass of both.
#[derive(Debug)]
pub(crate) struct Stream {
    pub residual: Tensor<3>,
    pub update: Option<Tensor<3>>,
}

impl Stream {
    /// (norm(h), h) of the stream with the update added.
    pub fn normed(self, norm: &RmsNorm, context: &SequenceContext) -> Result<(Tensor<3>, Tensor<3>), NnError> {
        let engine = context.compute().engine;
        match self.update {
            Some(update) => norm.forward_add(update, self.residual, engine),
            None => Ok((norm.forward(self.residual.clone(), engine)?, self.residual)),
        }
    }
}

impl Block {
    pub(crate) fn build(
        common: &CommonConfig,
        mixer: &MixerConfig,
        scope: &ParamScope<'_, '_>,
    ) -> Result<Self, NnError> {
        let width = common.hidden_size;
        let norm = |name| RmsNorm::new(&scope.at(name), width, common.norm_eps);
        Ok(Self {
            attn_norm: norm("attn_norm"),
            attn: mixer.build(&scope.at("attn"))?,
            mlp_norm: norm("mlp_norm"),
            mlp: GatedMlp::new(&scope.at("mlp"), width, common.intermediate_size),
        })
    }

    pub(crate) fn forward(
        &self,
        stream: Stream,
        past: Option<LayerState>,
        context: &SequenceContext,
    ) -> Result<(Stream, Option<LayerState>), NnError> {
        let (x, residual) = stream.normed(&self.attn_norm, context)?;
        let (mixed, state) = self.attn.forward(x, past, context)?;
        let stream = Stream { residual, update: Some(mixed) };
        let (x, residual) = stream.normed(&self.mlp_norm, context)?;
        let stream = Stream { residual, update: Some(self.mlp.forward(x, context.compute().engine)?) };
        Ok((stream, state))
    }
}
