//! The loss in plain tensor operations, strip by strip.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};

use crate::chunked::compute_dtype;
use crate::matmul::product;

/// The sum of the losses, `[1]`. The gradients are computed with it where an input is tracked, and tied to the inputs by
/// a term that is zero: `Σ x ∘ dx`, less itself without its gradient. `warp` `[1]` is the factor on a row's largest logit in
/// its gradient.
pub(super) fn linear_cross_entropy(
    x: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    counted: Tensor<1>,
    warp: Option<Tensor<1>>,
    strip: usize,
) -> Tensor<1> {
    let [n, _] = x.dims();
    let out = x.dtype();
    let dtype = compute_dtype(out);
    let tracked = x.is_tracked() || weight.is_tracked();
    let rows = x.clone().detach();
    // Rounded once for all strips.
    let rounded = weight.clone().detach().cast(out);
    let (mut sums, mut dx, mut dw) = (Vec::new(), Vec::new(), None);
    for first in (0..n).step_by(strip) {
        let size = strip.min(n - first);
        let rows = rows.clone().narrow(0, first, size);
        let target = labels.clone().narrow(0, first, size).clamp_min(0).unsqueeze_dim::<2>(1);
        let counted = counted.clone().narrow(0, first, size).unsqueeze_dim::<2>(1);
        let logits = product(rows.clone(), rounded.clone().transpose()).cast(dtype);
        let (top, place) = logits.clone().max_dim_with_indices(1);
        let shifted = logits - top.clone();
        let exponentials = shifted.clone().exp();
        let total = exponentials.clone().sum_dim(1);
        let losses = total.clone().log() - shifted.gather(1, target.clone());
        sums.push((losses * counted.clone()).sum());
        if tracked {
            let softmax = exponentials * (counted.clone() / total);
            let mut dlogits = softmax.scatter(1, target, counted.neg(), IndexingUpdateOp::Add);
            if let Some(warp) = &warp {
                dlogits = dlogits.scatter(1, place, top * warp.clone().unsqueeze(), IndexingUpdateOp::Add);
            }
            dx.push(product(dlogits.clone().cast(out), rounded.clone()).cast(dtype));
            let part = product(dlogits.transpose(), rows.cast(dtype));
            dw = Some(match dw {
                None => part,
                Some(sum) => sum + part,
            });
        }
    }
    let loss = Tensor::cat(sums, 0).sum();
    match dw {
        None => loss,
        Some(dw) => loss + tied(x, Tensor::cat(dx, 0), dtype) + tied(weight, dw, dtype),
    }
}

/// Zero, with the gradient `gradient` by `input`.
fn tied(input: Tensor<2>, gradient: Tensor<2>, dtype: DType) -> Tensor<1> {
    let along = (input.cast(dtype) * gradient).sum();
    along.clone() - along.detach()
}
