//! Between `[batch, tokens, heads · width]` and `[batch, tokens, heads, width]`.

use burn::tensor::Tensor;

/// `[B, T, H·D]` to `[B, T, H, D]`, heads outermost.
pub fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, t, width] = x.dims();
    x.reshape([b, t, heads, width / heads])
}

/// `[B, T, H, D]` to `[B, T, H·D]`.
pub fn merge_heads(x: Tensor<4>) -> Tensor<3> {
    let [b, t, heads, width] = x.dims();
    x.reshape([b, t, heads * width])
}

/// Grouped heads: `[B, T, G, D]` to `[B, T, G·times, D]`, head j serving the contiguous heads j·times to
/// j·times + times − 1.
pub fn repeat_heads(x: Tensor<4>, times: usize) -> Tensor<4> {
    if times == 1 {
        return x;
    }
    let [b, t, groups, width] = x.dims();
    x.unsqueeze_dim::<5>(3).expand([b, t, groups, times, width]).reshape([b, t, groups * times, width])
}
