//! The kernels: sums of squares, the factors that come of them, the update.
//!
//! A launch takes a list of parameters, and a cube works on one of them: `CUBE_POS_Y` says on which, `CUBE_POS_X` on
//! which part.

use cubecl::prelude::*;

use crate::rows::{RowPlan, UNITS, row_sum};

/// Places in the factors that the update reads.
const CLIP: usize = 0;
const BAD: usize = 1;
const INVERSE1: usize = 2;
const INVERSE2: usize = 3;
/// How many they are.
pub(super) const FACTORS: usize = 4;

/// Σ g² over the part of each cube, at `partial[first + CUBE_POS_Y · CUBE_COUNT_X + CUBE_POS_X]`.
#[cube(launch, address_type = "dynamic")]
pub(super) fn squares<N: Size>(
    grads: &Sequence<OwnedTensor<Vector<f32, N>>>,
    partial: &mut Tensor<f32>,
    first: u32,
    #[comptime] plan: RowPlan,
) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(UNITS));
    let mut sum = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for i in 0..grads.len() {
        if CUBE_POS_Y as usize == i {
            let grad = grads.index(i);
            let mut at = CUBE_POS_X as usize * comptime!(UNITS) + UNIT_POS as usize;
            while at < grad.len() {
                let g = grad[at];
                sum += g * g;
                at += CUBE_COUNT_X as usize * comptime!(UNITS);
            }
        }
    }
    let total = row_sum::<Const<1>>(Vector::new(sum.vector_sum()), &mut shared, 0usize, plan);
    if UNIT_POS == 0 {
        let at = first as usize + CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
        partial[at] = total.extract(0usize);
    }
}

/// Adds up the sums in a fixed order; advances the counters; writes the norm, and the factors of the update. One cube.
#[cube(launch, address_type = "dynamic")]
pub(super) fn factors(
    partial: &Tensor<f32>,
    counters: &Tensor<f32>,
    next: &mut Tensor<f32>,
    norm: &mut Tensor<f32>,
    factors: &mut Tensor<f32>,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    max_norm: f32,
    #[comptime] clip: bool,
    #[comptime] skip: bool,
    #[comptime] plan: RowPlan,
) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(UNITS));
    let mut sum = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < partial.len() {
        sum += partial[at];
        at += comptime!(UNITS);
    }
    let total = row_sum::<Const<1>>(Vector::new(sum), &mut shared, 0usize, plan).extract(0usize);
    if UNIT_POS == 0 {
        let n = total.sqrt();
        norm[0] = n;
        // By its bits: a compiler may take it that no number is infinite.
        let bad = comptime!(skip) && u32::reinterpret(total) & 0x7f80_0000u32 == 0x7f80_0000u32;
        let mut c1 = counters[0];
        let mut c2 = counters[1];
        if !bad {
            c1 = c1 * beta1 + rest1;
            c2 = c2 * beta2 + rest2;
        }
        next[0] = c1;
        next[1] = c2;
        if comptime!(skip) {
            let skipped = select(bad, 1.0f32, 0.0f32);
            let in_a_row = (counters[2] + 1.0f32) * skipped;
            next[2] = in_a_row;
            next[3] = max(counters[3], in_a_row);
            next[4] = counters[4] + skipped;
        } else {
            next[2] = counters[2];
            next[3] = counters[3];
            next[4] = counters[4];
        }
        let mut scale = 1.0f32;
        if comptime!(clip) {
            let ratio = max_norm / (n + 1e-6f32);
            // This way round NaN stays NaN.
            scale = select(ratio > 1.0f32, 1.0f32, ratio);
        }
        factors[comptime!(CLIP)] = scale;
        factors[comptime!(BAD)] = select(bad, 1.0f32, 0.0f32);
        // Before the first update c is zero, and so are the moments it divides.
        factors[comptime!(INVERSE1)] = 1.0f32 / max(c1, rest1);
        factors[comptime!(INVERSE2)] = 1.0f32 / max(c2, rest2);
    }
}

/// Updates parameters and moments where they lie, unless the update is skipped.
#[cube(launch, address_type = "dynamic")]
pub(super) fn update<N: Size>(
    values: &mut Sequence<OwnedTensor<Vector<f32, N>>>,
    grads: &Sequence<OwnedTensor<Vector<f32, N>>>,
    firsts: &mut Sequence<OwnedTensor<Vector<f32, N>>>,
    seconds: &mut Sequence<OwnedTensor<Vector<f32, N>>>,
    rates: &Sequence<f32>,
    keeps: &Sequence<f32>,
    factors: &Tensor<f32>,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    eps: f32,
) {
    let clip = Vector::<f32, N>::new(factors[comptime!(CLIP)]);
    let inverse1 = factors[comptime!(INVERSE1)];
    let inverse2 = Vector::<f32, N>::new(factors[comptime!(INVERSE2)]);
    if factors[comptime!(BAD)] == 0.0f32 {
        #[unroll]
        for i in 0..values.len() {
            if CUBE_POS_Y as usize == i {
                let rate = Vector::<f32, N>::new(*rates.index(i) * inverse1);
                let keep = Vector::<f32, N>::new(*keeps.index(i));
                let mut at = CUBE_POS_X as usize * comptime!(UNITS) + UNIT_POS as usize;
                while at < grads.index(i).len() {
                    let g = grads.index(i)[at] * clip;
                    let m = firsts.index(i)[at] * Vector::new(beta1) + g * Vector::new(rest1);
                    let v = seconds.index(i)[at] * Vector::new(beta2) + g * g * Vector::new(rest2);
                    let change = m * rate / ((v * inverse2).sqrt() + Vector::new(eps));
                    let p = values.index(i)[at] * keep - change;
                    firsts.index_mut(i)[at] = m;
                    seconds.index_mut(i)[at] = v;
                    values.index_mut(i)[at] = p;
                    at += CUBE_COUNT_X as usize * comptime!(UNITS);
                }
            }
        }
    }
}
