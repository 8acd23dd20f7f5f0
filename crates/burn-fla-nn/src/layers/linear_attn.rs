//! Linear attention with feature maps.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Tensor};
use burn_fla_ops as ops;

use super::{MixerDims, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{
    HeadMap, LearnedMap, Linear, RmsNorm, merge_heads, output_norm, project, repeat_heads, split_heads,
};
use crate::{NnError, ParamScope};

/// Added to the sums by which `norm_q` and `norm_k` divide.
const SUM_EPS: f64 = 1e-4;

/// Configuration of [`LinearAttention`].
#[derive(Config, Debug)]
pub struct LinearAttentionConfig {
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
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// The map φ of query and key heads.
    #[config(default = "HeadMap::ElementwiseProduct")]
    pub feature_map: HeadMap,
    /// Whether the parameters of the maps of queries and keys are the same.
    #[config(default = "false")]
    pub tie_feature_map_qk: bool,
    /// Whether mapped queries are divided by the sum of their features.
    #[config(default = "false")]
    pub norm_q: bool,
    /// Whether mapped keys are divided by the sum of their features.
    #[config(default = "false")]
    pub norm_k: bool,
    /// Whether the output is divided by the normaliser.
    #[config(default = "false")]
    pub norm_feature_map: bool,
    /// Whether the output norm has a weight.
    #[config(default = "true")]
    pub elementwise_affine: bool,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
}

/// S_t = S_{t−1} + φ(k_t) v_tᵀ, o_t = F^−½ S_tᵀ φ(q_t), optionally over F^−½ φ(q_t) · Σ φ(k); the output is normalised
/// for each head (Katharopoulos et al. 2020).
#[derive(Module, Debug)]
pub struct LinearAttention {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·V, hidden]`
    pub v_proj: Linear,
    /// The parameters of the map of queries, and of keys where the two are tied.
    pub feature_map_q: Option<LearnedMap>,
    /// The parameters of the map of keys.
    pub feature_map_k: Option<LearnedMap>,
    /// `[V]`
    pub norm: Option<RmsNorm>,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
    /// Whether mapped queries are divided by the sum of their features.
    pub norm_q: bool,
    /// Whether mapped keys are divided by the sum of their features.
    pub norm_k: bool,
    /// Whether the output is divided by the normaliser.
    pub norm_feature_map: bool,
    /// ε of the output norm.
    pub norm_eps: f64,
    #[module(skip)]
    feature_map: HeadMap,
}

impl LinearAttentionConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 4)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_expand_k(fields.positive("expand_k", 1.0)?)
            .with_expand_v(fields.positive("expand_v", 1.0)?)
            .with_feature_map(HeadMap::from_fields(fields)?)
            .with_tie_feature_map_qk(fields.bool("tie_feature_map_qk", false)?)
            .with_norm_q(fields.bool("norm_q", false)?)
            .with_norm_k(fields.bool("norm_k", false)?)
            .with_norm_feature_map(fields.bool("norm_feature_map", false)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_norm_eps(common.norm_eps))
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        MixerDims::new(self.hidden_size, self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the head counts.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<LinearAttention, NnError> {
        let dims = self.check()?;
        let hidden = self.hidden_size;
        let linear = |name, input, output| Linear::new(&scope.at(name), input, output, false);
        let map = |scope: ParamScope<'_, '_>| self.feature_map.build(&scope, dims.key_width());
        let (q, k) = ("feature_map_q", "feature_map_k");
        Ok(LinearAttention {
            q_proj: linear("q_proj", hidden, dims.keys),
            k_proj: linear("k_proj", hidden, dims.keys / dims.repeat()),
            v_proj: linear("v_proj", hidden, dims.values / dims.repeat()),
            feature_map_q: map(if self.tie_feature_map_qk { scope.at_either(q, k) } else { scope.at(q) }),
            feature_map_k: if self.tie_feature_map_qk { None } else { map(scope.at(k)) },
            norm: self.elementwise_affine.then(|| RmsNorm::new(&scope.at("norm"), dims.value_width(), self.norm_eps)),
            o_proj: linear("o_proj", dims.values, hidden),
            num_heads: dims.heads,
            num_kv_heads: dims.groups,
            norm_q: self.norm_q,
            norm_k: self.norm_k,
            norm_feature_map: self.norm_feature_map,
            norm_eps: self.norm_eps,
            feature_map: self.feature_map,
        })
    }
}

impl LinearAttention {
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
        let map = |x: Tensor<4>, learned: &Option<LearnedMap>, norm: bool| {
            let x = match learned {
                Some(map) => map.forward(x)?,
                None => self.feature_map.apply(x),
            };
            Ok::<_, NnError>(if norm { over_sum(x) } else { x })
        };
        let keys = if self.feature_map_k.is_some() { &self.feature_map_k } else { &self.feature_map_q };
        let repeat = self.num_heads / self.num_kv_heads;
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x)?;
        let q = map(split_heads(q, self.num_heads), &self.feature_map_q, self.norm_q)?;
        let k = map(split_heads(k, self.num_kv_heads), keys, self.norm_k)?;
        let v = split_heads(v, self.num_kv_heads);
        let (o, state) = ops::linear_attn(
            q,
            repeat_heads(k, repeat),
            repeat_heads(v, repeat),
            self.norm_feature_map,
            context.options(past.map(|past| past.state)),
        )?;
        let o = output_norm(o, None, self.norm.as_ref(), self.norm_eps, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        Ok((y, context.keep_state().then(|| RecurrentState { state, conv: Vec::new() })))
    }
}

/// x over the sum of its features.
fn over_sum(x: Tensor<4>) -> Tensor<4> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let sum = x.clone().sum_dim(3).add_scalar(SUM_EPS);
    (x / sum).cast(dtype)
}
