//! The forget gate of HGRN and HGRN2.

use burn::tensor::{DType, Tensor, activation};

use super::log_sigmoid;

/// A lower bound is taken to be at least this: where its softmax underflows, ln α and its gradient stay finite.
const SMALLEST_BOUND: f32 = 1e-30;

/// ln α and 1 − α of a forget gate α = β + (1 − β) σ(f), where β, the lower bound, is 0 when there is none. Both f32.
///
/// 1 − α is (1 − β) σ(−f): it keeps its digits where α is near 1.
///
/// # Shapes
/// - `f` and the outputs `[B, T, width]`
/// - `bound` `[width]`
pub(crate) fn forget_gate(f: Tensor<3>, bound: Option<Tensor<1>>) -> (Tensor<3>, Tensor<3>) {
    let f = f.cast(DType::F32);
    let rest = activation::sigmoid(f.clone().neg());
    match bound {
        None => (log_sigmoid(f), rest),
        Some(bound) => {
            let bound = bound.clamp_min(SMALLEST_BOUND).unsqueeze::<3>();
            let open = bound.clone().neg().add_scalar(1.0);
            ((bound + open.clone() * activation::sigmoid(f)).log(), open * rest)
        }
    }
}
