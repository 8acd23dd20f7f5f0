//! Linear attention with a quadratic kernel.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use burn_fla_ops as ops;

use super::based::{check_heads, polynomial_fields};
use super::{RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// ε of the norm on queries and keys, whatever `eps` is.
const NORM_EPS: f64 = 1e-5;

/// Configuration of [`Rebased`].
#[derive(Config, Debug)]
pub struct RebasedConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H, of queries, keys and values.
    #[config(default = "16")]
    pub num_heads: usize,
    /// Width K of a query and key head.
    #[config(default = "16")]
    pub feature_dim: usize,
    /// Whether queries and keys are multiplied by γ.
    #[config(default = "true")]
    pub use_gamma: bool,
    /// Whether β is added to queries and keys.
    #[config(default = "true")]
    pub use_beta: bool,
    /// Whether each query and key head is first brought to mean 0 and variance 1.
    #[config(default = "true")]
    pub normalize: bool,
    /// ε of the denominator.
    #[config(default = "1e-5")]
    pub eps: f64,
}

/// o_i = Σ_{j ≤ i} a_ij² v_j / (Σ_{j ≤ i} a_ij² + ε) with a_ij = K^−½ q̂_i · k̂_j and x̂ = γ ⊙ norm(x) + β for each head, with
/// a state of constant size (Aksenov et al. 2024).
#[derive(Module, Debug)]
pub struct Rebased {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[hidden, hidden]`
    pub v_proj: Linear,
    /// γ and β, shared by queries, keys and heads.
    pub feature_map: QuadraticMap,
    /// `[hidden, hidden]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
    /// ε of the denominator.
    pub eps: f64,
}

/// x̂ = γ ⊙ (x − mean) / √(variance + 1e-5) + β, each part optional.
#[derive(Module, Debug)]
pub struct QuadraticMap {
    /// γ, `[K]`.
    pub gamma: Option<Param<Tensor<1>>>,
    /// β, `[K]`.
    pub beta: Option<Param<Tensor<1>>>,
    /// Whether mean and variance are removed.
    pub normalize: bool,
}

impl QuadraticMap {
    /// Statistics in f32, the output in the type of `x`, `[…, K]`.
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let dtype = x.dtype();
        let mut x = x.cast(DType::F32);
        if self.normalize {
            x = x.clone() - x.mean_dim(3);
            let variance = x.clone().square().mean_dim(3);
            x = x / variance.add_scalar(NORM_EPS).sqrt();
        }
        if let Some(gamma) = &self.gamma {
            x = x * gamma.val().unsqueeze();
        }
        if let Some(beta) = &self.beta {
            x = x + beta.val().unsqueeze();
        }
        x.cast(dtype)
    }
}

impl RebasedConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let (heads, width) = polynomial_fields(fields)?;
        Ok(Self::new(common.hidden_size)
            .with_num_heads(heads)
            .with_feature_dim(width)
            .with_use_gamma(fields.bool("use_gamma", true)?)
            .with_use_beta(fields.bool("use_beta", true)?)
            .with_normalize(fields.bool("normalize", true)?)
            .with_eps(fields.positive("eps", 1e-5)?))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        check_heads(self.hidden_size, self.num_heads, self.feature_dim)?;
        if !self.normalize && !self.use_gamma {
            return Err(NnError::config("use_gamma", "must be true where normalize is false"));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(NnError::config("eps", format!("must be above 0, and it is {}", self.eps)));
        }
        Ok(())
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// A width that is not a multiple of the head count; a map that does nothing; an ε of 0.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Rebased, NnError> {
        self.check()?;
        let (hidden, keys) = (self.hidden_size, self.num_heads * self.feature_dim);
        let linear = |name, output| Linear::new(&scope.at(name), hidden, output, false);
        let map = scope.at("feature_map");
        Ok(Rebased {
            q_proj: linear("q_proj", keys),
            k_proj: linear("k_proj", keys),
            v_proj: linear("v_proj", hidden),
            feature_map: QuadraticMap {
                gamma: self.use_gamma.then(|| map.ones("gamma", [self.feature_dim])),
                beta: self.use_beta.then(|| map.zeros("beta", [self.feature_dim])),
                normalize: self.normalize,
            },
            o_proj: linear("o_proj", hidden),
            num_heads: self.num_heads,
            eps: self.eps,
        })
    }
}

impl Rebased {
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
        let [q, k, v] = project([&self.q_proj, &self.k_proj, &self.v_proj], x)?;
        let q = self.feature_map.forward(split_heads(q, self.num_heads));
        let k = self.feature_map.forward(split_heads(k, self.num_heads));
        let v = split_heads(v, self.num_heads);
        let (o, state) = ops::rebased(q, k, v, self.eps, context.options(past.map(|past| past.state)))?;
        let y = self.o_proj.forward(merge_heads(o))?;
        Ok((y, context.keep_state().then(|| RecurrentState { state, conv: Vec::new() })))
    }
}
