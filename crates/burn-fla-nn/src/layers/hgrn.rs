//! HGRN: an element-wise gated recurrence.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops as ops;

use super::state::conv_elements;
use super::{Convs, MixerState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, check_conv, forget_gate, output_norm, project};
use crate::{NnError, ParamScope};

/// Configuration of [`Hgrn`].
#[derive(Config, Debug)]
pub struct HgrnConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// The number of the layer in its model, from 0. The first layer has no lower bound.
    #[config(default = "0")]
    pub layer: usize,
    /// Width D of the recurrence over that of the input.
    #[config(default = "1.0")]
    pub expand_ratio: f64,
    /// Whether i and f pass a short convolution.
    #[config(default = "false")]
    pub use_short_conv: bool,
    /// Tokens that the short convolution mixes.
    #[config(default = "4")]
    pub conv_size: usize,
    /// Whether the forget gates of the layers after the first stay above bounds that the model learns.
    #[config(default = "true")]
    pub use_lower_bound: bool,
    /// Whether the output norm has a weight.
    #[config(default = "true")]
    pub elementwise_affine: bool,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
}

/// h_t = α_t ⊙ h_{t−1} + (1 − α_t) ⊙ silu(i_t) with a forget gate α = β + (1 − β) σ(f), whose lower bound β rises with
/// the layers of a model; the output is normalised over all channels and gated (Qin et al. 2023).
#[derive(Module, Debug)]
pub struct Hgrn {
    /// `[D, hidden]`
    pub i_proj: Linear,
    /// `[D, hidden]`
    pub f_proj: Linear,
    /// `[D, hidden]`
    pub g_proj: Linear,
    /// `[D, 1, W]`
    pub i_conv1d: Option<ShortConv>,
    /// `[D, 1, W]`
    pub f_conv1d: Option<ShortConv>,
    /// `[D]`
    pub g_norm: Option<RmsNorm>,
    /// `[hidden, D]`
    pub o_proj: Linear,
    /// ε of the output norm.
    pub norm_eps: f64,
    /// The layer whose lower bound holds, where one does.
    #[module(skip)]
    bound_of: Option<usize>,
}

/// What an [`Hgrn`] layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct HgrnState {
    /// h, f32 `[N, D]`.
    pub state: Tensor<2>,
    /// The last inputs of the convolutions of i and f, each `[N, D, W]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for HgrnState {
    fn elements(&self) -> usize {
        self.state.shape().num_elements() + conv_elements(&self.conv)
    }
}

impl HgrnConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig, layer: usize) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size)
            .with_layer(layer)
            .with_expand_ratio(fields.positive("expand_ratio", 1.0)?)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_use_lower_bound(fields.bool("use_lower_bound", true)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_norm_eps(common.norm_eps))
    }

    /// D, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<usize, NnError> {
        check_conv(self.use_short_conv.then_some(self.conv_size))?;
        let (hidden, ratio) = (self.hidden_size, self.expand_ratio);
        let width = hidden as f64 * ratio;
        if !width.is_finite() || !(1.0..1e9).contains(&width) {
            return Err(NnError::config("expand_ratio", format!("hidden_size {hidden} times {ratio} is no width")));
        }
        // The format cuts the fraction off.
        let width = width as usize;
        if self.use_lower_bound && width != hidden {
            return Err(NnError::config(
                "expand_ratio",
                format!(
                    "hidden_size {hidden} times {ratio} is {width}, but the lower bounds are as wide as hidden_size; \
                     set use_lower_bound to false"
                ),
            ));
        }
        Ok(width)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// A width of the recurrence that does not fit; a convolution over no token.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Hgrn, NnError> {
        let (hidden, width) = (self.hidden_size, self.check()?);
        let linear = |name| Linear::new(&scope.at(name), hidden, width, false);
        let conv = |name| {
            let conv = || ShortConv::new(&scope.at(name), width, self.conv_size).linear();
            self.use_short_conv.then(conv)
        };
        Ok(Hgrn {
            i_proj: linear("i_proj"),
            f_proj: linear("f_proj"),
            g_proj: linear("g_proj"),
            i_conv1d: conv("i_conv1d"),
            f_conv1d: conv("f_conv1d"),
            g_norm: self.elementwise_affine.then(|| RmsNorm::new(&scope.at("g_norm"), width, self.norm_eps)),
            o_proj: Linear::new(&scope.at("o_proj"), width, hidden, false),
            norm_eps: self.norm_eps,
            bound_of: (self.use_lower_bound && self.layer > 0).then_some(self.layer),
        })
    }
}

impl Hgrn {
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
        past: Option<HgrnState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<HgrnState>), NnError> {
        context.check_input(&x, self.i_proj.weight.dims()[1])?;
        let dtype = x.dtype();
        let (state, conv) = past.map_or((None, Vec::new()), |past| (Some(past.state), past.conv));
        let mut convs = Convs::new(context, conv);
        let [i, f] = project([&self.i_proj, &self.f_proj], x.clone())?;
        let i = convs.run(&self.i_conv1d, i)?;
        let f = convs.run(&self.f_conv1d, f)?;
        let bound = self.bound_of.and_then(|layer| context.lower_bound(layer));
        let (log_decay, rest) = forget_gate(f, bound);
        let i = (activation::silu(i.cast(DType::F32)) * rest).cast(dtype);
        let (h, state) = ops::hgrn(i, log_decay, context.scan_options(state))?;
        let gate = self.g_proj.forward(x)?;
        let o = output_norm(h, Some(gate), self.g_norm.as_ref(), self.norm_eps, context.engine())?;
        let y = self.o_proj.forward(o)?;
        let state = context.keep_state().then(|| HgrnState { state, conv: convs.finish() });
        Ok((y, state))
    }
}
