//! MesaNet.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, GateActivation, MesaOptions, MesaState};

use super::delta::{Heads, Maps, gated_norm, strength};
use super::state::conv_elements;
use super::{Convs, MixerState, SequenceContext};
use crate::init::Init;
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, RmsNorm, ShortConv, check_conv, merge_heads, project, softplus, split_heads};
use crate::{NnError, ParamScope};

/// Every λ starts at this.
const FIRST_LAMBDA: f64 = 1.0;

/// Configuration of [`MesaNet`].
#[derive(Config, Debug)]
pub struct MesaNetConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H.
    pub num_heads: usize,
    /// K, the width of a head's keys and values.
    #[config(default = "128")]
    pub head_dim: usize,
    /// Whether the output is multiplied by silu(g_proj x).
    #[config(default = "false")]
    pub use_output_gate: bool,
    /// Tokens that the short convolutions of queries and keys mix.
    #[config(default = "4")]
    pub conv_size: usize,
    /// No λ is below this; at least 0 and below 1, where λ starts.
    #[config(default = "0.25")]
    pub lambda_lower_bound: f64,
    /// Steps of the conjugate gradients over a sequence from its first token.
    #[config(default = "ops::mesa_net::ITERATIONS")]
    pub max_cg_step_training: usize,
    /// Steps of the conjugate gradients where a sequence goes on from a state.
    #[config(default = "ops::mesa_net::ITERATIONS")]
    pub max_cg_step_decoding: usize,
    /// ε of the output norm.
    #[config(default = "1e-6")]
    pub norm_eps: f64,
}

/// H_t = α_t H_{t−1} + β_t k_t k_tᵀ and G_t = α_t G_{t−1} + β_t k_t v_tᵀ, o_t = G_tᵀ (H_t + diag(λ))⁻¹ q_t by conjugate
/// gradients, with α_t = σ(a_proj x_t), β_t = σ(b_proj x_t), λ = softplus(lambda_params) + the lower bound, and normalised q
/// and k; the output is normalised for each head, and gated where `use_output_gate` says so (von Oswald et al. 2025).
///
/// The format's own implementation starts the conjugate gradients of a generated token elsewhere than those of a sequence,
/// and since they stop early its two results differ by about 1e-3. Here both start at 0, as in training: a token has the same
/// output however the sequence is cut.
#[derive(Module, Debug)]
pub struct MesaNet {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[H·K, hidden]`
    pub v_proj: Linear,
    /// `[H, hidden]`, with its bias.
    pub a_proj: Linear,
    /// `[H, hidden]`, with its bias.
    pub b_proj: Linear,
    /// λ before the softplus, `[H·K]`
    pub lambda_params: Param<Tensor<1>>,
    /// `[H·K, 1, W]`
    pub q_conv1d: Option<ShortConv>,
    /// `[H·K, 1, W]`
    pub k_conv1d: Option<ShortConv>,
    /// `[H·K, hidden]`
    pub g_proj: Option<Linear>,
    /// `[K]`
    pub o_norm: RmsNorm,
    /// `[hidden, H·K]`
    pub o_proj: Linear,
    /// No λ is below this.
    pub lambda_lower_bound: f64,
    /// Steps over a sequence from its first token, and where it goes on from a state.
    pub steps: [usize; 2],
    #[module(skip)]
    heads: Heads,
}

/// What a [`MesaNet`] layer keeps of the tokens it has seen.
#[derive(Clone, Debug)]
pub struct MesaLayerState {
    /// H and G.
    pub memory: MesaState,
    /// The last inputs of the convolutions of q and k, each `[N, channels, W]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for MesaLayerState {
    fn elements(&self) -> usize {
        let MesaState { keys, values } = &self.memory;
        keys.shape().num_elements() + values.shape().num_elements() + conv_elements(&self.conv)
    }
}

impl MesaNetConfig {
    /// Reads the fields of a `config.json`. `use_short_conv` is not read: in the format, the layers have their convolutions
    /// whatever it says.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        Ok(Self::new(common.hidden_size, fields.usize("num_heads", 16)?)
            .with_head_dim(fields.usize("head_dim", 128)?)
            .with_use_output_gate(fields.bool("use_output_gate", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_lambda_lower_bound(fields.optional_f64("lambda_lower_bound")?.unwrap_or(0.25))
            .with_max_cg_step_training(fields.usize("max_cg_step_training", ops::mesa_net::ITERATIONS)?)
            .with_max_cg_step_decoding(fields.usize("max_cg_step_decoding", ops::mesa_net::ITERATIONS)?)
            .with_norm_eps(common.norm_eps))
    }

    /// The heads, or an error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<Heads, NnError> {
        check_conv(Some(self.conv_size))?;
        let bound = self.lambda_lower_bound;
        if !(0.0..FIRST_LAMBDA).contains(&bound) {
            let message = format!("must be from 0 to below {FIRST_LAMBDA}, where λ starts, and it is {bound}");
            return Err(NnError::config("lambda_lower_bound", message));
        }
        for (field, steps) in
            [("max_cg_step_training", self.max_cg_step_training), ("max_cg_step_decoding", self.max_cg_step_decoding)]
        {
            if steps == 0 {
                return Err(NnError::config(field, "must be at least 1"));
            }
        }
        Heads::new(self.num_heads, None, self.head_dim, 1.0)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// No head or no channel; a convolution over no token; a lower bound that λ cannot start above; no step.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<MesaNet, NnError> {
        let heads = self.check()?;
        let width = heads.all_keys();
        let maps = Maps { scope, hidden: self.hidden_size, conv_size: Some(self.conv_size) };
        let by_head = |name: &str| Linear::new(&scope.at(name), self.hidden_size, heads.keys, true);
        // The inverse of the softplus.
        let first = (FIRST_LAMBDA - self.lambda_lower_bound).exp_m1().ln();
        Ok(MesaNet {
            q_proj: maps.linear("q_proj", width),
            k_proj: maps.linear("k_proj", width),
            v_proj: maps.linear("v_proj", width),
            a_proj: by_head("a_proj"),
            b_proj: by_head("b_proj"),
            lambda_params: scope.start("lambda_params", [width], &Init::Constant(first)),
            q_conv1d: maps.conv("q_conv1d", width),
            k_conv1d: maps.conv("k_conv1d", width),
            g_proj: self.use_output_gate.then(|| maps.linear("g_proj", width)),
            o_norm: RmsNorm::new(&scope.at("o_norm"), heads.value_width, self.norm_eps),
            o_proj: maps.output(width),
            lambda_lower_bound: self.lambda_lower_bound,
            steps: [self.max_cg_step_training, self.max_cg_step_decoding],
            heads,
        })
    }
}

impl MesaNet {
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
        past: Option<MesaLayerState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<MesaLayerState>), NnError> {
        context.check_input(&x, self.q_proj.weight.dims()[1])?;
        let heads = self.heads.keys;
        let iterations = self.steps[usize::from(past.is_some())];
        let (memory, conv) = past.map_or((None, Vec::new()), |past| (Some(past.memory), past.conv));
        let mut convs = Convs::new(context, conv);
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x.clone())?;
        let q = split_heads(convs.run(&self.q_conv1d, q)?, heads);
        let k = split_heads(convs.run(&self.k_conv1d, k)?, heads);
        let v = split_heads(v, heads);
        let log_decay = ops::log_gate(self.a_proj.forward(x.clone())?, None, 1.0, context.engine())?;
        let beta = strength(self.b_proj.forward(x.clone())?, false);
        let lambda = softplus(self.lambda_params.val()).add_scalar(self.lambda_lower_bound);
        let options = MesaOptions {
            initial_state: memory,
            cu_seqlens: context.cu_seqlens().cloned(),
            iterations: Some(iterations),
            l2_norm: true,
            engine: context.engine(),
            ..Default::default()
        };
        let lambda = lambda.reshape([heads, self.heads.key_width]);
        let (o, memory) = ops::mesa_net(q, k, v, log_decay, beta, lambda, options)?;
        let gate = match &self.g_proj {
            Some(g_proj) => Some(split_heads(g_proj.forward(x)?, heads)),
            None => None,
        };
        let o = gated_norm(o, gate, &self.o_norm, GateActivation::Silu, context.engine())?;
        let y = self.o_proj.forward(merge_heads(o))?;
        let state = context.keep_state().then(|| MesaLayerState { memory, conv: convs.finish() });
        Ok((y, state))
    }
}
