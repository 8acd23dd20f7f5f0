//! Multi-scale retention, the mixer of RetNet.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use burn_fla_ops::{self as ops, ScalarDecay};

use super::{MixerDims, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{
    FeatureMap, Linear, RmsNorm, Rotary, merge_heads, output_norm, project, repeat_heads, split_heads,
};
use crate::per_device::PerDevice;
use crate::{NnError, ParamScope};

/// Configuration of [`Retention`].
#[derive(Config, Debug)]
pub struct RetentionConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// Key and value heads G; `None`: H.
    pub num_kv_heads: Option<usize>,
    /// H·K over the width.
    #[config(default = "1.0")]
    pub expand_k: f64,
    /// H·V over the width.
    #[config(default = "2.0")]
    pub expand_v: f64,
    /// A map of queries and keys.
    pub feature_map: Option<FeatureMap>,
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
}

/// S_t = γ_h S_{t−1} + k_t v_tᵀ, o_t = K^−½ S_tᵀ q_t, with γ_h = 1 − 2^(−5−h) and rotated q and k; the output is
/// normalised for each head and gated (Sun et al. 2023).
#[derive(Module, Debug)]
pub struct Retention {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·V, hidden]`
    pub v_proj: Linear,
    /// `[H·V, hidden]`
    pub g_proj: Option<Linear>,
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
    #[module(skip)]
    feature_map: Option<FeatureMap>,
    #[module(skip)]
    rotary: Rotary,
    #[module(skip)]
    log_decay: PerDevice<Tensor<1>>,
}

impl RetentionConfig {
    /// Reads the fields of a `config.json`. `use_short_conv` is not read: the format has no place for the convolutions
    /// of this architecture.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 8)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_expand_k(fields.positive("expand_k", 1.0)?)
            .with_expand_v(fields.positive("expand_v", 2.0)?)
            .with_feature_map(FeatureMap::from_fields(fields)?)
            .with_use_output_gate(fields.bool("use_output_gate", true)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_fuse_norm(common.fuse_norm)
            .with_norm_eps(common.norm_eps))
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        let dims = MixerDims::new(self.hidden_size, self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)?;
        let key_width = dims.key_width();
        if !key_width.is_multiple_of(2) {
            return Err(NnError::config(
                "num_heads",
                format!("rotary positions need key heads of an even width, not {key_width}"),
            ));
        }
        Ok(dims)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the head counts; an odd width of a key head.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Retention, NnError> {
        let hidden = self.hidden_size;
        let dims = self.check()?;
        let linear = |name, input, output| Linear::new(&scope.at(name), input, output, false);
        let norm = |name, fused: bool| {
            let here = self.elementwise_affine && fused == (self.fuse_norm && self.use_output_gate);
            here.then(|| RmsNorm::new(&scope.at(name), dims.value_width(), self.norm_eps))
        };
        Ok(Retention {
            q_proj: linear("q_proj", hidden, dims.keys),
            k_proj: linear("k_proj", hidden, dims.keys / dims.repeat()),
            v_proj: linear("v_proj", hidden, dims.values / dims.repeat()),
            g_proj: self.use_output_gate.then(|| linear("g_proj", hidden, dims.values)),
            g_norm_swish_gate: norm("g_norm_swish_gate", true),
            g_norm: norm("g_norm", false),
            o_proj: linear("o_proj", dims.values, hidden),
            num_heads: dims.heads,
            num_kv_heads: dims.groups,
            norm_eps: self.norm_eps,
            feature_map: self.feature_map,
            rotary: Rotary::new(dims.key_width(), 10_000.0)?,
            log_decay: PerDevice::default(),
        })
    }
}

/// ln γ_h for every head, in f32: ln(1 − 2^(−5−h)).
fn log_decays(heads: usize) -> Vec<f32> {
    (0..heads).map(|h| (-(2f64.powi(-5 - h as i32))).ln_1p() as f32).collect()
}

impl Retention {
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
        let engine = context.engine();
        let rotate = |x: Tensor<3>, heads: usize| {
            let x = split_heads(x, heads);
            let x = match self.feature_map {
                Some(map) => map.apply(x),
                None => x,
            };
            self.rotary.forward(x, context.positions(), context.position_end(), engine)
        };
        let repeat = self.num_heads / self.num_kv_heads;
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = rotate(q, self.num_heads)?;
        let k = rotate(k, self.num_kv_heads)?;
        let v = split_heads(v, self.num_kv_heads);
        let decay = self.log_decay.get(
            &x.device(),
            |_| true,
            |device| Tensor::from_data(TensorData::new(log_decays(self.num_heads), [self.num_heads]), device),
        );
        let (o, state) = ops::simple_gla(
            q,
            repeat_heads(k, repeat),
            repeat_heads(v, repeat),
            ScalarDecay::PerHead(decay),
            context.options(past.map(|past| past.state)),
        )?;
        let gate = match &self.g_proj {
            Some(g_proj) => Some(split_heads(g_proj.forward(x)?, self.num_heads)),
            None => None,
        };
        let norm = self.g_norm_swish_gate.as_ref().or(self.g_norm.as_ref());
        let o = output_norm(o, gate, norm, self.norm_eps, engine)?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then_some(RecurrentState { state, conv: Vec::new() });
        Ok((y, state))
    }
}
