//! Three forms of normalised polynomial attention in plain tensor operations: quadratic over the whole sequence and token
//! by token, which are the oracles, and chunked, which runs.

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::Polynomial;
use crate::chunked::{compute_dtype, lower, merge, pass_states, split};
use crate::linear_attn::with_ones;
use crate::{OpError, matmul};

/// A polynomial, its scale and the tokens of a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem {
    pub(crate) polynomial: Polynomial,
    pub(crate) scale: f64,
    pub(crate) chunk: usize,
}

impl Problem {
    /// φ(x), `[…, D]` to `[…, F]`.
    pub(crate) fn features(&self, x: Tensor<4>) -> Tensor<4> {
        let [a, b, c, d] = x.dims();
        let (device, dtype) = (x.device(), x.dtype());
        let Polynomial { constant, linear, quadratic, .. } = self.polynomial;
        let pairs: Vec<(usize, usize)> = (0..d).flat_map(|i| (i..d).map(move |j| (i, j))).collect();
        let index = |of: fn(&(usize, usize)) -> usize| {
            let values: Vec<i32> = pairs.iter().map(|pair| of(pair) as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(values, [pairs.len()]), &device)
        };
        let weights: Vec<f64> =
            pairs.iter().map(|(i, j)| (if i == j { quadratic } else { 2.0 * quadratic }).sqrt()).collect();
        let data = TensorData::new(weights, [1, 1, 1, pairs.len()]).convert_dtype(dtype);
        let weights = Tensor::<4>::from_data(data, (&device, dtype));
        let mut parts = Vec::new();
        if constant > 0.0 {
            parts.push(Tensor::full([a, b, c, 1], constant.sqrt(), (&device, dtype)));
        }
        if linear > 0.0 {
            parts.push(x.clone().mul_scalar(linear.sqrt()));
        }
        parts.push(x.clone().select(3, index(|p| p.0)) * x.select(3, index(|p| p.1)) * weights);
        if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 3) }
    }

    /// The quotient of the two sums, which stand side by side: `[…, V + 1]` to `[…, V]`.
    fn quotient(&self, sums: Tensor<4>) -> Tensor<4> {
        let values = sums.dims()[3] - 1;
        // No sum of P is below zero; only the rounding of a state can put it there.
        let sum = sums.clone().narrow(3, values, 1).clamp_min(0.0).add_scalar(self.polynomial.eps);
        sums.narrow(3, 0, values) / sum
    }

    /// `o_i = Σ_{j ≤ i} P(a_ij) v_j / (Σ_{j ≤ i} P(a_ij) + ε)` as it stands, over the whole sequence.
    pub(crate) fn parallel(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Result<Tensor<4>, OpError> {
        let [b, t, h, _] = q.dims();
        let out = q.dtype();
        let dtype = compute_dtype(out);
        let [q, k, v] = [q, k, v].map(|x| x.cast(dtype).swap_dims(1, 2));
        let scores = matmul(q.mul_scalar(self.scale), k.swap_dims(2, 3))?;
        let triangle = lower(t, &scores.device(), dtype).reshape([1, 1, t, t]);
        let p = self.polynomial.value(scores) * triangle;
        let sum = p.clone().sum_dim(3).add_scalar(self.polynomial.eps);
        let o = matmul(p, v)? / sum.expand([b, h, t, 1]);
        Ok(o.swap_dims(1, 2).cast(out))
    }

    /// Token by token on the features, from the state `[B, H, F, V + 1]`.
    pub(crate) fn recurrent(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        state: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let out = q.dtype();
        let dtype = compute_dtype(out);
        let [b, t, h, _] = q.dims();
        let [_, _, features, columns] = state.dims();
        let q = self.features(q.cast(dtype).mul_scalar(self.scale));
        let k = self.features(k.cast(dtype));
        let v = with_ones(v.cast(dtype));
        let mut state = state.cast(dtype);
        let mut outputs = Vec::with_capacity(t);
        for i in 0..t {
            let column = |x: &Tensor<4>| x.clone().narrow(1, i, 1).reshape([b, h, features, 1]);
            state = state + column(&k) * v.clone().narrow(1, i, 1).reshape([b, h, 1, columns]);
            let sums = (state.clone() * column(&q)).sum_dim(2).swap_dims(1, 2);
            outputs.push(self.quotient(sums));
        }
        (Tensor::cat(outputs, 1).cast(out), state)
    }

    /// The scores within a chunk, the state between chunks.
    pub(crate) fn chunked(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        state: Option<Tensor<4>>,
    ) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        let out = q.dtype();
        let dtype = compute_dtype(out);
        let [b, t, h, _] = q.dims();
        let q = split(q.cast(dtype), self.chunk).mul_scalar(self.scale);
        let k = split(k.cast(dtype), self.chunk);
        // With the ones before it is filled up: the rows past the end add nothing to the state.
        let v = split(with_ones(v.cast(dtype)), self.chunk);
        let triangle = lower(self.chunk, &q.device(), dtype).reshape([1, 1, self.chunk, self.chunk]);
        let p = self.polynomial.value(matmul(q.clone(), k.clone().swap_dims(2, 3))?) * triangle;
        let inside = matmul(p, v.clone())?;
        let features = self.features(k);
        let [bh, n, _, size] = features.dims();
        let columns = v.dims()[3];
        let local = matmul(features.swap_dims(2, 3), v)?;
        let state_shape = [b, h, size, columns];
        let (sums, end) = match state {
            // Nothing came before the only chunk.
            None if n == 1 => (inside, local),
            state => {
                let first = match state {
                    Some(state) => state.cast(dtype).reshape([bh, 1, size, columns]),
                    None => Tensor::zeros([bh, 1, size, columns], (&inside.device(), dtype)),
                };
                let decay = Tensor::ones([1, n, 1, 1], (&inside.device(), dtype));
                let (starts, end) = pass_states(local, decay, first);
                (inside + matmul(self.features(q), starts)?, end)
            }
        };
        Ok((merge(self.quotient(sums), b, t).cast(out), end.reshape(state_shape)))
    }
}

/// The state before the first token, f32 (f64 where the inputs are).
pub(crate) fn zero_state(polynomial: Polynomial, q: &Tensor<4>, values: usize) -> Tensor<4> {
    let [b, _, h, keys] = q.dims();
    let dtype: DType = compute_dtype(q.dtype());
    Tensor::zeros([b, h, polynomial.features(keys), values + 1], (&q.device(), dtype))
}
