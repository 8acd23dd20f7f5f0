//! Gated linear attention.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, Engine};

use super::{Convs, MixerDims, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{
    FeatureMap, Linear, RmsNorm, ShortConv, check_conv, merge_heads, output_norm, project_all, repeat_heads,
    split_heads,
};
use crate::{NnError, ParamScope};

/// Rank of the map from the input to the log decays.
const GATE_LOW_RANK: usize = 16;
/// The log decay is ln σ(a) over this: gates start near 1 and forget slowly.
const GATE_NORMALIZER: f64 = 16.0;

/// Configuration of [`Gla`].
#[derive(Config, Debug)]
pub struct GlaConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// Key and value heads G; `None`: H.
    pub num_kv_heads: Option<usize>,
    /// H·K over the width.
    #[config(default = "0.5")]
    pub expand_k: f64,
    /// H·V over the width.
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// A map of queries and keys.
    pub feature_map: Option<FeatureMap>,
    /// Whether q, k and v pass a short convolution.
    #[config(default = "false")]
    pub use_short_conv: bool,
    /// Tokens that the short convolution mixes.
    #[config(default = "4")]
    pub conv_size: usize,
    /// Whether the output is multiplied by silu(g_proj x).
    #[config(default = "true")]
    pub use_output_gate: bool,
    /// Whether the output norm has a weight.
    #[config(default = "true")]
    pub elementwise_affine: bool,
    /// Decides, with the gate, the name of the output norm's weight.
    #[config(default = "true")]
    pub fuse_norm: bool,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
    /// The smallest log decay of a token.
    pub clamp_min: Option<f64>,
}

/// S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = K^−½ S_tᵀ q_t, with a decay α_t = σ(W₂ W₁ x_t + b)^(1/16) for each key
/// feature; the output is normalised for each head and gated (Yang et al. 2023).
#[derive(Module, Debug)]
pub struct Gla {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·V, hidden]`
    pub v_proj: Linear,
    /// W₁ `[16, hidden]`, then W₂ `[G·K, 16]` with its bias.
    pub gk_proj: Vec<Linear>,
    /// `[H·V, hidden]`
    pub g_proj: Option<Linear>,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[G·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[G·V, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// `[V]`: the output norm where norm and gate are one.
    pub g_norm_swish_gate: Option<RmsNorm>,
    /// `[V]`: the output norm elsewhere.
    pub g_norm: Option<RmsNorm>,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
    /// ε of the output norm.
    pub norm_eps: f64,
    /// The smallest log decay of a token.
    pub clamp_min: Option<f64>,
    #[module(skip)]
    feature_map: Option<FeatureMap>,
}

impl GlaConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 4)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_expand_k(fields.positive("expand_k", 0.5)?)
            .with_expand_v(fields.positive("expand_v", 1.0)?)
            .with_feature_map(FeatureMap::from_fields(fields)?)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_use_output_gate(fields.bool("use_output_gate", true)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_fuse_norm(common.fuse_norm)
            .with_norm_eps(common.norm_eps)
            .with_clamp_min(fields.optional_f64("clamp_min")?))
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        check_conv(self.use_short_conv.then_some(self.conv_size))?;
        if let Some(clamp) = self.clamp_min
            && (clamp.is_nan() || clamp > 0.0)
        {
            return Err(NnError::config(
                "clamp_min",
                format!("a log decay is never above 0, so its lower bound cannot be {clamp}"),
            ));
        }
        MixerDims::new(self.hidden_size, self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the head counts; a convolution over no token; a positive
    /// `clamp_min`.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Gla, NnError> {
        let hidden = self.hidden_size;
        let dims = self.check()?;
        let (keys, values) = (dims.keys / dims.repeat(), dims.values / dims.repeat());
        let linear = |name: &str, input, output, bias| Linear::new(&scope.at(name), input, output, bias);
        let conv =
            |name, channels| self.use_short_conv.then(|| ShortConv::new(&scope.at(name), channels, self.conv_size));
        let norm = |name, fused: bool| {
            let here = self.elementwise_affine && fused == (self.fuse_norm && self.use_output_gate);
            here.then(|| RmsNorm::new(&scope.at(name), dims.value_width(), self.norm_eps))
        };
        Ok(Gla {
            q_proj: linear("q_proj", hidden, dims.keys, false),
            k_proj: linear("k_proj", hidden, keys, false),
            v_proj: linear("v_proj", hidden, values, false),
            gk_proj: vec![
                linear("gk_proj.0", hidden, GATE_LOW_RANK, false),
                linear("gk_proj.1", GATE_LOW_RANK, keys, true),
            ],
            g_proj: self.use_output_gate.then(|| linear("g_proj", hidden, dims.values, false)),
            q_conv1d: conv("q_conv1d", dims.keys),
            k_conv1d: conv("k_conv1d", keys),
            v_conv1d: conv("v_conv1d", values),
            g_norm_swish_gate: norm("g_norm_swish_gate", true),
            g_norm: norm("g_norm", false),
            o_proj: linear("o_proj", dims.values, hidden, false),
            num_heads: dims.heads,
            num_kv_heads: dims.groups,
            norm_eps: self.norm_eps,
            clamp_min: self.clamp_min,
            feature_map: self.feature_map,
        })
    }
}

impl Gla {
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
        past: Option<RecurrentState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<RecurrentState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let (state, conv) = past.map_or((None, Vec::new()), |past| (Some(past.state), past.conv));
        let mut convs = Convs::new(context, conv);
        let mut maps = vec![&self.q_proj, &self.k_proj, &self.v_proj, &self.gk_proj[0]];
        maps.extend(&self.g_proj);
        let mut projected = project_all(&maps, x)?.into_iter();
        let mut next = || projected.next().expect("an output for each map");
        let (q, k, v, low) = (next(), next(), next(), next());
        let gate = self.g_proj.as_ref().map(|_| split_heads(next(), self.num_heads));
        let q = convs.run(&self.q_conv1d, q)?;
        let k = convs.run(&self.k_conv1d, k)?;
        let v = convs.run(&self.v_conv1d, v)?;
        let map = |x: Tensor<4>| match self.feature_map {
            Some(map) => map.apply(x),
            None => x,
        };
        let repeat = self.num_heads / self.num_kv_heads;
        let q = map(split_heads(q, self.num_heads));
        let k = repeat_heads(map(split_heads(k, self.num_kv_heads)), repeat);
        let v = repeat_heads(split_heads(v, self.num_kv_heads), repeat);
        let log_decay = split_heads(self.log_decay(low, context.engine())?, self.num_kv_heads);
        let (o, state) = ops::gla(q, k, v, repeat_heads(log_decay, repeat), context.options(state))?;
        let norm = self.g_norm_swish_gate.as_ref().or(self.g_norm.as_ref());
        let o = output_norm(o, gate, norm, self.norm_eps, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }

    /// ln α, f32 `[B, T, G·K]`, of `low` = W₁ x.
    fn log_decay(&self, low: Tensor<3>, engine: Engine) -> Result<Tensor<3>, NnError> {
        let dtype = low.dtype();
        let up = &self.gk_proj[1];
        let a = ops::linear(low, up.weight_for(dtype), None)?;
        let bias = up.bias.as_ref().map(|bias| bias.val());
        let log_decay = ops::log_gate(a, bias, GATE_NORMALIZER, engine)?;
        Ok(match self.clamp_min {
            Some(clamp) => log_decay.clamp_min(clamp),
            None => log_decay,
        })
    }
}
