//! Softmax attention in plain tensor operations: query by query, which is the oracle, and as a whole, which runs.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::softmax};

use crate::chunked::compute_dtype;
use crate::{OpError, matmul};

/// Added to the scores of keys that a query must not see. Finite, so that no device has to be right about infinities.
pub(crate) const UNSEEN: f64 = -1e30;

/// Query by query over the keys it sees. Shapes as [`attention`](crate::attention()); `lengths` as its option.
pub fn sequential(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_forget: Option<Tensor<3>>,
    scale: f64,
    window: Option<usize>,
    lengths: Option<&[usize]>,
) -> Tensor<4> {
    let out = q.dtype();
    let dtype = compute_dtype(out);
    let [b, t, heads, keys] = q.dims();
    let [_, s, groups, values] = v.dims();
    let (q, k, v) = (q.cast(dtype), k.cast(dtype), v.cast(dtype));
    let share = heads / groups;
    let mut rows = Vec::with_capacity(b);
    for row in 0..b {
        let first = lengths.map_or(0, |lengths| s - lengths[row]);
        let mut outputs = Vec::with_capacity(t);
        for i in 0..t {
            let end = s - t + i + 1;
            let start = first.max(window.map_or(0, |window| end.saturating_sub(window)));
            let seen = end - start;
            let part = |x: &Tensor<4>| x.clone().narrow(0, row, 1).narrow(1, start, seen);
            let q = q.clone().narrow(0, row, 1).narrow(1, i, 1).reshape([1, groups, share, 1, keys]);
            // [1, G, 1, seen, K]
            let k = part(&k).swap_dims(1, 2).unsqueeze_dim::<5>(2);
            let v = part(&v).swap_dims(1, 2).unsqueeze_dim::<5>(2);
            let mut scores = (q * k).sum_dim(4).mul_scalar(scale);
            if let Some(gate) = &log_forget {
                let gate = gate.clone().cast(dtype).narrow(0, row, 1).narrow(1, start, seen);
                // What the gates after each key leave of it.
                let whole = gate.clone().sum_dim(1);
                let after = whole - gate.cumsum(1);
                scores = scores + after.swap_dims(1, 2).reshape([1, groups, share, seen, 1]);
            }
            let weights = (scores.clone() - scores.detach().max_dim(3)).exp();
            let o = (weights.clone() * v).sum_dim(3) / weights.sum_dim(3);
            outputs.push(o.reshape([1, 1, heads, values]));
        }
        rows.push(Tensor::cat(outputs, 1));
    }
    Tensor::cat(rows, 0).cast(out)
}

/// All queries at once. Shapes as [`attention`](crate::attention()).
pub(crate) fn parallel(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_forget: Option<Tensor<3>>,
    scale: f64,
    window: Option<usize>,
    lengths: Option<&[usize]>,
) -> Result<Tensor<4>, OpError> {
    let [b, t, heads, keys] = q.dims();
    let [_, s, groups, values] = v.dims();
    let out = q.dtype();
    let dtype = compute_dtype(out);
    // Keys that no query of this input sees.
    let reach = window.map_or(s, |window| s.min(t + window - 1));
    let (k, v) = (last(k, reach), last(v, reach));
    // The query heads that share a key head stand below each other in one product: keys are not repeated.
    let share = heads / groups;
    let q = q.swap_dims(1, 2).reshape([b, groups, share * t, keys]);
    let scores = matmul(q, k.permute([0, 2, 3, 1]))?.cast(dtype).reshape([b, heads, t, reach]).mul_scalar(scale);
    let scores = match log_forget {
        Some(gate) => {
            let sums = last(gate.cast(dtype), reach).cumsum(1).swap_dims(1, 2);
            let own = sums.clone().narrow(2, reach - t, t).reshape([b, heads, t, 1]);
            scores + (own - sums.reshape([b, heads, 1, reach]))
        }
        None => scores,
    };
    let device = scores.device();
    let scores = match unseen(t, reach, window, lengths, &device) {
        Some(unseen) => scores + unseen.cast(dtype).mul_scalar(UNSEEN),
        None => scores,
    };
    let weights = softmax(scores, 3).cast(out).reshape([b, groups, share * t, reach]);
    let o = matmul(weights, v.swap_dims(1, 2))?;
    Ok(o.reshape([b, heads, t, values]).swap_dims(1, 2))
}

/// Above zero where query i must not see key j of the last `keys` keys: a later one, one before the window, or one before
/// the first of its row; f32 `[1 or B, 1, T, keys]`. `None` when every query sees every key.
pub(crate) fn unseen(
    t: usize,
    keys: usize,
    window: Option<usize>,
    lengths: Option<&[usize]>,
    device: &Device,
) -> Option<Tensor<4>> {
    let device = &device.clone().without_autodiff();
    let in_window = window.is_none_or(|window| keys <= window);
    let lengths = lengths.filter(|lengths| lengths.iter().any(|length| *length < keys));
    if t == 1 && in_window && lengths.is_none() {
        return None;
    }
    let column = |length: usize| Tensor::<1, Int>::arange((keys - length) as i64..keys as i64, device);
    let distance = column(t).unsqueeze_dim::<2>(1) - column(keys).unsqueeze_dim::<2>(0);
    let mut hidden = distance.clone().lower_elem(0).float().cast(DType::F32);
    if let (Some(window), false) = (window, in_window) {
        hidden = hidden + distance.greater_elem(window as i64 - 1).float().cast(DType::F32);
    }
    let hidden = hidden.unsqueeze_dims::<4>(&[0, 1]);
    let Some(lengths) = lengths else {
        return Some(hidden);
    };
    let absent: Vec<f32> = lengths
        .iter()
        .flat_map(|length| (0..keys).map(move |key| if key + length.min(&keys) < keys { 1.0 } else { 0.0 }))
        .collect();
    Some(hidden + Tensor::from_data(TensorData::new(absent, [lengths.len(), 1, 1, keys]), device))
}

/// The last `count` along the second dimension.
fn last<const D: usize>(x: Tensor<D>, count: usize) -> Tensor<D> {
    let length = x.dims()[1];
    if count == length { x } else { x.narrow(1, length - count, count) }
}
