//! The steps of a walk with a decay by key, or by value. Its tensors come prepared (see [`super::prepare`]), so that a
//! span of tokens is walked as if nothing decayed in it, between two factors of each of the state's channels that decay.

use cubecl::prelude::*;

use super::parts::{LOG2_E, Place, Span};
use super::plan::{DECAYED, SCORES, VALUES, WalkPlan};
use super::shift::{Rows, first_written, token_at};
use crate::tile::hopper::{
    bf16_high, bf16_low, column_of, exp2, load_transposed, next, pack, put, read, scale_columns, scale_rows, swizzled,
};

/// The log decay at an element, as a power of two.
#[cube]
pub(super) fn gate_at(gates: &[u32], at: u32, #[comptime] wide: bool) -> f32 {
    let value = if comptime!(wide) {
        f32::reinterpret(gates[at as usize])
    } else {
        let word = gates[(at / 2u32) as usize];
        if at % 2u32 == 0u32 { bf16_low(word) } else { bf16_high(word) }
    };
    value * LOG2_E
}

/// One warp writes the factors of a span to `to[at..]`: those of the state before the span's own contribution, then those
/// after it. Whole chunks have them prepared; those of a part are summed up here.
#[cube]
pub(crate) fn factors_of_span(
    vectors: &[f32],
    gates: &[u32],
    to: &mut [f32],
    at: usize,
    place: &Place,
    chunk: u32,
    parts: u32,
    span: &Span,
    heads: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    let keys = comptime!(plan.decaying() as u32);
    if parts == 1u32 {
        let from = ((place.border + chunk) * heads + place.head) * comptime!(2 * plan.decaying() as u32);
        #[unroll]
        for i in 0..comptime!(plan.decay_channels() / 32) {
            let channel = lane + comptime!(32 * i as u32);
            // Channels that only fill a panel keep a state of zeros.
            let mut early = f32::new(1.0);
            let mut late = f32::new(1.0);
            if channel < keys {
                early = vectors[(from + channel) as usize];
                late = vectors[(from + channel + keys) as usize];
            }
            put_factors(to, at + channel as usize, early, late, plan);
        }
    } else {
        let row = token_at(place.start + span.start, place, Rows::Written, plan) * heads + place.head;
        let writes = first_written(place, span, plan) == 0u32;
        // Rarely taken: one piece of code for all channels.
        let mut channel = lane + 0u32;
        while channel < comptime!(plan.decay_channels() as u32) {
            let mut first = f32::new(0.0);
            let mut rest = f32::new(0.0);
            if channel < keys {
                if writes {
                    first = gate_at(gates, row * keys + channel, plan.wide_gates);
                }
                for t in 1..span.count {
                    rest += gate_at(gates, (row + t * heads) * keys + channel, plan.wide_gates);
                }
            }
            put_factors(to, at + channel as usize, exp2(first + rest * 0.5f32), exp2(rest * 0.5f32), plan);
            channel = next(channel + 31u32);
        }
    }
}

/// Writes a channel's factors in the order of the walk.
#[cube]
fn put_factors(to: &mut [f32], at: usize, early: f32, late: f32, #[comptime] plan: WalkPlan) {
    let after = at + comptime!(plan.decay_channels());
    if comptime!(plan.roles.against_time) {
        to[at] = late;
        to[after] = early;
    } else {
        to[at] = early;
        to[after] = late;
    }
}

/// Multiplies the state with `factors[at..]`, a number for each channel that decays.
#[cube]
pub(super) fn scale_state(factors: &[f32], at: usize, panel: u32, row: u32, lane: u32, #[comptime] plan: WalkPlan) {
    let state = comptime!(plan.state());
    if comptime!(!plan.factors()) {
        #[unroll]
        for j in 0..comptime!(8 * plan.panels()) {
            let channel = at + column_of(lane, comptime!(4 * j)) as usize;
            let even = factors[channel];
            let odd = factors[channel + 1];
            scale_columns(state, j, even, odd);
        }
    } else {
        let channel = at + (panel * 64u32 + row) as usize;
        let low = factors[channel];
        let high = factors[channel + 8];
        scale_rows(state, low, high);
    }
}

/// Whether a row's output takes part of a column's token. An output whose channels decay leaves its own token out: that
/// is added to it afterwards, but not to what the decay's gradient is made of.
#[cube]
pub(crate) fn sees(row: u32, column: u32, count: u32, #[comptime] plan: WalkPlan) -> bool {
    let own = column == row && comptime!(!plan.factors());
    if comptime!(plan.roles.against_time) { (column > row || own) && column < count } else { column < row || own }
}

/// The scores, masked, as the left operand of their product with the values; and each of the two rows' own score. With
/// `plan.owns()`, `weights[at..]` stand in the operand where the value of a row's token does: in the next column, against
/// time in the one before.
#[cube]
pub(super) fn masked_scores(
    weights: &[f32],
    at: usize,
    row: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: WalkPlan,
) -> (f32, f32) {
    let mut own_low = f32::new(0.0);
    let mut own_high = f32::new(0.0);
    let high = row + 8u32;
    let mut weight_low = f32::new(0.0);
    let mut weight_high = f32::new(0.0);
    if comptime!(plan.owns()) {
        weight_low = weights[at + row as usize] * out_scale;
        weight_high = weights[at + high as usize] * out_scale;
    }
    #[unroll]
    for j in 0..8usize {
        let column = column_of(lane, comptime!(4 * j));
        let next = column + 1u32;
        let s00 = read(SCORES, comptime!(4 * j)) * out_scale;
        let s01 = read(SCORES, comptime!(4 * j + 1)) * out_scale;
        let s10 = read(SCORES, comptime!(4 * j + 2)) * out_scale;
        let s11 = read(SCORES, comptime!(4 * j + 3)) * out_scale;
        if comptime!(plan.factors()) {
            own_low = select(column == row, s00, select(next == row, s01, own_low));
            own_high = select(column == high, s10, select(next == high, s11, own_high));
        }
        let low = comptime!(j / 2 * 4 + j % 2 * 2);
        // What is masked may be infinite.
        let s00 = select(sees(row, column, count, plan), s00, 0.0f32);
        let s01 = select(sees(row, next, count, plan), s01, 0.0f32);
        let s10 = select(sees(high, column, count, plan), s10, 0.0f32);
        let s11 = select(sees(high, next, count, plan), s11, 0.0f32);
        let s00 = own_or(row, column, weight_low, s00, plan);
        let s01 = own_or(row, next, weight_low, s01, plan);
        let s10 = own_or(high, column, weight_high, s10, plan);
        let s11 = own_or(high, next, weight_high, s11, plan);
        pack(DECAYED, low, s00, s01);
        pack(DECAYED, comptime!(low + 1), s10, s11);
    }
    if comptime!(plan.factors()) {
        own_low += plane_shuffle_xor(own_low, 1u32);
        own_low += plane_shuffle_xor(own_low, 2u32);
        own_high += plane_shuffle_xor(own_high, 1u32);
        own_high += plane_shuffle_xor(own_high, 2u32);
    }
    (own_low, own_high)
}

#[cube]
fn own_or(row: u32, column: u32, weight: f32, score: f32, #[comptime] plan: WalkPlan) -> f32 {
    if comptime!(!plan.owns()) {
        score * 1.0f32
    } else if comptime!(plan.roles.against_time) {
        select(column + 1u32 == row, weight, score)
    } else {
        select(column == row + 1u32, weight, score)
    }
}

/// Transposes a warpgroup's values into a left operand, without tokens that the span does not have.
#[cube]
pub(super) fn plain_values(tile: u32, count: u32, warp: u32, lane: u32) {
    #[unroll]
    for step in 0..4usize {
        let token = comptime!(step as u32 * 16) + (lane / 16u32) * 8u32 + lane % 8u32;
        let found = load_transposed(swizzled(tile, token, (warp * 2u32 + (lane / 8u32) % 2u32) * 16u32));
        #[unroll]
        for half in 0..2usize {
            let column = column_of(lane, comptime!(4 * (2 * step + half)));
            let low = select(column < count, 0xFFFFu32, 0u32);
            let high = select(column + 1u32 < count, 0xFFFF0000u32, 0u32);
            #[unroll]
            for rows in 0..2usize {
                let word = found.extract(comptime!(2 * half + rows));
                put(VALUES, comptime!(step * 4 + 2 * half + rows), word & (low | high));
            }
        }
    }
}
