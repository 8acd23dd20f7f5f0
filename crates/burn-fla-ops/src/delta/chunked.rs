//! The chunked form of the delta rule.
//!
//! Inside a chunk `G` is the inclusive running sum of the log decays, `E` the sum that goes with a read: `G` where the
//! state is read after the decay, the sum before the token where it is read before. With
//!
//! ```text
//! A_ij = β_i Σ_c p_ic k_jc e^{E_ic − G_jc}   (i > j)       M = (I + A)⁻¹
//! u = M (β ∘ v)       w = M (β ∘ e^E ∘ p)                  β_i r_iᵀ = u_i − w_iᵀ S
//! ```
//!
//! the chunk writes `Σ_j k_j (u_j − w_jᵀ S)ᵀ`, each with the decay of the tokens behind it, on top of the state `S` before it:
//! what is left is linear attention whose values are `u − w S`. Yang, Wang, Zhang, Shen, Kim: *Parallelizing Linear
//! Transformers with the Delta Rule over Sequence Length* (2024), after Bischof and Van Loan's form of products of
//! Householder matrices.

use burn::tensor::{Bool, Tensor};

use super::Operands;
use crate::chunked::{merge, running_sum, split};
use crate::key_decay::{KeyDecay, Reads};
use crate::matmul::product;
use crate::triangular;

/// The exponent of a pair that does not come about: its exponential is 0 in f32 and f64, without an infinity.
const NEVER: f64 = -1e30;

/// The outputs, and the state after the last token.
pub(super) fn run(operands: Operands, scale: f64, chunk: usize) -> (Tensor<4>, Tensor<4>) {
    let [b, t, h, dk] = operands.q.dims();
    let dv = operands.v.dims()[3];
    let q = split(operands.q, chunk).mul_scalar(scale);
    let k = split(operands.k, chunk);
    let v = split(operands.v, chunk);
    let beta = split(operands.beta, chunk);
    let p = operands.p.map(|p| split(p, chunk));
    let sums = operands.decay.map(|g| Sums::new(running_sum(split(g, chunk)), p.is_some()));
    let p = p.unwrap_or_else(|| k.clone());

    let (reads, scores) = scores(&q, &k, &p, sums.as_ref());
    let decayed = |x: Tensor<4>, exponent: Option<Tensor<4>>| match exponent {
        Some(exponent) => x * exponent.exp(),
        None => x,
    };
    let read = decayed(p, sums.as_ref().map(|s| s.read.clone()));
    // One substitution for both right-hand sides.
    let both = triangular::solve(reads * beta.clone(), Tensor::cat(vec![v * beta.clone(), read * beta], 3));
    let (u, w) = (both.clone().narrow(3, 0, dv), both.narrow(3, dv, dk));
    let written = decayed(k, sums.as_ref().map(|s| s.last.clone() - s.write.clone())).swap_dims(2, 3);
    let forget = sums.as_ref().map(|s| s.last.clone().exp().swap_dims(2, 3));

    let mut state = operands.state.reshape([b * h, 1, dk, dv]);
    let chunks = u.dims()[1];
    let (mut values, mut starts) = (Vec::with_capacity(chunks), Vec::with_capacity(chunks));
    for m in 0..chunks {
        let at = |x: &Tensor<4>| x.clone().narrow(1, m, 1);
        let value = at(&u) - product(at(&w), state.clone());
        let write = product(at(&written), value.clone());
        let kept = match &forget {
            Some(forget) => state.clone() * at(forget),
            None => state.clone(),
        };
        starts.push(state);
        values.push(value);
        state = kept + write;
    }
    let q = decayed(q, sums.map(|s| s.write));
    let o = product(q, Tensor::cat(starts, 1)) + product(scores, Tensor::cat(values, 1));
    (merge(o, b, t), state.reshape([b, h, dk, dv]))
}

/// Running sums of log decays, `[B·H, n, C, 1]` or `[B·H, n, C, K]`.
struct Sums {
    /// `G`
    write: Tensor<4>,
    /// `E`
    read: Tensor<4>,
    /// `G` of the last token, `[B·H, n, 1, …]`.
    last: Tensor<4>,
}

impl Sums {
    fn new(sum: Tensor<4>, before: bool) -> Self {
        let [bh, n, c, d] = sum.dims();
        let last = sum.clone().narrow(2, c - 1, 1);
        let read = if before {
            // Not `G − g`, whose rounding would make exponents that are positive.
            let zero = Tensor::zeros([bh, n, 1, d], (&sum.device(), sum.dtype()));
            Tensor::cat(vec![zero, sum.clone()], 2).narrow(2, 0, c)
        } else {
            sum.clone()
        };
        Self { write: sum, read, last }
    }
}

/// `Σ_c p_ic k_jc e^{E_ic − G_jc}` for `i > j` (what stands elsewhere is not to be read), and
/// `Σ_c q_ic k_jc e^{G_ic − G_jc}` for `i ≥ j`, zero elsewhere.
fn scores(q: &Tensor<4>, k: &Tensor<4>, p: &Tensor<4>, sums: Option<&Sums>) -> (Tensor<4>, Tensor<4>) {
    let columns = k.clone().swap_dims(2, 3);
    match sums {
        Some(sums) if sums.write.dims()[3] > 1 => {
            // Only the state after the decay is read here, so `E` is `G`.
            let decay = KeyDecay::from_sum(sums.write.clone());
            (decay.scores(p, k, Reads::Updated), decay.scores(q, k, Reads::Updated))
        }
        Some(sums) => {
            let decay = |rows: &Tensor<4>, diagonal: i64| {
                let exponent = rows.clone() - sums.write.clone().swap_dims(2, 3);
                let [.., rows, columns] = exponent.dims();
                let above = Tensor::<2, Bool>::tril_mask([rows, columns], diagonal, &exponent.device());
                exponent.mask_fill(above.unsqueeze(), NEVER).exp()
            };
            let reads = product(p.clone(), columns.clone()) * decay(&sums.read, -1);
            (reads, product(q.clone(), columns) * decay(&sums.write, 0))
        }
        None => (product(p.clone(), columns.clone()), product(q.clone(), columns).tril(0)),
    }
}
