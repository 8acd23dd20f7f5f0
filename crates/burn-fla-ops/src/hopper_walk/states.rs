//! The states of a walk: where they enter and leave it, between segments, and at the borders of chunks.

use cubecl::prelude::*;

use super::parts::Place;
use super::plan::{BORDER_WORDS, WalkPlan};
use super::table::{FIRST, LAST};
use crate::tile::hopper::{Acc, bf16_high, bf16_low, column_of, pack_pair, read, write, zero};

/// Whether the walk enters its sequence here.
#[cube]
fn enters(place: &Place, #[comptime] plan: WalkPlan) -> bool {
    place.flags & comptime!(if plan.roles.against_time { LAST } else { FIRST }) != 0u32
}

/// Where register `n` of a unit stands in states `[N, H, K, V]` of sequences or segments, and whether it is inside.
#[cube]
fn state_at(
    of: u32,
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    #[comptime] n: usize,
    #[comptime] plan: WalkPlan,
) -> (bool, usize) {
    let outer = panel * 64u32 + row + comptime!((n / 2 % 2 * 8) as u32);
    let inner = column_of(lane, n);
    let base = (of * heads + place.head) * comptime!((plan.inner * plan.outer) as u32);
    let at = if comptime!(plan.roles.outer_is_value) {
        inner * comptime!(plan.outer as u32) + outer
    } else {
        outer * comptime!(plan.inner as u32) + inner
    };
    (outer < comptime!(plan.outer as u32) && inner < comptime!(plan.inner as u32), (base + at) as usize)
}

/// Sets the state from which a segment is walked.
#[cube]
pub(crate) fn load_state(
    initial: &[f32],
    between: &[f32],
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    factor: f32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    zero(state);
    if enters(place, plan) {
        if comptime!(plan.initial) {
            #[unroll]
            for n in 0..comptime!(state.len()) {
                let (inside, at) = state_at(place.sequence, place, panel, heads, row, lane, n, plan);
                if inside {
                    write(state, n, initial[at] * factor);
                }
            }
        }
    } else if comptime!(plan.segmented) {
        let before = if comptime!(plan.roles.against_time) { place.item + 1u32 } else { place.item - 1u32 };
        #[unroll]
        for n in 0..comptime!(state.len()) {
            let (inside, at) = state_at(before, place, panel, heads, row, lane, n, plan);
            if inside {
                write(state, n, between[at]);
            }
        }
    }
}

/// Writes the state where the walk leaves its sequence.
#[cube]
pub(crate) fn store_state(
    last: &mut [f32],
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    factor: f32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    let leaves = place.flags & comptime!(if plan.roles.against_time { FIRST } else { LAST }) != 0u32;
    if comptime!(plan.last) && leaves {
        #[unroll]
        for n in 0..comptime!(state.len()) {
            let (inside, at) = state_at(place.sequence, place, panel, heads, row, lane, n, plan);
            if inside {
                last[at] = read(state, n) * factor;
            }
        }
    }
}

/// Writes the state at the end of a segment.
#[cube]
pub(crate) fn store_end(
    ends: &mut [f32],
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    #[unroll]
    for n in 0..comptime!(state.len()) {
        let (inside, at) = state_at(place.item, place, panel, heads, row, lane, n, plan);
        if inside {
            ends[at] = read(state, n);
        }
    }
}

#[cube]
pub(super) fn border_at(place: &Place, chunk: u32, panel: u32, heads: u32, #[comptime] plan: WalkPlan) -> u32 {
    ((place.border + chunk) * heads + place.head) * comptime!(plan.outer_panels() as u32) + panel
}

/// Keeps the state at a border of a chunk.
#[cube]
pub(crate) fn write_border(
    borders: &mut [u32],
    place: &Place,
    chunk: u32,
    panel: u32,
    heads: u32,
    unit: u32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    let block = border_at(place, chunk, panel, heads, plan) as usize;
    let at = block * comptime!(plan.panels() * BORDER_WORDS) + unit as usize;
    #[unroll]
    for n in 0..comptime!(16 * plan.panels()) {
        borders[at + n * 128] = pack_pair(state, comptime!(2 * n));
    }
}

/// The product of the state before a chunk with the gradient of that after it, which is in the registers, times the
/// chunk's decay: one sum a warp.
#[cube]
pub(crate) fn multiply_border(
    borders: &mut [u32],
    ends: &mut [f32],
    place: &Place,
    chunk: u32,
    panel: u32,
    heads: u32,
    unit: u32,
    factor: f32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    let block = border_at(place, chunk, panel, heads, plan);
    let at = block as usize * comptime!(plan.panels() * BORDER_WORDS) + unit as usize;
    let mut sum = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(16 * plan.panels()) {
        let word = borders[at + n * 128];
        sum += bf16_low(word) * read(state, comptime!(2 * n));
        sum += bf16_high(word) * read(state, comptime!(2 * n + 1));
    }
    let sum = plane_sum(sum) * factor;
    if unit % 32u32 == 0u32 {
        ends[(block * 4u32 + unit / 32u32) as usize] = sum;
    }
}
