//! The copies of a step's tiles to shared memory.

use cubecl::prelude::*;

use super::key::load_factors;
use super::plan::MmaPlan;
use crate::hopper_walk::parts::{Place, Span};
use crate::hopper_walk::plan::{CHUNK, PANEL};
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
    let rows = comptime!(units as u32 / 8);
    let unit = unit_again();
    let piece = unit % 8u32;
    let row = unit / 8u32;
    let stride = heads * comptime!(channels as u32 * 2);
    let element = head * comptime!(channels as u32) + first + piece * 8u32;
    let at = from + u64::cast_from(token + row) * u64::cast_from(stride) + u64::cast_from(element * 2u32);
    let step = u64::cast_from(rows * stride);
    let place = swizzled(to, row, piece * 16u32);
    #[unroll]
    for panel in 0..panels {
        let inside = first + comptime!(panel as u32 * 64) + piece * 8u32 < comptime!(channels as u32);
        let mut address = at + comptime!(panel as u64 * 128);
        #[unroll]
        for n in 0..comptime!(CHUNK * 8 / units) {
            let there = inside && row + comptime!(n as u32) * rows < count;
            let bytes = select(there, 16u32, 0u32);
            copy_16(place, comptime!(panel * PANEL + n * units * 16), address, bytes);
            address += step;
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
    let token = place.start + span.start;
    let count = span.count;
    let stage = step % comptime!(shape.stages as u32);
    let at = stage * comptime!(plan.wide() as u32);
    let head = place.head;
    let units = comptime!(plan.units());
    load_tile(tiles_q + at, address_of(q), 0u32, token, head, heads, count, shape.inner, shape.panels(), units);
    load_tile(tiles_k + at, address_of(k), 0u32, token, head, heads, count, shape.inner, shape.panels(), units);
    if comptime!(plan.value_stages > 1) {
        let at = stage * comptime!(plan.narrow() as u32);
        let channel = place.slice * comptime!(64 * shape.warpgroups as u32);
        load_tile(
            tiles_v + at,
            address_of(v),
            channel,
            token,
            head,
            heads,
            count,
            shape.outer,
            shape.warpgroups,
            units,
        );
    }
    if comptime!(shape.by_channel()) {
        if parts == 1u32 {
            let to = shared_g + (step % 2u32) * comptime!(plan.decays() as u32 * 4);
            let at = ((place.border + chunk) * heads + head) * comptime!(2 * shape.decaying() as u32);
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
    token: u32,
    count: u32,
    place: &Place,
    heads: u32,
    #[comptime] plan: MmaPlan,
) {
    let shape = comptime!(plan.walk);
    let head = place.head;
    let units = comptime!(plan.units());
    let channel = place.slice * comptime!(64 * shape.warpgroups as u32);
    if comptime!(plan.value_stages == 1) {
        load_tile(tile_v, address_of(v), channel, token, head, heads, count, shape.outer, shape.warpgroups, units);
    }
    if comptime!(shape.dots()) {
        load_tile(tile_x, address_of(x), channel, token, head, heads, count, shape.outer, shape.warpgroups, units);
    }
    if comptime!(shape.factors()) {
        load_tile(
            tile_f,
            address_of(factors),
            channel,
            token,
            head,
            heads,
            count,
            shape.outer,
            shape.warpgroups,
            units,
        );
    }
}
