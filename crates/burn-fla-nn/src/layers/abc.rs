//! Attention with bounded-memory control.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops as ops;

use super::gsa::check_slots;
use super::state::conv_elements;
use super::{Convs, MixerDims, MixerState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, Rotary, ShortConv, check_conv, merge_heads, output_norm, project, split_heads};
use crate::{NnError, ParamScope};

/// Configuration of [`Abc`].
#[derive(Config, Debug)]
pub struct AbcConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// Slots M of a head; `None`: K.
    pub num_slots: Option<usize>,
    /// H·K over the width.
    #[config(default = "0.5")]
    pub expand_k: f64,
    /// H·V over the width.
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// The smallest score of a slot; `None`: there is none.
    pub clamp_min: Option<f64>,
    /// The largest score of a slot; `None`: there is none.
    pub clamp_max: Option<f64>,
    /// Whether q and k are rotated by their positions.
    #[config(default = "true")]
    pub use_rope: bool,
    /// Whether q, k and v pass a short convolution.
    #[config(default = "false")]
    pub use_short_conv: bool,
    /// Tokens that the short convolution mixes.
    #[config(default = "4")]
    pub conv_size: usize,
    /// Whether the output norm has a weight.
    #[config(default = "true")]
    pub elementwise_affine: bool,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
}

/// M slots a head, each a mean of the keys and of the values so far with the weights e^{s_t}; o_t = Hv_tᵀ softmax(K^−½
/// Hk_tᵀ q_t). The output is normalised for each head and gated (Peng et al. 2022).
#[derive(Module, Debug)]
pub struct Abc {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[H·V, hidden]`
    pub v_proj: Linear,
    /// `[H·V, hidden]`
    pub g_proj: Linear,
    /// `[H·M, hidden]`
    pub s_proj: Linear,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[H·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[H·V, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// `[V]`
    pub g_norm: Option<RmsNorm>,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// ε of the output norm.
    pub norm_eps: f64,
    /// The smallest score of a slot.
    pub clamp_min: Option<f64>,
    /// The largest score of a slot.
    pub clamp_max: Option<f64>,
    #[module(skip)]
    rotary: Option<Rotary>,
}

/// What an [`Abc`] layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct AbcLayerState {
    /// The keys and values of the slots, and the weight of what is in them.
    pub memory: ops::AbcState,
    /// The last inputs of the convolutions of q, k and v, each `[N, channels, W]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for AbcLayerState {
    fn elements(&self) -> usize {
        let ops::AbcState { keys, values, normaliser } = &self.memory;
        keys.shape().num_elements()
            + values.shape().num_elements()
            + normaliser.shape().num_elements()
            + conv_elements(&self.conv)
    }
}

impl AbcConfig {
    /// Reads the fields of a `config.json`. `gate_low_rank_dim` is not read: it changes nothing in this architecture.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 4)?)
            .with_num_slots(fields.usize_or_null("num_slots", 64)?)
            .with_expand_k(fields.positive("expand_k", fields.positive("exapnd_k", 0.5)?)?)
            .with_expand_v(fields.positive("expand_v", fields.positive("exapnd_v", 1.0)?)?)
            .with_clamp_min(fields.f64_or_null("clamp_min", -32.0)?)
            .with_clamp_max(fields.f64_or_null("clamp_max", 32.0)?)
            .with_use_rope(fields.bool("use_rope", true)?)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_norm_eps(common.norm_eps))
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        check_conv(self.use_short_conv.then_some(self.conv_size))?;
        check_slots(self.num_slots)?;
        if let (Some(min), Some(max)) = (self.clamp_min, self.clamp_max)
            && (min.is_nan() || max.is_nan() || min > max)
        {
            return Err(NnError::config("clamp_min", format!("{min} is not below clamp_max {max}")));
        }
        let dims = MixerDims::new(self.hidden_size, self.num_heads, None, self.expand_k, self.expand_v)?;
        let width = dims.key_width();
        if self.use_rope && !width.is_multiple_of(2) {
            return Err(NnError::config(
                "num_heads",
                format!("rotary positions need key heads of an even width, not {width}; or set use_rope to false"),
            ));
        }
        Ok(dims)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the number of heads; an odd width of a rotated head; a convolution
    /// over no token; no slot; bounds of the scores that leave nothing between them.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Abc, NnError> {
        let (hidden, dims) = (self.hidden_size, self.check()?);
        let slots = self.num_slots.unwrap_or(dims.key_width());
        let linear = |name, input, output| Linear::new(&scope.at(name), input, output, false);
        let conv =
            |name, channels| self.use_short_conv.then(|| ShortConv::new(&scope.at(name), channels, self.conv_size));
        let norm = || RmsNorm::new(&scope.at("g_norm"), dims.value_width(), self.norm_eps);
        Ok(Abc {
            q_proj: linear("q_proj", hidden, dims.keys),
            k_proj: linear("k_proj", hidden, dims.keys),
            v_proj: linear("v_proj", hidden, dims.values),
            g_proj: linear("g_proj", hidden, dims.values),
            s_proj: linear("s_proj", hidden, dims.heads * slots),
            q_conv1d: conv("q_conv1d", dims.keys),
            k_conv1d: conv("k_conv1d", dims.keys),
            v_conv1d: conv("v_conv1d", dims.values),
            g_norm: self.elementwise_affine.then(norm),
            o_proj: linear("o_proj", dims.values, hidden),
            num_heads: dims.heads,
            norm_eps: self.norm_eps,
            clamp_min: self.clamp_min,
            clamp_max: self.clamp_max,
            rotary: match self.use_rope {
                true => Some(Rotary::new(dims.key_width(), 10_000.0)?),
                false => None,
            },
        })
    }
}

impl Abc {
    /// The mixed sequence, and the state to go on from when the context keeps states.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, hidden]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<AbcLayerState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<AbcLayerState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let (memory, conv) = past.map_or((None, Vec::new()), |past| (Some(past.memory), past.conv));
        let mut convs = Convs::new(context, conv);
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = convs.run(&self.q_conv1d, q)?;
        let k = convs.run(&self.k_conv1d, k)?;
        let v = convs.run(&self.v_conv1d, v)?;
        let heads = |x| split_heads(x, self.num_heads);
        let rotate = |x: Tensor<4>| match &self.rotary {
            Some(rotary) => rotary.forward(x, context.positions(), context.position_end(), context.engine()),
            None => Ok(x),
        };
        let mut scores = self.s_proj.forward(x.clone())?;
        if let Some(min) = self.clamp_min {
            scores = scores.clamp_min(min);
        }
        if let Some(max) = self.clamp_max {
            scores = scores.clamp_max(max);
        }
        let options = ops::AbcOptions {
            initial_state: memory,
            cu_seqlens: context.cu_seqlens().cloned(),
            engine: context.engine(),
            ..Default::default()
        };
        let (o, memory) = ops::abc(rotate(heads(q))?, rotate(heads(k))?, heads(v), heads(scores), options)?;
        let gate = Some(heads(self.g_proj.forward(x)?));
        let o = output_norm(o, gate, self.g_norm.as_ref(), self.norm_eps, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| AbcLayerState { memory, conv: convs.finish() });
        Ok((y, state))
    }
}
