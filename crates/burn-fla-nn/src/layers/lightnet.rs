//! LightNet: linear attention to running means.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops as ops;

use super::state::conv_elements;
use super::{Convs, HeadsByRatio, MixerState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{
    FeatureMap, Linear, RmsNorm, ShortConv, check_conv, merge_heads, output_norm, project, split_heads,
};
use crate::{NnError, ParamScope};

/// The output norm has an ε of its own, whatever `norm_eps` is.
const NORM_EPS: f64 = 1e-6;

/// Configuration of [`LightNet`].
#[derive(Config, Debug)]
pub struct LightNetConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Width K of a key head; `None`: `hidden_size` over `num_heads`.
    pub expand_ratio: Option<usize>,
    /// Heads H; `None`: `hidden_size` over `expand_ratio`.
    pub num_heads: Option<usize>,
    /// Rank of the output gate.
    #[config(default = "128")]
    pub gate_low_rank_dim: usize,
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

/// o_t = K^−½ S_tᵀ silu(q_t), where row c of S_t is the mean of the v_j of the tokens j ≤ t with the weights e^{k_jc}: a
/// softmax over the tokens so far for each key channel. The output is normalised over all heads and gated
/// (Qin et al. 2024).
#[derive(Module, Debug)]
pub struct LightNet {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[hidden, hidden]`
    pub v_proj: Linear,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[H·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[hidden, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// `[rank, hidden]`, then `[hidden, rank]`.
    pub g_proj: Vec<Linear>,
    /// `[hidden]`
    pub g_norm: Option<RmsNorm>,
    /// `[hidden, hidden]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
}

/// What a [`LightNet`] layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct LightNetState {
    /// The means S, f32 `[N, H, K, V]`.
    pub state: Tensor<4>,
    /// The logarithm of the weight of the tokens seen, f32 `[N, H·K]`.
    pub normaliser: Tensor<2>,
    /// The last inputs of the convolutions of q, k and v, each `[N, channels, W]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for LightNetState {
    fn elements(&self) -> usize {
        self.state.shape().num_elements() + self.normaliser.shape().num_elements() + conv_elements(&self.conv)
    }
}

impl LightNetConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size)
            .with_expand_ratio(fields.usize_or_null("expand_ratio", 128)?)
            .with_num_heads(fields.optional_usize("num_heads")?)
            .with_gate_low_rank_dim(fields.usize("gate_low_rank_dim", 128)?)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_elementwise_affine(common.elementwise_affine))
    }

    /// The heads, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<HeadsByRatio, NnError> {
        check_conv(self.use_short_conv.then_some(self.conv_size))?;
        if self.gate_low_rank_dim == 0 {
            return Err(NnError::config("gate_low_rank_dim", "must be at least 1"));
        }
        HeadsByRatio::new(self.hidden_size, self.num_heads, self.expand_ratio)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Heads that do not divide the width; a convolution over no token; a gate of rank 0.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<LightNet, NnError> {
        let (hidden, heads) = (self.hidden_size, self.check()?);
        let rank = self.gate_low_rank_dim;
        let linear = |name: &str, input, output| Linear::new(&scope.at(name), input, output, false);
        let conv = |name, channels| {
            let conv = || ShortConv::new(&scope.at(name), channels, self.conv_size).linear();
            self.use_short_conv.then(conv)
        };
        Ok(LightNet {
            q_proj: linear("q_proj", hidden, heads.keys()),
            k_proj: linear("k_proj", hidden, heads.keys()),
            v_proj: linear("v_proj", hidden, hidden),
            q_conv1d: conv("q_conv1d", heads.keys()),
            k_conv1d: conv("k_conv1d", heads.keys()),
            v_conv1d: conv("v_conv1d", hidden),
            g_proj: vec![linear("g_proj.0", hidden, rank), linear("g_proj.1", rank, hidden)],
            g_norm: self.elementwise_affine.then(|| RmsNorm::new(&scope.at("g_norm"), hidden, NORM_EPS)),
            o_proj: linear("o_proj", hidden, hidden),
            num_heads: heads.heads,
        })
    }
}

impl LightNet {
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
        past: Option<LightNetState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<LightNetState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let (state, normaliser, conv) = match past {
            Some(past) => (Some(past.state), Some(past.normaliser), past.conv),
            None => (None, None, Vec::new()),
        };
        let mut convs = Convs::new(context, conv);
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = convs.run(&self.q_conv1d, q)?;
        let k = convs.run(&self.k_conv1d, k)?;
        let v = convs.run(&self.v_conv1d, v)?;
        let (k, log_decay, normaliser) = ops::running_softmax(k, context.scan_options(normaliser))?;
        let heads = |x| split_heads(x, self.num_heads);
        let q = heads(FeatureMap::Silu.apply(q));
        let (o, state) = ops::gla(q, heads(k), heads(v), heads(log_decay), context.options(state))?;
        let gate = self.g_proj[1].forward(self.g_proj[0].forward(x)?)?;
        let o = output_norm(merge_heads(o), Some(gate), self.g_norm.as_ref(), NORM_EPS, context.engine())?;
        let y = self.o_proj.forward(o)?;
        let state = context.keep_state().then(|| LightNetState { state, normaliser, conv: convs.finish() });
        Ok((y, state))
    }
}
