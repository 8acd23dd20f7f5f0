//! The steps of a walk.

use cubecl::prelude::*;

use super::plan::{Axis, CHUNK, KeyHeads, PANEL, SCORES, VALUES, WalkPlan};
use super::steps::{Sums, decays_of_two};
use super::table::ITEM_WORDS;
use crate::tile::hopper::{
    Acc, Frag, bf16_high, bf16_low, column_of, exp2, k_major, load_3d, load_transposed, load_u32, mma_registers,
    mma_shared, mn_major, next, pack, read, store_columns, swizzled,
};

/// `1 / ln 2`: decays are kept as powers of two.
pub(crate) const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// Where a cube works: a segment of a sequence, a head, a slice of its outer channels.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) slice: u32,
    pub(crate) head: u32,
    /// That of the inner and of the outer channels' tensors.
    pub(crate) inner_head: u32,
    pub(crate) outer_head: u32,
    pub(crate) item: u32,
    pub(crate) start: u32,
    pub(crate) length: u32,
    pub(crate) chunks: u32,
    pub(crate) sequence: u32,
    pub(crate) flags: u32,
    pub(crate) border: u32,
    /// Rows that earlier sequences have more than tokens.
    pub(crate) later: u32,
}

#[cube]
pub(crate) fn place(index: u32, table: &[i32], heads: u32, #[comptime] plan: WalkPlan) -> Place {
    place_beside(index, 0u32, table, heads, plan)
}

/// That of one of the heads which a cube walks side by side: all stand in the same segment.
#[cube]
pub(super) fn place_beside(index: u32, beside: u32, table: &[i32], heads: u32, #[comptime] plan: WalkPlan) -> Place {
    let slices = comptime!(plan.slices() as u32);
    let cubes = heads / comptime!(plan.heads as u32);
    let item = index / slices / cubes;
    let at = (item * comptime!(ITEM_WORDS as u32)) as usize;
    let length = table[at + 1] as u32;
    let head = (index / slices) % cubes * comptime!(plan.heads as u32) + beside;
    let shared = key_head(head, heads, plan.key_heads);
    Place {
        slice: index % slices,
        head,
        inner_head: if comptime!(plan.roles.outer_is_value) { shared } else { head },
        outer_head: if comptime!(plan.roles.outer_is_value) { head } else { shared },
        item,
        start: table[at] as u32,
        length,
        chunks: length.div_ceil(comptime!(CHUNK as u32)),
        sequence: table[at + 2] as u32,
        flags: table[at + 3] as u32,
        border: table[at + 4] as u32,
        later: table[at + 5] as u32,
    }
}

/// The head of the queries and keys of a head.
#[cube]
fn key_head(head: u32, heads: u32, #[comptime] key_heads: KeyHeads) -> u32 {
    match comptime!(key_heads) {
        KeyHeads::Own => head + 0u32,
        KeyHeads::Contiguous(count) => head / (heads / comptime!(count as u32)),
        KeyHeads::Tiled(count) => head % comptime!(count as u32),
    }
}

/// The chunk of step `i`.
#[cube]
pub(crate) fn chunk_at(i: u32, chunks: u32, #[comptime] plan: WalkPlan) -> u32 {
    if comptime!(plan.roles.against_time) { chunks - 1u32 - i } else { i + 0u32 }
}

/// A part of a chunk that is walked at once: all of it, but where a decay by channel is so strong that its factors would not
/// be finite.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Span {
    /// From the segment's first token on.
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// Into how many parts of equal length a chunk is cut.
#[cube]
pub(crate) fn parts_of(levels: &[u32], place: &Place, chunk: u32, heads: u32, #[comptime] plan: WalkPlan) -> u32 {
    let mut parts = u32::new(1);
    if comptime!(plan.by_channel()) {
        parts = levels[((place.border + chunk) * heads + place.head) as usize];
    }
    parts
}

/// How many of them have tokens.
#[cube]
pub(crate) fn spans_of(place: &Place, chunk: u32, parts: u32, #[comptime] plan: WalkPlan) -> u32 {
    let mut spans = u32::new(1);
    if comptime!(plan.by_channel()) {
        let left = u32::min(place.length - chunk * comptime!(CHUNK as u32), comptime!(CHUNK as u32));
        spans = left.div_ceil(comptime!(CHUNK as u32) / parts);
    }
    spans
}

/// The part of step `n` of a chunk.
#[cube]
pub(crate) fn span_at(place: &Place, chunk: u32, n: u32, parts: u32, spans: u32, #[comptime] plan: WalkPlan) -> Span {
    if comptime!(plan.by_channel()) {
        let size = comptime!(CHUNK as u32) / parts;
        let part = if comptime!(plan.roles.against_time) { spans - 1u32 - n } else { n + 0u32 };
        let start = chunk * comptime!(CHUNK as u32) + part * size;
        Span { start, count: u32::min(place.length - start, size) }
    } else {
        let start = chunk * comptime!(CHUNK as u32);
        Span { start, count: u32::min(place.length - start, comptime!(CHUNK as u32)) }
    }
}

/// Loads `panels` panels of 64 tokens, from channel `channel` of a head on.
#[cube]
pub(crate) fn load_tile(to: u32, map: u64, channel: u32, head: u32, token: u32, full: u32, #[comptime] panels: usize) {
    load_panels(to, map, channel, head, token, full, panels, PANEL);
}

/// Loads `panels` panels of `bytes`.
#[cube]
pub(super) fn load_panels(
    to: u32,
    map: u64,
    channel: u32,
    head: u32,
    token: u32,
    full: u32,
    #[comptime] panels: usize,
    #[comptime] bytes: usize,
) {
    #[unroll]
    for panel in 0..panels {
        let x = channel + comptime!(64 * panel as u32);
        load_3d(to + comptime!((panel * bytes) as u32), map, x, head, token, full);
    }
}

/// One warp writes the running sum of a chunk's log decays, in powers of two, to `to[at..at + 64]`; tokens after the last
/// one add nothing. With steps also those with which what tokens write is decayed, behind those of all heads; `rates` is A.
#[cube]
pub(super) fn decays_of_chunk(
    g: &[f32],
    rates: &[f32],
    to: &mut [f32],
    at: usize,
    place: &Place,
    chunk: u32,
    heads: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    let (low, high) = decays_of_two(g, place, chunk * comptime!(CHUNK as u32) + lane, heads, plan);
    let sums = Sums::of(low, high, rates, place, plan);
    let at = at + lane as usize;
    to[at] = sums.low;
    to[at + 32] = sums.high;
    if comptime!(plan.steps.is_some()) {
        let at = at + comptime!(plan.written());
        to[at] = sums.written_low;
        to[at + 32] = sums.written_high;
    }
}

#[cube]
pub(crate) fn decay_at(g: &[f32], place: &Place, token: u32, heads: u32, #[comptime] plan: WalkPlan) -> f32 {
    let mut value = f32::new(0.0);
    if comptime!(plan.axis != Axis::None) {
        if token < place.length {
            value = if comptime!(plan.axis == Axis::Head) {
                g[place.head as usize]
            } else {
                g[((place.start + token) * heads + place.head) as usize]
            };
        }
    }
    value * LOG2_E
}

/// The decay between the token of a row and that of a column, zero where the row's output does not depend on the
/// column's token.
#[cube]
pub(crate) fn factor(row: u32, column: u32, g_row: f32, g_column: f32, count: u32, #[comptime] plan: WalkPlan) -> f32 {
    if comptime!(plan.roles.against_time) {
        select(column >= row && column < count, exp2(g_column - g_row), 0.0f32)
    } else {
        select(column <= row, exp2(g_row - g_column), 0.0f32)
    }
}

/// The scores with the decay between their tokens, as the left operand `to` of their product with the values.
#[cube]
pub(super) fn decayed_scores(
    #[comptime] to: Frag,
    g: &[f32],
    g0: usize,
    row: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: WalkPlan,
) {
    let at = g0 + comptime!(plan.rows_at()) + row as usize;
    let g_low = g[at];
    let g_high = g[at + 8];
    #[unroll]
    for j in 0..8usize {
        let column = column_of(lane, comptime!(4 * j));
        let at = g0 + comptime!(plan.columns_at()) + column as usize;
        let g_a = g[at];
        let g_b = g[at + 1];
        let i0 = comptime!(4 * j);
        let f00 = factor(row, column, g_low, g_a, count, plan) * out_scale;
        let f01 = factor(row, column + 1u32, g_low, g_b, count, plan) * out_scale;
        let f10 = factor(row + 8u32, column, g_high, g_a, count, plan) * out_scale;
        let f11 = factor(row + 8u32, column + 1u32, g_high, g_b, count, plan) * out_scale;
        let low = comptime!(j / 2 * 4 + j % 2 * 2);
        pack(to, low, read(SCORES, i0) * f00, read(SCORES, comptime!(i0 + 1)) * f01);
        let next = comptime!(low + 1);
        pack(to, next, read(SCORES, comptime!(i0 + 2)) * f10, read(SCORES, comptime!(i0 + 3)) * f11);
    }
}

/// Transposes a warpgroup's values into a left operand, each token decayed to the chunk's end (against time: to its
/// start).
#[cube]
pub(super) fn decayed_values(
    tile: u32,
    g: &[f32],
    at: usize,
    g_last: f32,
    count: u32,
    warp: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    #[unroll]
    for step in 0..4usize {
        let token = comptime!(step as u32 * 16) + (lane / 16u32) * 8u32 + lane % 8u32;
        let found = load_transposed(swizzled(tile, token, (warp * 2u32 + (lane / 8u32) % 2u32) * 16u32));
        #[unroll]
        for half in 0..2usize {
            let column = column_of(lane, comptime!(4 * (2 * step + half)));
            let at = at + comptime!(plan.columns_at()) + column as usize;
            let a = token_factor(column, g[at], g_last, count, plan);
            let b = token_factor(column + 1u32, g[at + 1], g_last, count, plan);
            #[unroll]
            for rows in 0..2usize {
                let word = found.extract(comptime!(2 * half + rows));
                pack(VALUES, comptime!(step * 4 + 2 * half + rows), bf16_low(word) * a, bf16_high(word) * b);
            }
        }
    }
}

#[cube]
fn token_factor(token: u32, g: f32, g_last: f32, count: u32, #[comptime] plan: WalkPlan) -> f32 {
    let exponent = if comptime!(plan.roles.against_time) { g + 0.0f32 } else { g_last - g };
    select(token < count, exp2(exponent), 0.0f32)
}

/// Starts the product of two tiles of so many panels, rows with rows.
#[cube]
pub(super) fn multiply(#[comptime] to: Acc, a: u32, b: u32, #[comptime] panels: usize) {
    #[unroll]
    for n in 0..comptime!(4 * panels) {
        mma_shared(to, k_major(a, CHUNK, n), k_major(b, CHUNK, n), comptime!(n as u32), false, false);
    }
}

/// Starts adding that of a chunk's left operand in registers with a tile, columns with rows.
#[cube]
pub(super) fn add_product(#[comptime] to: Acc, #[comptime] a: Frag, b: u32) {
    #[unroll]
    for n in 0..4usize {
        mma_registers(to, a, n, mn_major(b, CHUNK, n), 1u32, true);
    }
}

/// Writes an accumulator of 64 rows, rounded to bf16, as panels.
#[cube]
pub(crate) fn publish(tile: u32, #[comptime] acc: Acc, row: u32, lane: u32) {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    #[unroll]
    for j in 0..comptime!(acc.columns() / 8) {
        store_columns(acc, j, base ^ comptime!((j % 8 * 16) as u32), comptime!((j / 8 * PANEL) as u32));
    }
}

/// A warpgroup copies the rows `kept` of a panel to rows of the outer channels, from channel `channel` on. Row 0 is row
/// `first` there, `stride` rows before the next.
#[cube]
pub(super) fn copy_rows(
    tile: u32,
    to: &mut [u32],
    first: u32,
    stride: u32,
    channel: u32,
    kept: (u32, u32),
    unit: u32,
    #[comptime] plan: WalkPlan,
) {
    let (begin, end) = kept;
    let pair = unit % 32u32;
    let mut row = begin + unit / 32u32;
    while row < end {
        if channel + 2u32 * pair < comptime!(plan.outer as u32) {
            let word = load_u32(swizzled(tile, row, pair * 4u32));
            let at = (first + row * stride) * comptime!(plan.outer as u32 / 2) + channel / 2u32 + pair;
            to[at as usize] = word;
        }
        row = next(row + 3u32);
    }
}

/// The product of a row of `acc` with the same row of the tile at `tile`: of a unit's upper row, or (`half` 1) its lower one.
#[cube]
pub(super) fn row_sum(tile: u32, #[comptime] acc: Acc, row: u32, lane: u32, #[comptime] half: usize) -> f32 {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    let mut sum = f32::new(0.0);
    #[unroll]
    for j in 0..8usize {
        let word = load_u32((base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32));
        let i = comptime!(4 * j + 2 * half);
        sum += bf16_low(word) * read(acc, i) + bf16_high(word) * read(acc, comptime!(i + 1));
    }
    sum += plane_shuffle_xor(sum, 1u32);
    sum += plane_shuffle_xor(sum, 2u32);
    sum
}

/// The products of each output row with the same row of the tile at `tile`, over this warpgroup's channels.
#[cube]
pub(super) fn row_products(
    tile: u32,
    dots: &mut [f32],
    token: u32,
    head: u32,
    heads: u32,
    row: u32,
    lane: u32,
    count: u32,
    #[comptime] plan: WalkPlan,
) {
    #[unroll]
    for half in 0..2usize {
        let sum = row_sum(tile, comptime!(plan.out()), row, lane, half);
        let at = row + comptime!(8 * half as u32);
        if lane % 4u32 == 0u32 && at < count {
            dots[((token + at) * heads + head) as usize] = sum;
        }
    }
}
