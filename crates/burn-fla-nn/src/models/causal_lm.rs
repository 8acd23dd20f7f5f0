//! One language model for every architecture and hybrid.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use burn_fla_ops::{self as ops, CrossEntropyOptions, CuSeqlens};

use super::block::{Block, BlockState, Stream};
use super::{ModelConfig, State};
use crate::layers::SequenceContext;
use crate::modules::{Embedding, Linear, LossOutput, Norm};
use crate::params::parameters_from;
use crate::{Compute, NamedParam, NnError, ParamPath, ParamScope, ParamSource};

/// Embedding, blocks and last norm.
#[derive(Module, Debug)]
pub struct Backbone {
    /// `[vocabulary, hidden]`
    pub embeddings: Embedding,
    /// The blocks, first to last.
    pub layers: Vec<Block>,
    /// The norm after the last block.
    pub norm: Norm,
    /// `[layers, width]`: where the lower bounds of the layers' forget gates come from, for the architectures that have
    /// them.
    pub lower_bounds: Option<Param<Tensor<2>>>,
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

    /// A model whose parameters have shapes and no values: to be counted, not run, whatever its size.
    ///
    /// # Errors
    /// Widths and head counts that do not fit.
    pub fn outline(config: &ModelConfig, device: &Device) -> Result<Self, NnError> {
        Self::build(config, &ParamSource::outline(device).root())
    }

    /// A model with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths and head counts that do not fit.
    pub fn build(config: &ModelConfig, scope: &ParamScope<'_, '_>) -> Result<Self, NnError> {
        let common = config.common();
        let (vocabulary, width, names) = (common.vocab_size, common.hidden_size, common.names);
        let inner = scope.at(names.model);
        let layers = inner.at("layers");
        let padding = common.pad_token_id.map(|id| id as usize);
        let lower_bounds = config.layers().iter().find_map(|layer| layer.mixer.lower_bounds());
        Ok(Self {
            model: Backbone {
                embeddings: Embedding::start(
                    &inner.at("embeddings"),
                    vocabulary,
                    width,
                    padding,
                    &common.outer_init.embedding(),
                ),
                layers: (config.layers().iter().enumerate())
                    .map(|(i, layer)| Block::build(common, layer, i == 0, &layers.at(i)))
                    .collect::<Result<_, _>>()?,
                norm: common.norm.build(&inner.at(names.norm), width, common.norm_eps),
                lower_bounds: lower_bounds.map(|width| inner.zeros("lower_bounds", [config.num_layers(), width])),
            },
            lm_head: (!common.tie_word_embeddings).then(|| {
                let init = common.outer_init.output(vocabulary, width);
                Linear::start(&scope.at("lm_head"), width, vocabulary, &init, None)
            }),
            config: Arc::new(config.clone()),
        })
    }

    /// Every parameter by its Hugging Face name.
    pub fn named_parameters(&self) -> Vec<NamedParam> {
        parameters_from(self, self.param_path())
    }

    /// For a visitor of this model that wants to know the Hugging Face name of where it stands.
    pub fn param_path(&self) -> ParamPath {
        ParamPath::named(self.config.common().names)
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.model.norm.device()
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
        let (h, _) = self.hidden(ids, None, context)?;
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
        same_shape(&ids, &labels)?;
        let context = SequenceContext::new(ids.dims(), cu, compute, &ids.device())?;
        let (h, _) = self.hidden(ids, None, context)?;
        self.loss_of_hidden(h, labels, compute)
    }

    /// The loss from the normed output of the last block.
    pub(super) fn loss_of_hidden(
        &self,
        h: Tensor<3>,
        labels: Tensor<2, Int>,
        compute: Compute,
    ) -> Result<LossOutput, NnError> {
        let [b, t] = labels.dims();
        let labels = labels.reshape([b * t]);
        let weight = self.output_weight(h.dtype());
        let l2_warp = self.config.common().use_l2warp.then_some(1e-4);
        let options = CrossEntropyOptions { l2_warp, engine: compute.engine, ..Default::default() };
        let (sum, count) = ops::linear_cross_entropy(h.flatten(0, 1), weight, labels, options)?;
        Ok(LossOutput { sum, count })
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
        let (layers, seen) = match state {
            Some(state) => (Some(state.layers), state.seen),
            None => (None, vec![0; b]),
        };
        let context = SequenceContext::new([b, t], None, compute, &ids.device())?.continuing(&seen)?;
        let (h, layers) = self.hidden(ids, layers, context)?;
        let logits = self.logits(h.narrow(1, t - 1, 1))?;
        let state = State { layers, seen: seen.into_iter().map(|seen| seen + t).collect() };
        Ok((logits.squeeze_dim(1), state))
    }

    /// Runs prompts of different lengths through the chunked form, each as if it were alone: the logits of the last
    /// position of each, and the state to go on from, one row a prompt.
    ///
    /// # Shapes
    /// - `ids` `[B, T]`, padded on the left: the last `lengths[i]` tokens of row i are its prompt
    /// - output `[B, vocabulary]`, f32
    ///
    /// # Errors
    /// A length of 0 or above T; another number of lengths than rows.
    pub fn prefill_padded(
        &self,
        ids: Tensor<2, Int>,
        lengths: &[usize],
        compute: Compute,
    ) -> Result<(Tensor<2>, State), NnError> {
        let [b, t] = ids.dims();
        if lengths.len() != b {
            return Err(NnError::argument("lengths", format!("there are {}, for {b} rows", lengths.len())));
        }
        if let Some(row) = lengths.iter().position(|length| *length == 0 || *length > t) {
            let length = lengths[row];
            return Err(NnError::argument("lengths", format!("that of row {row} is {length}, not from 1 to {t}")));
        }
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        let total = offsets[b];
        let device = ids.device();
        let index = |places: Vec<i32>| {
            let count = places.len();
            Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device)
        };
        let places = lengths.iter().enumerate().flat_map(|(row, length)| (row + 1) * t - length..(row + 1) * t);
        let packed = ids.reshape([b * t]).select(0, index(places.map(|place| place as i32).collect()));
        let ends = index(offsets[1..].iter().map(|end| *end as i32 - 1).collect());
        let cu = CuSeqlens::new(offsets)?;
        let context = SequenceContext::new([1, total], Some(&cu), compute, &device)?.continuing(&vec![0; b])?;
        let (h, layers) = self.hidden(packed.unsqueeze_dim(0), None, context)?;
        let logits = self.logits(h.select(1, ends))?;
        Ok((logits.squeeze_dim(0), State { layers, seen: lengths.to_vec() }))
    }

    /// The normed output of the last block, `[B, T, hidden]`, and the states if the context keeps them.
    fn hidden(
        &self,
        ids: Tensor<2, Int>,
        past: Option<Vec<BlockState>>,
        context: SequenceContext,
    ) -> Result<(Tensor<3>, Vec<BlockState>), NnError> {
        let blocks = &self.model.layers;
        let past: Vec<Option<BlockState>> = match past {
            None => vec![None; blocks.len()],
            Some(past) if past.len() == blocks.len() => past.into_iter().map(Some).collect(),
            Some(past) => {
                return Err(NnError::argument(
                    "state",
                    format!("it has {} layers, and the model {}", past.len(), blocks.len()),
                ));
            }
        };
        let context = &context.with_lower_bounds(self.lower_bounds());
        let mut stream = self.begin(ids, context.compute().dtype);
        let mut states = Vec::with_capacity(blocks.len());
        for (block, past) in blocks.iter().zip(past) {
            let (next, state) = block.forward(stream, past, context)?;
            stream = next;
            states.extend(state);
        }
        Ok((stream.finish(&self.model.norm, context)?, states))
    }

    /// The residual stream before the first block.
    pub(super) fn begin(&self, ids: Tensor<2, Int>, dtype: DType) -> Stream {
        Stream::new(self.model.embeddings.forward(ids, dtype), self.config.common().residual_in_fp32)
    }

    /// With P the softmax over the layers, the bound of layer l is Σ P_m over the m from 1 to l: 0 in the first layer,
    /// and rising (Qin et al. 2023). `[layers, width]`, f32.
    pub(super) fn lower_bounds(&self) -> Option<Tensor<2>> {
        let p = activation::softmax(self.model.lower_bounds.as_ref()?.val(), 0);
        let first = p.clone().narrow(0, 0, 1);
        Some(p.cumsum(0) - first)
    }

    /// The output layer's weight, `[vocabulary, hidden]`, as a product with activations of `dtype` takes it.
    fn output_weight(&self, dtype: DType) -> Tensor<2> {
        let weight = match &self.lm_head {
            Some(head) => head.weight.val(),
            None => self.model.embeddings.weight.val(),
        };
        // A bf16 product takes the f32 weight as it is and rounds it once for both directions.
        if dtype == DType::BF16 { weight } else { weight.cast(dtype) }
    }

    fn logits(&self, h: Tensor<3>) -> Result<Tensor<3>, NnError> {
        let weight = self.output_weight(h.dtype());
        Ok(ops::linear(h, weight, None)?.cast(DType::F32))
    }
}

/// Every id has a label.
pub(super) fn same_shape(ids: &Tensor<2, Int>, labels: &Tensor<2, Int>) -> Result<(), NnError> {
    if ids.dims() == labels.dims() {
        return Ok(());
    }
    Err(NnError::argument("labels", format!("the shape is {:?}, and that of ids {:?}", labels.dims(), ids.dims())))
}
