//! Gated DeltaProduct.
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

/// The most steps a token.
const MOST_STEPS: usize = 1024;

/// Configuration of [`GatedDeltaProduct`].
#[derive(Config, Debug)]
pub struct GatedDeltaProductConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// K
    #[config(default = "256")]
    pub head_dim: usize,
    /// V over K.
    #[config(default = "2.0")]
    pub expand_v: f64,
    /// Steps n of the delta rule a token.
    #[config(default = "1")]
    pub num_householder: usize,
    /// Whether the state decays.
    #[config(default = "false")]
    pub use_forget_gate: bool,
    /// Whether the output is multiplied by silu(g_proj x).
    #[config(default = "true")]
    pub use_output_gate: bool,
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

/// The gated delta rule with n keys, values and writing strengths a token: a decay, then n times
/// S ← S + β_j k_j (v_j − Sᵀ k_j)ᵀ, then o_t = K^−½ Sᵀ q_t; the output is normalised for each head and gated
/// (Siems et al. 2025).
#[derive(Module, Debug)]
pub struct GatedDeltaProduct {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[n·H·K, hidden]`
    pub k_proj: Linear,
    /// `[n·H·V, hidden]`
    pub v_proj: Linear,
    /// `[n·H, hidden]`
    pub b_proj: Linear,
    /// `[H, hidden]`
    pub a_proj: Option<Linear>,
    /// ln A, `[H]`
    pub A_log: Option<Param<Tensor<1>>>,
    /// `[H]`
    pub dt_bias: Option<Param<Tensor<1>>>,
    /// `[H·V, hidden]`
    pub g_proj: Option<Linear>,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[n·H·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[n·H·V, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// `[V]`
    pub o_norm: RmsNorm,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of steps n a token.
    pub num_householder: usize,
    /// Whether the writing strength is doubled.
    pub allow_neg_eigval: bool,
    #[module(skip)]
    heads: Heads,
}

impl GatedDeltaProductConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 6)?)
            .with_head_dim(fields.usize("head_dim", 256)?)
            .with_expand_v(fields.positive("expand_v", 2.0)?)
            .with_num_householder(fields.usize("num_householder", 1)?)
            .with_use_forget_gate(fields.bool("use_forget_gate", false)?)
            .with_use_output_gate(fields.bool("use_output_gate", true)?)
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
        if !(1..=MOST_STEPS).contains(&self.num_householder) {
            let message = format!("must be from 1 to {MOST_STEPS}, and it is {}", self.num_householder);
            return Err(NnError::config("num_householder", message));
        }
        Heads::new(self.num_heads, None, self.head_dim, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// No step a token, or too many; a value width that is not whole; a convolution over no token.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<GatedDeltaProduct, NnError> {
        let heads = self.check()?;
        let n = self.num_householder;
        let (keys, values) = (heads.all_keys(), heads.all_values());
        let maps = Maps { scope, hidden: self.hidden_size, conv_size: self.conv_size() };
        let forgets = self.use_forget_gate;
        Ok(GatedDeltaProduct {
            q_proj: maps.linear("q_proj", keys),
            k_proj: maps.linear("k_proj", n * keys),
            v_proj: maps.linear("v_proj", n * values),
            b_proj: maps.linear("b_proj", n * heads.values),
            a_proj: forgets.then(|| maps.linear("a_proj", heads.values)),
            A_log: forgets.then(|| a_log(scope, heads.values, 0.0)),
            dt_bias: forgets.then(|| dt_bias(scope, heads.values)),
            g_proj: self.use_output_gate.then(|| maps.linear("g_proj", values)),
            q_conv1d: maps.conv("q_conv1d", keys),
            k_conv1d: maps.conv("k_conv1d", n * keys),
            v_conv1d: maps.conv("v_conv1d", n * values),
            o_norm: RmsNorm::new(&scope.at("o_norm"), heads.value_width, self.norm_eps),
            o_proj: maps.output(values),
            num_householder: n,
            allow_neg_eigval: self.allow_neg_eigval,
            heads,
        })
    }
}

impl GatedDeltaProduct {
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
        let (heads, n) = (self.heads, self.num_householder);
        let [b, t, _] = x.dims();
        let (state, conv) = past.map_or((None, Vec::new()), |past| (Some(past.state), past.conv));
        let mut convs = Convs::new(context, conv);
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = convolved(&mut convs, &self.q_conv1d, q)?;
        let k = convolved(&mut convs, &self.k_conv1d, k)?;
        let v = convolved(&mut convs, &self.v_conv1d, v)?;
        // The steps of a token lie side by side among its features: there they become tokens.
        let k = k.reshape([b, t * n, heads.keys, heads.key_width]);
        let v = v.reshape([b, t * n, heads.values, heads.value_width]);
        let beta = strength(self.b_proj.forward(x.clone())?, self.allow_neg_eigval).reshape([b, t * n, heads.values]);
        let (a, gate) = match (&self.a_proj, &self.A_log, &self.dt_bias) {
            (Some(a_proj), Some(a_log), Some(dt_bias)) => {
                (Some(a_proj.forward(x.clone())?), Some(decay_gate(a_log, dt_bias)))
            }
            _ => (None, None),
        };
        let q = split_heads(q, heads.keys);
        let (o, state) = ops::gated_delta_product(q, k, v, a, beta, n, normalised(context, state, gate))?;
        let gate = match &self.g_proj {
            Some(g_proj) => Some(split_heads(g_proj.forward(x)?, heads.values)),
            None => None,
        };
        let o = gated_norm(o, gate, &self.o_norm, GateActivation::Silu, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }
}
