//! Linear attention with a Taylor kernel.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops as ops;

use super::{RecurrentState, SequenceContext};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Linear, merge_heads, project, split_heads};
use crate::{NnError, ParamScope};

/// Configuration of [`Based`].
#[derive(Config, Debug)]
pub struct BasedConfig {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Heads H, of queries, keys and values.
    #[config(default = "16")]
    pub num_heads: usize,
    /// Width K of a query and key head.
    #[config(default = "16")]
    pub feature_dim: usize,
}

/// o_i = Σ_{j ≤ i} P(a_ij) v_j / (Σ_{j ≤ i} P(a_ij) + 1e-6) with P(a) = 1 + a + a²/2 and a_ij = K^−½ q_i · k_j, the
/// exponential to the second order, with a state of constant size (Arora et al. 2024).
#[derive(Module, Debug)]
pub struct Based {
    /// `[H·K, hidden]`
    pub q_proj: Linear,
    /// `[H·K, hidden]`
    pub k_proj: Linear,
    /// `[hidden, hidden]`
    pub v_proj: Linear,
    /// `[hidden, hidden]`
    pub o_proj: Linear,
    /// Number of heads H.
    pub num_heads: usize,
}

/// The fields that the polynomial layers have in common: heads and the width of a query and key head.
pub(super) fn polynomial_fields(fields: &Fields<'_>) -> Result<(usize, usize), NnError> {
    let heads = fields.usize("num_heads", 16)?;
    let of_values = fields.usize("num_key_value_heads", heads)?;
    if of_values != heads {
        return Err(fields.error("num_key_value_heads", format!("must be num_heads {heads}, and it is {of_values}")));
    }
    if !fields.bool("causal", true)? {
        return Err(fields.error("causal", "false is not supported: every mixer of a language model is causal"));
    }
    // The other modes have another ε in the denominator.
    if let Some(mode) = fields.optional_str("mode")?
        && mode != "parallel"
    {
        return Err(fields.error("mode", format!("`{mode}` is not supported; supported: parallel")));
    }
    Ok((heads, fields.usize("feature_dim", 16)?))
}

/// An error for head counts that no polynomial layer can be built from.
pub(super) fn check_heads(hidden: usize, heads: usize, width: usize) -> Result<(), NnError> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        let message = format!("hidden_size {hidden} must be a multiple of it, and it is {heads}");
        return Err(NnError::config("num_heads", message));
    }
    if width == 0 {
        return Err(NnError::config("feature_dim", "must be at least 1"));
    }
    Ok(())
}

impl BasedConfig {
    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig) -> Result<Self, NnError> {
        let (heads, width) = polynomial_fields(fields)?;
        if let Some(name) = fields.optional_str("feature_name")?
            && name != "taylor_exp"
        {
            return Err(fields.error("feature_name", format!("`{name}` is not supported; supported: taylor_exp")));
        }
        // `eps` is not read: the causal form does not use it.
        Ok(Self::new(common.hidden_size).with_num_heads(heads).with_feature_dim(width))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        check_heads(self.hidden_size, self.num_heads, self.feature_dim)
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// A width that is not a multiple of the head count.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Based, NnError> {
        self.check()?;
        let (hidden, keys) = (self.hidden_size, self.num_heads * self.feature_dim);
        let linear = |name, output| Linear::new(&scope.at(name), hidden, output, false);
        Ok(Based {
            q_proj: linear("q_proj", keys),
            k_proj: linear("k_proj", keys),
            v_proj: linear("v_proj", hidden),
            o_proj: linear("o_proj", hidden),
            num_heads: self.num_heads,
        })
    }
}

impl Based {
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
        let q = split_heads(q, self.num_heads);
        let k = split_heads(k, self.num_heads);
        let v = split_heads(v, self.num_heads);
        let (o, state) = ops::based(q, k, v, context.options(past.map(|past| past.state)))?;
        let y = self.o_proj.forward(merge_heads(o))?;
        Ok((y, context.keep_state().then(|| RecurrentState { state, conv: Vec::new() })))
    }
}
