//! Linear attention with the exponential's Taylor polynomial of degree two as its kernel, normalised.
//!
//! ```text
//! a_ij = scale · q_i · k_j,   P = 1 + a + a²/2
//! o_i = Σ_{j ≤ i} P(a_ij) v_j / (Σ_{j ≤ i} P(a_ij) + 1e-6)
//! ```
//!
//! Arora et al.: *Simple linear attention language models balance the recall-throughput tradeoff* (2024).

pub mod reference;

use burn::tensor::Tensor;

use crate::polynomial::Polynomial;
use crate::{OpError, SequenceOptions};

pub(crate) const KERNEL: Polynomial = Polynomial { constant: 1.0, linear: 1.0, quadratic: 0.5, eps: 1e-6 };

/// The rows of the state of [`based`](crate::based()) for keys of `keys` channels: 1 + K + K(K + 1)/2.
pub const fn features(keys: usize) -> usize {
    KERNEL.features(keys)
}

/// Taylor linear attention over whole sequences.
///
/// `o_i = Σ_{j ≤ i} P(a_ij) v_j / (Σ_{j ≤ i} P(a_ij) + 1e-6)` with `P(a) = 1 + a + a²/2` and `a_ij = scale · q_i · k_j`.
/// Returns `o` and the state after the last token, which is constant in the number of tokens: with
/// `φ(x) = [1, x, x_a²/√2 (all a), x_a x_b (a < b)]`, the `F` = [`features`]`(K)` rows `Σ_j φ(k_j) [v_jᵀ, 1]`. Going on
/// from a state gives what the whole sequence gives, to rounding.
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
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn based(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    KERNEL.run("based", q, k, v, options)
}
