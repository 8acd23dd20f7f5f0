//! The copies of a step's tiles to shared memory.

use cubecl::prelude::*;

use super::key::load_factors;
use super::plan::MmaPlan;
use crate::hopper_walk::parts::{Place, Span};
use crate::hopper_walk::plan::{BESIDE, CHUNK, KeyHeads, PANEL, WalkPlan};
use crate::hopper_walk::shift::{Rows, count_reading, first_written};
use crate::tile::mma::{address_of, copy_16, swizzled, unit_again};

/// Starts loading 64 tokens of `panels` panels of a head, from channel `first` of `channels` on; what is not there is zero.
#[cube]
pub(crate) fn load_tile(
    to: u32,
    from: u64,
    first: u32,
    token: u32,
    head: u32,
    heads: u32,
    count: u32,
    #[comptime] channels: usize,
    #[comptime] panels: usize,
    #[comptime] units: usize,
) {
    load_rows(to, &tokens_from(from, token, count), first, head, heads, channels, panels, PANEL, units);
}

/// Where a step's rows of a tensor are.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Source {
    /// The address of token 0's first head.
    pub(super) address: u64,
    /// The token of the first row.
    pub(super) token: u32,
    /// The first row that is there, and the one after the last.
    pub(super) begin: u32,
    pub(super) end: u32,
}

/// So many rows, one a token.
#[cube]
pub(crate) fn tokens_from(address: u64, token: u32, count: u32) -> Source {
    Source { address: address + 0u64, token: token + 0u32, begin: u32::new(0), end: count + 0u32 }
}

/// The rows of a span in a tensor at `address`, of so many bytes a token: see [`crate::hopper_walk::shift`].
#[cube]
pub(super) fn source(
    address: u64,
    token_bytes: u32,
    place: &Place,
    span: &Span,
    #[comptime] rows: Rows,
    #[comptime] plan: WalkPlan,
) -> Source {
    let row = place.start + span.start;
    if comptime!(!plan.exclusive) {
        tokens_from(address, row, span.count)
    } else if comptime!(rows == Rows::Prepared) {
        tokens_from(address, row + place.later, span.count)
    } else if comptime!(rows == Rows::Reading) {
        tokens_from(address, row, count_reading(place, span, plan))
    } else {
        // One token back: the first row of all may have none.
        let begin = first_written(place, span, plan);
        Source {
            address: address - u64::cast_from(token_bytes),
            token: row + 0u32,
            begin: begin + 0u32,
            end: span.count + 0u32,
        }
    }
}

/// Starts loading 64 rows in panels of `bytes`.
#[cube]
fn load_rows(
    to: u32,
    source: &Source,
    first: u32,
    head: u32,
    heads: u32,
    #[comptime] channels: usize,
    #[comptime] panels: usize,
    #[comptime] bytes: usize,
    #[comptime] units: usize,
) {
    let rows = comptime!(units as u32 / 8);
    let unit = unit_again();
    let piece = unit % 8u32;
    let row = unit / 8u32;
    let stride = heads * comptime!(channels as u32 * 2);
    let element = head * comptime!(channels as u32) + first + piece * 8u32;
    let from = source.address + u64::cast_from(source.token + row) * u64::cast_from(stride);
    let at = from + u64::cast_from(element * 2u32);
    let step = u64::cast_from(rows * stride);
    let place = swizzled(to, row, piece * 16u32);
    #[unroll]
    for panel in 0..panels {
        let inside = first + comptime!(panel as u32 * 64) + piece * 8u32 < comptime!(channels as u32);
        let mut address = at + comptime!(panel as u64 * 128);
        #[unroll]
        for n in 0..comptime!(CHUNK * 8 / units) {
            let row = row + comptime!(n as u32) * rows;
            let there = inside && row >= source.begin && row < source.end;
            copy_16(place, comptime!(panel * bytes + n * units * 16), address, select(there, 16u32, 0u32));
            address += step;
        }
    }
}

/// How many heads the tensors of the inner, or of the outer, channels have.
#[cube]
fn heads_of(heads: u32, #[comptime] inner: bool, #[comptime] plan: WalkPlan) -> u32 {
    let shared = comptime!(match plan.key_heads {
        KeyHeads::Contiguous(count) | KeyHeads::Tiled(count) if plan.roles.outer_is_value == inner => count as u32,
        _ => 0,
    });
    if comptime!(shared > 0) { u32::new(comptime!(shared as i64)) } else { heads + 0u32 }
}

/// Starts loading queries, or keys, of a span.
#[cube]
pub(super) fn load_inner(
    to: u32,
    x: u64,
    place: &Place,
    span: &Span,
    heads: u32,
    #[comptime] rows: Rows,
    #[comptime] plan: MmaPlan,
) {
    let shape = comptime!(plan.walk);
    let heads = heads_of(heads, true, shape);
    let from = source(x, heads * comptime!(shape.inner as u32 * 2), place, span, rows, shape);
    let units = comptime!(plan.units());
    load_rows(to, &from, 0u32, place.inner_head, heads, shape.inner, shape.panels(), PANEL, units);
}

/// Starts loading what stands beside the outputs of a span.
#[cube]
fn load_outer(to: u32, x: u64, place: &Place, span: &Span, heads: u32, #[comptime] plan: MmaPlan) {
    let shape = comptime!(plan.walk);
    let heads = heads_of(heads, false, shape);
    let from = source(x, heads * comptime!(shape.outer as u32 * 2), place, span, Rows::Prepared, shape);
    let channel = place.slice * comptime!(64 * shape.warpgroups as u32);
    let units = comptime!(plan.units());
    load_rows(to, &from, channel, place.outer_head, heads, shape.outer, shape.warpgroups, PANEL, units);
}

/// Starts loading the values of a span, to `to` and from there on; and where the tokens' own values have weights, in the
/// row beside the span's where that one is, too: of its rows' own values, all but one are among its rows.
#[cube]
pub(super) fn load_values(to: u32, v: u64, place: &Place, span: &Span, heads: u32, #[comptime] plan: MmaPlan) {
    let shape = comptime!(plan.walk);
    let heads = heads_of(heads, false, shape);
    let token_bytes = heads * comptime!(shape.outer as u32 * 2);
    let mut from = source(v, token_bytes, place, span, comptime!(shape.value_rows()), shape);
    let channel = place.slice * comptime!(64 * shape.warpgroups as u32);
    let units = comptime!(plan.units());
    if comptime!(shape.owns() && !shape.roles.against_time) {
        // The row after a span of less than a chunk; those that read it are not there.
        from.end = count_reading(place, span, shape) + 1u32;
    }
    load_rows(to, &from, channel, place.outer_head, heads, shape.outer, shape.warpgroups, shape.value_panel(), units);
    if comptime!(shape.owns()) {
        let piece = unit_again();
        let at = piece % 8u32;
        let panel = piece / 8u32;
        if panel < comptime!(shape.warpgroups as u32) {
            let first = channel + piece * 8u32;
            let tile = to + panel * comptime!(shape.value_panel() as u32);
            let inside = first < comptime!(shape.outer as u32);
            let element = u64::cast_from((place.outer_head * comptime!(shape.outer as u32) + first) * 2u32);
            if comptime!(shape.roles.against_time) {
                let there = inside && first_written(place, span, shape) == 0u32;
                let row = u64::cast_from(from.token) * u64::cast_from(token_bytes) - u64::cast_from(token_bytes);
                let place = swizzled(tile - comptime!(128 * BESIDE as u32), comptime!(BESIDE as u32 - 1), at * 16u32);
                copy_16(place, 0usize, from.address + row + element, select(there, 16u32, 0u32));
            } else {
                let there = inside && from.end > comptime!(CHUNK as u32);
                let row = u64::cast_from(from.token + comptime!(CHUNK as u32)) * u64::cast_from(token_bytes);
                let place = swizzled(tile, comptime!(CHUNK as u32), at * 16u32);
                copy_16(place, 0usize, from.address + row + element, select(there, 16u32, 0u32));
            }
        }
    }
}

/// Starts loading queries and keys of a step; values where they have two buffers; and the factors of the state of a whole
/// chunk.
#[cube]
pub(super) fn load_early(
    tiles_q: u32,
    tiles_k: u32,
    tiles_v: u32,
    shared_g: u32,
    q: &[u32],
    k: &[u32],
    v: &[u32],
    vectors: &[u32],
    step: u32,
    place: &Place,
    chunk: u32,
    parts: u32,
    span: &Span,
    heads: u32,
    #[comptime] plan: MmaPlan,
) {
    let shape = comptime!(plan.walk);
    let stage = step % comptime!(shape.stages as u32);
    let at = stage * comptime!(plan.wide() as u32);
    load_inner(tiles_q + at, address_of(q), place, span, heads, comptime!(shape.query_rows()), plan);
    load_inner(tiles_k + at, address_of(k), place, span, heads, comptime!(shape.key_rows()), plan);
    if comptime!(plan.value_stages > 1) {
        load_values(tiles_v + stage * comptime!(plan.values() as u32), address_of(v), place, span, heads, plan);
    }
    if comptime!(shape.by_channel()) {
        if parts == 1u32 {
            let to = shared_g + (step % 2u32) * comptime!(plan.decays() as u32 * 4);
            let at = ((place.border + chunk) * heads + place.head) * comptime!(2 * shape.decaying() as u32);
            load_factors(to, address_of(vectors), at, plan);
        }
    }
}

/// Starts loading what is not needed before the second half of a step.
#[cube]
pub(super) fn load_late(
    tile_x: u32,
    tile_f: u32,
    tile_v: u32,
    v: &[u32],
    x: &[u32],
    factors: &[u32],
    place: &Place,
    span: &Span,
    heads: u32,
    #[comptime] plan: MmaPlan,
) {
    let shape = comptime!(plan.walk);
    if comptime!(plan.value_stages == 1) {
        load_values(tile_v, address_of(v), place, span, heads, plan);
    }
    if comptime!(shape.dots()) {
        load_outer(tile_x, address_of(x), place, span, heads, plan);
    }
    if comptime!(shape.factors()) {
        load_outer(tile_f, address_of(factors), place, span, heads, plan);
    }
}
