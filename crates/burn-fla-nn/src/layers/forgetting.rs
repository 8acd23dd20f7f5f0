//! Softmax attention that forgets.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, Activation};

use super::state::in_window;
use super::{ForgettingState, KeyValueState, SequenceContext, check_groups};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// The norm on queries and keys has an ε of its own, whatever `norm_eps` is.
const QK_NORM_EPS: f64 = 1e-5;

/// Configuration of [`ForgettingAttention`].
#[derive(Config, Debug)]
pub struct ForgettingAttentionConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Query heads H.
    #[config(default = "32")]
    pub num_heads: usize,
    /// Key and value heads G; `None`: H.
    pub num_kv_heads: Option<usize>,
    /// Whether the maps to q, k and v have biases.
    #[config(default = "false")]
    pub qkv_bias: bool,
    /// Whether each query and key head is normalised.
    #[config(default = "false")]
    pub qk_norm: bool,
    /// Whether the output is multiplied by σ(g_proj x).
    #[config(default = "false")]
    pub use_output_gate: bool,
    /// How many tokens a query sees, itself included, where a sequence goes on from a state; `None`: all before it. See
    /// [`ForgettingAttention`].
    pub window_size: Option<usize>,
}

/// Causal softmax attention without positions whose scores decay with distance:
/// s_ij = K^−½ q_i · k_j + Σ_{l = j+1..i} ln σ(f_l), with a gate f = W x + b for each query head (Lin et al. 2025).
///
/// A window bounds what is kept in generation, as the format has it: a sequence from its first token, in training or as a
/// prompt, sees all of itself, and the tokens after it see the window. So with a window the steps are not those of the whole
/// sequence, by as much as the gates have left of what is outside.
#[derive(Module, Debug)]
pub struct ForgettingAttention {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·K, hidden]`
    pub v_proj: Linear,
    /// The forget gate, `[H, hidden]` with its bias.
    pub f_proj: Linear,
    /// `[H·K, hidden]`
    pub g_proj: Option<Linear>,
    /// `[hidden, H·K]`
    pub o_proj: Linear,
    /// `[H·K]`: each head is normalised by itself.
    pub q_norm: Option<RmsNorm>,
    /// `[G·K]`: each head is normalised by itself.
    pub k_norm: Option<RmsNorm>,
    /// Number of query heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
    /// How many tokens a query sees where a sequence goes on from a state.
    pub window_size: Option<usize>,
}

impl ForgettingAttentionConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size)
            .with_num_heads(fields.usize("num_heads", 32)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_qkv_bias(fields.bool("qkv_bias", false)?)
            .with_qk_norm(fields.bool("qk_norm", false)?)
            .with_use_output_gate(fields.bool("use_output_gate", false)?)
            .with_window_size(fields.optional_usize("window_size")?))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        check_groups(self.num_heads, self.num_kv_heads)?;
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        if !hidden.is_multiple_of(heads) {
            let message = format!("hidden_size {hidden} must be a multiple of it, and it is {heads}");
            return Err(NnError::config("num_heads", message));
        }
        if self.window_size == Some(0) {
            return Err(NnError::config("window_size", "must be at least 1, or null for none"));
        }
        Ok(())
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Head counts that do not divide; a window of 0.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<ForgettingAttention, NnError> {
        self.check()?;
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        let groups = self.num_kv_heads.unwrap_or(heads);
        let keys = hidden / heads * groups;
        let linear = |name, output, bias| Linear::new(&scope.at(name), hidden, output, bias);
        let norm = |name, width| self.qk_norm.then(|| RmsNorm::new(&scope.at(name), width, QK_NORM_EPS));
        Ok(ForgettingAttention {
            q_proj: linear("q_proj", hidden, self.qkv_bias),
            k_proj: linear("k_proj", keys, self.qkv_bias),
            v_proj: linear("v_proj", keys, self.qkv_bias),
            f_proj: linear("f_proj", heads, true),
            g_proj: self.use_output_gate.then(|| linear("g_proj", hidden, false)),
            o_proj: linear("o_proj", hidden, false),
            q_norm: norm("q_norm", hidden),
            k_norm: norm("k_norm", keys),
            num_heads: heads,
            num_kv_heads: groups,
            window_size: self.window_size,
        })
    }
}

impl ForgettingAttention {
    /// The mixed sequence, and the keys, values and gates to go on from when the context keeps states.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, hidden]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<ForgettingState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<ForgettingState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let heads = |x: Tensor<3>, heads: usize, norm: &Option<RmsNorm>| match norm {
            Some(norm) => norm.forward_heads(split_heads(x, heads), context.engine()),
            None => Ok(split_heads(x, heads)),
        };
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = heads(q, self.num_heads, &self.q_norm)?;
        let k = heads(k, self.num_kv_heads, &self.k_norm)?;
        let v = split_heads(v, self.num_kv_heads);
        let log_forget = ops::log_gate(self.f_proj.forward(x.clone())?, None, 1.0, context.engine())?;
        let window = self.window_size.filter(|_| past.is_some());
        let (keys, gates) = past.map_or((None, None), |past| (Some(past.keys), Some(past.log_forget)));
        let (k, v) = KeyValueState::extend(keys, k, v);
        let log_forget = match gates {
            Some(gates) => Tensor::cat(vec![gates, log_forget], 1),
            None => log_forget,
        };
        let mut options = context.attention(k.dims()[1], window);
        options.log_forget = Some(log_forget.clone());
        let o = merge_heads(ops::attention(q, k.clone(), v.clone(), options)?);
        let o = match &self.g_proj {
            Some(gate) => gate.activated(x, Activation::Sigmoid)? * o,
            None => o,
        };
        let state = KeyValueState::keep(k, v, self.window_size, context)
            .map(|keys| ForgettingState { keys, log_forget: in_window(log_forget, self.window_size, context) });
        Ok((self.o_proj.forward(o)?, state))
    }
}
