//! DeltaNet.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::{self as ops, DeltaOptions, GateActivation};
use serde::{Deserialize, Serialize};

use super::delta::{Maps, check_conv, gated_norm, strength};
use super::{Convs, MixerDims, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// The smallest sum that a query or key is divided by.
const SMALLEST_SUM: f64 = 1e-6;

/// The activation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QkActivation {
    /// x σ(x), as part of the convolution.
    Silu,
    /// max(x, 0)
    Relu,
    /// x + 1 above zero, e^x below.
    Elu,
    /// x
    Identity,
}

/// The norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QkNorm {
    /// x / √(Σ x² + 1e-6)
    L2,
    /// x / max(Σ |x|, 1e-6)
    Sum,
}

/// Configuration of [`DeltaNet`].
#[derive(Config, Debug)]
pub struct DeltaNetConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// H·K over the width.
    #[config(default = "1.0")]
    pub expand_k: f64,
    /// H·V over the width.
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// Whether the output is multiplied by silu(g_proj x).
    #[config(default = "false")]
    pub use_gate: bool,
    /// Whether the writing strength is σ(b_proj x), and not 1.
    #[config(default = "true")]
    pub use_beta: bool,
    /// Whether the writing strength is doubled, so that a step can reverse what the state holds.
    #[config(default = "false")]
    pub allow_neg_eigval: bool,
    /// Whether q, k and v pass a short convolution.
    #[config(default = "true")]
    pub use_short_conv: bool,
    /// Tokens that the short convolution mixes.
    #[config(default = "4")]
    pub conv_size: usize,
    /// The activation of queries and keys.
    #[config(default = "QkActivation::Silu")]
    pub qk_activation: QkActivation,
    /// The norm of queries and keys.
    #[config(default = "QkNorm::L2")]
    pub qk_norm: QkNorm,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
}

/// S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ, o_t = K^−½ S_tᵀ q_t with β_t = σ(b_proj x_t) and normalised queries and
/// keys; the output is normalised for each head (Yang et al. 2024).
#[derive(Module, Debug)]
pub struct DeltaNet {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[H·V, hidden]`
    pub v_proj: Linear,
    /// `[H, hidden]`
    pub b_proj: Option<Linear>,
    /// `[H·V, hidden]`
    pub g_proj: Option<Linear>,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[H·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[H·V, 1, W]`
    pub v_conv1d: Option<ShortConv>,
    /// `[V]`
    pub o_norm: RmsNorm,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// Whether the writing strength is doubled.
    pub allow_neg_eigval: bool,
    #[module(skip)]
    qk_activation: QkActivation,
    #[module(skip)]
    qk_norm: QkNorm,
}

impl DeltaNetConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        // use_output_norm is not read: the format has the norm in any case.
        let choice = |field: &str, supported: &str| {
            let name = fields.optional_str(field)?.unwrap_or_default();
            Err(fields.error(field, format!("`{name}` is not supported; supported are {supported}")))
        };
        let qk_activation = match fields.optional_str("qk_activation")? {
            None | Some("silu") => QkActivation::Silu,
            Some("relu") => QkActivation::Relu,
            Some("elu") => QkActivation::Elu,
            Some("identity") => QkActivation::Identity,
            Some(_) => return choice("qk_activation", "silu, relu, elu and identity"),
        };
        let qk_norm = match fields.optional_str("qk_norm")? {
            None | Some("l2") => QkNorm::L2,
            Some("sum") => QkNorm::Sum,
            Some(_) => return choice("qk_norm", "l2 and sum"),
        };
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 16)?)
            .with_expand_k(fields.positive("expand_k", 1.0)?)
            .with_expand_v(fields.positive("expand_v", 1.0)?)
            .with_use_gate(fields.bool("use_gate", false)?)
            .with_use_beta(fields.bool("use_beta", true)?)
            .with_allow_neg_eigval(fields.bool("allow_neg_eigval", false)?)
            .with_use_short_conv(fields.bool("use_short_conv", true)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_qk_activation(qk_activation)
            .with_qk_norm(qk_norm)
            .with_norm_eps(common.norm_eps))
    }

    fn conv_size(&self) -> Option<usize> {
        self.use_short_conv.then_some(self.conv_size)
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        check_conv(self.conv_size())?;
        MixerDims::new(self.hidden_size, self.num_heads, None, self.expand_k, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the head count; a convolution over no token.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<DeltaNet, NnError> {
        let dims = self.check()?;
        let maps = Maps { scope, hidden: self.hidden_size, conv_size: self.conv_size() };
        let qk_conv = |name| {
            let conv = maps.conv(name, dims.keys);
            if self.qk_activation == QkActivation::Silu { conv } else { conv.map(ShortConv::linear) }
        };
        Ok(DeltaNet {
            q_proj: maps.linear("q_proj", dims.keys),
            k_proj: maps.linear("k_proj", dims.keys),
            v_proj: maps.linear("v_proj", dims.values),
            b_proj: self.use_beta.then(|| maps.linear("b_proj", dims.heads)),
            g_proj: self.use_gate.then(|| maps.linear("g_proj", dims.values)),
            q_conv1d: qk_conv("q_conv1d"),
            k_conv1d: qk_conv("k_conv1d"),
            v_conv1d: maps.conv("v_conv1d", dims.values),
            o_norm: RmsNorm::new(&scope.at("o_norm"), dims.value_width(), self.norm_eps),
            o_proj: maps.output(dims.values),
            num_heads: dims.heads,
            allow_neg_eigval: self.allow_neg_eigval,
            qk_activation: self.qk_activation,
            qk_norm: self.qk_norm,
        })
    }
}

impl DeltaNet {
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
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = convs.run(&self.q_conv1d, q)?;
        let k = convs.run(&self.k_conv1d, k)?;
        let v = convs.run(&self.v_conv1d, v)?;
        let v = if self.v_conv1d.is_some() { v } else { activation::silu(v) };
        let [q, k] = [q, k].map(|x| self.normalise(split_heads(self.activate(x), self.num_heads)));
        let beta = match &self.b_proj {
            Some(b_proj) => strength(b_proj.forward(x.clone())?, self.allow_neg_eigval),
            None => {
                let [b, t, _] = x.dims();
                let all = if self.allow_neg_eigval { 2.0 } else { 1.0 };
                Tensor::full([b, t, self.num_heads], all, (&x.device(), DType::F32))
            }
        };
        let options = DeltaOptions {
            sequence: context.options(state),
            l2_norm: self.qk_norm == QkNorm::L2,
            ..Default::default()
        };
        let (o, state) = ops::delta_rule(q, k, split_heads(v, self.num_heads), beta, options)?;
        let gate = match &self.g_proj {
            Some(g_proj) => Some(split_heads(g_proj.forward(x)?, self.num_heads)),
            None => None,
        };
        let o = gated_norm(o, gate, &self.o_norm, GateActivation::Silu, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }

    /// What the convolutions have not done of the activation.
    fn activate(&self, x: Tensor<3>) -> Tensor<3> {
        match self.qk_activation {
            QkActivation::Silu if self.q_conv1d.is_none() => activation::silu(x),
            QkActivation::Silu | QkActivation::Identity => x,
            QkActivation::Relu => activation::relu(x),
            QkActivation::Elu => x.clone().clamp_min(0.0) + x.clamp_max(0.0).exp(),
        }
    }

    /// What the operator does not do of the norm.
    fn normalise(&self, x: Tensor<4>) -> Tensor<4> {
        match self.qk_norm {
            QkNorm::L2 => x,
            QkNorm::Sum => {
                let dtype = x.dtype();
                let x = x.cast(DType::F32);
                let sum = x.clone().abs().sum_dim(3).clamp_min(SMALLEST_SUM);
                (x / sum).cast(dtype)
            }
        }
    }
}
