//! The delta rule with a diagonal-plus-low-rank transition, with a pair of vectors as RWKV7 has it.

use burn::tensor::activation;
use burn_fla_ops::dplr;

use super::operator::{BOUNDS, Kind, Operator, Size};
use super::transition::{self, Transition};

pub(super) const OPERATOR: Operator = Operator {
    name: "dplr",
    inputs: |draw| {
        let Size { b, t, h, k, .. } = draw.size;
        let removed = draw.normal([b, t, h, k]);
        let removed = removed.clone() / removed.square().sum_dim(3).sqrt();
        let added = removed.clone() * activation::sigmoid(draw.normal([b, t, h, k]));
        let mut inputs = draw.unit_qkv();
        inputs.extend([
            draw.input("a", Kind::Channels, removed.neg(), draw.dtype),
            draw.input("b", Kind::Channels, added, draw.dtype),
            draw.key_gate("g"),
        ]);
        inputs
    },
    forward: |x, options| {
        let x = |i: usize| x[i].clone();
        dplr(x(0), x(1), x(2), x(3), x(4), x(5), options).map(|(o, state)| (o, Some(state)))
    },
    exact,
    flops: transition::products,
    bounds: BOUNDS,
};

fn exact(x: &[Vec<f64>], grad: &[f64], Size { k, v, .. }: Size) -> Vec<Vec<f64>> {
    let decay: Vec<f64> = x[5].iter().map(|g| g.exp()).collect();
    let [q, keys, values, a, b] = [0, 1, 2, 3, 4].map(|i| &x[i][..]);
    let form = Transition { q, k: keys, v: values, a, b, decay: &decay, reads_first: true, keys: k, values: v };
    let found = form.run(grad);
    vec![found.o, found.q, found.k, found.v, found.a, found.b, found.g]
}
