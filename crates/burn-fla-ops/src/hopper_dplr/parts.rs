//! The steps that the kernels share.

use cubecl::prelude::*;

use super::plan::PANEL;
use super::tokens::Two;
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

/// The address of panel `n` of a tile.
#[cube]
pub(crate) fn panel_of(tile: u32, #[comptime] n: usize) -> u32 {
    tile + comptime!((n * PANEL) as u32)
}
