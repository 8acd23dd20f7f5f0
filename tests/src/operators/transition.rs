//! The delta rules token by token in f64, with their gradients: a transition of a diagonal and a part of rank one.
//!
//! `S_t = diag(e^{g_t}) S_{t−1} + b_t u_tᵀ + k_t v_tᵀ`, where `u_t` is what `a_t` reads: of the decayed state, or of the state
//! before.

use super::operator::{Products, Size, flops};

/// One head. `decay` has one number a token and key.
pub(super) struct Transition<'a> {
    pub(super) q: &'a [f64],
    pub(super) k: &'a [f64],
    pub(super) v: &'a [f64],
    pub(super) a: &'a [f64],
    pub(super) b: &'a [f64],
    pub(super) decay: &'a [f64],
    /// Whether a reads the state before it decays.
    pub(super) reads_first: bool,
    pub(super) keys: usize,
    pub(super) values: usize,
}

/// o and the gradients, that of the log decay by key.
pub(super) struct Gradients {
    pub(super) o: Vec<f64>,
    pub(super) q: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
    pub(super) a: Vec<f64>,
    pub(super) b: Vec<f64>,
    pub(super) g: Vec<f64>,
}

/// States before every so many tokens are kept; those between are made again.
const PIECE: usize = 64;

impl Transition<'_> {
    /// The factor on the queries.
    fn scale(&self) -> f64 {
        (self.keys as f64).powf(-0.5)
    }

    /// One token; returns what a read.
    fn step(&self, s: &mut [f64], i: usize) -> Vec<f64> {
        let (dk, dv) = (self.keys, self.values);
        let mut u = vec![0.0; dv];
        for r in 0..dk {
            let from = self.a[i * dk + r] * if self.reads_first { 1.0 } else { self.decay[i * dk + r] };
            u.iter_mut().zip(&s[r * dv..]).for_each(|(u, s)| *u += from * s);
        }
        for r in 0..dk {
            let at = i * dk + r;
            let values = &self.v[i * dv..(i + 1) * dv];
            let row = s[r * dv..(r + 1) * dv].iter_mut().zip(&u).zip(values);
            row.for_each(|((s, u), v)| *s = *s * self.decay[at] + self.b[at] * u + self.k[at] * v);
        }
        u
    }

    pub(super) fn run(&self, grad: &[f64]) -> Gradients {
        let &Self { q, k, v, a, b, decay, reads_first, keys: dk, values: dv } = self;
        let t = q.len() / dk;
        let scale = self.scale();
        let mut state = vec![0.0; dk * dv];
        let (mut o, mut starts) = (vec![0.0; t * dv], Vec::new());
        for i in 0..t {
            if i % PIECE == 0 {
                starts.push(state.clone());
            }
            self.step(&mut state, i);
            for r in 0..dk {
                (0..dv).for_each(|c| o[i * dv + c] += scale * q[i * dk + r] * state[r * dv + c]);
            }
        }
        let zeros = |width: usize| vec![0.0; t * width];
        let (mut dq, mut dkey, mut da, mut db, mut dg) = (zeros(dk), zeros(dk), zeros(dk), zeros(dk), zeros(dk));
        let mut dvalue = zeros(dv);
        let mut z = vec![0.0; dk * dv];
        for (piece, start) in starts.iter().enumerate().rev() {
            let first = piece * PIECE;
            let mut states = vec![start.clone()];
            let mut answers = Vec::new();
            for i in first..t.min(first + PIECE) {
                let mut next = states[i - first].clone();
                answers.push(self.step(&mut next, i));
                states.push(next);
            }
            for i in (first..t.min(first + PIECE)).rev() {
                let (before, after, u) = (&states[i - first], &states[i - first + 1], &answers[i - first]);
                let mut du = vec![0.0; dv];
                for r in 0..dk {
                    let at = i * dk + r;
                    for c in 0..dv {
                        let (e, d) = (r * dv + c, grad[i * dv + c]);
                        z[e] += scale * q[at] * d;
                        dq[at] += scale * after[e] * d;
                        dkey[at] += z[e] * v[i * dv + c];
                        db[at] += z[e] * u[c];
                        dvalue[i * dv + c] += k[at] * z[e];
                        du[c] += b[at] * z[e];
                    }
                }
                for r in 0..dk {
                    let at = i * dk + r;
                    for (c, du) in du.iter().enumerate() {
                        let (e, back) = (r * dv + c, a[at] * du);
                        let from = if reads_first { 1.0 } else { decay[at] };
                        da[at] += du * from * before[e];
                        let inner = if reads_first { z[e] } else { z[e] + back };
                        dg[at] += inner * decay[at] * before[e];
                        z[e] = decay[at] * inner + if reads_first { back } else { 0.0 };
                    }
                }
            }
        }
        Gradients { o, q: dq, k: dkey, v: dvalue, a: da, b: db, g: dg }
    }
}

/// The delta rule, whose inputs are q, k, v, the decay where there is one (by token or by key), and β: a = −k, b = β k,
/// and β v is what is written.
pub(super) fn delta_rule(x: &[Vec<f64>], grad: &[f64], size: Size) -> Vec<Vec<f64>> {
    let Size { t, k: dk, v: dv, .. } = size;
    let (k, values) = (&x[1], &x[2]);
    let (gate, beta) = (if x.len() == 5 { Some(&x[3]) } else { None }, &x[x.len() - 1]);
    let across = gate.map_or(1, |g| g.len() / t);
    let decay: Vec<f64> =
        (0..t * dk).map(|i| gate.map_or(1.0, |g| g[i / dk * across + i % dk % across].exp())).collect();
    let a: Vec<f64> = k.iter().map(|k| -k).collect();
    let b: Vec<f64> = (0..t * dk).map(|i| k[i] * beta[i / dk]).collect();
    let v: Vec<f64> = (0..t * dv).map(|i| values[i] * beta[i / dv]).collect();
    let form = Transition { q: &x[0], k, v: &v, a: &a, b: &b, decay: &decay, reads_first: false, keys: dk, values: dv };
    let found = form.run(grad);
    let strengths = (0..t).map(|i| {
        let values: f64 = (i * dv..(i + 1) * dv).map(|at| values[at] * found.v[at]).sum();
        values + (i * dk..(i + 1) * dk).map(|at| k[at] * found.b[at]).sum::<f64>()
    });
    let strengths: Vec<f64> = strengths.collect();
    let dkey = (0..t * dk).map(|i| found.k[i] - found.a[i] + beta[i / dk] * found.b[i]).collect();
    let dvalue = (0..t * dv).map(|i| found.v[i] * beta[i / dv]).collect();
    let mut all = vec![found.o, found.q, dkey, dvalue];
    if gate.is_some() {
        let of = |i: usize| {
            let row = found.g[i / across * dk..(i / across + 1) * dk].iter().enumerate();
            row.filter(|(r, _)| r % across == i % across).map(|(_, x)| x).sum()
        };
        all.push((0..t * across).map(of).collect());
    }
    all.push(strengths);
    all
}

/// k·kᵀ and q·kᵀ, the triangular system's solution and what the scores read, and the state read by k and q and written.
pub(super) fn delta_products(Size { b, t, h, k, v, .. }: Size) -> [f64; 2] {
    let forward = Products { scores: 2.0, values: 2.0, states: 3.0 };
    flops(forward, Products { scores: 0.0, values: 1.0, states: 1.0 }, b * t * h, k, v)
}

/// The scores of a and q with b and k, the system's solution from its two parts and what the scores read, and the state
/// read by a and q and written by b and k.
pub(super) fn products(Size { b, t, h, k, v, .. }: Size) -> [f64; 2] {
    let forward = Products { scores: 4.0, values: 4.0, states: 4.0 };
    flops(forward, Products { scores: 0.0, values: 2.0, states: 1.0 }, b * t * h, k, v)
}
