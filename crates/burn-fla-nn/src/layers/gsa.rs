//! Gated slot attention.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Tensor, activation};
use burn_fla_ops as ops;

use super::state::conv_elements;
use super::{Convs, MixerDims, MixerState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{
    FeatureMap, Linear, LinearMap, RmsNorm, ShortConv, check_conv, merge_heads, output_norm, project, repeat_heads,
    split_heads,
};
use crate::{NnError, ParamScope};

/// The output norm has an ε of its own, whatever `norm_eps` is.
const NORM_EPS: f64 = 1e-5;

/// The map of queries and keys of [`Gsa`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum GsaFeatureMap {
    /// x σ(x)
    Swish,
    /// max(x, 0)
    Relu,
    /// max(W x, 0) with a learned W `[K, K]` that all heads share (Kasai et al. 2021).
    T2r,
}

/// Configuration of [`Gsa`].
#[derive(Config, Debug)]
pub struct GsaConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// Key and value heads G; `None`: H.
    pub num_kv_heads: Option<usize>,
    /// Slots M of a head; `None`: K.
    pub num_slots: Option<usize>,
    /// H·K over the width.
    #[config(default = "1.0")]
    pub expand_k: f64,
    /// H·V over the width. The output norm is as wide as the input, so it must be 1.
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// The map of queries and keys.
    #[config(default = "GsaFeatureMap::Swish")]
    pub feature_map: GsaFeatureMap,
    /// The log decay of a slot is ln σ(f) over this.
    #[config(default = "8.0")]
    pub gate_logit_normalizer: f64,
    /// Whether q, k and v pass a short convolution.
    #[config(default = "false")]
    pub use_short_conv: bool,
    /// Tokens that the short convolution mixes.
    #[config(default = "4")]
    pub conv_size: usize,
    /// Whether the output norm has a weight.
    #[config(default = "true")]
    pub elementwise_affine: bool,
}

/// M slots a head, each a decaying mean of keys and of values: with α_t = σ(f_t)^(1/8) a slot,
/// Hk_t = Hk_{t−1} diag(α_t) + k_t (1 − α_t)ᵀ, Hv_t = diag(α_t) Hv_{t−1} + (1 − α_t) v_tᵀ,
/// o_t = Hv_tᵀ softmax(Hk_tᵀ q_t); silu(o) is normalised over all heads (Zhang et al. 2024).
#[derive(Module, Debug)]
pub struct Gsa {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·V, hidden]`
    pub v_proj: Linear,
    /// `[G·M, hidden]`
    pub f_proj: Linear,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[G·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[G·V, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// W of the map of queries and keys, where it is learned.
    pub feature_map: Option<LinearMap>,
    /// `[hidden]`
    pub g_norm: Option<RmsNorm>,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
    /// What ln σ(f) is divided by.
    pub gate_logit_normalizer: f64,
    #[module(skip)]
    map: FeatureMap,
}

/// What a [`Gsa`] layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct GsaLayerState {
    /// The keys and values of the slots.
    pub memory: ops::GsaState,
    /// The last inputs of the convolutions of q, k and v, each `[N, channels, W]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for GsaLayerState {
    fn elements(&self) -> usize {
        let ops::GsaState { keys, values } = &self.memory;
        keys.shape().num_elements() + values.shape().num_elements() + conv_elements(&self.conv)
    }
}

impl GsaConfig {
    /// Reads the fields of a `config.json`. `use_output_gate`, `use_norm` and the clamps are not read: they change nothing
    /// in this architecture.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let feature_map = match fields.optional_str("feature_map")? {
            None if fields.is_absent("feature_map") => GsaFeatureMap::Swish,
            Some("swish") => GsaFeatureMap::Swish,
            Some("relu") => GsaFeatureMap::Relu,
            Some("t2r") => GsaFeatureMap::T2r,
            found => {
                let found = found.unwrap_or("null");
                return Err(fields
                    .error("feature_map", format!("`{found}` is not supported; supported are swish, relu and t2r")));
            }
        };
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 4)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_num_slots(fields.usize_or_null("num_slots", 64)?)
            .with_expand_k(fields.positive("expand_k", fields.positive("exapnd_k", 1.0)?)?)
            .with_expand_v(fields.positive("expand_v", fields.positive("exapnd_v", 1.0)?)?)
            .with_feature_map(feature_map)
            .with_gate_logit_normalizer(fields.positive("gate_logit_normalizer", 8.0)?)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_elementwise_affine(common.elementwise_affine))
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        check_conv(self.use_short_conv.then_some(self.conv_size))?;
        let normalizer = self.gate_logit_normalizer;
        if !normalizer.is_finite() || normalizer <= 0.0 {
            return Err(NnError::config("gate_logit_normalizer", format!("must be above 0, and it is {normalizer}")));
        }
        check_slots(self.num_slots)?;
        let hidden = self.hidden_size;
        let dims = MixerDims::new(hidden, self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)?;
        if dims.values != hidden {
            return Err(NnError::config(
                "expand_v",
                format!("must be 1: the output norm is as wide as hidden_size {hidden}, the heads {}", dims.values),
            ));
        }
        Ok(dims)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the head counts; heads whose values are not as wide as the input;
    /// a convolution over no token; no slot; a normaliser that is not above 0.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Gsa, NnError> {
        let (hidden, dims) = (self.hidden_size, self.check()?);
        let (keys, values) = (dims.keys / dims.repeat(), dims.values / dims.repeat());
        let slots = self.num_slots.unwrap_or(dims.key_width());
        let linear = |name: &str, input, output| Linear::new(&scope.at(name), input, output, false);
        let conv =
            |name, channels| self.use_short_conv.then(|| ShortConv::new(&scope.at(name), channels, self.conv_size));
        let learned = self.feature_map == GsaFeatureMap::T2r;
        let width = dims.key_width();
        Ok(Gsa {
            q_proj: linear("q_proj", hidden, dims.keys),
            k_proj: linear("k_proj", hidden, keys),
            v_proj: linear("v_proj", hidden, values),
            f_proj: linear("f_proj", hidden, dims.groups * slots),
            q_conv1d: conv("q_conv1d", dims.keys),
            k_conv1d: conv("k_conv1d", keys),
            v_conv1d: conv("v_conv1d", values),
            feature_map: learned.then(|| LinearMap { layer: linear("feature_map.layer", width, width) }),
            g_norm: self.elementwise_affine.then(|| RmsNorm::new(&scope.at("g_norm"), hidden, NORM_EPS)),
            o_proj: linear("o_proj", dims.values, hidden),
            num_heads: dims.heads,
            num_kv_heads: dims.groups,
            gate_logit_normalizer: self.gate_logit_normalizer,
            map: if self.feature_map == GsaFeatureMap::Swish { FeatureMap::Silu } else { FeatureMap::Relu },
        })
    }
}

/// Checks the number of slots.
pub(crate) fn check_slots(slots: Option<usize>) -> Result<(), NnError> {
    match slots {
        Some(0) => Err(NnError::config("num_slots", "must be at least 1")),
        _ => Ok(()),
    }
}

impl Gsa {
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
        past: Option<GsaLayerState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<GsaLayerState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let dtype = x.dtype();
        let (memory, conv) = past.map_or((None, Vec::new()), |past| (Some(past.memory), past.conv));
        let mut convs = Convs::new(context, conv);
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = convs.run(&self.q_conv1d, q)?;
        let k = convs.run(&self.k_conv1d, k)?;
        let v = convs.run(&self.v_conv1d, v)?;
        let repeat = self.num_heads / self.num_kv_heads;
        let grouped = |x| repeat_heads(split_heads(x, self.num_kv_heads), repeat);
        let f = self.f_proj.forward(x)?;
        let log_decay = ops::log_gate(f, None, self.gate_logit_normalizer, context.engine())?;
        let slots = log_decay.clone().exp().neg().add_scalar(1.0).cast(dtype);
        let options = ops::GsaOptions {
            scale: Some(1.0),
            initial_state: memory,
            cu_seqlens: context.cu_seqlens().cloned(),
            engine: context.engine(),
            ..Default::default()
        };
        let k = repeat_heads(self.map(split_heads(k, self.num_kv_heads))?, repeat);
        let q = self.map(split_heads(q, self.num_heads))?;
        let v = grouped(FeatureMap::Silu.apply(v));
        let (o, memory) = ops::gsa(q, k, v, grouped(slots), grouped(log_decay), options)?;
        let o = activation::silu(merge_heads(o));
        let o = output_norm(o, None, self.g_norm.as_ref(), NORM_EPS, context.engine())?;
        let y = self.o_proj.forward(o)?;
        let state = context.keep_state().then(|| GsaLayerState { memory, conv: convs.finish() });
        Ok((y, state))
    }

    /// The map of queries and keys.
    fn map(&self, x: Tensor<4>) -> Result<Tensor<4>, NnError> {
        let x = match &self.feature_map {
            Some(map) => map.layer.forward(x)?,
            None => x,
        };
        Ok(self.map.apply(x))
    }
}
