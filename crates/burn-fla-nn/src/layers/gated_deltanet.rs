//! Gated DeltaNet.
// Parameters have the names of the format.
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, GateActivation};

use super::delta::{Heads, Maps, a_log, check_conv, convolved, decay_gate, dt_bias, gated_norm, normalised, strength};
use super::{Convs, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// Configuration of [`GatedDeltaNet`].
#[derive(Config, Debug)]
pub struct GatedDeltaNetConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H of queries and keys.
    pub num_heads: usize,
    /// Heads HV of values, a multiple of H; `None`: H.
    pub num_v_heads: Option<usize>,
    /// K
    #[config(default = "256")]
    pub head_dim: usize,
    /// V over K.
    #[config(default = "2.0")]
    pub expand_v: f64,
    /// Whether the output is multiplied by a gate.
    #[config(default = "true")]
    pub use_gate: bool,
    /// Whether that gate is σ(g_proj x), and not silu.
    #[config(default = "false")]
    pub sigmoid_gate: bool,
    /// Whether the writing strength is doubled, so that a step can reverse what the state holds.
    #[config(default = "false")]
    pub allow_neg_eigval: bool,
    /// Whether q, k and v pass a short convolution.
    #[config(default = "true")]
    pub use_short_conv: bool,
    /// Tokens that the short convolution mixes.
    #[config(default = "4")]
    pub conv_size: usize,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
}

/// S_t = α_t S_{t−1} + β_t k_t (v_t − α_t S_{t−1}ᵀ k_t)ᵀ, o_t = K^−½ S_tᵀ q_t with β_t = σ(b_proj x_t) and
/// α_t = e^(−A softplus(a_proj x_t + dt_bias)); the output is normalised for each head and gated (Yang et al. 2024).
#[derive(Module, Debug)]
pub struct GatedDeltaNet {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[HV·V, hidden]`
    pub v_proj: Linear,
    /// `[HV, hidden]`
    pub a_proj: Linear,
    /// `[HV, hidden]`
    pub b_proj: Linear,
    /// ln A, `[HV]`
    pub A_log: Param<Tensor<1>>,
    /// `[HV]`
    pub dt_bias: Param<Tensor<1>>,
    /// `[HV·V, hidden]`
    pub g_proj: Option<Linear>,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[H·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[HV·V, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// `[V]`
    pub o_norm: RmsNorm,
    /// `[hidden, HV·V]`
    pub o_proj: Linear,
    /// Whether the output gate is σ, and not silu.
    pub sigmoid_gate: bool,
    /// Whether the writing strength is doubled.
    pub allow_neg_eigval: bool,
    #[module(skip)]
    heads: Heads,
}

impl GatedDeltaNetConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let sigmoid_gate = match fields.optional_str("output_gate_activation")? {
            None | Some("swish" | "silu") => false,
            Some("sigmoid") => true,
            Some(other) => {
                let message = format!("`{other}` is not supported; supported are swish, silu and sigmoid");
                return Err(fields.error("output_gate_activation", message));
            }
        };
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 6)?)
            .with_num_v_heads(fields.optional_usize("num_v_heads")?)
            .with_head_dim(fields.usize("head_dim", 256)?)
            .with_expand_v(fields.positive("expand_v", 2.0)?)
            .with_use_gate(fields.bool("use_gate", true)?)
            .with_sigmoid_gate(sigmoid_gate)
            .with_allow_neg_eigval(fields.bool("allow_neg_eigval", false)?)
            .with_use_short_conv(fields.bool("use_short_conv", true)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_norm_eps(common.norm_eps))
    }

    fn conv_size(&self) -> Option<usize> {
        self.use_short_conv.then_some(self.conv_size)
    }

    /// The heads, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<Heads, NnError> {
        check_conv(self.conv_size())?;
        Heads::new(self.num_heads, self.num_v_heads, self.head_dim, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Value heads that are no multiple of the key heads; a value width that is not whole; a convolution over no token.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<GatedDeltaNet, NnError> {
        let heads = self.check()?;
        let (keys, values) = (heads.all_keys(), heads.all_values());
        let maps = Maps { scope, hidden: self.hidden_size, conv_size: self.conv_size() };
        Ok(GatedDeltaNet {
            q_proj: maps.linear("q_proj", keys),
            k_proj: maps.linear("k_proj", keys),
            v_proj: maps.linear("v_proj", values),
            a_proj: maps.linear("a_proj", heads.values),
            b_proj: maps.linear("b_proj", heads.values),
            A_log: a_log(scope, heads.values, 0.0),
            dt_bias: dt_bias(scope, heads.values),
            g_proj: self.use_gate.then(|| maps.linear("g_proj", values)),
            q_conv1d: maps.conv("q_conv1d", keys),
            k_conv1d: maps.conv("k_conv1d", keys),
            v_conv1d: maps.conv("v_conv1d", values),
            o_norm: RmsNorm::new(&scope.at("o_norm"), heads.value_width, self.norm_eps),
            o_proj: maps.output(values),
            sigmoid_gate: self.sigmoid_gate,
            allow_neg_eigval: self.allow_neg_eigval,
            heads,
        })
    }
}

impl GatedDeltaNet {
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
        let heads = self.heads;
        let (state, conv) = past.map_or((None, Vec::new()), |past| (Some(past.state), past.conv));
        let mut convs = Convs::new(context, conv);
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = convolved(&mut convs, &self.q_conv1d, q)?;
        let k = convolved(&mut convs, &self.k_conv1d, k)?;
        let v = convolved(&mut convs, &self.v_conv1d, v)?;
        let a = self.a_proj.forward(x.clone())?;
        let gate = Some(decay_gate(&self.A_log, &self.dt_bias));
        let beta = strength(self.b_proj.forward(x.clone())?, self.allow_neg_eigval);
        let [q, k] = [q, k].map(|x| split_heads(x, heads.keys));
        let v = split_heads(v, heads.values);
        let (o, state) = ops::gated_delta_rule(q, k, v, a, beta, normalised(context, state, gate))?;
        let gate = match &self.g_proj {
            Some(g_proj) => Some(split_heads(g_proj.forward(x)?, heads.values)),
            None => None,
        };
        let act = if self.sigmoid_gate { GateActivation::Sigmoid } else { GateActivation::Silu };
        let o = gated_norm(o, gate, &self.o_norm, act, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }
}
