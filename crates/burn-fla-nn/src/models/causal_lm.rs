//! One language model for every architecture and hybrid.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor};
use burn_fla_ops::{self as ops, CuSeqlens};

use super::block::{Block, Stream};
use super::{ModelConfig, State};
use crate::layers::{LayerState, SequenceContext};
use crate::modules::{Embedding, Linear, LossOutput, RmsNorm, cross_entropy};
use crate::{Compute, NnError, ParamScope, ParamSource};

/// Embedding, blocks and last norm.
#[derive(Module, Debug)]
pub struct Backbone {
    /// `[vocabulary, hidden]`
    pub embeddings: Embedding,
    /// The blocks, first to last.
    pub layers: Vec<Block>,
    /// The norm after the last block.
    pub norm: RmsNorm,
}

/// A causal language model: logits of the next token from the tokens before.
#[derive(Module, Debug)]
pub struct CausalLm {
    /// Embedding, blocks and last norm.
    pub model: Backbone,
    /// `[vocabulary, hidden]`; absent where the embedding serves for it.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    config: Arc<ModelConfig>,
}

impl CausalLm {
    /// A model with weights drawn from `seed`, each from its own stream of random numbers: the weights do not depend
    /// on the order in which they are made. On `device.autodiff()` it is ready to be trained.
    ///
    /// # Errors
    /// Widths and head counts that do not fit.
    pub fn init(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self, NnError> {
        let source = ParamSource::seeded(seed, config.common().initializer_range, device);
        Self::build(config, &source.root())
    }

    /// A model with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths and head counts that do not fit.
    pub fn build(config: &ModelConfig, scope: &ParamScope<'_, '_>) -> Result<Self, NnError> {
        let common = config.common();
        let (vocabulary, width) = (common.vocab_size, common.hidden_size);
        let inner = scope.at("model");
        let layers = inner.at("layers");
        Ok(Self {
            model: Backbone {
                embeddings: Embedding::new(
                    &inner.at("embeddings"),
                    vocabulary,
                    width,
                    common.pad_token_id.map(|id| id as usize),
                ),
                layers: (0..common.num_hidden_layers)
                    .map(|i| Block::build(common, &config.mixer(i), &layers.at(i)))
                    .collect::<Result<_, _>>()?,
                norm: RmsNorm::new(&inner.at("norm"), width, common.norm_eps),
            },
            lm_head: (!common.tie_word_embeddings).then(|| Linear::new(&scope.at("lm_head"), width, vocabulary, false)),
            config: Arc::new(config.clone()),
        })
    }

    /// The model's config.
    pub fn config(&self) -> ModelConfig {
        ModelConfig::clone(&self.config)
    }

    /// The logits of every position.
    ///
    /// # Shapes
    /// - `ids` `[B, T]`, each below the size of the vocabulary (not checked: ids are on the device)
    /// - output `[B, T, vocabulary]`, f32
    ///
    /// With `cu` the one row is packed of several sequences, and each is treated as if it were alone.
    ///
    /// # Errors
    /// Packed sequences that do not cover the row; a type that is not computed in.
    pub fn forward(&self, ids: Tensor<2, Int>, cu: Option<&CuSeqlens>, compute: Compute) -> Result<Tensor<3>, NnError> {
        let context = SequenceContext::new(ids.dims(), cu, compute, &ids.device())?;
        let (h, _) = self.hidden(ids, None, &context)?;
        self.logits(h)
    }

    /// The sum of the cross entropy over the counted positions, and their number.
    ///
    /// # Shapes
    /// - `ids` `[B, T]`
    /// - `labels` `[B, T]`: the token each position is to predict, already shifted by the caller; −100 is not counted
    ///
    /// # Errors
    /// As [`forward`](Self::forward); labels of another shape than the ids.
    pub fn loss(
        &self,
        ids: Tensor<2, Int>,
        labels: Tensor<2, Int>,
        cu: Option<&CuSeqlens>,
        compute: Compute,
    ) -> Result<LossOutput, NnError> {
        if ids.dims() != labels.dims() {
            return Err(NnError::argument(
                "labels",
                format!("the shape is {:?}, and that of ids {:?}", labels.dims(), ids.dims()),
            ));
        }
        let [b, t, v] = {
            let [b, t] = ids.dims();
            [b, t, self.config.vocab_size()]
        };
        let logits = self.forward(ids, cu, compute)?;
        Ok(cross_entropy(logits.reshape([b * t, v]), labels.reshape([b * t])))
    }

    /// Runs a whole prompt through the chunked form: the logits of its last position, and the state to go on from.
    ///
    /// # Shapes
    /// - `ids` `[B, T]`, T at least 1
    /// - output `[B, vocabulary]`, f32
    ///
    /// # Errors
    /// An empty prompt; a type that is not computed in.
    pub fn prefill(&self, ids: Tensor<2, Int>, compute: Compute) -> Result<(Tensor<2>, State), NnError> {
        self.advance(ids, None, compute)
    }

    /// Goes on by one token for each row, through the recurrent form.
    ///
    /// # Shapes
    /// - `ids` `[B]`
    /// - output `[B, vocabulary]`, f32
    ///
    /// # Errors
    /// A state of another model or number of rows.
    pub fn step(&self, ids: Tensor<1, Int>, state: State, compute: Compute) -> Result<(Tensor<2>, State), NnError> {
        self.advance(ids.unsqueeze_dim(1), Some(state), compute)
    }

    /// Goes on by any number of tokens from `state`, or from the beginning.
    ///
    /// # Shapes
    /// - `ids` `[B, T]`, T at least 1
    /// - output `[B, vocabulary]`, f32: the logits of the last position
    ///
    /// # Errors
    /// No token; a state of another model or number of rows.
    pub fn advance(
        &self,
        ids: Tensor<2, Int>,
        state: Option<State>,
        compute: Compute,
    ) -> Result<(Tensor<2>, State), NnError> {
        let [b, t] = ids.dims();
        if t == 0 || b == 0 {
            return Err(NnError::argument("ids", "there is no token to go on by"));
        }
        let seen = state.as_ref().map_or(0, State::seen);
        let context = SequenceContext::new([b, t], None, compute, &ids.device())?.continuing(seen);
        let (h, layers) = self.hidden(ids, state.map(|s| s.layers), &context)?;
        let logits = self.logits(h.narrow(1, t - 1, 1))?;
        let state = State { layers, seen: seen + t };
        Ok((logits.squeeze_dim(1), state))
    }

    /// The normed output of the last block, `[B, T, hidden]`, and the states if the context keeps them.
    fn hidden(
        &self,
        ids: Tensor<2, Int>,
        past: Option<Vec<LayerState>>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Vec<LayerState>), NnError> {
        let blocks = &self.model.layers;
        let past: Vec<Option<LayerState>> = match past {
            None => vec![None; blocks.len()],
            Some(past) if past.len() == blocks.len() => past.into_iter().map(Some).collect(),
            Some(past) => {
                return Err(NnError::argument(
                    "state",
                    format!("it has {} layers, and the model {}", past.len(), blocks.len()),
                ));
            }
        };
        let mut stream = Stream { residual: self.model.embeddings.forward(ids, context.compute().dtype), update: None };
        let mut states = Vec::with_capacity(blocks.len());
        for (block, past) in blocks.iter().zip(past) {
            let (next, state) = block.forward(stream, past, context)?;
            stream = next;
            states.extend(state);
        }
        let (h, _) = stream.normed(&self.model.norm, context)?;
        Ok((h, states))
    }

    fn logits(&self, h: Tensor<3>) -> Result<Tensor<3>, NnError> {
        let logits = match &self.lm_head {
            Some(head) => head.forward(h)?,
            None => {
                let weight = self.model.embeddings.weight.val().cast(h.dtype());
                ops::linear(h, weight, None)?
            }
        };
        Ok(logits.cast(DType::F32))
    }
}
