//! The chunk machinery that the tensor-op references of decayed linear recurrences share.
//!
//! Legend: `B` batch, `T` tokens, `H` heads, `K`/`V` key and value size, `C` tokens a chunk, `n` chunks. A chunked tensor
//! is `[B·H, n, C, D]`. `G` is the running sum of log decays inside a chunk, inclusive.

use burn::tensor::{DType, Device, Int, Tensor};

use crate::matmul::product;

/// The dtype in which a reference computes: f64 for f64 inputs, f32 for everything else.
pub(crate) fn compute_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `[B, T, H, D]` as chunks `[B·H, n, C, D]`, the last one filled up with zeros.
pub(crate) fn split(x: Tensor<4>, chunk: usize) -> Tensor<4> {
    let [b, t, h, d] = x.dims();
    let n = t.div_ceil(chunk);
    let x = x.swap_dims(1, 2);
    let missing = n * chunk - t;
    let x = if missing > 0 {
        let zeros = Tensor::zeros([b, h, missing, d], (&x.device(), x.dtype()));
        Tensor::cat(vec![x, zeros], 2)
    } else {
        x
    };
    x.reshape([b * h, n, chunk, d])
}

/// Chunks `[B·H, n, C, D]` as `[B, T, H, D]`.
pub(crate) fn merge(x: Tensor<4>, batch: usize, tokens: usize) -> Tensor<4> {
    let [bh, n, chunk, d] = x.dims();
    let h = bh / batch;
    let x = x.reshape([batch, h, n * chunk, d]);
    let x = if n * chunk > tokens { x.narrow(2, 0, tokens) } else { x };
    x.swap_dims(1, 2)
}

/// A lower triangle of ones, `[C, C]`, the diagonal included.
pub(crate) fn lower(size: usize, device: &Device, dtype: DType) -> Tensor<2> {
    let rows = Tensor::<1, Int>::arange(0..size as i64, device).reshape([size, 1]);
    let cols = Tensor::<1, Int>::arange(0..size as i64, device).reshape([1, size]);
    let mask = rows.expand([size, size]).greater_equal(cols.expand([size, size]));
    mask.float().cast(dtype)
}

/// The running sum `G` of log decays inside each chunk, by a product with a triangle: it is faster than a cumulative sum
/// wherever products are fast, and so is its gradient.
pub(crate) fn running_sum(g: Tensor<4>) -> Tensor<4> {
    let [bh, n, c, _] = g.dims();
    let triangle = lower(c, &g.device(), g.dtype()).reshape([1, 1, c, c]);
    product(triangle.expand([bh, n, c, c]), g)
}

/// Passes the state from chunk to chunk: `S_{m+1} = decay_m ∘ S_m + local_m`.
///
/// `local` is `[B·H, n, K, V]`, `decay` broadcasts against it, `first` is `[B·H, 1, K, V]`. Returns the state before
/// each chunk, `[B·H, n, K, V]`, and the one after the last, `[B·H, 1, K, V]`.
pub(crate) fn pass_states(local: Tensor<4>, decay: Tensor<4>, first: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let n = local.dims()[1];
    let mut state = first;
    let mut starts = Vec::with_capacity(n);
    for m in 0..n {
        starts.push(state.clone());
        state = state * decay.clone().narrow(1, m, 1) + local.clone().narrow(1, m, 1);
    }
    (Tensor::cat(starts, 1), state)
}
