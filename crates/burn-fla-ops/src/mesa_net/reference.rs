//! Two forms of MesaNet in plain tensor operations: the token recurrence, which is the oracle, and the chunked form.
//!
//! The chunked form never has the matrix of a token: what a step of the conjugate gradients needs of it, `(Hkk_t + Λ) p_t`,
//! is linear attention with a scalar decay, queries p, and keys in the place of values. So each step is a chunked product
//! over all tokens at once.

use burn::tensor::Tensor;

use super::MesaState;
#[cfg(any(feature = "cube", feature = "flex"))]
use crate::bridge::own_gradient::{takes_own_gradients, with_gradient};
use crate::chunked::{lower, merge, pass_states, running_sum, split};
use crate::matmul::product;
use crate::sequences::Piece;

/// What is added to the denominators of the conjugate gradients: steps die out where the squared residual is smaller.
const EPS: f64 = 1e-5;

/// What is computed from, in the dtype in which it is computed: f32, or f64.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[B, T, H, K]`
    pub q: Tensor<4>,
    /// `[B, T, H, K]`
    pub k: Tensor<4>,
    /// `[B, T, H, V]`
    pub v: Tensor<4>,
    /// g, `[B, T, H, 1]`
    pub log_decay: Tensor<4>,
    /// β, `[B, T, H, 1]`
    pub beta: Tensor<4>,
    /// λ, `[H, K]`
    pub lambda: Tensor<2>,
}

impl Inputs {
    /// The tokens of one packed sequence.
    pub(super) fn tokens(&self, piece: Piece) -> Self {
        Self {
            q: piece.tokens(&self.q),
            k: piece.tokens(&self.k),
            v: piece.tokens(&self.v),
            log_decay: piece.tokens(&self.log_decay),
            beta: piece.tokens(&self.beta),
            lambda: self.lambda.clone(),
        }
    }
}

/// What `iterations` steps of the conjugate gradients make of `A x = q` from `x = 0`, along the last dimension; `apply` is
/// the product with the symmetric positive A.
///
/// ```text
/// r = p = q,  δ = r·r
/// y = A p,  a = δ / (p·y + 1e-5),  x += a p,  r −= a y,  δ′ = r·r,  p = r + δ′ / (δ + 1e-5) p,  δ = δ′
/// ```
///
/// A row of zeros stays zero.
pub fn conjugate_gradients(q: Tensor<4>, iterations: usize, apply: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
    let dot = |a: &Tensor<4>, b: &Tensor<4>| (a.clone() * b.clone()).sum_dim(3);
    let mut p = q.clone();
    let mut delta = dot(&q, &q);
    let mut x = q.zeros_like();
    let mut r = q;
    for step in 0..iterations {
        let y = apply(p.clone());
        let a = delta.clone() / dot(&p, &y).add_scalar(EPS);
        x = x + a.clone() * p.clone();
        if step + 1 == iterations {
            break;
        }
        r = r - a * y;
        let next = dot(&r, &r);
        p = r.clone() + next.clone() / delta.add_scalar(EPS) * p;
        delta = next;
    }
    x
}

/// The symmetric positive matrices of one system at each row, by what they make of rows.
trait System: Clone + Send + Sync + 'static {
    /// `A p` for rows `p` along the last dimension.
    fn apply(&self, p: Tensor<4>) -> Tensor<4>;

    /// The same without a graph.
    #[cfg_attr(not(any(feature = "cube", feature = "flex")), expect(dead_code))]
    fn constant(&self) -> Self;
}

/// `A⁻¹ q` as far as the steps reach, with the gradient of a solution: with the gradient dx of x, `y = A⁻¹ dx` by the same
/// steps, `dq = y` and `dA = −y xᵀ`. So a backward pass solves once more and keeps none of the steps.
///
/// On a device whose build names no backend for that, the steps themselves are differentiated.
fn solution(q: Tensor<4>, system: &impl System, iterations: usize) -> Tensor<4> {
    #[cfg(any(feature = "cube", feature = "flex"))]
    if q.is_autodiff() && takes_own_gradients(&q.device()) {
        let fixed = system.constant();
        let x = conjugate_gradients(q.clone().inner(), iterations, |p| fixed.apply(p));
        // What is left of q, as a function of q and A: its gradient is y, and that of A follows from y by Burn's rules.
        let rest = q - system.apply(x.clone());
        return with_gradient(rest, x, move |dx| conjugate_gradients(dx, iterations, |p| fixed.apply(p)));
    }
    conjugate_gradients(q, iterations, |p| system.apply(p))
}

/// A matrix for each row of heads: `H + diag(λ)`.
#[derive(Clone)]
struct Dense {
    /// `[B, H, K, K]`
    keys: Tensor<4>,
    /// `[1, H, 1, K]`
    lambda: Tensor<4>,
}

impl System for Dense {
    fn apply(&self, p: Tensor<4>) -> Tensor<4> {
        product(p.clone(), self.keys.clone()) + p * self.lambda.clone()
    }

    fn constant(&self) -> Self {
        Self { keys: self.keys.clone().inner(), lambda: self.lambda.clone().inner() }
    }
}

/// Token by token: `Hkk_t = e^{g_t} Hkk_{t−1} + β_t k_t k_tᵀ`, `Hkv_t = e^{g_t} Hkv_{t−1} + β_t k_t v_tᵀ`,
/// `o_t = Hkv_tᵀ x_t`.
///
/// Shapes as [`mesa_net`](crate::mesa_net()), `N` = `B`. Returns the outputs and the last state.
pub fn recurrent(inputs: Inputs, iterations: usize, state: MesaState) -> (Tensor<4>, MesaState) {
    let Inputs { q, k, v, log_decay, beta, lambda } = inputs;
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let lambda = lambda.reshape([1, h, 1, dk]);
    let MesaState { mut keys, mut values } = state;
    let mut outputs = Vec::with_capacity(t);
    for i in 0..t {
        let row = |x: &Tensor<4>, width| x.clone().narrow(1, i, 1).reshape([b, h, 1, width]);
        let (q, k, v) = (row(&q, dk), row(&k, dk), row(&v, dv));
        let decay = row(&log_decay, 1).exp();
        let written = (k.clone() * row(&beta, 1)).swap_dims(2, 3);
        keys = keys * decay.clone() + written.clone() * k;
        values = values * decay + written * v;
        let system = Dense { keys: keys.clone(), lambda: lambda.clone() };
        let x = solution(q, &system, iterations);
        outputs.push(product(x, values.clone()).reshape([b, 1, h, dv]));
    }
    (Tensor::cat(outputs, 1), MesaState { keys, values })
}

/// What queries read of the keys of their chunk and of the states before it, all tokens at once.
#[derive(Clone)]
struct Reads {
    /// The keys, `[B·H, n, C, K]`
    k: Tensor<4>,
    /// `β_j e^{G_i − G_j}` for `j ≤ i`, `[B·H, n, C, C]`
    pairs: Tensor<4>,
    /// `e^{G_i}`, `[B·H, n, C, 1]`
    since: Tensor<4>,
    /// Hkk before each chunk, `[B·H, n, K, K]`
    starts: Tensor<4>,
    /// `[B·H, 1, 1, K]`
    lambda: Tensor<4>,
}

impl Reads {
    /// `e^{G_i} Sᵀ p_i + Σ_{j ≤ i} β_j e^{G_i − G_j} (p_i · k_j) w_j` for the states S before each chunk and values w.
    fn read(&self, p: Tensor<4>, starts: Tensor<4>, values: Tensor<4>) -> Tensor<4> {
        let scores = product(p.clone(), self.k.clone().swap_dims(2, 3)) * self.pairs.clone();
        product(p * self.since.clone(), starts) + product(scores, values)
    }
}

impl System for Reads {
    fn apply(&self, p: Tensor<4>) -> Tensor<4> {
        self.read(p.clone(), self.starts.clone(), self.k.clone()) + p * self.lambda.clone()
    }

    fn constant(&self) -> Self {
        let inner = |x: &Tensor<4>| x.clone().inner();
        Self {
            k: inner(&self.k),
            pairs: inner(&self.pairs),
            since: inner(&self.since),
            starts: inner(&self.starts),
            lambda: inner(&self.lambda),
        }
    }
}

/// The chunked form of [`recurrent`]: inside a chunk, with the state S before it, what a query p reads of keys and values w is
/// `e^{G_i} Sᵀ p_i + Σ_{j ≤ i} e^{G_i − G_j} β_j (p_i · k_j) w_j`; the conjugate gradients read w = k, the output w = v.
pub fn chunked(inputs: Inputs, iterations: usize, state: MesaState, chunk: usize) -> (Tensor<4>, MesaState) {
    let [b, t, h, dk] = inputs.q.dims();
    let dv = inputs.v.dims()[3];
    let q = split(inputs.q, chunk);
    let k = split(inputs.k, chunk);
    let v = split(inputs.v, chunk);
    let beta = split(inputs.beta, chunk);
    let sum = running_sum(split(inputs.log_decay, chunk));
    let last = sum.clone().narrow(2, chunk - 1, 1);
    let lambda = inputs.lambda.reshape([1, h, 1, dk]).expand([b, h, 1, dk]).reshape([b * h, 1, 1, dk]);

    let triangle = lower(chunk, &sum.device(), sum.dtype()).reshape([1, 1, chunk, chunk]);
    // The exponent is set to zero above the diagonal before the exponential, the product after it.
    let exponent = (sum.clone() - sum.clone().swap_dims(2, 3)) * triangle.clone();
    let pairs = exponent.exp() * triangle * beta.clone().swap_dims(2, 3);
    let since = sum.clone().exp();
    let forget = last.clone().exp();
    let written = (k.clone() * beta * (last - sum).exp()).swap_dims(2, 3);
    let pass = |x: &Tensor<4>, first: Tensor<4>| {
        let [.., width] = x.dims();
        let first = first.reshape([b * h, 1, dk, width]);
        pass_states(product(written.clone(), x.clone()), forget.clone(), first)
    };
    let (starts, keys) = pass(&k, state.keys);
    let (value_starts, values) = pass(&v, state.values);
    let reads = Reads { k, pairs, since, starts, lambda };
    let x = solution(q, &reads, iterations);
    let o = merge(reads.read(x, value_starts, v), b, t);
    (o, MesaState { keys: keys.reshape([b, h, dk, dk]), values: values.reshape([b, h, dk, dv]) })
}
