//! The recurrence of RWKV6, at its scale of 1.

use burn_fla_ops::{SequenceOptions, rwkv6};

use super::operator::{BOUNDS, Kind, Operator, Size};
use super::recurrence;

pub(super) const OPERATOR: Operator = Operator {
    name: "rwkv6",
    inputs: |draw| {
        let Size { h, k, v, .. } = draw.size;
        let bonus = draw.input("u", Kind::Channels, draw.normal([1, 1, h, k]), draw.wide);
        vec![draw.channels("r", k), draw.channels("k", k), draw.channels("v", v), draw.key_gate("w"), bonus]
    },
    forward: |x, options| {
        let [_, _, h, k] = x[4].dims();
        let options = SequenceOptions { scale: Some(1.0), ..options };
        let result =
            rwkv6(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), x[4].clone().reshape([h, k]), options);
        result.map(|(o, state)| (o, Some(state)))
    },
    exact,
    flops: recurrence::products,
    bounds: BOUNDS,
};

fn exact(x: &[Vec<f64>], grad: &[f64], Size { t, k: dk, v: dv, .. }: Size) -> Vec<Vec<f64>> {
    let [r, k, v, w, u] = [0, 1, 2, 3, 4].map(|i| &x[i][..]);
    let (mut o, mut dvalue) = (vec![0.0; t * dv], vec![0.0; t * dv]);
    let (mut dr, mut dkey, mut du) = (vec![0.0; t * dk], vec![0.0; t * dk], vec![0.0; dk]);
    // What the decay's gradient is a sum of, without a token's own part.
    let (mut by_r, mut by_k) = (vec![0.0; t * dk], vec![0.0; t * dk]);
    let mut state = vec![0.0; dk * dv];
    for i in 0..t {
        let (values, grads) = (&v[i * dv..(i + 1) * dv], &grad[i * dv..(i + 1) * dv]);
        let own: f64 = values.iter().zip(grads).map(|(a, b)| a * b).sum();
        for a in 0..dk {
            let at = i * dk + a;
            let (bonus, decay) = (r[at] * u[a] * k[at], w[at].exp());
            let mut sum = 0.0;
            for c in 0..dv {
                let s = &mut state[a * dv + c];
                o[i * dv + c] += r[at] * *s + bonus * values[c];
                dvalue[i * dv + c] += bonus * grads[c];
                sum += grads[c] * *s;
                *s = *s * decay + k[at] * values[c];
            }
            by_r[at] = r[at] * sum;
            dr[at] = sum + u[a] * k[at] * own;
            dkey[at] = u[a] * r[at] * own;
            du[a] += r[at] * k[at] * own;
        }
    }
    let mut state = vec![0.0; dk * dv];
    for i in (0..t).rev() {
        for a in 0..dk {
            let at = i * dk + a;
            let mut sum = 0.0;
            for c in 0..dv {
                let z = &mut state[a * dv + c];
                dvalue[i * dv + c] += k[at] * *z;
                sum += v[i * dv + c] * *z;
                *z = *z * w[at].exp() + r[at] * grad[i * dv + c];
            }
            by_k[at] = k[at] * sum;
            dkey[at] += sum;
        }
    }
    let mut dw = vec![0.0; t * dk];
    let mut sums = vec![0.0; dk];
    for i in (0..t).rev() {
        for a in 0..dk {
            sums[a] -= by_k[i * dk + a];
            dw[i * dk + a] = sums[a];
            sums[a] += by_r[i * dk + a];
        }
    }
    vec![o, dr, dkey, dvalue, dw, du]
}
