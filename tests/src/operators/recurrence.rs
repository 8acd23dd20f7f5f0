//! Gated linear attention token by token in f64, with its gradients.

use super::operator::{Products, Size, flops};

/// One head of gated linear attention; `g` has one number in all, one a token, or one a token and key.
pub(super) struct Pass<'a> {
    pub(super) q: &'a [f64],
    pub(super) k: &'a [f64],
    pub(super) v: &'a [f64],
    pub(super) grad: &'a [f64],
    pub(super) g: &'a [f64],
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) scale: f64,
}

impl Pass<'_> {
    /// o, dq, dk, dv, dg by the recurrence; of a constant decay dg is that of its tokens.
    pub(super) fn run(&self) -> [Vec<f64>; 5] {
        let &Self { q, k, v, grad, g, keys: dk, values: dv, scale } = self;
        let t = q.len() / dk;
        let across = (g.len() / t).max(1);
        let decay_at = |i: usize, a: usize| g[(i * across + a % across) % g.len()].exp();
        let mut state = vec![0.0; dk * dv];
        let (mut o, mut dq) = (vec![0.0; t * dv], vec![0.0; t * dk]);
        for i in 0..t {
            for a in 0..dk {
                let decay = decay_at(i, a);
                let (ka, qa) = (k[i * dk + a], q[i * dk + a] * scale);
                let mut sum = 0.0;
                for c in 0..dv {
                    let s = &mut state[a * dv + c];
                    *s = *s * decay + ka * v[i * dv + c];
                    o[i * dv + c] += qa * *s;
                    sum += grad[i * dv + c] * *s;
                }
                dq[i * dk + a] = sum * scale;
            }
        }
        let mut state = vec![0.0; dk * dv];
        let (mut dkey, mut dvalue) = (vec![0.0; t * dk], vec![0.0; t * dv]);
        for i in (0..t).rev() {
            for a in 0..dk {
                let decay = if i + 1 < t { decay_at(i + 1, a) } else { 1.0 };
                let (ka, qa) = (k[i * dk + a], q[i * dk + a] * scale);
                let mut sum = 0.0;
                for c in 0..dv {
                    let z = &mut state[a * dv + c];
                    *z = *z * decay + qa * grad[i * dv + c];
                    dvalue[i * dv + c] += ka * *z;
                    sum += v[i * dv + c] * *z;
                }
                dkey[i * dk + a] = sum;
            }
        }
        let mut dg = vec![0.0; t * across];
        let mut sums = vec![0.0; across];
        for i in (0..t).rev() {
            for a in 0..dk {
                let at = i * dk + a;
                sums[a % across] += q[at] * dq[at] - k[at] * dkey[at];
            }
            dg[i * across..(i + 1) * across].copy_from_slice(&sums);
        }
        [o, dq, dkey, dvalue, dg]
    }
}

/// o and the gradients of q, k, v and, where it is among the inputs, of the decay.
pub(super) fn exact(x: &[Vec<f64>], grad: &[f64], size: Size) -> Vec<Vec<f64>> {
    let Size { k: keys, v: values, .. } = size;
    let g: &[f64] = x.get(3).map_or(&[0.0], |g| g);
    let pass = Pass { q: &x[0], k: &x[1], v: &x[2], grad, g, keys, values, scale: (keys as f64).powf(-0.5) };
    pass.run().into_iter().take(1 + x.len()).collect()
}

/// Scores and what they read, the state's part of the outputs, and what a chunk adds to the state.
pub(super) fn products(Size { b, t, h, k, v, .. }: Size) -> [f64; 2] {
    let forward = Products { scores: 1.0, values: 1.0, states: 2.0 };
    flops(forward, Products { scores: 0.0, values: 1.0, states: 1.0 }, b * t * h, k, v)
}
