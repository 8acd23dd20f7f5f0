//! What stands between the two passes of a slot memory.

use cubecl::prelude::*;

use super::parts::LOG2_E;
use crate::tile::hopper::{bf16_high, bf16_low, exp2, pack_word};

/// Units of a cube.
pub(super) const UNITS: usize = 256;
/// Units of a row: neighbours in a plane.
pub(super) const LANES: usize = 8;

/// `softmax(scores) ∘ factors` of each row of `2 · width` bf16, or with `backward`
/// `softmax(scores) ∘ (grads − ⟨softmax(scores), grads⟩) ∘ factors`: eight units a row.
#[cube(launch)]
pub(super) fn probabilities(
    scores: &[u32],
    grads: &[u32],
    factors: &[u32],
    out: &mut [u32],
    rows: u32,
    #[comptime] width: u32,
    #[comptime] backward: bool,
) {
    let steps = comptime!(width.div_ceil(LANES as u32) as usize);
    let row = ABSOLUTE_POS as u32 / comptime!(LANES as u32);
    let lane = ABSOLUTE_POS as u32 % comptime!(LANES as u32);
    let mut lows = Array::<f32>::new(steps);
    let mut highs = Array::<f32>::new(steps);
    let mut most = f32::new(-3.0e38);
    #[unroll]
    for i in 0..steps {
        let word = lane + comptime!((i * LANES) as u32);
        lows[i] = f32::new(-3.0e38);
        highs[i] = f32::new(-3.0e38);
        if row < rows && word < width {
            let found = scores[(row * width + word) as usize];
            lows[i] = bf16_low(found) * LOG2_E;
            highs[i] = bf16_high(found) * LOG2_E;
        }
        most = f32::max(most, f32::max(lows[i], highs[i]));
    }
    #[unroll]
    for bit in 0..3usize {
        most = f32::max(most, plane_shuffle_xor(most, comptime!(1u32 << bit as u32)));
    }
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..steps {
        lows[i] = exp2(lows[i] - most);
        highs[i] = exp2(highs[i] - most);
        sum += lows[i] + highs[i];
    }
    let sum = row_sum(sum);
    if comptime!(backward) {
        let mut given = Array::<u32>::new(steps);
        let mut mean = f32::new(0.0);
        #[unroll]
        for i in 0..steps {
            let word = lane + comptime!((i * LANES) as u32);
            given[i] = u32::new(0);
            if row < rows && word < width {
                given[i] = grads[(row * width + word) as usize];
            }
            mean += lows[i] * bf16_low(given[i]) + highs[i] * bf16_high(given[i]);
        }
        let mean = row_sum(mean) / sum;
        #[unroll]
        for i in 0..steps {
            lows[i] *= bf16_low(given[i]) - mean;
            highs[i] *= bf16_high(given[i]) - mean;
        }
    }
    #[unroll]
    for i in 0..steps {
        let word = lane + comptime!((i * LANES) as u32);
        if row < rows && word < width {
            let at = (row * width + word) as usize;
            let factor = factors[at];
            out[at] = pack_word(lows[i] / sum * bf16_low(factor), highs[i] / sum * bf16_high(factor));
        }
    }
}

#[cube]
fn row_sum(value: f32) -> f32 {
    let mut sum = value + 0.0f32;
    #[unroll]
    for bit in 0..3usize {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << bit as u32));
    }
    sum
}

/// `x ← x + y`, two bf16 a word.
#[cube(launch)]
pub(super) fn add_words(x: &mut [u32], y: &[u32], count: u32) {
    let at = ABSOLUTE_POS;
    if at < count as usize {
        let (a, b) = (x[at], y[at]);
        x[at] = pack_word(bf16_low(a) + bf16_low(b), bf16_high(a) + bf16_high(b));
    }
}
