//! The token recurrence of the state space duality in plain tensor operations: the oracle. The chunked form is that of
//! [`simple_gla`](crate::simple_gla()).

use burn::tensor::Tensor;

use super::HeadGroups;
use crate::chunked::compute_dtype;

/// Token by token and with every head's own group picked by its index: `S_t = e^{Δ_t A} S_{t−1} + B_t (Δ_t x_t)ᵀ`,
/// `y_t = S_tᵀ C_t + D ∘ x_t`.
///
/// Shapes as [`ssd`](crate::ssd()); `state` is `[B, H, N_s, P]`, `skip` `[H]` or `[H·P]`.
#[allow(clippy::too_many_arguments)]
pub fn recurrent(
    x: Tensor<4>,
    delta: Tensor<3>,
    a: Tensor<1>,
    b: Tensor<4>,
    c: Tensor<4>,
    skip: Option<Tensor<1>>,
    groups: HeadGroups,
    state: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    let (out, dtype) = (x.dtype(), compute_dtype(x.dtype()));
    let [batch, tokens, heads, width] = x.dims();
    let [_, _, count, states] = b.dims();
    let (x, delta, a) = (x.cast(dtype), delta.cast(dtype), a.cast(dtype));
    let group = |head: usize| match groups {
        HeadGroups::Contiguous => head / (heads / count),
        HeadGroups::Tiled => head % count,
    };
    let each = |x: Tensor<4>| {
        let x = x.cast(dtype);
        Tensor::cat((0..heads).map(|head| x.clone().narrow(2, group(head), 1)).collect(), 2)
    };
    let (b, c) = (each(b), each(c));
    let mut state = state.cast(dtype);
    let mut outputs = Vec::with_capacity(tokens);
    for t in 0..tokens {
        let step = delta.clone().narrow(1, t, 1).reshape([batch, heads, 1, 1]);
        let decay = (step.clone() * a.clone().reshape([1, heads, 1, 1])).exp();
        let token = |x: &Tensor<4>, shape: [usize; 4]| x.clone().narrow(1, t, 1).reshape(shape);
        let input = token(&x, [batch, heads, 1, width]) * step;
        state = state * decay + token(&b, [batch, heads, states, 1]) * input;
        let read = state.clone() * token(&c, [batch, heads, states, 1]);
        outputs.push(read.sum_dim(2).reshape([batch, 1, heads, width]));
    }
    let y = Tensor::cat(outputs, 1);
    let y = match skip {
        Some(weight) => y + self::skip(x, weight.cast(dtype)),
        None => y,
    };
    (y.cast(out), state)
}

/// `D ∘ x` of `[B, T, H, P]`, with `D` `[H]` or `[H·P]`.
pub(super) fn skip(x: Tensor<4>, weight: Tensor<1>) -> Tensor<4> {
    let [_, _, heads, width] = x.dims();
    let by_channel = weight.dims()[0] / heads;
    debug_assert!(by_channel == 1 || by_channel == width);
    x * weight.reshape([1, 1, heads, by_channel])
}
