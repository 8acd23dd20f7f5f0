//! Softmax attention with accumulated reflections.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::{self as ops, PathOptions, PathState, l2_norm};

use super::state::{conv_elements, in_window};
use super::{Convs, MixerState, SequenceContext, check_groups};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, ShortConv, log_sigmoid, merge_heads, split_heads};
use crate::{NnError, ParamScope};

/// Rank of the map to the reflections where it is factored.
const LOW_RANK: usize = 32;
/// Tokens that the convolution of the reflections mixes.
const CONV_SIZE: usize = 3;

/// Configuration of [`PathAttention`].
#[derive(Config, Debug)]
pub struct PathAttentionConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Query heads H.
    #[config(default = "32")]
    pub num_heads: usize,
    /// Key and value heads G; `None`: H.
    pub num_kv_heads: Option<usize>,
    /// Whether scores decay by a forget gate.
    #[config(default = "false")]
    pub use_forget_gate: bool,
    /// Whether the map to the reflections is a product of rank 32.
    #[config(default = "true")]
    pub use_low_rank_w: bool,
    /// Whether the reflections pass a short convolution.
    #[config(default = "true")]
    pub use_w_shortconv: bool,
}

/// s_ij = K^−½ q_iᵀ H_i … H_{j+1} k_j with H_t = I − β_t w_t w_tᵀ, w_t of length one for each key head and
/// β = 2 σ(W x + b); optionally with the forget gate of [`ForgettingAttention`](super::ForgettingAttention)
/// (Yang et al. 2025).
#[derive(Module, Debug)]
pub struct PathAttention {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[G·K, hidden]`
    pub k_proj: Linear,
    /// `[G·K, hidden]`
    pub v_proj: Linear,
    /// To the reflections, `[G·K]`.
    pub w_proj: ReflectionMap,
    /// `[G·K, 1, 3]`
    pub w_conv1d: Option<ShortConv>,
    /// To β, `[G, hidden]` with its bias.
    pub bt_proj: Linear,
    /// The forget gate, `[H, hidden]` with its bias.
    pub g_proj: Option<Linear>,
    /// `[hidden, H·K]`
    pub o_proj: Linear,
    /// Number of query heads H.
    pub num_heads: usize,
    /// Number of key and value heads G.
    pub num_kv_heads: usize,
}

/// How reflections come from the input.
#[derive(Module, Debug)]
pub enum ReflectionMap {
    /// In one map.
    Whole(Linear),
    /// `[32, hidden]`, then `[G·K, 32]`.
    Factors(Vec<Linear>),
}

/// What [`PathAttention`] keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct PathAttentionState {
    /// Reflected keys, values and forget gates; a sequence of fewer tokens than another stands behind zeros.
    pub seen: PathState,
    /// The last inputs of the convolution, `[N, G·K, 3]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for PathAttentionState {
    fn elements(&self) -> usize {
        let gates = self.seen.log_forget.as_ref().map_or(0, |gate| gate.shape().num_elements());
        self.seen.keys.shape().num_elements()
            + self.seen.values.shape().num_elements()
            + gates
            + conv_elements(&self.conv)
    }
}

impl PathAttentionConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size)
            .with_num_heads(fields.usize("num_heads", 32)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_use_forget_gate(fields.bool("use_forget_gate", false)?)
            .with_use_low_rank_w(fields.bool("use_low_rank_w", true)?)
            .with_use_w_shortconv(fields.bool("use_w_shortconv", true)?))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        check_groups(self.num_heads, self.num_kv_heads)?;
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        if !hidden.is_multiple_of(heads) {
            let message = format!("hidden_size {hidden} must be a multiple of it, and it is {heads}");
            return Err(NnError::config("num_heads", message));
        }
        Ok(())
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Head counts that do not divide.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<PathAttention, NnError> {
        self.check()?;
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        let groups = self.num_kv_heads.unwrap_or(heads);
        let keys = hidden / heads * groups;
        let linear = |name: &str, input, output, bias| Linear::new(&scope.at(name), input, output, bias);
        Ok(PathAttention {
            q_proj: linear("q_proj", hidden, hidden, false),
            k_proj: linear("k_proj", hidden, keys, false),
            v_proj: linear("v_proj", hidden, keys, false),
            w_proj: match self.use_low_rank_w {
                true => ReflectionMap::Factors(vec![
                    linear("w_proj.0", hidden, LOW_RANK, false),
                    linear("w_proj.1", LOW_RANK, keys, false),
                ]),
                false => ReflectionMap::Whole(linear("w_proj", hidden, keys, false)),
            },
            w_conv1d: self.use_w_shortconv.then(|| ShortConv::new(&scope.at("w_conv1d"), keys, CONV_SIZE)),
            bt_proj: linear("bt_proj", hidden, groups, true),
            g_proj: self.use_forget_gate.then(|| linear("g_proj", hidden, heads, true)),
            o_proj: linear("o_proj", hidden, hidden, false),
            num_heads: heads,
            num_kv_heads: groups,
        })
    }
}

impl PathAttention {
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
        past: Option<PathAttentionState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<PathAttentionState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let (initial, conv) = past.map_or((None, Vec::new()), |past| (Some(past.seen), past.conv));
        let mut convs = Convs::new(context, conv);
        let heads = |map: &Linear, heads| Ok::<_, NnError>(split_heads(map.forward(x.clone())?, heads));
        let q = heads(&self.q_proj, self.num_heads)?;
        let k = heads(&self.k_proj, self.num_kv_heads)?;
        let v = heads(&self.v_proj, self.num_kv_heads)?;
        let w = match &self.w_proj {
            ReflectionMap::Whole(map) => map.forward(x.clone())?,
            ReflectionMap::Factors(maps) => maps.iter().try_fold(x.clone(), |x, map| map.forward(x))?,
        };
        let w = convs.run(&self.w_conv1d, w)?;
        // In f32: a reflection by a vector that is not of length one is none.
        let w = l2_norm(split_heads(w, self.num_kv_heads).cast(DType::F32), ops::l2_norm::EPS)?;
        let in_f32 = |map: &Linear| Ok::<_, NnError>(map.forward(x.clone())?.cast(DType::F32));
        let beta = activation::sigmoid(in_f32(&self.bt_proj)?).mul_scalar(2.0);
        let log_forget = match &self.g_proj {
            Some(gate) => Some(log_sigmoid(in_f32(gate)?)),
            None => None,
        };
        let before = initial.as_ref().map_or(0, |state| state.keys.dims()[1]);
        let options = PathOptions {
            initial,
            lengths: context.key_lengths(before + x.dims()[1]),
            cu_seqlens: context.cu_seqlens().cloned(),
            engine: context.engine(),
            ..Default::default()
        };
        let (o, seen) = ops::path_attn(q, k, v, w, beta, log_forget, options)?;
        let state = context.keep_state().then(|| PathAttentionState {
            seen: PathState {
                keys: in_window(seen.keys, None, context),
                values: in_window(seen.values, None, context),
                log_forget: seen.log_forget.map(|gate| in_window(gate, None, context)),
            },
            conv: convs.finish(),
        });
        Ok((self.o_proj.forward(merge_heads(o))?, state))
    }
}
