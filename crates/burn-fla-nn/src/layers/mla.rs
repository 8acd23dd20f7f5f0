//! Multi-head latent attention.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops as ops;

use super::{KeyValueState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, Rotary, merge_heads, repeat_heads, split_heads};
use crate::{NnError, ParamScope};

/// The norms of the latents have an ε of their own, whatever `norm_eps` is.
const LATENT_EPS: f64 = 1e-5;

/// Configuration of [`LatentAttention`].
#[derive(Config, Debug)]
pub struct LatentAttentionConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    #[config(default = "16")]
    pub num_heads: usize,
    /// Width of the latent of queries; `None`: queries come from the input in one map.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent of keys and values.
    #[config(default = "512")]
    pub kv_lora_rank: usize,
    /// Features N of a query and key head that carry no position.
    #[config(default = "128")]
    pub qk_nope_head_dim: usize,
    /// Features R of a query head that are rotated, and of the one rotated key that all heads share.
    #[config(default = "64")]
    pub qk_rope_head_dim: usize,
    /// Width V of a value head.
    #[config(default = "128")]
    pub v_head_dim: usize,
    /// How many tokens a query sees, itself included; `None`: all before it.
    pub window_size: Option<usize>,
    /// Base θ of the rotary frequencies.
    #[config(default = "10000.0")]
    pub rope_theta: f64,
}

/// Causal softmax attention whose queries, keys and values come from small latents, and whose positions are in features of
/// their own: q = \[q_nope, rotate(q_rope)\], k = \[k_nope, rotate(k_rope)\] with one k_rope for all heads, scores over
/// √(N + R) (DeepSeek-AI 2024).
#[derive(Module, Debug)]
pub struct LatentAttention {
    /// To `[H·(N + R)]`.
    pub q_proj: QueryMap,
    /// Down to the latent, its norm, and up to `[H·(N + V)]`: for each head its key, then its value.
    pub kv_proj: Vec<LatentPart>,
    /// `[R, hidden]`
    pub k_rope: Linear,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// Features of a head without position, N.
    pub nope: usize,
    /// How many tokens a query sees.
    pub window_size: Option<usize>,
    #[module(skip)]
    rotary: Rotary,
}

/// How queries come from the input.
#[derive(Module, Debug)]
pub enum QueryMap {
    /// In one map.
    Whole(Linear),
    /// Down to a latent, its norm, and up.
    Latent(Vec<LatentPart>),
}

/// A part of a map through a latent.
#[derive(Module, Debug)]
pub enum LatentPart {
    /// Down or up.
    Linear(Linear),
    /// The norm between.
    Norm(RmsNorm),
}

impl LatentAttentionConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let rank = match fields.is_absent("q_lora_rank") {
            true => Some(64),
            false => fields.optional_usize("q_lora_rank")?,
        };
        let config = Self::new(common.hidden_size)
            .with_num_heads(fields.usize("num_heads", 16)?)
            .with_q_lora_rank(rank)
            .with_kv_lora_rank(fields.usize("kv_lora_rank", 512)?)
            .with_qk_nope_head_dim(fields.usize("qk_nope_head_dim", 128)?)
            .with_qk_rope_head_dim(fields.usize("qk_rope_head_dim", 64)?)
            .with_v_head_dim(fields.usize("v_head_dim", 128)?)
            .with_window_size(fields.optional_usize("window_size")?)
            .with_rope_theta(fields.positive("rope_theta", 10_000.0)?);
        let width = config.qk_nope_head_dim + config.qk_rope_head_dim;
        match if fields.is_absent("qk_head_dim") { Some(192) } else { fields.optional_usize("qk_head_dim")? } {
            Some(stated) if stated != width => {
                let parts = "qk_nope_head_dim + qk_rope_head_dim";
                Err(fields.error("qk_head_dim", format!("must be {parts} = {width}, and it is {stated}")))
            }
            _ => Ok(config),
        }
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        let sizes = [
            ("num_heads", self.num_heads),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("window_size", self.window_size.unwrap_or(1)),
        ];
        if let Some((field, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(NnError::config(*field, "must be at least 1"));
        }
        let width = self.qk_rope_head_dim;
        if !width.is_multiple_of(2) {
            let message = format!("rotary positions need an even width, and it is {width}");
            return Err(NnError::config("qk_rope_head_dim", message));
        }
        Ok(())
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Sizes of 0; an odd width of the rotated features.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<LatentAttention, NnError> {
        self.check()?;
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        let (nope, rope, values) = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim);
        let linear = |scope: &ParamScope<'_, '_>, input, output| Linear::new(scope, input, output, false);
        let latent = |name: &str, rank, output| {
            let scope = scope.at(name);
            vec![
                LatentPart::Linear(linear(&scope.at(0), hidden, rank)),
                LatentPart::Norm(RmsNorm::new(&scope.at(1), rank, LATENT_EPS)),
                LatentPart::Linear(linear(&scope.at(2), rank, output)),
            ]
        };
        let queries = heads * (nope + rope);
        Ok(LatentAttention {
            q_proj: match self.q_lora_rank {
                Some(rank) => QueryMap::Latent(latent("q_proj", rank, queries)),
                None => QueryMap::Whole(linear(&scope.at("q_proj"), hidden, queries)),
            },
            kv_proj: latent("kv_proj", self.kv_lora_rank, heads * (nope + values)),
            k_rope: linear(&scope.at("k_rope"), hidden, rope),
            o_proj: linear(&scope.at("o_proj"), heads * values, hidden),
            num_heads: heads,
            nope,
            window_size: self.window_size,
            rotary: Rotary::new(rope, self.rope_theta)?,
        })
    }
}

impl LatentAttention {
    /// The mixed sequence, and the keys and values of all heads to go on from when the context keeps states.
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
        context.check_input(&x, self.k_rope.weight.dims()[1])?;
        let through = |parts: &[LatentPart]| {
            parts.iter().try_fold(x.clone(), |x, part| match part {
                LatentPart::Linear(map) => map.forward(x),
                LatentPart::Norm(norm) => norm.forward(x, context.engine()),
            })
        };
        let rotate =
            |x: Tensor<4>| self.rotary.forward(x, context.positions(), context.position_end(), context.engine());
        // The features of a head from `start` on.
        let from = |x: &Tensor<4>, start: usize| {
            let width = x.dims()[3];
            x.clone().narrow(3, start, width - start)
        };
        let q = match &self.q_proj {
            QueryMap::Whole(map) => map.forward(x.clone())?,
            QueryMap::Latent(parts) => through(parts)?,
        };
        let q = split_heads(q, self.num_heads);
        let q = Tensor::cat(vec![q.clone().narrow(3, 0, self.nope), rotate(from(&q, self.nope))?], 3);
        let kv = split_heads(through(&self.kv_proj)?, self.num_heads);
        let shared = rotate(split_heads(self.k_rope.forward(x.clone())?, 1))?;
        let k = Tensor::cat(vec![kv.clone().narrow(3, 0, self.nope), repeat_heads(shared, self.num_heads)], 3);
        let v = from(&kv, self.nope);
        let (k, v) = KeyValueState::extend(past, k, v);
        let o = ops::attention(q, k.clone(), v.clone(), context.attention(k.dims()[1], self.window_size))?;
        let state = KeyValueState::keep(k, v, self.window_size, context);
        Ok((self.o_proj.forward(merge_heads(o))?, state))
    }
}
