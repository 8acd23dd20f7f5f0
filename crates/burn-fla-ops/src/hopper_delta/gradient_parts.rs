//! The steps of [`super::gradients`].

use cubecl::prelude::*;

use super::parts::copy_rows;
use super::plan::{CHUNK, DECAYED, DECAYS, GradientPlan, PANEL, TOKENS};
use crate::hopper_walk::Cores;
use crate::hopper_walk::table::CHUNK_WORDS;
use crate::mma_delta::parts::add_rows;
use crate::tile::hopper::{
    Acc, Frag, Ring, bf16_high, bf16_low, column_of, commit, commit_stores, exp2, fence, fence_shared, k_major,
    load_u32, mma_registers, mma_shared, mn_major, pack, read, row_of, scale, store_3d, swizzled, sync_warpgroup, wait,
};

/// Products of output gradients and written values; those of value gradients.
pub(crate) const OUTER: Acc = Acc::new("a", 64);
pub(crate) const INNER: Acc = Acc::new("x", 64);
/// Sums of a token, of which each chunk has two sets in turn: `q · dq`, `k · dk'`, `k · dk″`, inter.
pub(crate) const SUMS: usize = 4 * CHUNK;

/// Where the tiles are.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Tiles {
    pub(crate) slices: u32,
    pub(crate) q: u32,
    pub(crate) k: u32,
    pub(crate) out: u32,
}

#[derive(CubeType, Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) head: u32,
    pub(crate) start: u32,
    pub(crate) length: u32,
}

#[cube]
pub(crate) fn chunk_of(index: u32, table: &[i32], table_at: u32, heads: u32) -> Chunk {
    let at = (table_at + index / heads * comptime!(CHUNK_WORDS as u32)) as usize;
    Chunk { head: index % heads, start: table[at] as u32, length: table[at + 1] as u32 }
}

/// `acc (+)= A B` over the 64 channels of a slice, from zero at the first one. A is tokens × channels; B too, transposed, or
/// with `state` channels × key channels.
#[cube]
fn multiply_panels(#[comptime] acc: Acc, a: u32, b: u32, slice: u32, #[comptime] state: bool) {
    #[unroll]
    for n in 0..4usize {
        let keep = slice + comptime!(n as u32);
        let right = if comptime!(state) { mn_major(b, 64usize, n) } else { k_major(b, CHUNK, n) };
        mma_shared(acc, k_major(a, CHUNK, n), right, keep, false, state);
    }
}

/// What tokens read with, over all value channels: products between tokens, `do Sᵀ` and `dv Sᵀ`.
#[cube]
pub(super) fn read_slices(t: &Tiles, ring: &Ring, first: u32, #[comptime] plan: GradientPlan) {
    let of_queries = comptime!(plan.of_queries());
    let of_keys = comptime!(plan.of_keys());
    for slice in 0..comptime!(plan.slices() as u32) {
        let step = first + slice;
        ring.wait_full(step);
        let w0 = t.slices + ring.stage(step) * comptime!((plan.slice_panels() * PANEL) as u32);
        let do0 = w0 + comptime!(PANEL as u32);
        let dv0 = w0 + comptime!(2 * PANEL as u32);
        let s0 = w0 + comptime!(3 * PANEL as u32);
        fence();
        multiply_panels(OUTER, do0, w0, slice, false);
        multiply_panels(INNER, dv0, w0, slice, false);
        multiply_panels(of_queries, do0, s0, slice, true);
        multiply_panels(of_keys, dv0, s0, slice, true);
        commit();
        wait(0u32);
        if UNIT_POS % 128u32 == 0u32 {
            ring.release(step);
        }
    }
}

/// What tokens write with: products between tokens, transposed, and `W Zᵀ`.
#[cube]
pub(super) fn write_slices(t: &Tiles, ring: &Ring, first: u32, #[comptime] plan: GradientPlan) {
    let of_keys = comptime!(plan.of_keys());
    for slice in 0..comptime!(plan.slices() as u32) {
        let step = first + slice;
        ring.wait_full(step);
        let w0 = t.slices + ring.stage(step) * comptime!((plan.slice_panels() * PANEL) as u32);
        let do0 = w0 + comptime!(PANEL as u32);
        let dv0 = w0 + comptime!(2 * PANEL as u32);
        let z0 = w0 + comptime!(((3 + plan.panels()) * PANEL) as u32);
        fence();
        multiply_panels(OUTER, w0, do0, slice, false);
        multiply_panels(INNER, w0, dv0, slice, false);
        multiply_panels(of_keys, w0, z0, slice, true);
        commit();
        wait(0u32);
        if UNIT_POS % 128u32 == 0u32 {
            ring.release(step);
        }
    }
}

/// dq, the part of dk with which tokens read, dβ and what dg takes of them.
#[cube]
pub(crate) fn reader(
    t: &Tiles,
    g: &[f32],
    sums: &mut [f32],
    set: usize,
    dbeta: &mut [f32],
    c: &Chunk,
    heads: u32,
    warp: u32,
    lane: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let of_queries = comptime!(plan.of_queries());
    let of_keys = comptime!(plan.of_keys());
    let row = row_of(warp, lane, 0usize);
    let low = g[CHUNK + row as usize];
    let high = g[CHUNK + row as usize + 8];
    scale_rows(of_queries, low * out_scale, high * out_scale);
    scale_rows(of_keys, -low, -high);
    let products = diagonal(INNER, row, lane);
    pack_between(TOKENS, OUTER, g, row, lane, c.length, out_scale, false, false, plan);
    pack_between(DECAYED, INNER, g, row, lane, c.length, -1.0f32, true, false, plan);
    add_tokens(of_queries, t.k, of_keys, t.k, 0u32, warp, lane, plan);
    let keys = row_sums(of_keys, t.k, row, lane);
    let queries = row_sums(of_queries, t.q, row, lane);
    if lane % 4u32 == 0u32 {
        #[unroll]
        for half in 0..2usize {
            let i = row + comptime!(8 * half as u32);
            let product = if comptime!(half == 0) { products.low } else { products.high };
            let strength = g[DECAYS + i as usize];
            if comptime!(plan.gated) {
                sums[set + i as usize] = if comptime!(half == 0) { queries.low } else { queries.high };
                sums[set + CHUNK + i as usize] = if comptime!(half == 0) { keys.low } else { keys.high };
            }
            if i < c.length {
                // w and dv both have the factor β.
                dbeta[((c.start + i) * heads + c.head) as usize] = product / strength / strength;
            }
        }
    }
}

/// The part of dk with which tokens write, and what dg takes of it.
#[cube]
pub(crate) fn writer(
    t: &Tiles,
    g: &[f32],
    sums: &mut [f32],
    set: usize,
    c: &Chunk,
    warp: u32,
    lane: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let of_keys = comptime!(plan.of_keys());
    let row = row_of(warp, lane, 0usize);
    scale_rows(of_keys, g[2 * CHUNK + row as usize], g[2 * CHUNK + row as usize + 8]);
    pack_between(TOKENS, OUTER, g, row, lane, c.length, out_scale, false, true, plan);
    pack_between(DECAYED, INNER, g, row, lane, c.length, -1.0f32, true, true, plan);
    let inter = row_sums(of_keys, t.k, row, lane);
    add_tokens(of_keys, t.q, of_keys, t.k, warp, 3u32, lane, plan);
    if comptime!(plan.gated) {
        let all = row_sums(of_keys, t.k, row, lane);
        if lane % 4u32 == 0u32 {
            let at = set + row as usize;
            sums[at + 2 * CHUNK] = all.low - inter.low;
            sums[at + 2 * CHUNK + 8] = all.high - inter.high;
            sums[at + 3 * CHUNK] = inter.low;
            sums[at + 3 * CHUNK + 8] = inter.high;
        }
    }
}

/// Adds what tokens take from each other: the products of [`TOKENS`] with a tile, and of [`DECAYED`] with another one. A
/// warp's tokens take something from groups `from` to `to` of 16 alone.
#[cube]
fn add_tokens(
    #[comptime] first: Acc,
    tile: u32,
    #[comptime] second: Acc,
    other: u32,
    from: u32,
    to: u32,
    lane: u32,
    #[comptime] plan: GradientPlan,
) {
    if comptime!(plan.cores == Cores::Mma) {
        add_rows(first, TOKENS, tile, from, to, lane, comptime!(plan.keys / 16));
        add_rows(second, DECAYED, other, from, to, lane, comptime!(plan.keys / 16));
    } else {
        fence();
        #[unroll]
        for n in 0..4usize {
            mma_registers(first, TOKENS, n, mn_major(tile, CHUNK, n), 1u32, true);
        }
        #[unroll]
        for n in 0..4usize {
            mma_registers(second, DECAYED, n, mn_major(other, CHUNK, n), 1u32, true);
        }
        commit();
        wait(0u32);
    }
}

/// A number for each of a unit's two rows.
#[derive(CubeType, Clone, Copy)]
struct Rows {
    low: f32,
    high: f32,
}

/// Multiplies the rows of an accumulator.
#[cube]
fn scale_rows(#[comptime] acc: Acc, low: f32, high: f32) {
    #[unroll]
    for n in 0..comptime!(acc.len()) {
        scale(acc, n, if comptime!(n / 2 % 2 == 0) { low } else { high });
    }
}

/// Products between tokens, masked, times the decay between both and a factor, as a left operand. `transposed`: a row is the
/// token that is read, a column the one that reads.
#[cube]
fn pack_between(
    #[comptime] to: Frag,
    #[comptime] acc: Acc,
    g: &[f32],
    row: u32,
    lane: u32,
    length: u32,
    factor: f32,
    #[comptime] strict: bool,
    #[comptime] transposed: bool,
    #[comptime] plan: GradientPlan,
) {
    #[unroll]
    for j in 0..8usize {
        #[unroll]
        for half in 0..2usize {
            let own = row + comptime!(8 * half as u32);
            let other = column_of(lane, comptime!(4 * j));
            let i = comptime!(4 * j + 2 * half);
            let low = read(acc, i) * between(g, own, other, length, factor, strict, transposed, plan);
            let high =
                read(acc, comptime!(i + 1)) * between(g, own, other + 1u32, length, factor, strict, transposed, plan);
            pack(to, comptime!(2 * j + half), low, high);
        }
    }
}

#[cube]
fn between(
    g: &[f32],
    own: u32,
    other: u32,
    length: u32,
    factor: f32,
    #[comptime] strict: bool,
    #[comptime] transposed: bool,
    #[comptime] plan: GradientPlan,
) -> f32 {
    let reader = if comptime!(transposed) { other } else { own };
    let source = if comptime!(transposed) { own } else { other };
    let mut value = factor + 0.0f32;
    if comptime!(plan.gated) {
        value *= exp2(g[reader as usize] - g[source as usize]);
    }
    let kept = if comptime!(strict) { source < reader } else { source <= reader };
    select(kept && reader < length, value, 0.0f32)
}

/// The diagonal at this unit's two rows.
#[cube]
fn diagonal(#[comptime] acc: Acc, row: u32, lane: u32) -> Rows {
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(acc.len()) {
        let column = column_of(lane, n);
        if comptime!(n / 2 % 2 == 0) {
            low += select(column == row, read(acc, n), 0.0f32);
        } else {
            high += select(column == row + 8u32, read(acc, n), 0.0f32);
        }
    }
    Rows { low: over_row(low), high: over_row(high) }
}

/// The products of this unit's two rows with the same rows of a tile.
#[cube]
fn row_sums(#[comptime] acc: Acc, tile: u32, row: u32, lane: u32) -> Rows {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    #[unroll]
    for j in 0..comptime!(acc.columns() / 8) {
        let at = (base ^ comptime!((j % 8 * 16) as u32)) + comptime!((j / 8 * PANEL) as u32);
        let first = load_u32(at);
        let second = load_u32(at + 1024u32);
        low += bf16_low(first) * read(acc, comptime!(4 * j)) + bf16_high(first) * read(acc, comptime!(4 * j + 1));
        high +=
            bf16_low(second) * read(acc, comptime!(4 * j + 2)) + bf16_high(second) * read(acc, comptime!(4 * j + 3));
    }
    Rows { low: over_row(low), high: over_row(high) }
}

/// The sum over the four units of a row.
#[cube]
fn over_row(x: f32) -> f32 {
    let two = x + plane_shuffle_xor(x, 1u32);
    two + plane_shuffle_xor(two, 2u32)
}

/// Stores the panels of a chunk that a warpgroup has written.
#[cube]
pub(super) fn store_panels(
    t: &Tiles,
    rows: &mut [u32],
    map: u64,
    c: &Chunk,
    heads: u32,
    id: u32,
    unit: u32,
    #[comptime] plan: GradientPlan,
) {
    fence_shared();
    sync_warpgroup(id, 128u32);
    if c.length == comptime!(CHUNK as u32) {
        if unit == 0u32 {
            #[unroll]
            for n in 0..comptime!(plan.panels()) {
                store_3d(t.out + comptime!((n * PANEL) as u32), map, comptime!(64 * n as u32), c.head, c.start);
            }
            commit_stores();
        }
    } else {
        let width = comptime!(plan.keys as u32);
        let stride = heads * comptime!(plan.keys as u32 / 2);
        let first = (c.start * heads + c.head) * comptime!(plan.keys as u32 / 2);
        #[unroll]
        for n in 0..comptime!(plan.panels()) {
            let from = t.out + comptime!((n * PANEL) as u32);
            copy_rows(from, rows, first, stride, comptime!(64 * n as u32), width, c.length, unit);
        }
        sync_warpgroup(id, 128u32);
    }
}

/// One warp sums up a chunk's dg: see the equations above.
#[cube]
pub(crate) fn finish_gate(sums: &[f32], set: u32, dg: &mut [f32], across: f32, c: &Chunk, heads: u32, lane: u32) {
    let at = (set * comptime!(SUMS as u32) + lane) as usize;
    let after_low = select(lane < c.length, sums[at] + sums[at + CHUNK] - sums[at + 2 * CHUNK], 0.0f32);
    let inter_low = select(lane < c.length, sums[at + 3 * CHUNK], 0.0f32);
    let at = at + 32;
    let after_high = select(lane + 32u32 < c.length, sums[at] + sums[at + CHUNK] - sums[at + 2 * CHUNK], 0.0f32);
    let inter_high = select(lane + 32u32 < c.length, sums[at + 3 * CHUNK], 0.0f32);
    let to_low = plane_inclusive_sum(after_low);
    let to_high = plane_inclusive_sum(after_high) + plane_broadcast(to_low, 31u32);
    let total = plane_broadcast(to_high, 31u32);
    let by_low = plane_inclusive_sum(inter_low);
    let by_high = plane_inclusive_sum(inter_high) + plane_broadcast(by_low, 31u32);
    if lane < c.length {
        let value = across + total - to_low + after_low + by_low - inter_low;
        dg[((c.start + lane) * heads + c.head) as usize] = value;
    }
    if lane + 32u32 < c.length {
        let value = across + total - to_high + after_high + by_high - inter_high;
        dg[((c.start + lane + 32u32) * heads + c.head) as usize] = value;
    }
}
