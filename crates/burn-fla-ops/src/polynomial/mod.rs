//! Normalised linear attention whose kernel is a polynomial of the score: what [`based`](crate::based) and
//! [`rebased`](crate::rebased) share.
//!
//! ```text
//! P(a) = c₀ + c₁ a + c₂ a²,   a_ij = scale · q_i · k_j
//! o_i = Σ_{j ≤ i} P(a_ij) v_j / (Σ_{j ≤ i} P(a_ij) + ε)
//! ```
//!
//! `P(a_ij) = φ(scale · q_i) · φ(k_j)` with `φ(x) = [√c₀, √c₁ x, √c₂ x_a² (all a), √(2 c₂) x_a x_b (a < b)]`, so the tokens
//! seen are a state of constant size: `S = Σ φ(k_j) v_jᵀ` and `z = Σ φ(k_j)`.

pub(crate) mod reference;

use burn::tensor::Tensor;

use crate::arguments::{self, query_key_value};
use crate::bridge::{same_device, same_shape};
use crate::chunked::compute_dtype;
use crate::sequences::by_sequence;
use crate::{CuSeqlens, OpError, SequenceOptions};

/// Tokens a chunk: within it the scores are quadratic, between chunks the state has K²/2 rows.
const CHUNK: usize = 128;

/// A polynomial of degree two with coefficients of at least zero, and the ε of its denominator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Polynomial {
    pub(crate) constant: f64,
    pub(crate) linear: f64,
    pub(crate) quadratic: f64,
    pub(crate) eps: f64,
}

impl Polynomial {
    /// P(a).
    pub(crate) fn value(&self, a: Tensor<4>) -> Tensor<4> {
        let square = a.clone() * a.clone();
        let value = square.mul_scalar(self.quadratic);
        let value = if self.linear > 0.0 { value + a.mul_scalar(self.linear) } else { value };
        if self.constant > 0.0 { value.add_scalar(self.constant) } else { value }
    }

    /// The number of features of a key with `keys` channels.
    pub(crate) const fn features(&self, keys: usize) -> usize {
        let mut features = keys * (keys + 1) / 2;
        if self.linear > 0.0 {
            features += keys;
        }
        if self.constant > 0.0 {
            features += 1;
        }
        features
    }

    /// Checks the arguments and runs: the outputs `[B, T, H, V]` and the state `[N, H, F, V + 1]`, its last column z.
    pub(crate) fn run(
        self,
        op: &'static str,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: SequenceOptions,
    ) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        query_key_value(op, &q, &k, &v)?;
        arguments::chunk(op, options.chunk)?;
        let [b, t, h, keys] = q.dims();
        let packed = options.cu_seqlens.is_some();
        let sequences = arguments::sequences(options.cu_seqlens, b, t)?;
        let n = sequences.num_sequences();
        let shape = [n, h, self.features(keys), v.dims()[3] + 1];
        if let Some(state) = &options.initial_state {
            same_shape(op, "initial_state", state, shape, "[N, H, F, V + 1]")?;
            same_device(op, "initial_state", state, &q.device())?;
        }
        let problem = reference::Problem {
            polynomial: self,
            scale: options.scale.unwrap_or_else(|| (keys as f64).powf(-0.5)),
            chunk: options.chunk.unwrap_or_else(|| CHUNK.min(t.max(1).next_power_of_two())),
        };
        let state = options.initial_state;
        if packed {
            packed_rows(&problem, &sequences, [q, k, v], state, shape)
        } else {
            dense(&problem, [q, k, v], state)
        }
    }
}

fn dense(
    problem: &reference::Problem,
    [q, k, v]: [Tensor<4>; 3],
    state: Option<Tensor<4>>,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    if q.dims()[1] > 0 {
        return problem.chunked(q, k, v, state);
    }
    let [b, _, h, keys] = q.dims();
    let shape = [b, h, problem.polynomial.features(keys), v.dims()[3] + 1];
    let dtype = compute_dtype(q.dtype());
    let state = state.map_or_else(|| Tensor::zeros(shape, (&q.device(), dtype)), |state| state.cast(dtype));
    Ok((v, state))
}

fn packed_rows(
    problem: &reference::Problem,
    sequences: &CuSeqlens,
    [q, k, v]: [Tensor<4>; 3],
    state: Option<Tensor<4>>,
    [_, h, features, columns]: [usize; 4],
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let dtype = compute_dtype(q.dtype());
    let (o, states) = by_sequence(sequences, |piece| {
        let state = state.as_ref().map(|state| piece.state(state));
        if piece.length == 0 {
            let zeros = || Tensor::zeros([1, h, features, columns], (&q.device(), dtype));
            return (None, Ok(state.map_or_else(zeros, |state| state.cast(dtype))));
        }
        match dense(problem, [&q, &k, &v].map(|x| piece.tokens(x)), state) {
            Ok((o, end)) => (Some(o), Ok(end)),
            Err(error) => (None, Err(error)),
        }
    });
    let states = states.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok((o.unwrap_or(v), Tensor::cat(states, 0)))
}
