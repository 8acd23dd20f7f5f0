//! Mamba2.
// Parameters have the names of the format.
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops::{self as ops, GroupedGatedNorm, SsdOptions};

use super::mamba::{inner_size, output_map};
use super::{RecurrentState, SequenceContext, StepSizes};
use crate::init::Init;
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, check_conv_of, merge_heads, softplus, split_heads};
use crate::{NnError, ParamScope};

/// Configuration of [`Mamba2`].
#[derive(Config, Debug)]
pub struct Mamba2Config {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Inner channels I = H·P.
    pub inner_size: usize,
    /// Width P of a head.
    #[config(default = "64")]
    pub head_dim: usize,
    /// Rows N_s of the state of a head.
    #[config(default = "128")]
    pub state_size: usize,
    /// Groups G of heads that share B and C.
    #[config(default = "1")]
    pub n_groups: usize,
    /// Tokens that the convolution mixes.
    #[config(default = "4")]
    pub conv_kernel: usize,
    /// Whether the convolution has a bias.
    #[config(default = "true")]
    pub use_conv_bias: bool,
    /// The taps start evenly within ± this; `None`: as matrices do.
    pub conv_init: Option<f64>,
    /// Whether the maps from and to the width of the model have biases.
    #[config(default = "false")]
    pub use_bias: bool,
    /// −A starts evenly between these.
    #[config(default = "(1.0, 16.0)")]
    pub a_init_range: (f64, f64),
    /// Whether D has a number for each channel, and not for each head.
    #[config(default = "false")]
    pub d_has_hdim: bool,
    /// Whether the output is normalised.
    #[config(default = "true")]
    pub rmsnorm: bool,
    /// Whether that norm comes before the gate.
    #[config(default = "false")]
    pub norm_before_gate: bool,
    /// ε of that norm.
    #[config(default = "1e-5")]
    pub norm_eps: f64,
    /// The step sizes at the start.
    #[config(default = "StepSizes::new()")]
    pub step_sizes: StepSizes,
    /// The smallest step size there can be.
    #[config(default = "0.0")]
    pub dt_least: f64,
    /// The largest step size there can be; `None`: any.
    pub dt_most: Option<f64>,
    /// The number of layers L of the model where `out_proj` starts evenly within ±(I L)^−½; `None`: as other matrices.
    pub rescale_layers: Option<usize>,
}

/// S_t = e^(Δ_t A) S_{t−1} + B_t (Δ_t x_t)ᵀ for each head, y_t = S_tᵀ C_t + D x_t, with x, B and C after a short
/// convolution and silu, A = −e^(A_log) and Δ = softplus(… + dt_bias); then norm(y ∘ silu(z)), by group, and the map back
/// (Dao and Gu 2024).
///
/// Head h shares B and C with those of group ⌊h / (H/G)⌋, as in the kernels of published checkpoints and in every step of
/// the peer's. Its fallback in plain tensor operations takes group h mod G for whole sequences, and no field of a
/// `config.json` says which one a checkpoint was trained with; the operator has that rule too
/// ([`HeadGroups::Tiled`](burn_fla_ops::HeadGroups)).
///
/// In packed rows convolution and state restart at each sequence.
#[derive(Module, Debug)]
pub struct Mamba2 {
    /// To z, (x, B, C) and Δ, `[2·I + 2·G·N_s + H, hidden]`
    pub in_proj: Linear,
    /// `[I + 2·G·N_s, 1, W]`
    pub conv1d: ShortConv,
    /// `[H]`
    pub dt_bias: Param<Tensor<1>>,
    /// ln −A, `[H]`
    pub A_log: Param<Tensor<1>>,
    /// `[H]`, or `[I]`
    pub D: Param<Tensor<1>>,
    /// `[I]`
    pub norm: Option<RmsNorm>,
    /// `[hidden, I]`
    pub out_proj: Linear,
    /// Number of groups G.
    pub n_groups: usize,
    /// Whether the norm comes before the gate.
    pub norm_before_gate: bool,
    /// The smallest step size there can be.
    pub dt_least: f64,
    /// The largest.
    pub dt_most: Option<f64>,
}

impl Mamba2Config {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let hidden = common.hidden_size;
        let (low, high) = fields.range("A_init_range", (1.0, 16.0))?;
        if low <= 0.0 || !high.is_finite() {
            return Err(fields.error("A_init_range", "must be two numbers above 0"));
        }
        let (least, most) = fields.range("dt_limit", (0.0, f64::INFINITY))?;
        if least < 0.0 {
            return Err(fields.error("dt_limit", format!("a step size is never below 0, and its limit is {least}")));
        }
        let conv_init = fields.optional_f64("conv_init")?;
        if conv_init.is_some_and(|bound| bound < 0.0) {
            return Err(fields.error("conv_init", "must not be below 0"));
        }
        // How many tokens the peer computes at a time: the same numbers.
        fields.usize("chunk_size", 256)?;
        let rescale = fields.bool("rescale_prenorm_residual", true)?;
        Ok(Self::new(hidden, inner_size(fields, hidden)?)
            .with_head_dim(fields.usize("head_dim", 64)?)
            .with_state_size(fields.usize("state_size", 128)?)
            .with_n_groups(fields.usize("n_groups", 1)?)
            .with_conv_kernel(fields.usize("conv_kernel", 4)?)
            .with_use_conv_bias(fields.bool("use_conv_bias", true)?)
            .with_conv_init(conv_init)
            .with_use_bias(fields.bool("use_bias", false)?)
            .with_a_init_range((low, high))
            .with_d_has_hdim(fields.bool("D_has_hdim", false)?)
            .with_rmsnorm(fields.bool("rmsnorm", true)?)
            .with_norm_before_gate(fields.bool("norm_before_gate", false)?)
            .with_norm_eps(common.norm_eps)
            .with_step_sizes(StepSizes::from_fields(fields, ["dt_min", "dt_max", "dt_init_floor"])?)
            .with_dt_least(least)
            .with_dt_most(most.is_finite().then_some(most))
            .with_rescale_layers(rescale.then_some(common.num_hidden_layers)))
    }

    /// The number of heads, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<usize, NnError> {
        check_conv_of("conv_kernel", self.conv_kernel)?;
        let (inner, width, groups) = (self.inner_size, self.head_dim, self.n_groups);
        if inner == 0 || width == 0 || !inner.is_multiple_of(width) {
            let message = format!("must divide expand times hidden_size, {inner} channels, and it is {width}");
            return Err(NnError::config("head_dim", message));
        }
        let heads = inner / width;
        if groups == 0 || !heads.is_multiple_of(groups) {
            let message = format!("must divide the {heads} heads, and it is {groups}");
            return Err(NnError::config("n_groups", message));
        }
        if self.state_size == 0 {
            return Err(NnError::config("state_size", "must be at least 1"));
        }
        let (low, high) = self.a_init_range;
        if !(low > 0.0 && high >= low) {
            return Err(NnError::config("A_init_range", format!("must be 0 < low ≤ high, and it is {low}, {high}")));
        }
        self.step_sizes.check()?;
        Ok(heads)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// A head width or a number of groups that does not divide; a convolution over no token or too many; ranges that
    /// nothing can be drawn from.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Mamba2, NnError> {
        let heads = self.check()?;
        let (hidden, inner) = (self.hidden_size, self.inner_size);
        let mixed = inner + 2 * self.n_groups * self.state_size;
        let taps = self.conv_init.map_or(Init::Normal, Init::Uniform);
        let (low, high) = self.a_init_range;
        Ok(Mamba2 {
            in_proj: Linear::new(&scope.at("in_proj"), hidden, inner + mixed + heads, self.use_bias),
            conv1d: ShortConv::starting(
                &scope.at("conv1d"),
                [mixed, self.conv_kernel],
                &taps,
                self.use_conv_bias.then_some(&Init::Constant(0.0)),
            ),
            dt_bias: self.step_sizes.bias(scope, "dt_bias", heads),
            A_log: scope.start("A_log", [heads], &Init::Drawn(&|draws| (low + (high - low) * draws.uniform()).ln())),
            D: scope.ones("D", [if self.d_has_hdim { inner } else { heads }]),
            norm: self.rmsnorm.then(|| RmsNorm::new(&scope.at("norm"), inner, self.norm_eps)),
            out_proj: output_map(scope, [hidden, inner], self.use_bias, self.rescale_layers),
            n_groups: self.n_groups,
            norm_before_gate: self.norm_before_gate,
            dt_least: self.dt_least,
            dt_most: self.dt_most,
        })
    }
}

impl Mamba2 {
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
        let [hidden, inner] = self.out_proj.weight.dims();
        context.check_input(&x, hidden)?;
        let (heads, groups) = (self.dt_bias.dims()[0], self.n_groups);
        let mixed = self.conv1d.weight.dims()[0];
        let shared = (mixed - inner) / 2;
        let (state, history) = past.map_or((None, None), |past| (Some(past.state), past.conv.into_iter().next()));
        let projected = self.in_proj.forward(x)?;
        let part = |x: &Tensor<3>, start: usize, count: usize| x.clone().narrow(2, start, count);
        let (z, xbc, dt) =
            (part(&projected, 0, inner), part(&projected, inner, mixed), part(&projected, inner + mixed, heads));
        let (xbc, conv) = self.conv1d.forward(xbc, history, context.cu_seqlens().cloned(), context.engine())?;
        let x = split_heads(part(&xbc, 0, inner), heads);
        let b = split_heads(part(&xbc, inner, shared), groups);
        let c = split_heads(part(&xbc, inner + shared, shared), groups);
        let options = SsdOptions {
            skip: Some(self.D.val()),
            initial_state: state,
            cu_seqlens: context.cu_seqlens().cloned(),
            engine: context.engine(),
            ..Default::default()
        };
        let (y, state) = ops::ssd(x, self.steps(dt), self.A_log.val().exp().neg(), b, c, options)?;
        let y = self.gated(merge_heads(y), z, context)?;
        let y = self.out_proj.forward(y)?;
        Ok((y, context.keep_state().then(|| RecurrentState { state, conv: vec![conv] })))
    }

    /// Δ, f32 `[B, T, H]`.
    fn steps(&self, dt: Tensor<3>) -> Tensor<3> {
        let step = softplus(dt.cast(DType::F32) + self.dt_bias.val().unsqueeze::<3>());
        let step = if self.dt_least > 0.0 { step.clamp_min(self.dt_least) } else { step };
        match self.dt_most {
            Some(most) => step.clamp_max(most),
            None => step,
        }
    }

    /// y with norm and gate, as the layer has them.
    fn gated(&self, y: Tensor<3>, z: Tensor<3>, context: &SequenceContext) -> Result<Tensor<3>, NnError> {
        let Some(norm) = &self.norm else {
            return Ok(ops::swiglu(z, y, context.engine())?);
        };
        let options = GroupedGatedNorm {
            eps: norm.eps,
            group_size: Some(y.dims()[2] / self.n_groups),
            norm_before_gate: self.norm_before_gate,
        };
        Ok(ops::grouped_gated_rms_norm(y, z, norm.weight.val(), options, context.engine())?)
    }
}
