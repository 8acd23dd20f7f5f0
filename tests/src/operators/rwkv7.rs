//! The recurrence of RWKV7, with its decays between e^-0.6065 and 1.

use burn::tensor::activation;
use burn_fla_ops::rwkv7;

use super::operator::{BOUNDS, Kind, Operator, Size};
use super::transition::{self, Transition};

pub(super) const OPERATOR: Operator = Operator {
    name: "rwkv7",
    inputs: |draw| {
        let Size { b, t, h, k, .. } = draw.size;
        let decay = activation::sigmoid(draw.normal([b, t, h, k])) * -0.6065;
        let mut inputs = draw.unit_qkv();
        inputs.extend([draw.input("w", Kind::Gate, decay, draw.dtype), draw.unit("kk"), draw.rate("rate")]);
        inputs
    },
    forward: |x, options| {
        let x = |i: usize| x[i].clone();
        rwkv7(x(0), x(3), x(1), x(2), x(4), x(5), options).map(|(o, state)| (o, Some(state)))
    },
    exact,
    flops: transition::products,
    bounds: BOUNDS,
};

/// a = −κ, b = κ ∘ rate.
fn exact(x: &[Vec<f64>], grad: &[f64], Size { k, v, .. }: Size) -> Vec<Vec<f64>> {
    let (removed, rate) = (&x[4], &x[5]);
    let decay: Vec<f64> = x[3].iter().map(|w| w.exp()).collect();
    let a: Vec<f64> = removed.iter().map(|x| -x).collect();
    let b: Vec<f64> = removed.iter().zip(rate).map(|(x, rate)| x * rate).collect();
    let (q, keys, values) = (&x[0], &x[1], &x[2]);
    let form = Transition { q, k: keys, v: values, a: &a, b: &b, decay: &decay, reads_first: true, keys: k, values: v };
    let found = form.run(grad);
    let dremoved = (0..removed.len()).map(|i| rate[i] * found.b[i] - found.a[i]).collect();
    let drate = (0..removed.len()).map(|i| removed[i] * found.b[i]).collect();
    vec![found.o, found.q, found.k, found.v, found.g, dremoved, drate]
}
