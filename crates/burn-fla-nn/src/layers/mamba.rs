//! Mamba.
// Parameters have the names of the format.
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops::{self as ops, SelectiveScanOptions};

use super::{MixerState, SequenceContext, StepSizes};
use crate::init::Init;
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, ShortConv, check_conv_of, softplus};
use crate::{NnError, ParamScope};

/// Configuration of [`Mamba`].
#[derive(Config, Debug)]
pub struct MambaConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Inner channels I.
    pub inner_size: usize,
    /// Numbers N_s of the state of a channel.
    #[config(default = "16")]
    pub state_size: usize,
    /// Tokens that the convolution mixes.
    #[config(default = "4")]
    pub conv_kernel: usize,
    /// Whether the convolution has a bias.
    #[config(default = "true")]
    pub use_conv_bias: bool,
    /// Whether the maps from and to the width of the model have biases.
    #[config(default = "false")]
    pub use_bias: bool,
    /// Rank R of the map to the step sizes; `None`: the width over 16, rounded up.
    pub dt_rank: Option<usize>,
    /// The step sizes at the start.
    #[config(default = "StepSizes::new()")]
    pub step_sizes: StepSizes,
    /// The weight of `dt_proj` starts within ±`dt_scale`·R^−½.
    #[config(default = "1.0")]
    pub dt_scale: f64,
    /// Whether the weight of `dt_proj` starts at that bound everywhere, and not drawn evenly within it.
    #[config(default = "false")]
    pub dt_init_constant: bool,
    /// The number of layers L of the model where `out_proj` starts evenly within ±(I L)^−½; `None`: as other matrices.
    pub rescale_layers: Option<usize>,
}

/// The names that the fields of the step size have in a `config.json`.
struct StepFields {
    rank: &'static str,
    scale: &'static str,
    /// The smallest step at the start, the largest, and the floor.
    sizes: [&'static str; 3],
    scheme: &'static str,
}

const MAMBA_FIELDS: StepFields = StepFields {
    rank: "dt_rank",
    scale: "dt_scale",
    sizes: ["dt_min", "dt_max", "dt_init_floor"],
    scheme: "dt_init_scheme",
};

const SAMBA_FIELDS: StepFields = StepFields {
    rank: "time_step_rank",
    scale: "time_step_scale",
    sizes: ["time_step_min", "time_step_max", "time_step_floor"],
    scheme: "time_step_init_scheme",
};

/// The inner channels: `expand` times the width of the model.
pub(crate) fn inner_size(fields: &Fields<'_>, hidden_size: usize) -> Result<usize, NnError> {
    let size = hidden_size as f64 * fields.positive("expand", 2.0)?;
    if !(1.0..=f64::from(1 << 30)).contains(&size) {
        return Err(fields.error("expand", format!("hidden_size {hidden_size} times it is {size} channels")));
    }
    Ok(size as usize)
}

/// S of a channel is a row of h, `[I, N_s]`: h_t = e^(Δ_t A) ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ,
/// y_t = (h_t C_t + D ∘ x_t) ∘ silu(z_t), with x after a short convolution and silu, A = −e^(A_log), and Δ, B and C
/// depending on x: (r, B, C) = x_proj x, Δ = softplus(dt_proj r) (Gu and Dao 2023).
///
/// In packed rows convolution and state restart at each sequence.
#[derive(Module, Debug)]
pub struct Mamba {
    /// To x and z, `[2·I, hidden]`
    pub in_proj: Linear,
    /// `[I, 1, W]`
    pub conv1d: ShortConv,
    /// To r, B and C, `[R + 2·N_s, I]`
    pub x_proj: Linear,
    /// `[I, R]`
    pub dt_proj: Linear,
    /// ln −A, `[I, N_s]`
    pub A_log: Param<Tensor<2>>,
    /// `[I]`
    pub D: Param<Tensor<1>>,
    /// `[hidden, I]`
    pub out_proj: Linear,
}

/// What a [`Mamba`] layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct MambaState {
    /// h, f32 `[N, I, N_s]`.
    pub state: Tensor<3>,
    /// The last inputs of the convolution, `[N, I, W]`.
    pub conv: Tensor<3>,
}

impl MixerState for MambaState {
    fn elements(&self) -> usize {
        self.state.shape().num_elements() + self.conv.shape().num_elements()
    }
}

impl MambaConfig {
    /// Reads the fields of a Mamba's `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::read(fields, common, &MAMBA_FIELDS)?.with_use_conv_bias(fields.bool("use_conv_bias", true)?))
    }

    /// Reads the fields of a Samba's `config.json`. Its convolutions always have a bias.
    pub(crate) fn from_samba_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Self::read(fields, common, &SAMBA_FIELDS)
    }

    fn read(fields: &Fields<'_>, common: &CommonConfig, names: &StepFields) -> Result<Self, NnError> {
        let hidden = common.hidden_size;
        let rank = match fields.get(names.rank).and_then(|value| value.as_str()) {
            Some("auto") => None,
            _ => fields.optional_usize(names.rank)?,
        };
        let constant = match fields.optional_str(names.scheme)? {
            None | Some("random") => false,
            Some("constant") => true,
            Some(other) => {
                let message = format!("`{other}` is not supported; supported are random and constant");
                return Err(fields.error(names.scheme, message));
            }
        };
        let rescale = fields.bool("rescale_prenorm_residual", false)?;
        Ok(Self::new(hidden, inner_size(fields, hidden)?)
            .with_state_size(fields.usize("state_size", 16)?)
            .with_conv_kernel(fields.usize("conv_kernel", 4)?)
            .with_use_bias(fields.bool("use_bias", false)?)
            .with_dt_rank(rank)
            .with_step_sizes(StepSizes::from_fields(fields, names.sizes)?)
            .with_dt_scale(fields.positive(names.scale, 1.0)?)
            .with_dt_init_constant(constant)
            .with_rescale_layers(rescale.then_some(common.num_hidden_layers)))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        check_conv_of("conv_kernel", self.conv_kernel)?;
        for (field, size) in
            [("inner_size", self.inner_size), ("state_size", self.state_size), ("dt_rank", self.rank())]
        {
            if size == 0 {
                return Err(NnError::config(field, "must be at least 1"));
            }
        }
        self.step_sizes.check()
    }

    fn rank(&self) -> usize {
        self.dt_rank.unwrap_or(self.hidden_size.div_ceil(16))
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// A convolution over no token or too many; sizes of 0; step sizes that nothing can be drawn from.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Mamba, NnError> {
        self.check()?;
        let (hidden, inner, states, rank) = (self.hidden_size, self.inner_size, self.state_size, self.rank());
        // PyTorch's own start of a convolution of W taps a channel.
        let taps = Init::Uniform((self.conv_kernel as f64).powf(-0.5));
        let bound = self.dt_scale * (rank as f64).powf(-0.5);
        let dt_weight = if self.dt_init_constant { Init::Constant(bound) } else { Init::Uniform(bound) };
        let dt_scope = scope.at("dt_proj");
        Ok(Mamba {
            in_proj: Linear::new(&scope.at("in_proj"), hidden, 2 * inner, self.use_bias),
            conv1d: ShortConv::starting(
                &scope.at("conv1d"),
                [inner, self.conv_kernel],
                &taps,
                self.use_conv_bias.then_some(&taps),
            ),
            x_proj: Linear::new(&scope.at("x_proj"), inner, rank + 2 * states, false),
            dt_proj: Linear {
                weight: dt_scope.start("weight", [inner, rank], &dt_weight),
                bias: Some(self.step_sizes.bias(&dt_scope, "bias", inner)),
            },
            A_log: scope.start("A_log", [inner, states], &Init::Values(&|i| ((i % states + 1) as f64).ln())),
            D: scope.ones("D", [inner]),
            out_proj: output_map(scope, [hidden, inner], self.use_bias, self.rescale_layers),
        })
    }
}

/// The map `out_proj` to the width of the model: N(0, std), or evenly within ±(I L)^−½ where it is scaled to the L layers.
pub(crate) fn output_map(
    scope: &ParamScope<'_, '_>,
    [hidden, inner]: [usize; 2],
    bias: bool,
    layers: Option<usize>,
) -> Linear {
    let scope = scope.at("out_proj");
    let start = match layers {
        Some(layers) => Init::Uniform(((inner * layers) as f64).powf(-0.5)),
        None => Init::Normal,
    };
    Linear { weight: scope.start("weight", [hidden, inner], &start), bias: bias.then(|| scope.zeros("bias", [hidden])) }
}

impl Mamba {
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
        past: Option<MambaState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<MambaState>), NnError> {
        context.check_input(&x, self.in_proj.weight.dims()[1])?;
        let dtype = x.dtype();
        let [inner, states] = self.A_log.dims();
        let rank = self.dt_proj.weight.dims()[1];
        let (state, history) = past.map_or((None, None), |past| (Some(past.state), Some(past.conv)));
        let projected = self.in_proj.forward(x)?;
        let part = |x: &Tensor<3>, start: usize, count: usize| x.clone().narrow(2, start, count);
        let (x, z) = (part(&projected, 0, inner), part(&projected, inner, inner));
        let (x, conv) = self.conv1d.forward(x, history, context.cu_seqlens().cloned(), context.engine())?;
        let maps = self.x_proj.forward(x.clone())?;
        let (r, b, c) = (part(&maps, 0, rank), part(&maps, rank, states), part(&maps, rank + states, states));
        // The bias is added in f32: the steps depend on its last digits.
        let step = ops::linear(r, self.dt_proj.weight.val().cast(dtype), None)?.cast(DType::F32);
        let step = match &self.dt_proj.bias {
            Some(bias) => step + bias.val().unsqueeze::<3>(),
            None => step,
        };
        let options = SelectiveScanOptions {
            skip: Some(self.D.val()),
            gate: Some(z),
            initial_state: state,
            cu_seqlens: context.cu_seqlens().cloned(),
            engine: context.engine(),
            chunk: None,
        };
        let a = self.A_log.val().exp().neg();
        let (y, state) = ops::selective_scan(x, softplus(step), a, b, c, options)?;
        let y = self.out_proj.forward(y)?;
        Ok((y, context.keep_state().then_some(MambaState { state, conv })))
    }
}
