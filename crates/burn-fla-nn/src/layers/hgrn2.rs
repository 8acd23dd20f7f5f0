//! HGRN2: the gates of HGRN over a state of outer products.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops as ops;

use super::{Convs, HeadsByRatio, RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{
    FeatureMap, Linear, RmsNorm, ShortConv, check_conv, forget_gate, merge_heads, output_norm, project, split_heads,
};
use crate::{NnError, ParamScope};

/// The output norm has an ε of its own, whatever `norm_eps` is.
const NORM_EPS: f64 = 1e-5;

/// Configuration of [`Hgrn2`].
#[derive(Config, Debug)]
pub struct Hgrn2Config {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Width K of a head of q and f: there are `hidden_size` / K heads. `None`: as many heads as `num_heads`.
    pub expand_ratio: Option<usize>,
    /// Heads H, where `expand_ratio` is `None`.
    pub num_heads: Option<usize>,
    /// The number of the layer in its model, from 0. The first layer has no lower bound.
    #[config(default = "0")]
    pub layer: usize,
    /// Whether q, f and i pass a short convolution.
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
}

/// S_t = diag(α_t) S_{t−1} + (1 − α_t) i_tᵀ, o_t = K^−½ S_tᵀ silu(q_t) with a forget gate α = β + (1 − β) σ(f), whose
/// lower bound β rises with the layers of a model; the output is normalised over all heads (Qin et al. 2024).
#[derive(Module, Debug)]
pub struct Hgrn2 {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub f_proj: Linear,
    /// `[hidden, hidden]`
    pub i_proj: Linear,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[H·K, 1, W]`
    pub f_conv1d: Option<ShortConv>,
    /// `[hidden, 1, W]`
    pub i_conv1d: Option<ShortConv>,
    /// `[hidden]`
    pub g_norm: Option<RmsNorm>,
    /// `[hidden, hidden]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// The layer whose lower bound holds, where one does.
    #[module(skip)]
    bound_of: Option<usize>,
}

impl Hgrn2Config {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig, layer: usize) -> Result<Self, NnError> {
        let expand_ratio = fields.usize_or_null("expand_ratio", 128)?;
        // A note beside `expand_ratio`: the format does not read it then.
        let num_heads = fields.optional_usize("num_heads")?.filter(|_| expand_ratio.is_none());
        Ok(Self::new(common.hidden_size)
            .with_expand_ratio(expand_ratio)
            .with_num_heads(num_heads)
            .with_layer(layer)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_use_lower_bound(fields.bool("use_lower_bound", true)?)
            .with_elementwise_affine(common.elementwise_affine))
    }

    /// The heads, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<HeadsByRatio, NnError> {
        check_conv(self.use_short_conv.then_some(self.conv_size))?;
        let heads = HeadsByRatio::new(self.hidden_size, self.num_heads, self.expand_ratio)?;
        if self.use_lower_bound && heads.keys() != self.hidden_size {
            return Err(NnError::config(
                "expand_ratio",
                format!(
                    "{} heads of {} are {} features, but the lower bounds are as wide as hidden_size {}; \
                     set use_lower_bound to false",
                    heads.heads,
                    heads.key_width,
                    heads.keys(),
                    self.hidden_size
                ),
            ));
        }
        Ok(heads)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// Heads that do not divide the width; a convolution over no token.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Hgrn2, NnError> {
        let (hidden, heads) = (self.hidden_size, self.check()?);
        let linear = |name, output| Linear::new(&scope.at(name), hidden, output, false);
        let conv = |name, channels| {
            let conv = || ShortConv::new(&scope.at(name), channels, self.conv_size).linear();
            self.use_short_conv.then(conv)
        };
        Ok(Hgrn2 {
            q_proj: linear("q_proj", heads.keys()),
            f_proj: linear("f_proj", heads.keys()),
            i_proj: linear("i_proj", hidden),
            q_conv1d: conv("q_conv1d", heads.keys()),
            f_conv1d: conv("f_conv1d", heads.keys()),
            i_conv1d: conv("i_conv1d", hidden),
            g_norm: self.elementwise_affine.then(|| RmsNorm::new(&scope.at("g_norm"), hidden, NORM_EPS)),
            o_proj: linear("o_proj", hidden),
            num_heads: heads.heads,
            bound_of: (self.use_lower_bound && self.layer > 0).then_some(self.layer),
        })
    }
}

impl Hgrn2 {
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
        let dtype = x.dtype();
        let (state, conv) = past.map_or((None, Vec::new()), |past| (Some(past.state), past.conv));
        let mut convs = Convs::new(context, conv);
        let [q, f, i] = project([&self.q_proj, &self.f_proj, &self.i_proj], x)?;
        let q = convs.run(&self.q_conv1d, q)?;
        let f = convs.run(&self.f_conv1d, f)?;
        let i = convs.run(&self.i_conv1d, i)?;
        let bound = self.bound_of.and_then(|layer| context.lower_bound(layer));
        let (log_decay, k) = forget_gate(f, bound);
        let heads = |x| split_heads(x, self.num_heads);
        let (o, state) = ops::gla(
            heads(FeatureMap::Silu.apply(q)),
            heads(k.cast(dtype)),
            heads(i),
            heads(log_decay),
            context.options(state),
        )?;
        let o = output_norm(merge_heads(o), None, self.g_norm.as_ref(), NORM_EPS, context.engine())?;
        let y = self.o_proj.forward(o)?;
        let state = context.keep_state().then(|| RecurrentState { state, conv: convs.finish() });
        Ok((y, state))
    }
}
