//! The steps of a walk with a decay by key. Its tensors come prepared (see [`super::prepare`]), so that a span of tokens is
//! walked as if nothing decayed in it, between two factors of each of the state's key channels.

use cubecl::prelude::*;

use super::parts::{LOG2_E, Place, Span, border_at};
use super::plan::{BORDER_WORDS, DECAYED, END_SUMS, SCORES, VALUES, WalkPlan};
use crate::tile::hopper::{
    Acc, bf16_high, bf16_low, column_of, exp2, load_transposed, load_u32, pack, pack_half_word, pack_word, put, read,
    reciprocal, scale, store_u32, swizzled, write,
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
    let keys = comptime!(plan.keys() as u32);
    #[unroll]
    for i in 0..comptime!(plan.decay_channels() / 32) {
        let channel = lane + comptime!(32 * i as u32);
        // Channels that only fill a panel keep a state of zeros.
        let mut early = f32::new(1.0);
        let mut late = f32::new(1.0);
        if channel < keys {
            if parts == 1u32 {
                let from = ((place.border + chunk) * heads + place.head) * comptime!(2 * plan.keys() as u32) + channel;
                early = vectors[from as usize];
                late = vectors[(from + keys) as usize];
            } else {
                let row = (place.start + span.start) * heads + place.head;
                let first = gate_at(gates, row * keys + channel, plan.wide_gates);
                let mut rest = f32::new(0.0);
                for t in 1..span.count {
                    rest += gate_at(gates, (row + t * heads) * keys + channel, plan.wide_gates);
                }
                early = exp2(first + rest * 0.5f32);
                late = exp2(rest * 0.5f32);
            }
        }
        let channel = at + channel as usize;
        to[channel] = if comptime!(plan.roles.against_time) { late } else { early };
        to[channel + comptime!(plan.decay_channels())] = if comptime!(plan.roles.against_time) { early } else { late };
    }
}

/// Multiplies the state with `factors[at..]`, a number for each key channel.
#[cube]
pub(super) fn scale_state(factors: &[f32], at: usize, panel: u32, row: u32, lane: u32, #[comptime] plan: WalkPlan) {
    let state = comptime!(plan.state());
    if comptime!(plan.roles.outer_is_value) {
        #[unroll]
        for j in 0..comptime!(8 * plan.panels()) {
            let channel = at + column_of(lane, comptime!(4 * j)) as usize;
            let even = factors[channel];
            let odd = factors[channel + 1];
            scale(state, comptime!(4 * j), even);
            scale(state, comptime!(4 * j + 1), odd);
            scale(state, comptime!(4 * j + 2), even);
            scale(state, comptime!(4 * j + 3), odd);
        }
    } else {
        let channel = at + (panel * 64u32 + row) as usize;
        let low = factors[channel];
        let high = factors[channel + 8];
        #[unroll]
        for n in 0..comptime!(state.len()) {
            scale(state, n, if comptime!(n / 2 % 2 == 0) { low } else { high });
        }
    }
}

/// Whether a row's output takes part of a column's token. An output by key leaves its own token out: that is added to it
/// afterwards, but not to what the decay's gradient is made of.
#[cube]
pub(crate) fn sees(row: u32, column: u32, count: u32, #[comptime] plan: WalkPlan) -> bool {
    let beside = column == row;
    let own = beside && comptime!(!plan.factors());
    if comptime!(plan.roles.against_time) { (column > row || own) && column < count } else { column < row || own }
}

/// The scores, masked, as the left operand of their product with the values; and each of the two rows' own score.
#[cube]
pub(super) fn masked_scores(row: u32, lane: u32, count: u32, out_scale: f32, #[comptime] plan: WalkPlan) -> (f32, f32) {
    let mut own_low = f32::new(0.0);
    let mut own_high = f32::new(0.0);
    let high = row + 8u32;
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

/// Multiplies the outputs without their own tokens with the tile `x`, into the registers [`WalkPlan::products`], and returns by
/// how much they are to be multiplied so that the largest of a warp uses all of f16; the inverse goes to `scales[at]`.
#[cube]
pub(super) fn products_of_span(
    scales: &mut [f32],
    at: u32,
    x: u32,
    row: u32,
    lane: u32,
    count: u32,
    #[comptime] plan: WalkPlan,
) -> f32 {
    let out = comptime!(plan.out());
    let products = comptime!(plan.products());
    let base = swizzled(x, row, (lane % 4u32) * 4u32);
    let mut largest = f32::new(0.0);
    #[unroll]
    for j in 0..8usize {
        #[unroll]
        for half in 0..2usize {
            let word = load_u32((base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32));
            let i = comptime!(4 * j + 2 * half);
            let a = read(out, i) * bf16_low(word);
            let b = read(out, comptime!(i + 1)) * bf16_high(word);
            write(products, i, a);
            write(products, comptime!(i + 1), b);
            // Rows beyond the span may hold anything.
            let found = f32::max(f32::abs(a), f32::abs(b));
            largest = select(row + comptime!(8 * half as u32) < count, f32::max(largest, found), largest);
        }
    }
    let largest = plane_max(largest);
    // The exponent of the largest, with room for its inverse.
    let exponent = u32::max(u32::reinterpret(largest) >> 23u32, 15u32);
    if lane == 0u32 {
        scales[at as usize] = f32::reinterpret((exponent - 14u32) << 23u32);
    }
    f32::reinterpret((268u32 - exponent) << 23u32)
}

/// Writes the outputs of a span, each with its own token's part and its factor; with `plan.dots()`, also the products
/// times `products_scale`, in f16.
///
/// A whole chunk goes to the tiles `outputs` and `products`, otherwise straight to device memory: what follows belongs to
/// other spans.
#[cube]
pub(super) fn write_factored(
    rows: &mut [u32],
    product_rows: &mut [u32],
    outputs: u32,
    products: u32,
    products_scale: f32,
    factors: u32,
    values: u32,
    own: (f32, f32),
    first: u32,
    channel: u32,
    stride: u32,
    row: u32,
    lane: u32,
    count: u32,
    #[comptime] whole: bool,
    #[comptime] plan: WalkPlan,
) {
    let out = comptime!(plan.out());
    let base = swizzled(0u32, row, (lane % 4u32) * 4u32);
    let (own_low, own_high) = own;
    let kept = comptime!(plan.products());
    #[unroll]
    for j in 0..8usize {
        let column = channel + column_of(lane, comptime!(4 * j));
        #[unroll]
        for half in 0..2usize {
            let at = (base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32);
            let i = comptime!(4 * j + 2 * half);
            let own = if comptime!(half == 0) { own_low } else { own_high };
            let value = load_u32(values + at);
            let factor = load_u32(factors + at);
            let a = (read(out, i) + own * bf16_low(value)) * factor_of(bf16_low(factor), plan);
            let b = (read(out, comptime!(i + 1)) + own * bf16_high(value)) * factor_of(bf16_high(factor), plan);
            let word = pack_word(a, b);
            let token = row + comptime!(8 * half as u32);
            let to = ((first + token * stride) * comptime!(plan.outer as u32 / 2) + column / 2u32) as usize;
            let inside = token < count && column < comptime!(plan.outer as u32);
            if comptime!(whole) {
                store_u32(outputs + at, word);
            } else if inside {
                rows[to] = word;
            }
            if comptime!(plan.dots()) {
                let a = read(kept, i) * products_scale;
                let b = read(kept, comptime!(i + 1)) * products_scale;
                let word = pack_half_word(a, b);
                if comptime!(whole) {
                    store_u32(products + at, word);
                } else if inside {
                    product_rows[to] = word;
                }
            }
        }
    }
}

/// Where the sums at the end of a chunk stand: one of the state, then one a warp of its later tokens, of each channel.
#[cube]
pub(crate) fn ends_at(place: &Place, chunk: u32, panel: u32, heads: u32, #[comptime] plan: WalkPlan) -> u32 {
    border_at(place, chunk, panel, heads, plan) * comptime!(END_SUMS as u32 * 64)
}

/// The sums over a span's tokens of the tile `x` times what the state alone gives to the outputs, in the registers.
#[cube]
pub(super) fn sum_inter(
    ends: &mut [f32],
    place: &Place,
    chunk: u32,
    panel: u32,
    heads: u32,
    x: u32,
    row: u32,
    warp: u32,
    lane: u32,
    count: u32,
    #[comptime] plan: WalkPlan,
) {
    let out = comptime!(plan.out());
    let base = swizzled(x, row, (lane % 4u32) * 4u32);
    let to = (ends_at(place, chunk, panel, heads, plan) + (warp + 1u32) * 64u32) as usize;
    #[unroll]
    for j in 0..8usize {
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        #[unroll]
        for half in 0..2usize {
            let word = load_u32((base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32));
            let i = comptime!(4 * j + 2 * half);
            let inside = row + comptime!(8 * half as u32) < count;
            low += select(inside, bf16_low(word) * read(out, i), 0.0f32);
            high += select(inside, bf16_high(word) * read(out, comptime!(i + 1)), 0.0f32);
        }
        #[unroll]
        for step in 2..5usize {
            low += plane_shuffle_xor(low, comptime!(1u32 << step as u32));
            high += plane_shuffle_xor(high, comptime!(1u32 << step as u32));
        }
        if lane < 4u32 {
            let column = column_of(lane, comptime!(4 * j)) as usize;
            ends[to + column] = low;
            ends[to + column + 1] = high;
        }
    }
}

/// Queries are multiplied with the factor, keys divided by it.
#[cube]
pub(crate) fn factor_of(factor: f32, #[comptime] plan: WalkPlan) -> f32 {
    if comptime!(plan.roles.against_time) { reciprocal(factor) } else { factor * 1.0f32 }
}

/// The product of the state before a chunk's last span with the gradient of that after it, which is in the registers,
/// times the decay between them, `factors[at..]`: one sum a key channel.
#[cube]
pub(crate) fn multiply_rows(
    borders: &mut [u32],
    ends: &mut [f32],
    factors: &[f32],
    at: usize,
    place: &Place,
    chunk: u32,
    panel: u32,
    heads: u32,
    row: u32,
    lane: u32,
    unit: u32,
    factor: f32,
    #[comptime] state: Acc,
    #[comptime] plan: WalkPlan,
) {
    let block = border_at(place, chunk, panel, heads, plan) as usize;
    let from = block * comptime!(plan.panels() * BORDER_WORDS) + unit as usize;
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(16 * plan.panels()) {
        let word = borders[from + n * 128];
        let a = bf16_low(word) * read(state, comptime!(2 * n));
        let b = bf16_high(word) * read(state, comptime!(2 * n + 1));
        if comptime!(n % 2 == 0) {
            low += a + b;
        } else {
            high += a + b;
        }
    }
    low += plane_shuffle_xor(low, 1u32);
    low += plane_shuffle_xor(low, 2u32);
    high += plane_shuffle_xor(high, 1u32);
    high += plane_shuffle_xor(high, 2u32);
    if lane % 4u32 == 0u32 {
        let channel = at + (panel * 64u32 + row) as usize;
        let after = comptime!(plan.decay_channels());
        let to = (ends_at(place, chunk, panel, heads, plan) + row) as usize;
        ends[to] = low * factor * factors[channel] * factors[channel + after];
        ends[to + 8] = high * factor * factors[channel + 8] * factors[channel + 8 + after];
    }
}
