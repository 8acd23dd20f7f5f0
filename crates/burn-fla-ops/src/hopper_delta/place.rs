//! Where a cube of a chain works, and its state where it enters a segment and leaves it: of the delta rules and of
//! [`crate::hopper_dplr`].

use cubecl::prelude::*;

use super::segments;
use crate::hopper_walk::plan::CHUNK;
use crate::hopper_walk::states::set_unit_vectors;
use crate::hopper_walk::table::ITEM_WORDS;
use crate::tile::hopper::{Acc, column_of, read, write, zero};

/// A segment of a sequence, a head, a slice of its value channels.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) slice: u32,
    pub(crate) head: u32,
    pub(crate) start: u32,
    pub(crate) length: u32,
    pub(crate) chunks: u32,
    /// The segment; sequences that are not cut have one each.
    pub(crate) item: u32,
    /// Its first chunk among all.
    pub(crate) border: u32,
}

/// The place of a cube's piece of work, where each head has so many slices.
#[cube]
pub(crate) fn place(index: u32, table: &[i32], heads: u32, #[comptime] slices: usize) -> Place {
    let slices = comptime!(slices as u32);
    let item = index / slices / heads;
    let at = (item * comptime!(ITEM_WORDS as u32)) as usize;
    let length = table[at + 1] as u32;
    Place {
        slice: index % slices,
        head: (index / slices) % heads,
        start: table[at] as u32,
        length,
        chunks: length.div_ceil(comptime!(CHUNK as u32)),
        item,
        border: table[at + 4] as u32,
    }
}

/// The chunk of step `i`.
#[cube]
pub(crate) fn chunk_at(i: u32, chunks: u32, #[comptime] against_time: bool) -> u32 {
    if comptime!(against_time) { chunks - 1u32 - i } else { i + 0u32 }
}

/// A state in registers, value channels × key channels, and in memory, `[segments, HV, K, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StatePlan {
    pub(crate) registers: Acc,
    pub(crate) keys: usize,
    pub(crate) values: usize,
    /// There is one where the walk enters.
    pub(crate) initial: bool,
    /// Behind the values stand the columns of the segment's transition, which begin as unit vectors.
    pub(crate) transition: bool,
}

impl StatePlan {
    pub(crate) fn columns(&self) -> usize {
        if self.transition { segments::columns(self.keys, self.values) } else { self.values }
    }
}

/// Where register `n` of a unit stands in a head's state, and whether it is inside.
#[cube]
fn state_at(
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    #[comptime] n: usize,
    #[comptime] plan: StatePlan,
) -> (bool, usize) {
    let value = panel * 64u32 + row + comptime!((n / 2 % 2 * 8) as u32);
    let key = column_of(lane, n);
    let base = (place.item * heads + place.head) * comptime!((plan.keys * plan.columns()) as u32);
    let at = base + key * comptime!(plan.columns() as u32) + value;
    (value < comptime!(plan.columns() as u32) && key < comptime!(plan.keys as u32), at as usize)
}

/// Sets the state where the walk enters a segment.
#[cube]
pub(crate) fn load_state(
    initial: &[f32],
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    #[comptime] plan: StatePlan,
) {
    let state = comptime!(plan.registers);
    zero(state);
    if comptime!(plan.initial) {
        #[unroll]
        for n in 0..comptime!(state.len()) {
            let (inside, at) = state_at(place, panel, heads, row, lane, n, plan);
            if inside {
                write(state, n, initial[at]);
            }
        }
    }
    if comptime!(plan.transition) {
        set_unit_vectors(panel, row, lane, comptime!(segments::transition(plan.values)), state);
    }
}

/// Writes the state where the walk leaves a segment.
#[cube]
pub(crate) fn store_state(
    last: &mut [f32],
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    #[comptime] plan: StatePlan,
) {
    let state = comptime!(plan.registers);
    #[unroll]
    for n in 0..comptime!(state.len()) {
        let (inside, at) = state_at(place, panel, heads, row, lane, n, plan);
        if inside {
            last[at] = read(state, n);
        }
    }
}
