//! Cross entropy over a vocabulary.

use burn::tensor::{DType, Int, Tensor};

/// The label of a position that is not counted.
pub const IGNORED_LABEL: i64 = -100;

/// A sum of losses and the number of positions in it, both on the device.
///
/// Kept apart so that the mean can be taken over all micro-batches of an optimiser step.
#[derive(Clone, Debug)]
pub struct LossOutput {
    /// Σ over the counted positions, `[1]`, f32.
    pub sum: Tensor<1>,
    /// How many positions were counted, `[1]`, f32 (exact up to 2²⁴).
    pub count: Tensor<1>,
}

impl LossOutput {
    /// The mean over the counted positions, `[1]`; 0 when none is counted.
    pub fn mean(self) -> Tensor<1> {
        self.sum / self.count.clamp_min(1.0)
    }
}

/// Σ_rows (ln Σ_j e^{z_j} − z_label) over the rows whose label is not −100, in f32.
///
/// # Shapes
/// - `logits` `[rows, vocabulary]`
/// - `labels` `[rows]`, each −100 or below the size of the vocabulary (not checked: labels are on the device)
pub fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> LossOutput {
    let logits = logits.cast(DType::F32);
    let counted = labels.clone().not_equal_elem(IGNORED_LABEL).float().cast(DType::F32);
    let target = labels.clamp_min(0).unsqueeze_dim::<2>(1);
    let max = logits.clone().detach().max_dim(1);
    let shifted = logits - max;
    let log_sum = shifted.clone().exp().sum_dim(1).log();
    let rows = (log_sum - shifted.gather(1, target)).squeeze_dim::<1>(1);
    LossOutput { sum: (rows * counted.clone()).sum(), count: counted.sum() }
}
