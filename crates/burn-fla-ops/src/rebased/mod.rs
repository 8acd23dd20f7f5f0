//! Linear attention whose kernel is the square of the score, normalised.
//!
//! ```text
//! a_ij = scale · q_i · k_j
//! o_i = Σ_{j ≤ i} a_ij² v_j / (Σ_{j ≤ i} a_ij² + ε)
//! ```
//!
//! Aksenov et al.: *Linear Transformers with Learnable Kernel Functions are Better In-Context Models* (2024).

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::positive_eps;
use crate::polynomial::Polynomial;
use crate::{OpError, SequenceOptions};

pub(crate) const fn kernel(eps: f64) -> Polynomial {
    Polynomial { constant: 0.0, linear: 0.0, quadratic: 1.0, eps }
}

/// The rows of the state of [`rebased`](crate::rebased()) for keys of `keys` channels: K(K + 1)/2.
pub const fn features(keys: usize) -> usize {
    kernel(1.0).features(keys)
}

/// Linear attention with a quadratic kernel over whole sequences. Queries and keys come normalised, as the layer does.
///
/// `o_i = Σ_{j ≤ i} a_ij² v_j / (Σ_{j ≤ i} a_ij² + eps)` with `a_ij = scale · q_i · k_j`. Returns `o` and the state after
/// the last token, which is constant in the number of tokens: with `φ(x) = [x_a² (all a), √2 x_a x_b (a < b)]`, the `F` =
/// [`features`]`(K)` rows `Σ_j φ(k_j) [v_jᵀ, 1]`.
///
/// Going on from a state gives what the whole sequence gives, the ε of the denominator included, but in other roundings:
/// within a chunk `a²` is squared from the score, and as small as it is; from the state it is a sum of `F` products that
/// cancel, exact to the last bit of `scale² |q|² |k|²` only. Where a query is orthogonal to every key seen so far, which
/// takes a sequence of very few tokens, f32 then differs in the digits below `1e-7 scale² |q|² |k|² / (Σ a² + eps)`.
/// Chunks therefore begin at the first token of a call, and only a sequence longer than a chunk meets the state at all.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state, f32 `[N, H, F, V + 1]`, whose last column is
///   the normaliser. An initial state has the same shape.
///
/// # Gradients
/// With respect to `q`, `k`, `v` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together, and for an `eps` that is not above 0.
pub fn rebased(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    eps: f64,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    positive_eps("rebased", eps)?;
    kernel(eps).run("rebased", q, k, v, options)
}
