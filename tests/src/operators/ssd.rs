//! State space duality with one group of B and C for all heads, as Mamba2 has it.

use burn::tensor::activation;
use burn_fla_ops::{SsdOptions, ssd};

use super::operator::{BOUNDS, Kind, Operator, Size, by_token};
use super::recurrence::{self, Pass};

pub(super) const OPERATOR: Operator = Operator {
    name: "ssd",
    inputs: |draw| {
        let Size { b, t, h, k, v, .. } = draw.size;
        let shared = |name| draw.input(name, Kind::Channels, draw.normal([b, t, 1, k]), draw.dtype);
        let positive = |shape| activation::softplus(draw.normal(shape), 1.0);
        vec![
            shared("c"),
            shared("b"),
            draw.channels("x", v),
            draw.input("delta", Kind::Gate, positive([b, t, h, 1]), draw.wide),
            draw.input("a", Kind::Gate, positive([1, 1, h, 1]).neg(), draw.wide),
            draw.input("D", Kind::Channels, draw.normal([1, 1, h, 1]), draw.wide),
        ]
    },
    forward: |x, options| {
        let options = SsdOptions {
            skip: Some(x[5].clone().reshape([-1])),
            initial_state: options.initial_state,
            engine: options.engine,
            ..Default::default()
        };
        let a = x[4].clone().reshape([-1]);
        ssd(x[2].clone(), by_token(&x[3]), a, x[1].clone(), x[0].clone(), options).map(|(o, state)| (o, Some(state)))
    },
    exact,
    flops: recurrence::products,
    bounds: BOUNDS,
};

/// Linear attention with a decay by token, from the gradients of which those of Δ, A and D follow.
fn exact(x: &[Vec<f64>], grad: &[f64], Size { t, k, v: dv, .. }: Size) -> Vec<Vec<f64>> {
    let [c, b, input, delta] = [0, 1, 2, 3].map(|i| &x[i][..]);
    let (a, skip) = (x[4][0], x[5][0]);
    let v: Vec<f64> = (0..t * dv).map(|i| input[i] * delta[i / dv]).collect();
    let g: Vec<f64> = delta.iter().map(|delta| delta * a).collect();
    let pass = Pass { q: c, k: b, v: &v, grad, g: &g, keys: k, values: dv, scale: 1.0 };
    let [mut o, dc, db, dvalue, dg] = pass.run();
    o.iter_mut().zip(input).for_each(|(o, x)| *o += skip * x);
    let dx = (0..t * dv).map(|i| dvalue[i] * delta[i / dv] + skip * grad[i]).collect();
    let ddelta = (0..t).map(|i| {
        let row = i * dv..(i + 1) * dv;
        a * dg[i] + dvalue[row.clone()].iter().zip(&input[row]).map(|(a, b)| a * b).sum::<f64>()
    });
    let da = dg.iter().zip(delta).map(|(a, b)| a * b).sum();
    let dskip = grad.iter().zip(input).map(|(a, b)| a * b).sum();
    vec![o, dc, db, dx, ddelta.collect(), vec![da], vec![dskip]]
}
