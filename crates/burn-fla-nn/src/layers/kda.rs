//! Kimi delta attention.
// Parameters have the names of the format.
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::{self as ops, GateActivation};

use super::delta::{Heads, Maps, a_log, check_conv, convolved, decay_gate, dt_bias, gated_norm, normalised, strength};
use super::{Convs, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// The lowest bound of a log decay that the format's safe gate has.
const SAFE_BOUND: f64 = -5.0;

/// Configuration of [`Kda`].
#[derive(Config, Debug)]
pub struct KdaConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H of queries and keys.
    pub num_heads: usize,
    /// Heads HV of values, a multiple of H; `None`: H.
    pub num_v_heads: Option<usize>,
    /// K
    #[config(default = "128")]
    pub head_dim: usize,
    /// V over K.
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// Whether the layer promises log decays of at least −5; it needs `lower_bound`, and A starts at 1.
    #[config(default = "false")]
    pub safe_gate: bool,
    /// The lowest log decay, where the gate is bounded.
    pub lower_bound: Option<f64>,
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

/// S̃_t = diag(α_t) S_{t−1}, S_t = S̃_t + β_t k_t (v_t − S̃_tᵀ k_t)ᵀ, o_t = K^−½ S_tᵀ q_t with β_t = σ(b_proj x_t) and a
/// decay for each key channel, ln α_t = −A softplus(f_proj x_t + dt_bias), or b σ(A (f_proj x_t + dt_bias)) where the
/// bound b is given; the output is normalised for each head and gated (Kimi Team 2025).
#[derive(Module, Debug)]
pub struct Kda {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[HV·V, hidden]`
    pub v_proj: Linear,
    /// `[V, hidden]`, then `[HV·K, V]`.
    pub f_proj: Vec<Linear>,
    /// `[HV, hidden]`
    pub b_proj: Linear,
    /// ln A, `[HV]`
    pub A_log: Param<Tensor<1>>,
    /// `[HV·K]`
    pub dt_bias: Param<Tensor<1>>,
    /// `[V, hidden]`, then `[HV·V, V]` with its bias.
    pub g_proj: Vec<Linear>,
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
    /// The lowest log decay, where the gate is bounded.
    pub lower_bound: Option<f64>,
    /// Whether the writing strength is doubled.
    pub allow_neg_eigval: bool,
    #[module(skip)]
    heads: Heads,
}

impl KdaConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 16)?)
            .with_num_v_heads(fields.optional_usize("num_v_heads")?)
            .with_head_dim(fields.usize("head_dim", 128)?)
            .with_expand_v(fields.positive("expand_v", 1.0)?)
            .with_safe_gate(fields.bool("safe_gate", false)?)
            .with_lower_bound(fields.optional_f64("lower_bound")?)
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
        let wrong = |message: String| Err(NnError::config("lower_bound", message));
        match (self.lower_bound, self.safe_gate) {
            (None, true) => return wrong("is missing: safe_gate needs one, such as -5".into()),
            (Some(bound), true) if !(SAFE_BOUND..0.0).contains(&bound) => {
                return wrong(format!("must be from {SAFE_BOUND} to below 0 with safe_gate, and it is {bound}"));
            }
            (Some(bound), false) if bound.is_nan() || bound >= 0.0 => {
                return wrong(format!("must be below 0, as log decays are, and it is {bound}"));
            }
            _ => {}
        }
        Heads::new(self.num_heads, self.num_v_heads, self.head_dim, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Value heads that are no multiple of the key heads; a value width that is not whole; a convolution over no token;
    /// a bound of the log decays that is not below 0, or that `safe_gate` does not go with.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Kda, NnError> {
        let heads = self.check()?;
        let (keys, values, rank) = (heads.all_keys(), heads.all_values(), heads.value_width);
        let maps = Maps { scope, hidden: self.hidden_size, conv_size: self.conv_size() };
        let second = |name: &str, output, bias| Linear::new(&scope.at(name), rank, output, bias);
        Ok(Kda {
            q_proj: maps.linear("q_proj", keys),
            k_proj: maps.linear("k_proj", keys),
            v_proj: maps.linear("v_proj", values),
            f_proj: vec![maps.linear("f_proj.0", rank), second("f_proj.1", heads.values * heads.key_width, false)],
            b_proj: maps.linear("b_proj", heads.values),
            A_log: if self.safe_gate { scope.zeros("A_log", [heads.values]) } else { a_log(scope, heads.values, 1.0) },
            dt_bias: dt_bias(scope, heads.values * heads.key_width),
            g_proj: vec![maps.linear("g_proj.0", rank), second("g_proj.1", values, true)],
            q_conv1d: maps.conv("q_conv1d", keys),
            k_conv1d: maps.conv("k_conv1d", keys),
            v_conv1d: maps.conv("v_conv1d", values),
            o_norm: RmsNorm::new(&scope.at("o_norm"), heads.value_width, self.norm_eps),
            o_proj: maps.output(values),
            lower_bound: self.lower_bound,
            allow_neg_eigval: self.allow_neg_eigval,
            heads,
        })
    }
}

impl Kda {
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
        let f = self.f_proj[1].forward(self.f_proj[0].forward(x.clone())?)?;
        let (decay, gate) = match self.lower_bound {
            Some(bound) => (self.bounded_decay(f, bound), None),
            None => (split_heads(f, heads.values), Some(decay_gate(&self.A_log, &self.dt_bias))),
        };
        let beta = strength(self.b_proj.forward(x.clone())?, self.allow_neg_eigval);
        let [q, k] = [q, k].map(|x| split_heads(x, heads.keys));
        let v = split_heads(v, heads.values);
        let (o, state) = ops::kda(q, k, v, decay, beta, normalised(context, state, gate))?;
        let gate = split_heads(self.g_proj[1].forward(self.g_proj[0].forward(x)?)?, heads.values);
        let o = gated_norm(o, Some(gate), &self.o_norm, GateActivation::Sigmoid, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }

    /// ln α where it has a lower bound, f32 `[B, T, HV, K]`.
    fn bounded_decay(&self, f: Tensor<3>, bound: f64) -> Tensor<4> {
        let f = split_heads(f.cast(DType::F32) + self.dt_bias.val().unsqueeze(), self.heads.values);
        let a = self.A_log.val().exp().reshape([1, 1, self.heads.values, 1]);
        activation::sigmoid(f * a).mul_scalar(bound)
    }
}
