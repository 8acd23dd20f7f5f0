//! Attention with accumulated reflections in plain tensor operations: token by token, which is the oracle, and in chunks,
//! which runs.
//!
//! Within a chunk with rows `W` and `D = diag(β)`, the reflections after key j up to query i take `Σ_l w_l u_l` off the
//! key, where `u = (I + stril(D W Wᵀ))⁻¹ D W k_j` over the rows `l` from j + 1 to i: a part of a triangular inverse is the
//! inverse of the part.

use burn::tensor::{Tensor, activation::softmax};

use super::PathState;
use crate::OpError;
use crate::attention::reference::{UNSEEN, unseen};
use crate::chunked::compute_dtype;
use crate::matmul::product;
use crate::sequences::Piece;
use crate::triangular;

/// The tensors of a call.
pub(crate) struct Inputs {
    pub(crate) q: Tensor<4>,
    pub(crate) k: Tensor<4>,
    pub(crate) v: Tensor<4>,
    pub(crate) w: Tensor<4>,
    pub(crate) beta: Tensor<3>,
    pub(crate) log_forget: Option<Tensor<3>>,
}

impl Inputs {
    /// One sequence of a packed row.
    pub(crate) fn tokens(&self, piece: Piece) -> Self {
        Self {
            q: piece.tokens(&self.q),
            k: piece.tokens(&self.k),
            v: piece.tokens(&self.v),
            w: piece.tokens(&self.w),
            beta: piece.tokens(&self.beta),
            log_forget: self.log_forget.as_ref().map(|gate| piece.tokens(gate)),
        }
    }

    /// The forget gates, f32 (f64 for f64).
    pub(crate) fn gates(&self) -> Option<Tensor<3>> {
        let dtype = compute_dtype(self.q.dtype());
        self.log_forget.as_ref().map(|gate| gate.clone().cast(dtype))
    }
}

/// How to compute.
pub(crate) struct Problem {
    pub(crate) scale: f64,
    pub(crate) chunk: usize,
    pub(crate) lengths: Option<Vec<usize>>,
}

/// Token by token: every key seen is reflected, then one more stands beside them. Shapes as
/// [`path_attn`](crate::path_attn()).
pub fn recurrent(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    w: Tensor<4>,
    beta: Tensor<3>,
    log_forget: Option<Tensor<3>>,
    scale: f64,
) -> (Tensor<4>, Tensor<4>) {
    let [b, t, heads, keys] = q.dims();
    let [_, _, groups, values] = v.dims();
    let share = heads / groups;
    let mut seen: Option<Tensor<4>> = None;
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let token = |x: &Tensor<4>| x.clone().narrow(1, i, 1);
        let (w, k) = (token(&w), token(&k));
        let beta = beta.clone().narrow(1, i, 1).reshape([b, 1, groups, 1]);
        let all = match seen {
            Some(seen) => {
                let along = (seen.clone() * w.clone()).sum_dim(3);
                Tensor::cat(vec![seen - along * w * beta, k], 1)
            }
            // The first reflection has no key to act on: its gradient is zero, and not absent.
            None => k + (w * beta).mul_scalar(0.0),
        };
        let q = token(&q).reshape([b, 1, groups, share, keys]);
        let mut scores = (q * all.clone().unsqueeze_dim::<5>(3)).sum_dim(4).mul_scalar(scale);
        if let Some(gate) = &log_forget {
            let gate = gate.clone().narrow(1, 0, i + 1);
            let after = gate.clone().sum_dim(1) - gate.cumsum(1);
            scores = scores + after.reshape([b, i + 1, groups, share, 1]);
        }
        let weights = softmax(scores, 1);
        let o = (weights * v.clone().narrow(1, 0, i + 1).unsqueeze_dim::<5>(3)).sum_dim(1);
        outputs.push(o.reshape([b, 1, heads, values]));
        seen = Some(all);
    }
    (Tensor::cat(outputs, 1), seen.unwrap_or(k))
}

impl Problem {
    /// Chunk by chunk: the scores inside, and against the keys before, which the chunk then reflects.
    pub(crate) fn chunked(
        &self,
        inputs: Inputs,
        initial: Option<PathState>,
    ) -> Result<(Tensor<4>, PathState), OpError> {
        let out = inputs.q.dtype();
        let dtype = compute_dtype(out);
        let gates = inputs.gates();
        let Inputs { q, k, v, w, beta, .. } = inputs;
        let [b, t, heads, keys] = q.dims();
        let [_, _, groups, values] = v.dims();
        let share = heads / groups;
        let (mut before, v, gates) = match initial {
            Some(state) => {
                let gates =
                    gates.zip(state.log_forget).map(|(gate, past)| Tensor::cat(vec![past.cast(dtype), gate], 1));
                (Some(state.keys.cast(dtype).swap_dims(1, 2)), Tensor::cat(vec![state.values, v], 1), gates)
            }
            None => (None, v, gates),
        };
        let past = before.as_ref().map_or(0, |keys| keys.dims()[2]);
        let all_values = v.clone().cast(dtype).swap_dims(1, 2);
        let sums = gates.clone().map(|gates| gates.cumsum(1).swap_dims(1, 2));
        let q = q.cast(dtype).mul_scalar(self.scale).swap_dims(1, 2).reshape([b, groups, share, t, keys]);
        let (k, w) = (k.cast(dtype).swap_dims(1, 2), w.cast(dtype).swap_dims(1, 2));
        let beta = beta.cast(dtype).swap_dims(1, 2).reshape([b, groups, t, 1]);

        let mut outputs = Vec::new();
        for start in (0..t).step_by(self.chunk) {
            let size = self.chunk.min(t - start);
            let (end, seen) = (start + size, past + start + size);
            let part = |x: &Tensor<4>| x.clone().narrow(2, start, size);
            let (k, w, beta) = (part(&k), part(&w), part(&beta));
            let columns = w.clone().swap_dims(2, 3);
            let inverse = triangular::unchecked(product(w.clone() * beta.clone(), columns.clone()));
            // Queries of one key head stand below each other.
            let q = q.clone().narrow(3, start, size).reshape([b, groups, share * size, keys]);
            let along = product(q.clone(), columns).reshape([b * groups, share, size, size]).tril(0);
            let along = along.reshape([b, groups, share * size, size]);
            // u for the keys of the chunk, [l, j], and what u is of any earlier key: rows to be multiplied with it.
            let own = product(inverse.clone(), product(w.clone(), k.clone().swap_dims(2, 3)).tril(-1) * beta.clone());
            let earlier = product(inverse, w.clone() * beta);

            let mut scores = product(q.clone(), k.clone().swap_dims(2, 3)) - product(along.clone(), own.clone());
            let reflected = k - product(own.swap_dims(2, 3), w.clone());
            before = Some(match before {
                Some(keys) => {
                    let q = q - product(along, earlier.clone());
                    scores = Tensor::cat(vec![product(q, keys.clone().swap_dims(2, 3)), scores], 3);
                    let along = product(keys.clone(), earlier.swap_dims(2, 3));
                    Tensor::cat(vec![keys - product(along, w), reflected], 2)
                }
                None => reflected,
            });
            let mut scores = scores.reshape([b, heads, size, seen]);
            if let Some(sums) = &sums {
                let sums = sums.clone().narrow(2, 0, seen);
                let own = sums.clone().narrow(2, seen - size, size).reshape([b, heads, size, 1]);
                scores = scores + (own - sums.reshape([b, heads, 1, seen]));
            }
            let lengths =
                self.lengths.as_ref().map(|lengths| lengths.iter().map(|length| length - (t - end)).collect());
            let lengths: Option<Vec<usize>> = lengths;
            if let Some(unseen) = unseen(size, seen, None, lengths.as_deref(), &scores.device()) {
                scores = scores + unseen.cast(dtype).mul_scalar(UNSEEN);
            }
            let weights = softmax(scores, 3).reshape([b, groups, share * size, seen]);
            let o = product(weights, all_values.clone().narrow(2, 0, seen));
            outputs.push(o.reshape([b, heads, size, values]));
        }
        let keys = before.unwrap_or(k).swap_dims(1, 2);
        let state = PathState { keys, values: v.clone(), log_forget: gates };
        if outputs.is_empty() {
            return Ok((Tensor::zeros([b, 0, heads, values], (&v.device(), out)), state));
        }
        Ok((Tensor::cat(outputs, 2).swap_dims(1, 2).cast(out), state))
    }
}
