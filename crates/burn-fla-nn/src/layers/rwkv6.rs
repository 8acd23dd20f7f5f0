//! RWKV6 (Finch).

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops::{self as ops, Activation, SequenceOptions};

use super::{MixerDims, SequenceContext, ShiftState};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Between, GroupNorm, LerpLinear, Linear, LowRank, lerp, merge_heads, split_heads};
use crate::{Init, NnError, ParamScope};

/// Gain of the maps at the start, 2^−2.5.
const GAIN: f64 = 0.176_776_695_296_636_9;
/// The mixes of a token with the one before it, in the order of the format: for r, w, k, v and g.
const MIXES: usize = 5;
/// The log decay is −e^x; above this x no digit of the state is left, and sums of log decays would only lose theirs.
const STRONGEST: f64 = 4.6;

/// Configuration of [`Rwkv6`].
#[derive(Config, Debug)]
pub struct Rwkv6Config {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// H·K over the width.
    #[config(default = "0.5")]
    pub expand_k: f64,
    /// H·V over the width.
    #[config(default = "1.0")]
    pub expand_v: f64,
    /// Rank of each map from the input to how far a token is mixed with the one before it.
    #[config(default = "32")]
    pub proj_low_rank_dim: usize,
    /// Rank of the map from the input to the log decays.
    #[config(default = "64")]
    pub gate_low_rank_dim: usize,
    /// ε of the output norm.
    #[config(default = "1e-5")]
    pub norm_eps: f64,
}

/// The maps from the input to the five mixes, by their places in the format's sequence.
#[derive(Module, Debug)]
pub struct MixMaps {
    /// W₀ `[5·R, hidden]`, μ.
    pub _0: LerpLinear,
    /// W₂ `[hidden, 5·R]`.
    pub _2: Linear,
}

/// A map of a mixed input.
#[derive(Module, Debug)]
pub struct MixedLinear {
    /// W.
    pub linear: Linear,
}

/// A map of a mixed input through a few features.
#[derive(Module, Debug)]
pub struct MixedLowRank {
    /// The map.
    pub linear: LowRank,
}

/// o_t = (S_{t−1} + (u ∘ k_t) v_tᵀ)ᵀ r_t, S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ, with a log decay w_t = −e^x for each key
/// feature. What each of r, w, k, v and g sees of a token is moved towards the one before it by an amount that depends on
/// both; the output is normalised for each head and gated by silu(g) (Peng et al. 2024).
#[derive(Module, Debug)]
pub struct Rwkv6 {
    /// The maps to the five mixes.
    pub x_proj: MixMaps,
    /// `[5, hidden]`: the mixes of a token whose maps give nothing.
    pub x_bias: Param<Tensor<2>>,
    /// `[H·K, hidden]`
    pub r_proj: MixedLinear,
    /// Through rank `gate_low_rank_dim` to `[H·K]`.
    pub w_proj: MixedLowRank,
    /// `[H·K, hidden]`
    pub k_proj: MixedLinear,
    /// `[H·V, hidden]`
    pub v_proj: MixedLinear,
    /// `[H·V, hidden]`
    pub g_proj: MixedLinear,
    /// u, `[H, K]`.
    pub bonus: Param<Tensor<2>>,
    /// `[H·V]`
    pub g_norm: GroupNorm,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
}

impl Rwkv6Config {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 4)?)
            .with_expand_k(fields.positive("expand_k", 0.5)?)
            .with_expand_v(fields.positive("expand_v", 1.0)?)
            .with_proj_low_rank_dim(fields.usize("proj_low_rank_dim", 32)?)
            .with_gate_low_rank_dim(fields.usize("gate_low_rank_dim", 64)?)
            .with_norm_eps(common.norm_eps))
    }

    /// The widths, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<MixerDims, NnError> {
        for (field, rank) in
            [("proj_low_rank_dim", self.proj_low_rank_dim), ("gate_low_rank_dim", self.gate_low_rank_dim)]
        {
            if rank == 0 {
                return Err(NnError::config(field, "must be at least 1"));
            }
        }
        MixerDims::new(self.hidden_size, self.num_heads, None, self.expand_k, self.expand_v)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Widths that are not whole or not multiples of the head count; a rank of 0.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Rwkv6, NnError> {
        let dims = self.check()?;
        let hidden = self.hidden_size;
        let weight = &Init::XavierUniform(GAIN);
        let linear = |scope: &ParamScope<'_, '_>, input, output| Linear::start(scope, input, output, weight, None);
        let mixed = |name, output| MixedLinear { linear: linear(&scope.at(name).at("linear"), hidden, output) };
        let mixes = MIXES * self.proj_low_rank_dim;
        let x_proj = scope.at("x_proj");
        Ok(Rwkv6 {
            x_proj: MixMaps {
                _0: LerpLinear::new(&x_proj.at(0), hidden, mixes, weight),
                _2: linear(&x_proj.at(2), mixes, hidden),
            },
            x_bias: scope.zeros("x_bias", [MIXES, hidden]),
            r_proj: mixed("r_proj", dims.keys),
            w_proj: MixedLowRank {
                linear: LowRank::new(
                    &scope.at("w_proj").at("linear"),
                    [hidden, self.gate_low_rank_dim, dims.keys],
                    Between::Tanh,
                    Some(&Init::Constant(0.0)),
                ),
            },
            k_proj: mixed("k_proj", dims.keys),
            v_proj: mixed("v_proj", dims.values),
            g_proj: mixed("g_proj", dims.values),
            bonus: scope.zeros("bonus", [dims.heads, dims.key_width()]),
            g_norm: GroupNorm::new(&scope.at("g_norm"), dims.values, true, self.norm_eps),
            o_proj: linear(&scope.at("o_proj"), dims.values, hidden),
            num_heads: dims.heads,
        })
    }
}

impl Rwkv6 {
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
        past: Option<ShiftState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<ShiftState>), NnError> {
        context.check_input(&x, self.o_proj.weight.dims()[0])?;
        let (state, last) = past.map_or((None, None), |past| (Some(past.state), Some(past.last)));
        let (delta, last) = context.token_shift(x.clone(), last)?;
        let [r, w, k, v, g] = self.mixes(&x, &delta)?;
        let heads = |x| split_heads(x, self.num_heads);
        let r = heads(self.r_proj.linear.forward(r)?);
        let log_decay = self.w_proj.linear.forward(w)?.cast(DType::F32).clamp_max(STRONGEST).exp().neg();
        let k = heads(self.k_proj.linear.forward(k)?);
        let v = heads(self.v_proj.linear.forward(v)?);
        let gate = heads(self.g_proj.linear.activated(g, Activation::Silu)?);
        let options = SequenceOptions { scale: Some(1.0), ..context.options(state) };
        let (o, state) = ops::rwkv6(r, k, v, heads(log_decay), self.bonus.val(), options)?;
        let y = self.o_proj.forward(merge_heads(self.g_norm.forward(o)? * gate))?;
        Ok((y, context.keep_state().then_some(ShiftState { state, last })))
    }

    /// The inputs of r, w, k, v and g: x + δ ⊙ (W₂ tanh(W₀ (x + δ ⊙ μ)) + bias), each with its own part of W₀ and W₂.
    fn mixes(&self, x: &Tensor<3>, delta: &Tensor<3>) -> Result<[Tensor<3>; MIXES], NnError> {
        let low = self.x_proj._0.activated(x, delta, Activation::Tanh)?;
        let up = self.x_proj._2.weight.val().cast(x.dtype());
        let rank = up.dims()[1] / MIXES;
        let mix = |n: usize| -> Result<Tensor<3>, NnError> {
            let bias = self.x_bias.val().narrow(0, n, 1).squeeze_dim(0).cast(x.dtype());
            let up = up.clone().narrow(1, n * rank, rank);
            Ok(lerp(x, delta, ops::linear(low.clone().narrow(2, n * rank, rank), up, Some(bias))?))
        };
        Ok([mix(0)?, mix(1)?, mix(2)?, mix(3)?, mix(4)?])
    }
}
