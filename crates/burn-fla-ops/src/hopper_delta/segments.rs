//! What few heads need: sequences are cut into segments that are walked side by side.
//!
//! A segment makes `Φ S + H` of the state S before it: H is what it makes of no state, and column i of Φ `[K, K]` what its
//! transitions alone make of the i-th unit vector. [`super::chain`] walks both at once, as the state of a head with K more
//! value channels whose values are zero. Then S goes from segment to segment, by one small product each, and every segment
//! is walked from its own. Against time it is `Φᵀ Z + H'`, with the same Φ.

use burn::tensor::{DType, Shape};
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, TensorSpec, alloc};
use crate::hopper_walk::table::{ITEM_WORDS, SEQUENCE_WORDS};

/// Units of a cube.
const UNITS: usize = 256;
/// Value channels of a cube.
const TILE: usize = 16;
/// Rows of the state whose numbers a unit has, at a time.
const ROWS: usize = UNITS / TILE;
/// Numbers of Φ that are loaded at once.
const VECTOR: usize = 4;
/// The least tokens of a segment, and of segments a sequence must have: walking what precedes each must pay.
const SHORTEST: usize = 1024;
const FEWEST: usize = 3;

/// Tokens a segment: as many as leave no processor without a cube, where that gives segments enough. `cubes` is how many a
/// segment has.
pub(crate) fn segment_tokens(longest: usize, sequences: usize, cubes: usize, processors: usize) -> usize {
    let count = (processors / (sequences * cubes).max(1)).min(longest / SHORTEST);
    if count < FEWEST { longest.max(1) } else { longest.div_ceil(count) }
}

/// How sequences are cut, and the sizes of their states.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) sequences: usize,
    /// Segments of them all.
    pub(crate) items: usize,
    pub(crate) heads: usize,
    pub(crate) keys: usize,
    pub(crate) values: usize,
}

/// The first column of a transition behind so many value channels.
pub(crate) fn transition(values: usize) -> usize {
    values.next_multiple_of(64)
}

/// Columns of a state with its transition behind it.
pub(crate) fn columns(keys: usize, values: usize) -> usize {
    transition(values) + keys.next_multiple_of(64)
}

impl Cut {
    /// Whether some sequence has several segments.
    pub(crate) fn is_cut(&self) -> bool {
        self.items > self.sequences
    }

    /// Where the table has its chunks.
    pub(crate) fn chunks_at(&self) -> u32 {
        (ITEM_WORDS * self.items + SEQUENCE_WORDS * self.sequences) as u32
    }

    /// That of the states of sequences, `[N, HV, K, V]`.
    pub(crate) fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    /// What forward keeps for backward, where sequences are cut: what their segments make of no state, with their transitions,
    /// and the state before each.
    pub(crate) fn saved(&self) -> Vec<TensorSpec> {
        if !self.is_cut() {
            return Vec::new();
        }
        [columns(self.keys, self.values), self.values]
            .map(|columns| TensorSpec::new(Shape::from([self.items, self.heads, self.keys, columns]), DType::F32))
            .to_vec()
    }

    /// The state before each segment (against time: the gradient of that after it), and the last one, from what segments make
    /// of none (`ends`) and from their transitions.
    pub(crate) fn pass(
        &self,
        against_time: bool,
        ends: &CubeTensor,
        transitions: &CubeTensor,
        initial: Option<&CubeTensor>,
        table: &CubeTensor,
    ) -> [CubeTensor; 2] {
        let (keys, values) = (self.keys, self.values);
        let plan = PassPlan { keys, values, against_time, initial: initial.is_some() };
        let starts = alloc(ends, [self.items, self.heads, keys, values], DType::F32);
        let last = alloc(ends, self.state_shape(), DType::F32);
        pass_states::launch(
            &ends.client,
            CubeCount::new_1d((self.sequences * self.heads * values / TILE) as u32),
            CubeDim::new_1d(UNITS as u32),
            VECTOR,
            ends.clone().into_buffer_arg(),
            transitions.clone().into_tensor_arg(),
            initial.unwrap_or(ends).clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            starts.clone().into_buffer_arg(),
            last.clone().into_buffer_arg(),
            self.heads as u32,
            self.items as u32,
            plan,
        );
        [starts, last]
    }
}

/// Sizes of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PassPlan {
    keys: usize,
    values: usize,
    against_time: bool,
    initial: bool,
}

impl PassPlan {
    /// Columns of what segments make of no state.
    fn columns(&self) -> usize {
        if self.against_time { self.values } else { columns(self.keys, self.values) }
    }
}

/// The state before each segment (against time: the gradient of that after it), and the one behind the last.
///
/// `ends` `[segments, HV, K, columns]`, `transitions` the same with time, `initial` and `last`
/// `[N, HV, K, V]`, `starts` `[segments, HV, K, V]`. A cube takes 16 value channels of a head, with their state in shared
/// memory.
#[cube(launch)]
fn pass_states<N: Size>(
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
                sums[j] = ends[(base + row) * comptime!(plan.columns()) + column];
            }
        }
        let width = comptime!(columns(plan.keys, plan.values) / VECTOR);
        let from = comptime!(transition(plan.values) / VECTOR);
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
