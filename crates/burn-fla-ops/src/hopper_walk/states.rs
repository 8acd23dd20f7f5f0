//! The states of a walk: where they enter and leave it, between segments, and at the borders of chunks.

use cubecl::prelude::*;

use super::parts::Place;
use super::plan::{BORDER_WORDS, WalkPlan};
use super::table::{FIRST, LAST};
use crate::tile::hopper::{
    Acc, address_of_mut, bf16_high, bf16_low, column_of, fetch, load_global, pack_pair, read, store_global, write, zero,
};

/// Whether the walk enters its sequence here.
#[cube]
fn enters(place: &Place, #[comptime] plan: WalkPlan) -> bool {
    place.flags & comptime!(if plan.roles.against_time { LAST } else { FIRST }) != 0u32
}

/// Where register 0 of a unit stands in states `[N, H, K, V]` of sequences or segments: its outer and inner channel, its
/// place, and the end of the head's state.
#[derive(CubeType, Clone, Copy)]
struct Corner {
    outer: u32,
    inner: u32,
    at: usize,
    end: usize,
}

#[cube]
fn corner(of: u32, place: &Place, panel: u32, heads: u32, row: u32, lane: u32, #[comptime] plan: WalkPlan) -> Corner {
    let outer = panel * 64u32 + row;
    let inner = column_of(lane, 0usize);
    let size = comptime!((plan.inner * plan.outer) as u32);
    let base = (of * heads + place.head) * size;
    let at = if comptime!(plan.roles.outer_is_value) {
        inner * comptime!(plan.outer as u32) + outer
    } else {
        outer * comptime!(plan.inner as u32) + inner
    };
    Corner { outer, inner, at: (base + at) as usize, end: (base + size) as usize }
}

/// How far register `n` stands from register 0: a number that the compiler knows, so that it is added to no address.
fn distance(n: usize, plan: &WalkPlan) -> usize {
    let (outer, inner) = (n / 2 % 2 * 8, n / 4 * 8 + n % 2);
    if plan.roles.outer_is_value { inner * plan.outer + outer } else { outer * plan.inner + inner }
}

/// Whether register `n` stands inside.
#[cube]
fn holds(corner: &Corner, #[comptime] n: usize, #[comptime] plan: WalkPlan) -> bool {
    if comptime!(plan.fills_panels()) {
        true.runtime()
    } else {
        let outer = corner.outer + comptime!((n / 2 % 2 * 8) as u32);
        let inner = corner.inner + comptime!((n / 4 * 8 + n % 2) as u32);
        outer < comptime!(plan.outer as u32) && inner < comptime!(plan.inner as u32)
    }
}

/// Sets the registers to a state of `states`, times `factor`.
#[cube]
fn read_state(
    states: &[f32],
    of: u32,
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    factor: f32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    let corner = corner(of, place, panel, heads, row, lane, plan);
    let states = &states[corner.at..corner.end];
    #[unroll]
    for n in 0..comptime!(state.len()) {
        if holds(&corner, n, plan) {
            write(state, n, states[comptime!(distance(n, &plan))] * factor);
        }
    }
}

/// Writes the registers, times `factor`, to a state of `states`.
#[cube]
fn write_state(
    states: &mut [f32],
    of: u32,
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    factor: f32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    let corner = corner(of, place, panel, heads, row, lane, plan);
    let states = &mut states[corner.at..corner.end];
    #[unroll]
    for n in 0..comptime!(state.len()) {
        if holds(&corner, n, plan) {
            states[comptime!(distance(n, &plan))] = read(state, n) * factor;
        }
    }
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
            read_state(initial, place.sequence, place, panel, heads, row, lane, factor, state, plan);
        }
    } else if comptime!(plan.segmented) {
        let before = if comptime!(plan.roles.against_time) { place.item + 1u32 } else { place.item - 1u32 };
        read_state(between, before, place, panel, heads, row, lane, 1.0f32, state, plan);
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
        write_state(last, place.sequence, place, panel, heads, row, lane, factor, state, plan);
    }
}

/// Sets the state from which a segment is walked, where `starts` has one for each.
#[cube]
pub(crate) fn load_start(
    starts: &[f32],
    place: &Place,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    zero(state);
    if comptime!(plan.initial) {
        read_state(starts, place.item, place, panel, heads, row, lane, 1.0f32, state, plan);
    }
}

/// Sets the outer channels of a state from `first` on to unit vectors, one of each inner channel.
#[cube]
pub(crate) fn set_unit_vectors(panel: u32, row: u32, lane: u32, #[comptime] first: usize, #[comptime] state: Acc) {
    #[unroll]
    for n in 0..comptime!(state.len()) {
        let outer = panel * 64u32 + row + comptime!((n / 2 % 2 * 8) as u32);
        if outer == column_of(lane, n) + comptime!(first as u32) {
            write(state, n, f32::new(1.0));
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
    write_state(ends, place.item, place, panel, heads, row, lane, 1.0f32, state, plan);
}

/// Bytes between two words that a unit has of a state at a border.
pub(super) const BORDER_STRIDE: usize = 512;

#[cube]
pub(super) fn border_at(place: &Place, chunk: u32, panel: u32, heads: u32, #[comptime] plan: WalkPlan) -> u32 {
    ((place.border + chunk) * heads + place.head) * comptime!(plan.outer_panels() as u32) + panel
}

/// Bytes of the state of one panel of outer channels at a border.
fn border_bytes(plan: &WalkPlan) -> usize {
    4 * plan.panels() * BORDER_WORDS
}

/// The address of a unit's words of the state at a border, [`BORDER_STRIDE`] bytes apart.
#[cube]
pub(super) fn border_words(borders: u64, block: u32, unit: u32, #[comptime] plan: WalkPlan) -> u64 {
    borders + u64::cast_from(block) * comptime!(border_bytes(&plan) as u64) + u64::cast_from(4u32 * unit)
}

/// Starts bringing what a cube multiplies at the border of a chunk to the L2 cache. Loaded when they are needed, in as many
/// turns as there are registers for, the states come from device memory while nothing else happens in the chunk.
#[cube]
pub(super) fn fetch_border(borders: u64, place: &Place, chunk: u32, heads: u32, #[comptime] plan: WalkPlan) {
    let groups = comptime!(plan.groups());
    let block = border_at(place, chunk, place.slice * comptime!(groups as u32), heads, plan);
    fetch(border_words(borders, block, 0u32, plan), comptime!(groups * border_bytes(&plan)));
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
    let block = border_at(place, chunk, panel, heads, plan);
    let to = border_words(address_of_mut(borders), block, unit, plan);
    #[unroll]
    for n in 0..comptime!(16 * plan.panels()) {
        store_global(to, comptime!(n * BORDER_STRIDE), pack_pair(state, comptime!(2 * n)));
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
    let from = border_words(address_of_mut(borders), block, unit, plan);
    let mut sum = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(16 * plan.panels()) {
        let word = load_global(from, comptime!(n * BORDER_STRIDE));
        sum += bf16_low(word) * read(state, comptime!(2 * n));
        sum += bf16_high(word) * read(state, comptime!(2 * n + 1));
    }
    let sum = plane_sum(sum) * factor;
    if unit % 32u32 == 0u32 {
        ends[(block * 4u32 + unit / 32u32) as usize] = sum;
    }
}
