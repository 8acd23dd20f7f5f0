//! Two forms of the selective scan in plain tensor operations: the token recurrence, which is the oracle, and the chunked
//! form, which devices without kernels run.

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::chunked::compute_dtype;

/// Token by token: `h_t = e^{Δ_t A} ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ`, `y_t = h_t C_t`.
///
/// Shapes as [`selective_scan`](crate::selective_scan()), without `D` and `z`; `state` is `[B, I, N_s]`. `y` is in the
/// dtype of computation: f32, or f64 for f64.
pub fn recurrent(
    x: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    state: Tensor<3>,
) -> (Tensor<3>, Tensor<3>) {
    let dtype = compute_dtype(x.dtype());
    let [batch, tokens, channels] = x.dims();
    let states = a.dims()[1];
    let (x, delta, b, c) = (x.cast(dtype), delta.cast(dtype), b.cast(dtype), c.cast(dtype));
    let a = a.cast(dtype).reshape([1, channels, states]);
    let mut h = state.cast(dtype);
    let mut outputs = Vec::with_capacity(tokens);
    for t in 0..tokens {
        let column = |x: &Tensor<3>| x.clone().narrow(1, t, 1).reshape([batch, channels, 1]);
        let row = |x: &Tensor<3>| x.clone().narrow(1, t, 1);
        let step = column(&delta);
        h = h * (step.clone() * a.clone()).exp() + step * column(&x) * row(&b);
        outputs.push((h.clone() * row(&c)).sum_dim(2).reshape([batch, 1, channels]));
    }
    (Tensor::cat(outputs, 1), h)
}

/// The chunked form of [`recurrent`]: the tokens of a chunk one after the other, all chunks at once, each from zero; then
/// the states pass from chunk to chunk in a logarithmic number of steps; then every token gets the share of the state
/// that its chunk began with, `e^{G_t A} ∘ h₀` with `G_t` the sum of the steps of the chunk up to it.
///
/// The number of operations is of the order of `chunk` and the logarithm of the number of chunks. No exponent is
/// positive. Where Burn keeps operands for a gradient, they are four tensors `[B, T, I, N_s]`; elsewhere nothing larger
/// than `[B, T / chunk, I, N_s]` lives longer than a step.
pub fn chunked(
    x: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    state: Tensor<3>,
    chunk: usize,
) -> (Tensor<3>, Tensor<3>) {
    let dtype = compute_dtype(x.dtype());
    let device = x.device();
    let [batch, tokens, channels] = x.dims();
    let states = a.dims()[1];
    let n = tokens.div_ceil(chunk);
    // A token that fills up the last chunk has Δ = 0: it leaves the state as it is.
    let delta = split(delta.cast(dtype), chunk);
    let input = split(x.cast(dtype), chunk) * delta.clone();
    let (b, c) = (split(b.cast(dtype), chunk), split(c.cast(dtype), chunk));
    // The state is held as [.., N_s, I] here, so that the long dimension is the innermost.
    let a = a.cast(dtype).swap_dims(0, 1).reshape([1, states, channels]);
    let state = state.cast(dtype).swap_dims(1, 2).reshape([batch, 1, states, channels]);
    let row = |x: &Tensor<3>, t: usize| x.clone().narrow(1, t, 1);
    let column = |x: &Tensor<3>, t: usize| row(x, t).swap_dims(1, 2);

    // Within the chunks. The first chunk begins with the given state, the others with zero.
    let mut h = state;
    if n > 1 {
        h = Tensor::cat(vec![h, Tensor::zeros([batch, n - 1, states, channels], (&device, dtype))], 1);
    }
    let mut h = h.reshape([batch * n, states, channels]);
    let mut outputs = Vec::with_capacity(chunk);
    let mut sums = Vec::with_capacity(chunk);
    for t in 0..chunk {
        let step = row(&delta, t);
        h = h * (step.clone() * a.clone()).exp() + row(&input, t) * column(&b, t);
        outputs.push((h.clone() * column(&c, t)).sum_dim(1));
        sums.push(match sums.last() {
            Some(sum) => step + Tensor::clone(sum),
            None => step,
        });
    }
    let mut end = h.reshape([batch, n, states, channels]);

    if n > 1 {
        let by_chunk = (sums[chunk - 1].clone() * a.clone()).exp().reshape([batch, n, states, channels]);
        let ends = scan(end, by_chunk);
        end = ends.clone().narrow(1, n - 1, 1);
        // From the second chunk on; what the first began with is in its outputs already.
        let rest = (n - 1) * batch;
        let later = |x: Tensor<3>| {
            let [_, rows, columns] = x.dims();
            x.reshape([batch, n, rows, columns]).narrow(1, 1, n - 1).reshape([rest, rows, columns])
        };
        let starts = ends.narrow(1, 0, n - 1).reshape([rest, states, channels]);
        let (c, nothing) = (later(c), Tensor::zeros([batch, 1, channels], (&device, dtype)));
        for (t, (output, sum)) in outputs.iter_mut().zip(sums).enumerate() {
            let kept = (later(sum) * a.clone()).exp() * starts.clone();
            let share = (kept * column(&c, t)).sum_dim(1).reshape([batch, n - 1, channels]);
            let share = Tensor::cat(vec![nothing.clone(), share], 1).reshape([batch * n, 1, channels]);
            *output = output.clone() + share;
        }
    }
    let y = Tensor::cat(outputs, 1).reshape([batch, n * chunk, channels]).narrow(1, 0, tokens);
    (y, end.reshape([batch, states, channels]).swap_dims(1, 2))
}

/// The states after each chunk, from those that each chunk alone would end with: `e_m ← e_m + p_m ∘ e_{m−1}`, with the
/// decay `p_m` of a whole chunk, by doubling the reach. Both `[B, n, N_s, I]`.
fn scan(mut ends: Tensor<4>, mut decay: Tensor<4>) -> Tensor<4> {
    let n = ends.dims()[1];
    let mut reach = 1;
    while reach < n {
        let rest = n - reach;
        let first = |x: &Tensor<4>, count: usize| x.clone().narrow(1, 0, count);
        let last = |x: &Tensor<4>| x.clone().narrow(1, reach, rest);
        let reached = last(&ends) + last(&decay) * first(&ends, rest);
        ends = Tensor::cat(vec![first(&ends, reach), reached], 1);
        if reach * 2 < n {
            decay = Tensor::cat(vec![first(&decay, reach), last(&decay) * first(&decay, rest)], 1);
        }
        reach *= 2;
    }
    ends
}

/// `[B, T, D]` as chunks `[B·n, C, D]`, the last one filled up with zeros.
fn split(x: Tensor<3>, chunk: usize) -> Tensor<3> {
    let [b, t, d] = x.dims();
    let n = t.div_ceil(chunk);
    let missing = n * chunk - t;
    let x = match missing {
        0 => x,
        _ => {
            let zeros = Tensor::zeros([b, missing, d], (&x.device(), x.dtype()));
            Tensor::cat(vec![x, zeros], 1)
        }
    };
    x.reshape([b * n, chunk, d])
}

/// `(y + D ∘ x) ∘ silu(z)` in the dtype of `y`, the result in that of `x`.
pub fn skip_and_gate(y: Tensor<3>, x: Tensor<3>, skip: Option<Tensor<1>>, gate: Option<Tensor<3>>) -> Tensor<3> {
    let (dtype, out) = (y.dtype(), x.dtype());
    let y = match skip {
        Some(skip) => y + x.cast(dtype) * skip.cast(dtype).unsqueeze::<3>(),
        None => y,
    };
    let y = match gate {
        Some(gate) => y * silu(gate.cast(dtype)),
        None => y,
    };
    y.cast(out)
}
