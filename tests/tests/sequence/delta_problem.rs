//! Problems of the family of the delta rule, as its operators and as its token recurrence compute them.

use burn::tensor::Tensor;
use burn_fla_ops::{
    CuSeqlens, DecayGate, DeltaOptions, Engine, OpError, SequenceOptions, comba, delta, delta_rule,
    gated_delta_product, gated_delta_rule, kda,
};
use burn_fla_tests::agree::{Input, assert_agree, flat, view};

/// Which operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    Delta,
    Gated,
    Kda,
    Comba,
    /// With this many steps a token, gated.
    Product(usize),
    /// With this many steps a token, not gated.
    ProductUngated(usize),
}

pub const OPS: [Op; 6] = [Op::Delta, Op::Gated, Op::Kda, Op::Comba, Op::Product(3), Op::ProductUngated(2)];

/// A problem; its inputs are, in this order, q, k, v, p, log decay, beta, initial state.
#[derive(Clone, Debug)]
pub struct Problem {
    pub op: Op,
    pub batch: usize,
    pub tokens: usize,
    pub heads: usize,
    /// Value heads a key head.
    pub groups: usize,
    pub keys: usize,
    pub values: usize,
    /// Log decays are drawn from this range.
    pub decay: (f64, f64),
    pub packed: Option<Vec<usize>>,
    pub l2_norm: bool,
    pub scale: Option<f64>,
    pub chunk: Option<usize>,
    pub engine: Engine,
}

impl Problem {
    pub fn new(op: Op, tokens: usize) -> Self {
        Self {
            op,
            batch: 2,
            tokens,
            heads: 1,
            groups: 2,
            keys: 5,
            values: 7,
            decay: (-0.3, 0.0),
            packed: None,
            l2_norm: true,
            scale: None,
            chunk: None,
            engine: Engine::Auto,
        }
    }

    pub fn steps(&self) -> usize {
        match self.op {
            Op::Product(n) | Op::ProductUngated(n) => n,
            _ => 1,
        }
    }

    pub fn sequences(&self) -> usize {
        self.packed.as_ref().map_or(self.batch, |offsets| offsets.len() - 1)
    }

    /// Keys of norm at most 1 where they are not normalised, so that the recurrence is stable; β up to 2.
    pub fn inputs(&self) -> Vec<Input> {
        let Self { batch: b, tokens: t, heads: h, keys, values, .. } = *self;
        let (n, heads) = (self.steps(), h * self.groups);
        let unit = 1.0 / (keys as f64).sqrt();
        let range = if self.l2_norm { (-1.0, 1.0) } else { (-unit, unit) };
        let width = if self.op == Op::Kda { keys } else { 1 };
        vec![
            Input::new("q", &[b, t, h, keys], range),
            Input::new("k", &[b, t * n, h, keys], range),
            Input::new("v", &[b, t * n, heads, values], (-1.0, 1.0)),
            Input::new("p", &[b, t, h, keys], range),
            Input::new("g", &[b, t, heads, width], self.decay),
            Input::new("beta", &[b, t * n, heads], (0.0, 2.0)),
            Input::new("state", &[self.sequences(), heads, keys, values], (-1.0, 1.0)),
        ]
    }

    /// The tensors of flat inputs.
    pub fn views(&self, x: &[Tensor<1>]) -> Views {
        let Self { batch: b, tokens: t, heads: h, keys, values, .. } = *self;
        let (n, heads) = (self.steps(), h * self.groups);
        let width = if self.op == Op::Kda { keys } else { 1 };
        Views {
            q: view(&x[0], [b, t, h, keys]),
            k: view(&x[1], [b, t * n, h, keys]),
            v: view(&x[2], [b, t * n, heads, values]),
            p: view(&x[3], [b, t, h, keys]),
            g: view(&x[4], [b, t, heads, width]),
            beta: view(&x[5], [b, t * n, heads]),
            state: view(&x[6], [self.sequences(), heads, keys, values]),
        }
    }

    /// The public function.
    pub fn public(&self, x: &Views) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        self.with_gate(x, None)
    }

    /// The same with decays made of g by a gate.
    pub fn with_gate(&self, x: &Views, decay_gate: Option<DecayGate>) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        let sequence = SequenceOptions {
            scale: self.scale,
            initial_state: Some(x.state.clone()),
            cu_seqlens: self.packed.clone().map(|offsets| CuSeqlens::new(offsets).unwrap()),
            chunk: self.chunk,
            engine: self.engine,
        };
        let options = DeltaOptions { sequence, l2_norm: self.l2_norm, decay_gate };
        let Views { q, k, v, p, g, beta, .. } = x.clone();
        let by_token = |g: Tensor<4>| g.squeeze_dim::<3>(3);
        match self.op {
            Op::Delta => delta_rule(q, k, v, beta, options),
            Op::Gated => gated_delta_rule(q, k, v, by_token(g), beta, options),
            Op::Kda => kda(q, k, v, g, beta, options),
            Op::Comba => comba(q, k, p, v, by_token(g), beta, options),
            Op::Product(n) => gated_delta_product(q, k, v, Some(by_token(g)), beta, n, options),
            Op::ProductUngated(n) => gated_delta_product(q, k, v, None, beta, n, options),
        }
    }

    /// The same by the token recurrence, one step at a time and one sequence at a time; what the operators do inside
    /// (norms, repeated heads, steps without a query) is done here by other means.
    pub fn oracle(&self, x: &Views) -> (Tensor<4>, Tensor<4>) {
        let n = self.steps();
        let norm = |x: Tensor<4>| {
            if self.l2_norm { x.clone() / (x.powi_scalar(2).sum_dim(3) + 1e-6).sqrt() } else { x }
        };
        let heads = |x: Tensor<4>| {
            let copies = (0..self.heads * self.groups).map(|i| x.clone().narrow(2, i / self.groups, 1)).collect();
            Tensor::cat(copies, 2)
        };
        let [q, k, p] = [&x.q, &x.k, &x.p].map(|x| heads(norm(x.clone())));
        let scale = self.scale.unwrap_or(1.0 / (self.keys as f64).sqrt());
        let offsets = self.packed.clone().unwrap_or_else(|| vec![0, self.tokens]);
        let mut outputs = Vec::new();
        let mut states = Vec::new();
        for (i, pair) in offsets.windows(2).enumerate() {
            let mut state = if self.packed.is_some() { x.state.clone().narrow(0, i, 1) } else { x.state.clone() };
            for t in pair[0]..pair[1] {
                for j in 0..n {
                    let at = |x: &Tensor<4>| x.clone().narrow(1, t * n + j, 1);
                    let beta = x.beta.clone().narrow(1, t * n + j, 1).unsqueeze_dim::<4>(3);
                    let decay = match self.op {
                        Op::Delta | Op::ProductUngated(_) => None,
                        _ if j > 0 => None,
                        _ => Some(x.g.clone().narrow(1, t, 1)),
                    };
                    let p = (self.op == Op::Comba).then(|| at(&p));
                    let query = q.clone().narrow(1, t, 1);
                    let (o, next) = delta::reference::recurrent(query, at(&k), at(&x.v), p, decay, beta, scale, state);
                    state = next;
                    if j == n - 1 {
                        outputs.push(o);
                    }
                }
            }
            states.push(state);
        }
        (Tensor::cat(outputs, 1), Tensor::cat(states, 0))
    }

    pub fn assert_chunked_is_recurrent(&self, bound: f64) {
        let both = |(o, state)| vec![flat::<4>(o), flat::<4>(state)];
        assert_agree(
            &format!("{self:?}"),
            &self.inputs(),
            bound,
            |x| both(self.public(&self.views(x)).unwrap()),
            |x| both(self.oracle(&self.views(x))),
        );
    }
}

#[derive(Clone)]
pub struct Views {
    pub q: Tensor<4>,
    pub k: Tensor<4>,
    pub v: Tensor<4>,
    pub p: Tensor<4>,
    pub g: Tensor<4>,
    pub beta: Tensor<3>,
    pub state: Tensor<4>,
}
