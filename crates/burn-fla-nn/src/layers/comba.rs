//! Comba.
// Parameters have the names of the format.
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use burn_fla_ops::{self as ops, GateActivation};

use super::delta::{Heads, Maps, a_log, check_conv, convolved, decay_gate, dt_bias, gated_norm, normalised, strength};
use super::{Convs, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// Configuration of [`Comba`].
#[derive(Config, Debug)]
pub struct CombaConfig {
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
    /// Whether the output is multiplied by σ(g_proj x).
    #[config(default = "true")]
    pub use_output_gate: bool,
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

/// S_t = α_t S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ p_t)ᵀ, o_t = K^−½ S_tᵀ (q_t − D p_t), with p_t = σ(decay) k_t, β_t and α_t
/// as in Gated DeltaNet, and q − D p, k and p normalised; the output is normalised for each head and gated
/// (Hu et al. 2025).
#[derive(Module, Debug)]
pub struct Comba {
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
    /// The feedback before σ, `[H]`. The norm of p leaves it an effect through the query alone.
    pub decay: Param<Tensor<1>>,
    /// The correction of the query, `[H]`.
    pub D: Param<Tensor<1>>,
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
    #[module(skip)]
    heads: Heads,
}

impl CombaConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        // use_inner_decay, use_output_correction and correction_factor are not read: in the format, the layers have both
        // parameters and start them at 1 whatever these say.
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 6)?)
            .with_num_v_heads(fields.optional_usize("num_v_heads")?)
            .with_head_dim(fields.usize("head_dim", 256)?)
            .with_expand_v(fields.positive("expand_v", 2.0)?)
            .with_use_output_gate(fields.bool("use_output_gate", true)?)
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
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Comba, NnError> {
        let heads = self.check()?;
        let (keys, values) = (heads.all_keys(), heads.all_values());
        let maps = Maps { scope, hidden: self.hidden_size, conv_size: self.conv_size() };
        Ok(Comba {
            q_proj: maps.linear("q_proj", keys),
            k_proj: maps.linear("k_proj", keys),
            v_proj: maps.linear("v_proj", values),
            a_proj: maps.linear("a_proj", heads.values),
            b_proj: maps.linear("b_proj", heads.values),
            decay: scope.ones("decay", [heads.keys]),
            D: scope.ones("D", [heads.keys]),
            A_log: a_log(scope, heads.values, 0.0),
            dt_bias: dt_bias(scope, heads.values),
            g_proj: self.use_output_gate.then(|| maps.linear("g_proj", values)),
            q_conv1d: maps.conv("q_conv1d", keys),
            k_conv1d: maps.conv("k_conv1d", keys),
            v_conv1d: maps.conv("v_conv1d", values),
            o_norm: RmsNorm::new(&scope.at("o_norm"), heads.value_width, self.norm_eps),
            o_proj: maps.output(values),
            heads,
        })
    }
}

impl Comba {
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
        let [q, k] = [q, k].map(|x| split_heads(x, heads.keys));
        let by_head = |parameter: Tensor<1>| parameter.reshape([1, 1, heads.keys, 1]).cast(k.dtype());
        let p = k.clone() * by_head(activation::sigmoid(self.decay.val()));
        let q = q - p.clone() * by_head(self.D.val());
        let v = split_heads(v, heads.values);
        let a = self.a_proj.forward(x.clone())?;
        let gate = Some(decay_gate(&self.A_log, &self.dt_bias));
        let beta = strength(self.b_proj.forward(x.clone())?, false);
        let (o, state) = ops::comba(q, k, p, v, a, beta, normalised(context, state, gate))?;
        let gate = match &self.g_proj {
            Some(g_proj) => Some(split_heads(g_proj.forward(x)?, heads.values)),
            None => None,
        };
        let o = gated_norm(o, gate, &self.o_norm, GateActivation::Sigmoid, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }
}
