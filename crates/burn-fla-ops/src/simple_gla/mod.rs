//! Linear attention with one decay a head: a number each token (simple GLA), a constant (retention), or none.
//!
//! ```text
//! S_t = e^{g_t} S_{t−1} + k_t v_tᵀ        S: [K, V], g_t a scalar
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! Katharopoulos et al.: *Transformers are RNNs* (2020), without decay; Sun et al.: *Retentive Network* (2023), constant
//! decay; Dao, Gu: *Transformers are SSMs* (2024), decay by token.

pub mod reference;

use burn::tensor::Tensor;

use crate::recurrence::{Decay, Problem};
use crate::{OpError, SequenceOptions};

/// The decay of [`simple_gla`](crate::simple_gla()), as a natural logarithm (at most 0).
#[derive(Clone, Debug)]
pub enum ScalarDecay {
    /// No decay.
    None,
    /// A constant for each head, `[H]`. It carries no gradient.
    PerHead(Tensor<1>),
    /// A number for each token and head, `[B, T, H]`.
    PerToken(Tensor<3>),
}

/// Linear attention with a scalar decay over whole sequences.
///
/// `S_t = e^{g_t} S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the state after the last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - `decay`: see [`ScalarDecay`]; f32 or the dtype of `q`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state, f32 `[N, H, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, a decay by token and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn simple_gla(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    decay: ScalarDecay,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let decay = match decay {
        ScalarDecay::None => Decay::None,
        // A detached tensor that requires gradients would still require them.
        ScalarDecay::PerHead(decay) => Decay::Head(decay.without_autodiff()),
        ScalarDecay::PerToken(decay) => Decay::Token(decay),
    };
    Problem::new("simple_gla", q, k, v, decay, options)?.run()
}
