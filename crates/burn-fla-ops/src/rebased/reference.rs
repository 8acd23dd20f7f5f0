//! The two oracles of [`rebased`](crate::rebased()).

use burn::tensor::Tensor;

use super::kernel;
use crate::OpError;
use crate::polynomial::reference::{Problem, zero_state};

/// The quadratic form over the whole sequence, as the equation stands. Shapes as [`rebased`](crate::rebased()).
///
/// # Errors
/// [`OpError`] where shapes do not fit together.
pub fn parallel(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, scale: f64, eps: f64) -> Result<Tensor<4>, OpError> {
    Problem { polynomial: kernel(eps), scale, chunk: 1 }.parallel(q, k, v)
}

/// Token by token from `state` `[B, H, F, V + 1]`, zeros where there is none. Shapes as [`rebased`](crate::rebased()).
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    eps: f64,
    state: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>) {
    let state = state.unwrap_or_else(|| zero_state(kernel(eps), &q, v.dims()[3]));
    Problem { polynomial: kernel(eps), scale, chunk: 1 }.recurrent(q, k, v, state)
}
