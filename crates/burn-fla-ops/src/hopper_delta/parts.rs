//! The steps that the kernels share.

use cubecl::prelude::*;

use super::plan::{CHUNK, ChainPlan, SCORES, TOKENS};
use crate::hopper_walk::parts::LOG2_E;
use crate::tile::hopper::{
    Acc, Frag, bf16_high, bf16_low, column_of, exp2, load_f32, load_f32_pair, load_transposed, load_u32, pack,
    pack_pair, put, read, store_transposed, swizzled, word, write,
};

/// The least writing strength in size: one of zero counts as this much, which is nothing beside what it writes to, and lets
/// its gradient be divided by it.
const LEAST: f32 = 1.0e-12;

/// The writing strength of token `i` of a chunk.
#[cube]
pub(crate) fn strength(beta: &[f32], start: u32, length: u32, i: u32, head: u32, heads: u32) -> f32 {
    let mut value = f32::new(1.0);
    if i < length {
        value = beta[((start + i) * heads + head) as usize];
    }
    select(f32::abs(value) < LEAST, LEAST, value)
}

/// The running sums of a chunk's log decays, in powers of two, at tokens `lane` and `lane + 32`; tokens after the last one
/// add nothing.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Decays {
    pub(crate) low: f32,
    pub(crate) high: f32,
}

#[cube]
impl Decays {
    /// The sums; a whole warp calls it.
    pub(crate) fn of(
        g: &[f32],
        start: u32,
        length: u32,
        head: u32,
        heads: u32,
        lane: u32,
        #[comptime] gated: bool,
    ) -> Decays {
        Decays::of_tokens(g, start, length, head, heads, lane, gated).summed(gated)
    }

    /// The log decays of the tokens themselves.
    pub(super) fn of_tokens(
        g: &[f32],
        start: u32,
        length: u32,
        head: u32,
        heads: u32,
        lane: u32,
        #[comptime] gated: bool,
    ) -> Decays {
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        if comptime!(gated) {
            if lane < length {
                low = g[((start + lane) * heads + head) as usize];
            }
            if lane + 32u32 < length {
                high = g[((start + lane + 32u32) * heads + head) as usize];
            }
        }
        Decays { low, high }
    }

    /// From log decays to their running sums, in powers of two; a whole warp calls it.
    pub(super) fn summed(&self, #[comptime] gated: bool) -> Decays {
        if comptime!(gated) {
            let low = plane_inclusive_sum(self.low * LOG2_E);
            let high = plane_inclusive_sum(self.high * LOG2_E) + plane_broadcast(low, 31u32);
            Decays { low, high }
        } else {
            Decays { low: self.low, high: self.high }
        }
    }

    /// Writes the sums, their exponentials and the decays to the chunk's end, the last two zero after its last token.
    pub(crate) fn write(&self, to: &mut [f32], at: usize, length: u32, lane: u32) {
        let last = plane_broadcast(self.high, 31u32);
        let at = at + lane as usize;
        to[at] = self.low;
        to[at + 32] = self.high;
        to[at + comptime!(CHUNK)] = select(lane < length, exp2(self.low), 0.0f32);
        to[at + comptime!(CHUNK + 32)] = select(lane + 32u32 < length, exp2(self.high), 0.0f32);
        to[at + comptime!(2 * CHUNK)] = select(lane < length, exp2(last - self.low), 0.0f32);
        to[at + comptime!(2 * CHUNK + 32)] = select(lane + 32u32 < length, exp2(last - self.high), 0.0f32);
    }
}

/// An accumulator, rounded, as a left operand.
#[cube]
pub(crate) fn pack_all(#[comptime] to: Frag, #[comptime] from: Acc) {
    #[unroll]
    for j in 0..comptime!(from.columns() / 8) {
        #[unroll]
        for rows in 0..2usize {
            let i = comptime!(4 * j + 2 * rows);
            pack(to, comptime!(2 * j + rows), read(from, i), read(from, comptime!(i + 1)));
        }
    }
}

/// Takes the factors of tokens from shared memory: those of the columns that a unit has of an accumulator, two for each tile
/// of eight.
#[cube]
pub(super) fn load_factors(#[comptime] to: Acc, from: u32, lane: u32) {
    #[unroll]
    for j in 0..8usize {
        let pair = load_f32_pair(from + column_of(lane, comptime!(4 * j)) * 4u32);
        write(to, comptime!(2 * j), pair.extract(0usize));
        write(to, comptime!(2 * j + 1), pair.extract(1usize));
    }
}

/// An accumulator, each column times its factor, as a left operand.
#[cube]
pub(super) fn pack_columns(#[comptime] to: Frag, #[comptime] from: Acc, #[comptime] factors: Acc, factor: f32) {
    #[unroll]
    for j in 0..8usize {
        let a = read(factors, comptime!(2 * j)) * factor;
        let b = read(factors, comptime!(2 * j + 1)) * factor;
        #[unroll]
        for rows in 0..2usize {
            let i = comptime!(4 * j + 2 * rows);
            pack(to, comptime!(2 * j + rows), read(from, i) * a, read(from, comptime!(i + 1)) * b);
        }
    }
}

/// Word `2 · half + rows` of step `step` of a transposed tile of 64 tokens: see [`load_transposed`].
#[cube]
fn transposed(tile: u32, warp: u32, lane: u32, #[comptime] step: usize) -> Vector<u32, Const<4>> {
    let token = comptime!(step as u32 * 16) + (lane / 16u32) * 8u32 + lane % 8u32;
    load_transposed(swizzled(tile, token, (warp * 2u32 + (lane / 8u32) % 2u32) * 16u32))
}

/// A tile `[tokens, channels]` transposed into a left operand, as it is.
#[cube]
pub(crate) fn put_transposed(#[comptime] to: Frag, tile: u32, warp: u32, lane: u32) {
    #[unroll]
    for step in 0..4usize {
        let found = transposed(tile, warp, lane, step);
        #[unroll]
        for n in 0..4usize {
            put(to, comptime!(step * 4 + n), found.extract(n));
        }
    }
}

/// Multiplies each column of a left operand by its factor.
#[cube]
pub(super) fn scale_operand(#[comptime] operand: Frag, #[comptime] factors: Acc, factor: f32) {
    #[unroll]
    for j in 0..8usize {
        let a = read(factors, comptime!(2 * j)) * factor;
        let b = read(factors, comptime!(2 * j + 1)) * factor;
        #[unroll]
        for rows in 0..2usize {
            let i = comptime!(2 * j + rows);
            let found = word(operand, i);
            pack(operand, i, bf16_low(found) * a, bf16_high(found) * b);
        }
    }
}

/// `held + sign · factors ∘ acc`, by columns, as a left operand.
#[cube]
pub(super) fn pack_sum(
    #[comptime] to: Frag,
    #[comptime] held: Frag,
    #[comptime] acc: Acc,
    #[comptime] factors: Acc,
    #[comptime] negative: bool,
) {
    #[unroll]
    for j in 0..8usize {
        let mut a = read(factors, comptime!(2 * j));
        let mut b = read(factors, comptime!(2 * j + 1));
        if comptime!(negative) {
            a = -a;
            b = -b;
        }
        #[unroll]
        for rows in 0..2usize {
            let i = comptime!(4 * j + 2 * rows);
            let found = word(held, comptime!(2 * j + rows));
            let low = bf16_low(found) + read(acc, i) * a;
            let high = bf16_high(found) + read(acc, comptime!(i + 1)) * b;
            pack(to, comptime!(2 * j + rows), low, high);
        }
    }
}

/// The scores, scaled and with the decay between their tokens, zero where a query stands before its key, as a left operand: queries in
/// rows and keys in columns, against time the other way round.
#[cube]
pub(super) fn pack_scores(g: u32, row: u32, lane: u32, count: u32, scale: f32, #[comptime] plan: ChainPlan) {
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    if comptime!(plan.gated) {
        low = load_f32(g + row * 4u32);
        high = load_f32(g + row * 4u32 + 32u32);
    }
    #[unroll]
    for j in 0..8usize {
        let column = column_of(lane, comptime!(4 * j));
        let mut of_columns = (f32::new(0.0), f32::new(0.0));
        if comptime!(plan.gated) {
            let pair = load_f32_pair(g + column * 4u32);
            of_columns = (pair.extract(0usize), pair.extract(1usize));
        }
        #[unroll]
        for rows in 0..2usize {
            let i = comptime!(4 * j + 2 * rows);
            let at = row + comptime!(8 * rows as u32);
            let of_row = if comptime!(rows == 0) { low + 0.0f32 } else { high + 0.0f32 };
            let a = decayed(read(SCORES, i) * scale, at, column, of_row, of_columns.0, count, plan);
            let b =
                decayed(read(SCORES, comptime!(i + 1)) * scale, at, column + 1u32, of_row, of_columns.1, count, plan);
            pack(TOKENS, comptime!(2 * j + rows), a, b);
        }
    }
}

/// A score with its decay. What is masked may be infinite, so it is selected, not multiplied.
#[cube]
fn decayed(
    score: f32,
    row: u32,
    column: u32,
    of_row: f32,
    of_column: f32,
    count: u32,
    #[comptime] plan: ChainPlan,
) -> f32 {
    let (query, key) =
        if comptime!(plan.against_time()) { (column + 0u32, row + 0u32) } else { (row + 0u32, column + 0u32) };
    let mut value = score * 1.0f32;
    if comptime!(plan.gated) {
        let exponent = if comptime!(plan.against_time()) { of_column - of_row } else { of_row - of_column };
        value *= exp2(exponent);
    }
    select(key <= query && query < count, value, 0.0f32)
}

/// Writes an accumulator `[channels, tokens]` as a panel `[tokens, channels]`.
#[cube]
pub(crate) fn publish_transposed(tile: u32, #[comptime] acc: Acc, warp: u32, lane: u32) {
    #[unroll]
    for step in 0..4usize {
        let token = comptime!(step as u32 * 16) + (lane / 16u32) * 8u32 + lane % 8u32;
        let to = swizzled(tile, token, (warp * 2u32 + (lane / 8u32) % 2u32) * 16u32);
        store_transposed(
            to,
            pack_pair(acc, comptime!(8 * step)),
            pack_pair(acc, comptime!(8 * step + 2)),
            pack_pair(acc, comptime!(8 * step + 4)),
            pack_pair(acc, comptime!(8 * step + 6)),
        );
    }
}

/// A warpgroup copies the first `count` rows of a panel to rows of `width` channels, from channel `channel` on; what follows
/// belongs to others. `first` is the word of the first row's first channel, `stride` the words from row to row.
#[cube]
pub(crate) fn copy_rows(
    tile: u32,
    to: &mut [u32],
    first: u32,
    stride: u32,
    channel: u32,
    width: u32,
    count: u32,
    unit: u32,
) {
    let pair = unit % 32u32;
    let mut row = unit / 32u32;
    while row < count {
        if channel + 2u32 * pair < width {
            let word = load_u32(swizzled(tile, row, pair * 4u32));
            to[(first + row * stride + channel / 2u32 + pair) as usize] = word;
        }
        row += 4u32;
    }
}
