//! One layer of a model: a mixer and a feed-forward network, each behind a norm.

use burn::module::Module;
use burn::tensor::{DType, Tensor};

use super::config::{CommonConfig, LayerConfig};
use crate::layers::{LayerState, Mixer, SequenceContext};
use crate::modules::{FeedForward, Norm};
use crate::{NnError, ParamScope};

/// h ← h + mixer(norm(h)), then h ← h + mlp(norm(h)) where there is a feed-forward network.
#[derive(Module, Debug)]
pub struct Block {
    /// A norm of the embedding, in the first layer of some architectures: the residual stream begins with its output.
    pub pre_norm: Option<Norm>,
    /// Norm before the mixer.
    pub attn_norm: Norm,
    /// The mixer.
    pub attn: Mixer,
    /// Norm before the feed-forward network.
    pub mlp_norm: Option<Norm>,
    /// The feed-forward network.
    pub mlp: Option<FeedForward>,
}

/// What a layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct BlockState {
    /// What the mixer keeps.
    pub mixer: LayerState,
    /// The last input of a feed-forward network that shifts tokens, `[N, hidden]`.
    pub mlp: Option<Tensor<2>>,
}

impl BlockState {
    /// How many numbers it holds.
    pub fn elements(&self) -> usize {
        self.mixer.elements() + self.mlp.as_ref().map_or(0, |last| last.shape().num_elements())
    }
}

/// The residual stream between two blocks, with what the last network gave not yet added: the addition belongs to the
/// next norm, which makes one pass of both.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(super) residual: Tensor<3>,
    pub(super) update: Option<Tensor<3>>,
    /// The type of the activations; the residual may be wider.
    pub(super) dtype: DType,
}

impl Stream {
    /// A stream that begins with `h`, kept in f32 where the model says so.
    pub fn new(h: Tensor<3>, in_f32: bool) -> Self {
        let dtype = h.dtype();
        let residual = if in_f32 { h.cast(DType::F32) } else { h };
        Self { residual, update: None, dtype }
    }

    /// (norm(h), h) of the stream with the update added.
    fn normed(self, norm: &Norm, context: &SequenceContext) -> Result<(Tensor<3>, Self), NnError> {
        let (dtype, wide) = (self.dtype, self.residual.dtype());
        let (x, residual) = match self.update {
            Some(update) => norm.forward_add(update.cast(wide), self.residual, context.engine())?,
            None => (norm.forward(self.residual.clone(), context.engine())?, self.residual),
        };
        Ok((x.cast(dtype), Self { residual, update: None, dtype }))
    }

    /// norm(h) of the whole stream.
    pub fn finish(self, norm: &Norm, context: &SequenceContext) -> Result<Tensor<3>, NnError> {
        Ok(self.normed(norm, context)?.0)
    }
}

impl Block {
    pub(crate) fn build(
        common: &CommonConfig,
        layer: &LayerConfig,
        first: bool,
        scope: &ParamScope<'_, '_>,
    ) -> Result<Self, NnError> {
        let names = common.names;
        let norm = |name| common.norm.build(&scope.at(name), common.hidden_size, common.norm_eps);
        Ok(Self {
            pre_norm: (first && common.norm_first).then(|| norm("pre_norm")),
            attn_norm: norm(names.attn_norm),
            attn: layer.mixer.build(&scope.at(names.attn))?,
            mlp_norm: layer.feed_forward.is_some().then(|| norm(names.mlp_norm)),
            mlp: layer.feed_forward.as_ref().map(|config| config.build(&scope.at(names.mlp), common.hidden_size)),
        })
    }

    pub(crate) fn forward(
        &self,
        stream: Stream,
        past: Option<BlockState>,
        context: &SequenceContext,
    ) -> Result<(Stream, Option<BlockState>), NnError> {
        let (mixer, mlp) = past.map_or((None, None), |past| (Some(past.mixer), past.mlp));
        let stream = match &self.pre_norm {
            Some(norm) => {
                let (x, stream) = stream.normed(norm, context)?;
                Stream { residual: x.cast(stream.residual.dtype()), ..stream }
            }
            None => stream,
        };
        let (x, mut stream) = stream.normed(&self.attn_norm, context)?;
        let (mixed, mixer) = self.attn.forward(x, mixer, context)?;
        stream.update = Some(mixed);
        let mut last = None;
        if let (Some(norm), Some(network)) = (&self.mlp_norm, &self.mlp) {
            let (x, normed) = stream.normed(norm, context)?;
            let (y, shifted) = network.forward(x, mlp, context)?;
            stream = Stream { update: Some(y), ..normed };
            last = shifted;
        }
        Ok((stream, mixer.map(|mixer| BlockState { mixer, mlp: last })))
    }
}
