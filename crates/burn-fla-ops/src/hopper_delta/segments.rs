//! What few heads need: sequences are cut into segments that are walked side by side.
//!
//! A segment makes `Φ S + H` of the state S before it: H is what it makes of no state, and column i of Φ `[K, K]` what its
//! transitions alone make of the i-th unit vector. [`super::chain`] walks both at once, as the state of a head with K more
//! value channels whose values are zero. Then S goes from segment to segment, by one small product each, and every segment
//! is walked from its own. Against time it is `Φᵀ Z + H'`, with the same Φ.

use cubecl::prelude::*;

use crate::hopper_walk::table::{ITEM_WORDS, SEQUENCE_WORDS};

/// Units of a cube.
pub(super) const UNITS: usize = 256;
/// Value channels of a cube.
pub(super) const TILE: usize = 16;
/// Rows of the state whose numbers a unit has, at a time.
const ROWS: usize = UNITS / TILE;
/// Numbers of Φ that are loaded at once.
pub(super) const VECTOR: usize = 4;
/// The least tokens of a segment, and of segments a sequence must have: walking what precedes each must pay.
const SHORTEST: usize = 1024;
const FEWEST: usize = 3;

/// Tokens a segment: as many as leave no processor without a cube, where that gives segments enough. `cubes` is how many a
/// segment has.
pub(super) fn segment_tokens(longest: usize, sequences: usize, cubes: usize, processors: usize) -> usize {
    let count = (processors / (sequences * cubes).max(1)).min(longest / SHORTEST);
    if count < FEWEST { longest.max(1) } else { longest.div_ceil(count) }
}

/// Sizes of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PassPlan {
    pub(super) keys: usize,
    pub(super) values: usize,
    /// Columns of `ends`.
    pub(super) columns: usize,
    /// Columns of what has the transitions, and the first of theirs.
    pub(super) transition_columns: usize,
    pub(super) transition: usize,
    pub(super) against_time: bool,
    pub(super) initial: bool,
}

/// The state before each segment (against time: the gradient of that after it), and the one behind the last.
///
/// `ends` `[segments, HV, K, columns]`, `transitions` `[segments, HV, K, transition_columns]`, `initial` and `last`
/// `[N, HV, K, V]`, `starts` `[segments, HV, K, V]`. A cube takes 16 value channels of a head, with their state in shared
/// memory.
#[cube(launch)]
pub(super) fn pass_states<N: Size>(
    ends: &[f32],
    transitions: &Tensor<Vector<f32, N>>,
    initial: &[f32],
    table: &[i32],
    starts: &mut [f32],
    last: &mut [f32],
    heads: u32,
    items: u32,
    #[comptime] plan: PassPlan,
) {
    let tiles = comptime!(plan.values / TILE);
    let column = CUBE_POS % tiles * comptime!(TILE) + UNIT_POS as usize % comptime!(TILE);
    let head = (CUBE_POS as u32 / comptime!(tiles as u32)) % heads;
    let sequence = CUBE_POS as u32 / comptime!(tiles as u32) / heads;
    let lane = UNIT_POS as usize % comptime!(TILE);
    let part = UNIT_POS as usize / comptime!(TILE);
    let words = (items * comptime!(ITEM_WORDS as u32) + sequence * comptime!(SEQUENCE_WORDS as u32)) as usize;
    let first = table[words] as u32;
    let segments = table[words + 1] as u32;
    let each = comptime!(plan.keys.div_ceil(VECTOR * ROWS) * VECTOR);
    let rows_of = (sequence * heads + head) as usize * comptime!(plan.keys);
    let mut state = Shared::<[f32]>::new_slice(comptime!(plan.keys * TILE));
    let mut sums = Array::<f32>::new(each);

    #[unroll]
    for j in 0..each {
        let row = row_at(part, j, plan);
        if row < comptime!(plan.keys) {
            let mut value = f32::new(0.0);
            if comptime!(plan.initial) {
                value = initial[(rows_of + row) * comptime!(plan.values) + column];
            }
            state[row * comptime!(TILE) + lane] = value;
        }
    }
    for i in 0..segments {
        sync_cube();
        let item = first + if comptime!(plan.against_time) { segments - 1u32 - i } else { i + 0u32 };
        let base = (item * heads + head) as usize * comptime!(plan.keys);
        #[unroll]
        for j in 0..each {
            let row = row_at(part, j, plan);
            sums[j] = f32::new(0.0);
            if row < comptime!(plan.keys) {
                starts[(base + row) * comptime!(plan.values) + column] = state[row * comptime!(TILE) + lane];
                sums[j] = ends[(base + row) * comptime!(plan.columns) + column];
            }
        }
        let width = comptime!(plan.transition_columns / VECTOR);
        let from = comptime!(plan.transition / VECTOR);
        if comptime!(plan.against_time) {
            // Φᵀ: a unit's rows are columns that one vector has.
            for other in 0..comptime!(plan.keys) {
                let value = state[other * comptime!(TILE) + lane];
                #[unroll]
                for j in 0..comptime!(each / VECTOR) {
                    let at = row_at(part, comptime!(j * VECTOR), plan) / comptime!(VECTOR);
                    let phi = transitions[(base + other) * width + from + at];
                    #[unroll]
                    for n in 0..VECTOR {
                        sums[comptime!(j * VECTOR + n)] += phi.extract(n) * value;
                    }
                }
            }
        } else {
            for other in 0..comptime!(plan.keys / VECTOR) {
                #[unroll]
                for j in 0..each {
                    let row = min(row_at(part, j, plan), comptime!(plan.keys - 1));
                    let phi = transitions[(base + row) * width + from + other];
                    #[unroll]
                    for n in 0..VECTOR {
                        let at = (other * comptime!(VECTOR) + n) * comptime!(TILE) + lane;
                        sums[j] += phi.extract(n) * state[at];
                    }
                }
            }
        }
        sync_cube();
        #[unroll]
        for j in 0..each {
            let row = row_at(part, j, plan);
            if row < comptime!(plan.keys) {
                state[row * comptime!(TILE) + lane] = sums[j];
            }
        }
    }
    // Each unit reads what it has written.
    #[unroll]
    for j in 0..each {
        let row = row_at(part, j, plan);
        if row < comptime!(plan.keys) {
            last[(rows_of + row) * comptime!(plan.values) + column] = state[row * comptime!(TILE) + lane];
        }
    }
}

/// The row of the unit's `j`-th number: with time rows are dealt out one by one, which spreads a warp's loads of Φ over few
/// lines; against time by the vector.
#[cube]
fn row_at(part: usize, #[comptime] j: usize, #[comptime] plan: PassPlan) -> usize {
    if comptime!(plan.against_time) {
        part * comptime!(VECTOR) + comptime!(j / VECTOR * VECTOR * ROWS + j % VECTOR)
    } else {
        part + comptime!(j * ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_heads_are_cut_and_many_are_not() {
        assert_eq!(segment_tokens(16_384, 1, 32, 132), 4096);
        assert_eq!(segment_tokens(2048, 8, 64, 132), 2048);
        assert_eq!(segment_tokens(8192, 1, 64, 132), 8192, "two segments are no faster than one");
        assert_eq!(segment_tokens(2048, 1, 2, 132), 2048, "short ones neither");
        assert_eq!(segment_tokens(0, 1, 2, 132), 1);
    }
}
