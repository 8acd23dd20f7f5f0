//! Native sparse attention.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, Activation, NsaOptions, OpError};

use super::{KeyValueState, SequenceContext, check_groups};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, Rotary, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// Configuration of [`NativeSparseAttention`].
#[derive(Config, Debug)]
pub struct NativeSparseAttentionConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Query heads H.
    #[config(default = "64")]
    pub num_heads: usize,
    /// Key and value heads G; `None`: H.
    pub num_kv_heads: Option<usize>,
    /// Width K of a head.
    #[config(default = "32")]
    pub head_dim: usize,
    /// Whether the maps to q, k and v have biases.
    #[config(default = "false")]
    pub qkv_bias: bool,
    /// Tokens a block.
    #[config(default = "64")]
    pub block_size: usize,
    /// Blocks each query attends to, rounded up to a power of two.
    #[config(default = "16")]
    pub block_counts: usize,
    /// How many tokens the window branch sees; `None`: there is no such branch.
    pub window_size: Option<usize>,
    /// Base θ of the rotary frequencies.
    #[config(default = "10000.0")]
    pub rope_theta: f64,
}

/// Three branches of softmax attention with rotary positions, to means of blocks, to the tokens of the best blocks and to
/// the last tokens, added with gates σ(W x) (Yuan et al. 2025).
#[derive(Module, Debug)]
pub struct NativeSparseAttention {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·K, hidden]`
    pub v_proj: Linear,
    /// `[3·H, hidden]`: for each head the gates of compression, selection and window.
    pub g_proj: Linear,
    /// `[hidden, H·K]`
    pub o_proj: Linear,
    /// Number of query heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
    /// Tokens a block.
    pub block_size: usize,
    /// Blocks each query attends to.
    pub block_counts: usize,
    /// How many tokens the window branch sees.
    pub window_size: Option<usize>,
    #[module(skip)]
    rotary: Rotary,
}

impl NativeSparseAttentionConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let or_default = |field, default| match fields.is_absent(field) {
            true => Ok(Some(default)),
            false => fields.optional_usize(field),
        };
        // A window of 0 leaves the branch out.
        let window = match fields.get("window_size").and_then(|value| value.as_u64()) {
            Some(0) => None,
            _ => or_default("window_size", 512)?,
        };
        Ok(Self::new(common.hidden_size)
            .with_num_heads(fields.usize("num_heads", 64)?)
            .with_num_kv_heads(or_default("num_kv_heads", 4)?)
            .with_head_dim(fields.usize("head_dim", 32)?)
            .with_qkv_bias(fields.bool("qkv_bias", false)?)
            .with_block_size(fields.usize("block_size", 64)?)
            .with_block_counts(fields.usize("block_counts", 16)?)
            .with_window_size(window)
            .with_rope_theta(fields.positive("rope_theta", 10_000.0)?))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        check_groups(self.num_heads, self.num_kv_heads)?;
        let width = self.head_dim;
        if width == 0 || !width.is_multiple_of(2) {
            let message = format!("rotary positions need heads of an even width, and it is {width}");
            return Err(NnError::config("head_dim", message));
        }
        ops::nsa::check_blocks(self.block_size, self.block_counts, self.window_size).map_err(|error| match error {
            OpError::Option { option, reason, .. } => NnError::config(option, reason),
            other => other.into(),
        })
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Head counts that do not divide; an odd head width; blocks that the operator does not take.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<NativeSparseAttention, NnError> {
        self.check()?;
        let (hidden, heads, width) = (self.hidden_size, self.num_heads, self.head_dim);
        let groups = self.num_kv_heads.unwrap_or(heads);
        let linear = |name, input, output, bias| Linear::new(&scope.at(name), input, output, bias);
        Ok(NativeSparseAttention {
            q_proj: linear("q_proj", hidden, heads * width, self.qkv_bias),
            k_proj: linear("k_proj", hidden, groups * width, self.qkv_bias),
            v_proj: linear("v_proj", hidden, groups * width, self.qkv_bias),
            g_proj: linear("g_proj", hidden, 3 * heads, false),
            o_proj: linear("o_proj", heads * width, hidden, false),
            num_heads: heads,
            num_kv_heads: groups,
            block_size: self.block_size,
            block_counts: self.block_counts,
            window_size: self.window_size,
            rotary: Rotary::new(width, self.rope_theta)?,
        })
    }
}

impl NativeSparseAttention {
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
        let rotate = |x: Tensor<3>, heads: usize| {
            self.rotary.forward(split_heads(x, heads), context.positions(), context.position_end(), engine)
        };
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = rotate(q, self.num_heads)?;
        let k = rotate(k, self.num_kv_heads)?;
        let v = split_heads(v, self.num_kv_heads);
        let gates = split_heads(self.g_proj.activated(x, Activation::Sigmoid)?, self.num_heads);
        let gates = [0, 1, 2].map(|branch| gates.clone().narrow(3, branch, 1).squeeze_dim::<3>(3));
        let (k, v) = KeyValueState::extend(past, k, v);
        let options = NsaOptions {
            window: self.window_size,
            lengths: context.key_lengths(k.dims()[1]),
            cu_seqlens: context.cu_seqlens().cloned(),
            engine,
            ..NsaOptions::new(self.block_size, self.block_counts)
        };
        let o = ops::nsa(q, k.clone(), v.clone(), gates, options)?;
        // Any block may be chosen again: nothing is dropped.
        let state = KeyValueState::keep(k, v, None, context);
        Ok((self.o_proj.forward(merge_heads(o))?, state))
    }
}
