//! Pairs of tokens one by one, where some channel decays so far inside a chunk that the decay between two tokens is no
//! product of two factors: each difference of sums is then taken before its exponential. The tiles hold the tokens'
//! vectors as they are.

use cubecl::prelude::*;

use super::gradient_parts::{Room, inter_products};
use super::gradients::TOKENS_OF_WARP;
use super::parts::{staged, staged_pair};
use super::plan::{GradientPlan, KeyPlan, PANEL, TEAM};
use super::tokens::{Part, Two, logs_at};
use crate::tile::hopper::{
    Acc, bf16_high, bf16_low, column_of, exp2, load_u32, next, read, row_of, store_f32_pair, swizzled, sync_warpgroup,
    write, zero,
};
use crate::tile::mma::unit_again;

/// The decay between two sums, of which the second comes first in time.
#[cube]
pub(crate) fn between(later: f32, sooner: f32) -> f32 {
    exp2(f32::min(later - sooner, 0.0f32))
}

/// The token up to whose sum the state that a token reads has decayed. Of the first token it may be any: it reads no other.
#[cube]
fn sum_read(token: u32, #[comptime] plan: KeyPlan) -> u32 {
    if comptime!(plan.form.reads_decayed()) { token + 0u32 } else { u32::max(token, 1u32) - 1u32 }
}

/// A pair of a tile's row.
#[cube]
pub(crate) fn tile_pair(tile: u32, row: u32, pair: u32) -> Two {
    Two::of(load_u32(swizzled(tile, row, pair * 4u32)))
}

/// Writes a panel of the running sums that units hold, as f32.
#[cube]
pub(crate) fn stage_logs(to: u32, part: &Part, logs: &Array<f32>, #[comptime] panel: usize, #[comptime] tokens: usize) {
    #[unroll]
    for i in 0..tokens {
        let log = logs_at(logs, i, panel, tokens);
        store_f32_pair(staged(to, part.first + comptime!(i as u32), part.pair), log.low, log.high);
    }
}

/// The products between tokens of the tiles `x` and `y`, right up to the diagonal, or below it where x `reads`. `room`: the
/// sums of their decays, a panel of f32 for each of theirs.
#[cube]
pub(crate) fn exact_scores(
    #[comptime] acc: Acc,
    x: u32,
    y: u32,
    room: u32,
    #[comptime] reads: bool,
    #[comptime] plan: KeyPlan,
) {
    zero(acc);
    #[unroll]
    for panel in 0..comptime!(plan.panels()) {
        let tile = comptime!((panel * PANEL) as u32);
        let sums = room + comptime!((2 * panel * PANEL) as u32);
        let mut pair = 0u32.runtime();
        while pair < 32u32 {
            // Asked anew: addresses that were computed before the loop would not fit into registers.
            let unit = unit_again() % 128u32;
            let lane = unit % 32u32;
            let row = row_of(unit / 32u32, lane, 0usize);
            #[unroll]
            for half in 0..2usize {
                let line = row + comptime!(8 * half as u32);
                let own = staged_pair(sums, if comptime!(reads) { sum_read(line, plan) } else { line + 0u32 }, pair);
                let vector = tile_pair(x + tile, line, pair);
                #[unroll]
                for n in 0..16usize {
                    let i = comptime!(n / 2 * 4 + 2 * half + n % 2);
                    let column = column_of(lane, i);
                    // A warp's tokens read none of those after its last one.
                    if column <= row / 16u32 * 16u32 + 15u32 {
                        let there = staged_pair(sums, column, pair);
                        let other = tile_pair(y + tile, column, pair);
                        let low = vector.low * other.low * between(own.low, there.low);
                        let high = vector.high * other.high * between(own.high, there.high);
                        write(acc, i, read(acc, i) + low + high);
                    }
                }
            }
            pair = next(pair);
        }
    }
}

/// A number of a tile between tokens.
#[cube]
fn tile_at(tile: u32, row: u32, column: u32) -> f32 {
    let word = load_u32(swizzled(tile, row, column / 2u32 * 4u32));
    if column % 2u32 == 0u32 { bf16_low(word) } else { bf16_high(word) }
}

/// Adds a pair to two registers in a row.
#[cube]
fn add_to(#[comptime] acc: Acc, #[comptime] i: usize, low: f32, high: f32) {
    write(acc, i, read(acc, i) + low);
    let next = comptime!(i + 1);
    write(acc, next, read(acc, next) + high);
}

/// Instead of [`super::gradient_parts::add_pairs`] and what comes before it: the sums get the decays of their states, inter is
/// taken, and pairs of tokens are added.
#[cube]
pub(crate) fn exact_gradients(
    t: &Room,
    part: &Part,
    logs: &Array<f32>,
    sums: &[f32],
    middles: usize,
    reads: bool,
    row: u32,
    lane: u32,
    id: u32,
    #[comptime] plan: GradientPlan,
) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let panels = comptime!(plan.key.panels());
    let room = t.logs + 0u32;
    #[unroll]
    for panel in 0..panels {
        stage_logs(room + comptime!(2 * panel as u32 * PANEL as u32), part, logs, panel, TOKENS_OF_WARP);
    }
    sync_warpgroup(id, comptime!(TEAM as u32));
    #[unroll]
    for n in 0..comptime!(outer.columns() / 8 * 2) {
        let (j, half) = comptime!((n / 2, n % 2));
        let sum = room + comptime!(2 * (n / 16) as u32 * PANEL as u32);
        let i = comptime!(4 * j + 2 * half);
        let next = comptime!(4 * j + 2 * half + 1);
        let pair = comptime!((j % 8 * 4) as u32) + lane % 4u32;
        let line = row + comptime!(8 * half as u32);
        let channel = middles + (comptime!((j / 8 * 64) as u32) + 2u32 * pair) as usize;
        let middle = Two { low: sums[channel], high: sums[channel + 1] };
        let own = staged_pair(sum, line, pair);
        if reads {
            let before = staged_pair(sum, sum_read(line, comptime!(plan.key)), pair);
            let grown = own.grown(&middle);
            let soon = before.grown(&middle);
            // Nothing decays before the first token.
            let fresh = comptime!(!plan.key.form.reads_decayed()) && line == 0u32;
            write(outer, i, read(outer, i) * grown.low);
            write(outer, next, read(outer, next) * grown.high);
            write(inner, i, read(inner, i) * select(fresh, 1.0f32, soon.low));
            write(inner, next, read(inner, next) * select(fresh, 1.0f32, soon.high));
        } else {
            let left = own.negated().grown(&middle);
            write(outer, i, read(outer, i) * left.low);
            write(outer, next, read(outer, next) * left.high);
            write(inner, i, read(inner, i) * left.low);
            write(inner, next, read(inner, next) * left.high);
        }
    }
    if !reads {
        inter_products(t, row, lane, plan);
    }
    for other in 0..64u32 {
        let sooner = sum_read(other, comptime!(plan.key));
        #[unroll]
        for half in 0..2usize {
            let line = row + comptime!(8 * half as u32);
            let before = sum_read(line, comptime!(plan.key));
            // Of two tokens the one that reads and the one that writes.
            let reader = select(reads, line, other);
            let source = select(reads, other, line);
            let dqb = tile_at(t.qb, reader, source);
            let dqk = tile_at(t.v, reader, source);
            let dak = tile_at(t.o, reader, source);
            let dab = tile_at(t.z, reader, source);
            #[unroll]
            for j in 0..comptime!(outer.columns() / 8) {
                let sum = room + comptime!(2 * (j / 8) as u32 * PANEL as u32);
                let tile = comptime!((j / 8 * PANEL) as u32);
                let i = comptime!(4 * j + 2 * half);
                let pair = comptime!((j % 8 * 4) as u32) + lane % 4u32;
                let own = staged_pair(sum, line, pair);
                let there = staged_pair(sum, other, pair);
                if reads {
                    let own_before = staged_pair(sum, before, pair);
                    let key = tile_pair(t.k + tile, other, pair);
                    let writes = tile_pair(t.b + tile, other, pair);
                    let (low, high) = (between(own.low, there.low), between(own.high, there.high));
                    let (soon_low, soon_high) =
                        (between(own_before.low, there.low), between(own_before.high, there.high));
                    add_to(
                        outer,
                        i,
                        (dqb * writes.low + dqk * key.low) * low,
                        (dqb * writes.high + dqk * key.high) * high,
                    );
                    add_to(
                        inner,
                        i,
                        (dab * writes.low + dak * key.low) * soon_low,
                        (dab * writes.high + dak * key.high) * soon_high,
                    );
                } else {
                    let there_before = staged_pair(sum, sooner, pair);
                    let query = tile_pair(t.q + tile, other, pair);
                    let asks = tile_pair(t.a + tile, other, pair);
                    let (low, high) = (between(there.low, own.low), between(there.high, own.high));
                    let (soon_low, soon_high) =
                        (between(there_before.low, own.low), between(there_before.high, own.high));
                    let query = Two { low: query.low * low, high: query.high * high };
                    let asks = Two { low: asks.low * soon_low, high: asks.high * soon_high };
                    add_to(outer, i, dqk * query.low + dak * asks.low, dqk * query.high + dak * asks.high);
                    add_to(inner, i, dqb * query.low + dab * asks.low, dqb * query.high + dab * asks.high);
                }
            }
        }
    }
    sync_warpgroup(id, comptime!(TEAM as u32));
}
