//! Softmax attention with rotary positions.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops as ops;

use super::{KeyValueState, SequenceContext, check_groups};
use crate::models::Fields;
use crate::modules::{Linear, RmsNorm, Rotary, merge_heads, project, split_heads};
use crate::{Init, NnError, ParamScope};

/// The norm on queries and keys has an ε of its own, whatever `norm_eps` is.
const QK_NORM_EPS: f64 = 1e-5;

/// Configuration of [`Attention`].
#[derive(Config, Debug)]
pub struct AttentionConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; `None`: as many as query heads.
    pub num_kv_heads: Option<usize>,
    /// Whether the maps to q, k and v have biases.
    #[config(default = "false")]
    pub qkv_bias: bool,
    /// Whether each query and key head is normalised before the rotation.
    #[config(default = "false")]
    pub qk_norm: bool,
    /// How many tokens a query sees, itself included; `None`: all before it.
    pub window_size: Option<usize>,
    /// Base θ of the rotary frequencies.
    #[config(default = "10000.0")]
    pub rope_theta: f64,
    /// For a residual stream of this many layers `o_proj` starts evenly from ±1 / √(2 · layers · width); `None`: as the
    /// other maps.
    pub residual_layers: Option<usize>,
}

/// Causal softmax attention with rotary positions, grouped heads and an optional sliding window:
/// o_i = Σ_j softmax_j(K^−½ q_i·k_j) v_j over the j in \[i − window + 1, i\] (Vaswani et al. 2017; Su et al. 2021;
/// Ainslie et al. 2023).
///
/// In plain tensor operations: the scores of a forward pass exist as a whole, in f32.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·K, hidden]`
    pub v_proj: Linear,
    /// `[hidden, H·K]`
    pub o_proj: Linear,
    /// `[K]`
    pub q_norm: Option<RmsNorm>,
    /// `[K]`
    pub k_norm: Option<RmsNorm>,
    /// Number of query heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
    /// How many tokens a query sees.
    pub window_size: Option<usize>,
    #[module(skip)]
    rotary: Rotary,
}

impl AttentionConfig {
    /// Reads the fields of a transformer's `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, hidden_size: usize) -> Result<Self, NnError> {
        let heads = fields.usize("num_heads", 32)?;
        Ok(Self::of_hybrid(fields, hidden_size, heads)?.with_qk_norm(fields.bool("qk_norm", false)?))
    }

    /// Reads the fields that the object `attn` of a hybrid and the transformer have in common.
    pub(crate) fn of_hybrid(fields: &Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<Self, NnError> {
        let config = Self::new(hidden_size, num_heads)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_qkv_bias(fields.bool("qkv_bias", false)?)
            .with_window_size(fields.optional_usize("window_size")?)
            .with_rope_theta(fields.positive("rope_theta", 10_000.0)?);
        config.check().map_err(|error| match error {
            NnError::Config { field, message } => fields.error(&field, message),
            other => other,
        })?;
        Ok(config)
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        check_groups(heads, self.num_kv_heads)?;
        if !hidden.is_multiple_of(heads) {
            return Err(NnError::config(
                "num_heads",
                format!("hidden_size {hidden} must be a multiple of it, and it is {heads}"),
            ));
        }
        let width = hidden / heads;
        if !width.is_multiple_of(2) {
            return Err(NnError::config(
                "num_heads",
                format!("rotary positions need heads of an even width; {hidden} / {heads} is {width}"),
            ));
        }
        if self.window_size == Some(0) {
            return Err(NnError::config("window_size", "must be at least 1, or null for none"));
        }
        Ok(())
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Head counts that do not divide; a window of 0; an odd head width.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Attention, NnError> {
        self.check()?;
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        let groups = self.num_kv_heads.unwrap_or(heads);
        let width = hidden / heads;
        let linear = |name, input, output, bias| Linear::new(&scope.at(name), input, output, bias);
        let output = match self.residual_layers {
            Some(layers) => Init::Uniform(((2 * layers * hidden) as f64).powf(-0.5)),
            None => Init::Normal,
        };
        let norm = |name| self.qk_norm.then(|| RmsNorm::new(&scope.at(name), width, QK_NORM_EPS));
        Ok(Attention {
            q_proj: linear("q_proj", hidden, hidden, self.qkv_bias),
            k_proj: linear("k_proj", hidden, groups * width, self.qkv_bias),
            v_proj: linear("v_proj", hidden, groups * width, self.qkv_bias),
            o_proj: Linear::start(&scope.at("o_proj"), hidden, hidden, &output, None),
            q_norm: norm("q_norm"),
            k_norm: norm("k_norm"),
            num_heads: heads,
            num_kv_heads: groups,
            window_size: self.window_size,
            rotary: Rotary::new(width, self.rope_theta)?,
        })
    }
}

impl Attention {
    /// The mixed sequence, and the keys and values to go on from when the context keeps states.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, hidden]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<KeyValueState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<KeyValueState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let engine = context.engine();
        let rotate = |x: Tensor<3>, heads: usize, norm: Option<&RmsNorm>| {
            let x = split_heads(x, heads);
            let x = match norm {
                Some(norm) => norm.forward(x, engine)?,
                None => x,
            };
            self.rotary.forward(x, context.positions(), context.position_end(), engine)
        };
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x)?;
        let q = rotate(q, self.num_heads, self.q_norm.as_ref())?;
        let k = rotate(k, self.num_kv_heads, self.k_norm.as_ref())?;
        let v = split_heads(v, self.num_kv_heads);
        let (k, v) = KeyValueState::extend(past, k, v);
        let o = ops::attention(q, k.clone(), v.clone(), context.attention(k.dims()[1], self.window_size))?;
        let state = KeyValueState::keep(k, v, self.window_size, context);
        Ok((self.o_proj.forward(merge_heads(o))?, state))
    }
}
