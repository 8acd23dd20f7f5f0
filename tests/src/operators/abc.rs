//! Attention with bounded-memory control, with 64 slots.

use burn_fla_ops::{AbcOptions, abc};

use super::gsa::{self, SLOTS};
use super::operator::{Operator, Size};

pub(super) const OPERATOR: Operator = Operator {
    name: "abc",
    inputs: |draw| {
        let mut inputs = draw.qkv();
        inputs.push(draw.channels("s", SLOTS));
        inputs
    },
    forward: |x, options| {
        let options = AbcOptions { engine: options.engine, ..Default::default() };
        abc(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), options).map(|(o, _)| (o, None))
    },
    exact,
    flops: gsa::products,
    bounds: gsa::BOUNDS,
};

/// Gated slot attention with the weights `e^{s − z}` and log decays of a running softmax, z = log Σ e^s. Both are functions
/// of z and s, and z_t of s_t and z_{t−1}: `dz_t / ds_t = e^{s_t − z_t}`, `dz_t / dz_{t−1} = e^{z_{t−1} − z_t}`.
fn exact(x: &[Vec<f64>], grad: &[f64], size: Size) -> Vec<Vec<f64>> {
    let (t, s) = (size.t, &x[3]);
    let mut z = vec![f64::NEG_INFINITY; (t + 1) * SLOTS];
    for at in 0..t * SLOTS {
        let (before, own) = (z[at], s[at]);
        let most = before.max(own);
        z[at + SLOTS] = most + ((before - most).exp() + (own - most).exp()).ln();
    }
    let weights: Vec<f64> = (0..t * SLOTS).map(|at| (s[at] - z[at + SLOTS]).exp()).collect();
    // The state before the first token is zero: any decay of it will do.
    let decays: Vec<f64> = (0..t * SLOTS).map(|at| if at < SLOTS { 0.0 } else { z[at] - z[at + SLOTS] }).collect();
    let inputs = [x[0].clone(), x[1].clone(), x[2].clone(), weights.clone(), decays];
    let mut gradients = gsa::exact(&inputs, grad, size);
    let (dg, dw) = (gradients.pop().expect("of the decay"), gradients.pop().expect("of the weights"));
    let mut ds = vec![0.0; t * SLOTS];
    let mut dz = [0.0; SLOTS];
    for at in (0..t * SLOTS).rev() {
        let (slot, first) = (&mut dz[at % SLOTS], at < SLOTS);
        let by_weight = dw[at] * weights[at];
        let by_decay = if first { 0.0 } else { dg[at] };
        // Of z_t: through its weight and decay, and through z_{t+1}.
        let own = *slot - by_weight - by_decay;
        ds[at] = by_weight + own * weights[at];
        *slot = if first { 0.0 } else { own * (z[at] - z[at + SLOTS]).exp() + by_decay };
    }
    gradients.push(ds);
    gradients
}
