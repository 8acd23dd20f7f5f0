//! Gated slot attention, with 64 slots.

use burn::tensor::activation;
use burn_fla_ops::{GsaOptions, gsa};

use super::operator::{Bounds, Kind, Operator, Size};
use super::recurrence::{self, Pass};

/// Slots of a head.
pub(super) const SLOTS: usize = 64;
/// Two passes and the probabilities between them are rounded.
pub(super) const BOUNDS: Bounds = Bounds { output: 8e-3, channels: 1.2e-2, gate: 2e-2 };

pub(super) const OPERATOR: Operator = Operator {
    name: "gsa",
    inputs: |draw| {
        let Size { b, t, h, .. } = draw.size;
        let slots = activation::softmax(draw.normal([b, t, h, SLOTS]), 3);
        let mut inputs = draw.qkv();
        inputs.push(draw.input("s", Kind::Channels, slots, draw.dtype));
        inputs.push(draw.gate(SLOTS));
        inputs
    },
    forward: |x, options| {
        let options = GsaOptions { engine: options.engine, ..Default::default() };
        let result = gsa(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), x[4].clone(), options);
        result.map(|(o, _)| (o, None))
    },
    exact,
    flops: products,
    bounds: BOUNDS,
};

/// Two passes, one of which has the slots as values, and one as keys.
pub(super) fn products(size: Size) -> [f64; 2] {
    let [scores, read] = [Size { v: SLOTS, ..size }, Size { k: SLOTS, ..size }].map(recurrence::products);
    [scores[0] + read[0], scores[1] + read[1]]
}

/// Two passes of gated linear attention. The first is one with the sides of its state exchanged: what reads it is the
/// gradient of the scores, and its "gradient of the outputs" is q.
pub(super) fn exact(x: &[Vec<f64>], grad: &[f64], Size { t, k: dk, v: dv, .. }: Size) -> Vec<Vec<f64>> {
    let [q, k, v, s, g] = [0, 1, 2, 3, 4].map(|i| &x[i][..]);
    let scale = (dk as f64).powf(-0.5);
    let first = |reading: &[f64]| Pass { q: reading, k: s, v: k, grad: q, g, keys: SLOTS, values: dk, scale }.run();
    let [_, scores, ..] = first(&vec![0.0; t * SLOTS]);
    let mut p = scores;
    for row in p.chunks_mut(SLOTS) {
        let most = row.iter().fold(f64::NEG_INFINITY, |most, x| most.max(*x));
        row.iter_mut().for_each(|x| *x = (*x - most).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
    }
    let [o, dp, ds, dvalue, dg] = Pass { q: &p, k: s, v, grad, g, keys: SLOTS, values: dv, scale: 1.0 }.run();
    let mut dscores = dp;
    for (row, p) in dscores.chunks_mut(SLOTS).zip(p.chunks(SLOTS)) {
        let mean: f64 = row.iter().zip(p).map(|(a, b)| a * b).sum();
        row.iter_mut().zip(p).for_each(|(a, b)| *a = b * (*a - mean));
    }
    let [dq, _, ds_first, dkey, dg_first] = first(&dscores);
    let sum = |a: Vec<f64>, b: Vec<f64>| a.into_iter().zip(b).map(|(a, b)| a + b).collect();
    vec![o, dq, dkey, dvalue, sum(ds, ds_first), sum(dg, dg_first)]
}
