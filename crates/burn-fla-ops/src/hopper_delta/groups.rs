//! What heads that share a key head add up to.

use cubecl::prelude::*;

use crate::tile::hopper::{bf16_high, bf16_low, pack_word};

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;

/// Sums the heads of each group, two bf16 a word: `[tokens, H · groups, K]` to `[tokens, H, K]`.
#[cube(launch)]
pub(crate) fn sum_groups(parts: &[u32], sums: &mut [u32], words: u32, groups: u32) {
    let to = ABSOLUTE_POS_X;
    if to < sums.len() as u32 {
        let from = to / words * words * groups + to % words;
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        for i in 0..groups {
            let word = parts[(from + i * words) as usize];
            low += bf16_low(word);
            high += bf16_high(word);
        }
        sums[to as usize] = pack_word(low, high);
    }
}
