//! The steps that the kernels share.

use cubecl::prelude::*;

use super::plan::{ChainPlan, PANEL};
use super::tokens::Two;
use crate::hopper_walk::table::ITEM_WORDS;
use crate::tile::hopper::{Acc, column_of, load_f32_pair, read, scale, store_f32_pair, write};

/// Keeps what a token has of those up to itself (`strict`: before itself), in products between tokens.
#[cube]
pub(crate) fn mask(#[comptime] acc: Acc, row: u32, lane: u32, #[comptime] strict: bool) {
    #[unroll]
    for n in 0..comptime!(acc.len()) {
        let line = row + comptime!((n / 2 % 2 * 8) as u32);
        let column = column_of(lane, n);
        let keep = if comptime!(strict) { column < line } else { column <= line };
        write(acc, n, select(keep, read(acc, n), 0.0f32));
    }
}

/// Multiplies the columns of an accumulator of key channels, each with its factor in `factors[at..]`.
#[cube]
pub(crate) fn scale_by(#[comptime] acc: Acc, factors: &[f32], at: usize, lane: u32) {
    #[unroll]
    for j in 0..comptime!(acc.columns() / 8) {
        let column = at + column_of(lane, comptime!(4 * j)) as usize;
        let low = factors[column];
        let high = factors[column + 1];
        scale(acc, comptime!(4 * j), low);
        scale(acc, comptime!(4 * j + 1), high);
        scale(acc, comptime!(4 * j + 2), low);
        scale(acc, comptime!(4 * j + 3), high);
    }
}

/// The address of a pair of channels in a panel of f32: rows of 256 bytes whose groups of four pairs are swapped by the row's
/// number, so that neither accumulators nor whole rows meet in a bank.
#[cube]
pub(crate) fn staged(panel: u32, row: u32, pair: u32) -> u32 {
    panel + row * 256u32 + (pair ^ ((row % 4u32) * 4u32)) * 8u32
}

/// Writes a panel of an accumulator as f32, 16 KiB.
#[cube]
pub(crate) fn stage_panel(to: u32, #[comptime] acc: Acc, #[comptime] panel: usize, row: u32, lane: u32) {
    let base = staged(to, row, lane % 4u32);
    #[unroll]
    for j in 0..8usize {
        let i = comptime!(32 * panel + 4 * j);
        let at = base ^ comptime!((j * 32) as u32);
        store_f32_pair(at, read(acc, i), read(acc, comptime!(i + 1)));
        store_f32_pair(at + 2048u32, read(acc, comptime!(i + 2)), read(acc, comptime!(i + 3)));
    }
}

/// A staged pair.
#[cube]
pub(crate) fn staged_pair(panel: u32, row: u32, pair: u32) -> Two {
    let found = load_f32_pair(staged(panel, row, pair));
    Two { low: found.extract(0usize), high: found.extract(1usize) }
}

/// Where a cube of a chain works: a segment of a sequence, a head, a slice of its value channels.
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

#[cube]
pub(crate) fn place(index: u32, table: &[i32], heads: u32, #[comptime] plan: ChainPlan) -> Place {
    let slices = comptime!(plan.slices() as u32);
    let item = index / slices / heads;
    let at = (item * comptime!(ITEM_WORDS as u32)) as usize;
    let length = table[at + 1] as u32;
    Place {
        slice: index % slices,
        head: (index / slices) % heads,
        start: table[at] as u32,
        length,
        chunks: length.div_ceil(64u32),
        item,
        border: table[at + 4] as u32,
    }
}

/// The chunk of step `i`.
#[cube]
pub(crate) fn chunk_at(i: u32, chunks: u32, #[comptime] plan: ChainPlan) -> u32 {
    if comptime!(plan.against_time()) { chunks - 1u32 - i } else { i + 0u32 }
}

/// The address of panel `n` of a tile.
#[cube]
pub(crate) fn panel_of(tile: u32, #[comptime] n: usize) -> u32 {
    tile + comptime!((n * PANEL) as u32)
}
