//! Native sparse attention in plain tensor operations: query by query, which is the oracle, and as a whole, which runs.

use burn::tensor::{DType, Tensor, TensorData, activation::softmax};

use super::NsaOptions;
use super::select::{network, select};
use crate::attention::reference::{UNSEEN, unseen};
use crate::chunked::compute_dtype;
use crate::{OpError, matmul};

/// Query by query: blocks by their numbers, chosen by the sorting network, and only their tokens looked at.
///
/// Shapes as [`nsa`](crate::nsa()); `options.lengths` and `options.cu_seqlens` are not looked at.
pub fn sequential(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, gates: [Tensor<3>; 3], options: &NsaOptions) -> Tensor<4> {
    let [b, t, heads, keys] = q.dims();
    let [_, s, groups, values] = v.dims();
    let share = heads / groups;
    let size = options.block_size;
    let scale = options.scale.unwrap_or_else(|| (keys as f64).powf(-0.5));
    let mut rows = Vec::new();
    for (row, group) in (0..b).flat_map(|row| (0..groups).map(move |group| (row, group))) {
        let head = |x: &Tensor<4>| x.clone().narrow(0, row, 1).narrow(2, group, 1).squeeze_dims::<2>(&[0, 2]);
        let (k, v) = (head(&k), head(&v));
        let mut outputs = Vec::new();
        for i in 0..t {
            let at = s - t + i;
            let heads_of = |x: &Tensor<4>| x.clone().narrow(0, row, 1).narrow(1, i, 1).narrow(2, group * share, share);
            let q = heads_of(&q).reshape([share, keys]);
            let gate = |index: usize| heads_of(&gates[index].clone().unsqueeze_dim::<4>(3)).reshape([share, 1]);
            let attend = |k: Tensor<2>, v: Tensor<2>, scale: f64| {
                let weights = softmax(q.clone().matmul(k.transpose()).mul_scalar(scale), 1);
                (weights.clone().matmul(v), weights)
            };
            let mut o = Tensor::zeros([share, values], (&q.device(), q.dtype())) * gate(0);
            let mut block_weights = Vec::new();
            let whole = (at + 1) / size;
            if whole > 0 {
                let mean = |x: &Tensor<2>| {
                    let means = (0..whole).map(|block| x.clone().narrow(0, block * size, size).mean_dim(0));
                    Tensor::cat(means.collect(), 0)
                };
                let (compressed, weights) = attend(mean(&k), mean(&v), scale);
                o = o + compressed * gate(0);
                block_weights =
                    weights.detach().sum_dim(0).into_data().convert::<f64>().try_to_vec().unwrap_or_default();
            }
            let take = options.block_counts.next_power_of_two();
            let order = network(at / size, size, take, |block| block_weights[block]);
            let tokens = |x: &Tensor<2>| {
                let blocks = order.iter().enumerate().filter(|(_, block)| **block >= 0).map(|(place, block)| {
                    let start = *block as usize * size;
                    let x = x.clone().narrow(0, start, size.min(at + 1 - start));
                    if place < options.block_counts { x } else { x.detach() }
                });
                Tensor::cat(blocks.collect(), 0)
            };
            o = o + attend(tokens(&k), tokens(&v), scale).0 * gate(1);
            if let Some(window) = options.window {
                let start = (at + 1).saturating_sub(window);
                let tokens = |x: &Tensor<2>| x.clone().narrow(0, start, at + 1 - start);
                o = o + attend(tokens(&k), tokens(&v), (keys as f64).powf(-0.5)).0 * gate(2);
            }
            outputs.push(o.reshape([1, 1, share, values]));
        }
        rows.push(Tensor::cat(outputs, 1));
    }
    let rows: Vec<_> = rows.chunks(groups).map(|groups| Tensor::cat(groups.to_vec(), 2)).collect();
    Tensor::cat(rows, 0)
}

/// All queries of rows with all their keys at once; f32 for bf16 inputs, so that rounding chooses no blocks.
pub(crate) fn parallel(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gates: [Tensor<3>; 3],
    options: &NsaOptions,
) -> Result<Tensor<4>, OpError> {
    let out = q.dtype();
    let dtype = compute_dtype(out);
    let [b, t, heads, keys] = q.dims();
    let [_, s, groups, values] = v.dims();
    let share = heads / groups;
    let (size, first) = (options.block_size, s - t);
    let blocks = s.div_ceil(size);
    let device = q.device();
    let own_scale = (keys as f64).powf(-0.5);
    let scale = options.scale.unwrap_or(own_scale);
    let [compression_gate, selection_gate, window_gate] =
        gates.map(|gate| gate.cast(dtype).swap_dims(1, 2).reshape([b, groups, share * t, 1]));
    // The query heads that share a key head stand below each other in one product: keys are not repeated.
    let q = q.cast(dtype).swap_dims(1, 2).reshape([b, groups, share * t, keys]);
    let (k, v) = (k.cast(dtype).swap_dims(1, 2), v.cast(dtype).swap_dims(1, 2));
    let by_head = |x: Tensor<4>, columns: usize| x.reshape([b, groups, share, t, columns]);
    let below = |x: Tensor<5>| {
        let columns = x.dims()[4];
        x.reshape([b, groups, share * t, columns])
    };

    let (mean_k, mean_v) = (means(k.clone(), size), means(v.clone(), size));
    let whole = |i: usize| (first + i + 1) / size;
    let visible: Vec<f32> =
        (0..t).flat_map(|i| (0..blocks).map(move |block| if block < whole(i) { 1.0 } else { 0.0 })).collect();
    let visible = Tensor::<5>::from_data(TensorData::new(visible, [1, 1, 1, t, blocks]), (&device, DType::F32));
    let visible = visible.cast(dtype);
    let scores = by_head(matmul(q.clone(), mean_k.swap_dims(2, 3))?.mul_scalar(scale), blocks);
    // Where no block is whole yet the weights are even, and then nothing.
    let weights = softmax(scores + (visible.clone() - 1.0).mul_scalar(-UNSEEN), 4) * visible;
    let block_weights = weights.clone().detach().sum_dim(2).squeeze_dim::<4>(2);
    let mut o = matmul(below(weights), mean_v)? * compression_gate;

    let selection = select(block_weights, first, size, options.block_counts);
    let of_tokens = |x: Tensor<4>| {
        let [b, groups, t, blocks] = x.dims();
        let x = x.unsqueeze_dim::<5>(4).expand([b, groups, t, blocks, size]).reshape([b, groups, t, blocks * size]);
        x.narrow(3, 0, s).unsqueeze_dim::<5>(2)
    };
    let causal = unseen(t, s, None, None, &device).map(|unseen| unseen.cast(dtype).unsqueeze_dim::<5>(2));
    let raw = by_head(matmul(q.clone(), k.clone().swap_dims(2, 3))?, s);
    let chosen = of_tokens(selection.chosen);
    let hidden = match causal {
        Some(causal) => (chosen.neg() + 1.0) + causal,
        None => chosen.neg() + 1.0,
    };
    let masked = |scores: Tensor<5>| softmax(scores.mul_scalar(scale) + hidden.clone().mul_scalar(UNSEEN), 4);
    let selected = match selection.with_gradient {
        None => matmul(below(masked(raw.clone())), v.clone())?,
        Some(with_gradient) => {
            let open = of_tokens(with_gradient);
            let closed = open.clone().neg() + 1.0;
            let constant = by_head(matmul(q, k.detach().swap_dims(2, 3))?, s);
            let weights = masked(raw.clone() * open.clone() + constant * closed.clone());
            matmul(below(weights.clone() * open), v.clone())? + matmul(below(weights * closed), v.clone().detach())?
        }
    };
    o = o + selected * selection_gate;

    if let Some(window) = options.window {
        let scores = raw.mul_scalar(own_scale);
        let scores = match unseen(t, s, Some(window), None, &device) {
            Some(unseen) => scores + unseen.cast(dtype).unsqueeze_dim::<5>(2).mul_scalar(UNSEEN),
            None => scores,
        };
        o = o + matmul(below(softmax(scores, 4)), v)? * window_gate;
    }
    Ok(o.reshape([b, heads, t, values]).swap_dims(1, 2).cast(out))
}

/// The mean of each block of `[B, G, S, D]`, the last one's over the tokens it has, `[B, G, C, D]`.
fn means(x: Tensor<4>, size: usize) -> Tensor<4> {
    let [b, groups, s, d] = x.dims();
    let blocks = s.div_ceil(size);
    let (device, dtype) = (x.device(), x.dtype());
    let missing = blocks * size - s;
    let x = match missing {
        0 => x,
        _ => Tensor::cat(vec![x, Tensor::zeros([b, groups, missing, d], (&device, dtype))], 2),
    };
    let sums = x.reshape([b, groups, blocks, size, d]).sum_dim(3).squeeze_dim::<4>(3);
    let shares: Vec<f64> = (0..blocks).map(|block| 1.0 / size.min(s - block * size) as f64).collect();
    let shares = TensorData::new(shares, [1, 1, blocks, 1]).convert_dtype(dtype);
    sums * Tensor::from_data(shares, (&device, dtype))
}
