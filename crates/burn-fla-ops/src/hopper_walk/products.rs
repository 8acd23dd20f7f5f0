//! The outputs of a walk whose output channels decay: their factors, and their products with what the decay's gradient is
//! made of (see [`super::gate`]).

use cubecl::prelude::*;

use super::parts::Place;
use super::plan::{END_SUMS, WalkPlan};
use super::states::{BORDER_STRIDE, border_at, border_words};
use crate::tile::hopper::{
    Acc, address_of_mut, bf16_high, bf16_low, f16_high, f16_low, load_global, load_u32, pack_half_word, pack_word,
    read, reciprocal, store_u32, swizzled, write,
};

/// Multiplies the outputs without their own tokens with the tile `x`, into the registers [`WalkPlan::products`], and
/// returns by how much they are to be multiplied so that the largest of a warp uses all of f16; the inverse goes to
/// `scales[at]`.
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

/// Writes the outputs of a span, each with its own token's part and its factor, to the tile `outputs`; with `plan.dots()`,
/// also the products times `products_scale`, in f16, to the tile `products`. Rows beyond the span may hold anything.
#[cube]
pub(super) fn write_factored(
    outputs: u32,
    products: u32,
    products_scale: f32,
    factors: u32,
    values: u32,
    own: (f32, f32),
    row: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    let out = comptime!(plan.out());
    let kept = comptime!(plan.products());
    let base = swizzled(0u32, row, (lane % 4u32) * 4u32);
    let (own_low, own_high) = own;
    #[unroll]
    for j in 0..8usize {
        #[unroll]
        for half in 0..2usize {
            let at = (base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32);
            let i = comptime!(4 * j + 2 * half);
            let own = if comptime!(half == 0) { own_low } else { own_high };
            let value = load_u32(values + at);
            let factor = load_u32(factors + at);
            let a = (read(out, i) + own * bf16_low(value)) * factor_of(bf16_low(factor), plan);
            let b = (read(out, comptime!(i + 1)) + own * bf16_high(value)) * factor_of(bf16_high(factor), plan);
            store_u32(outputs + at, pack_word(a, b));
            if comptime!(plan.dots()) {
                let a = read(kept, i) * products_scale;
                let b = read(kept, comptime!(i + 1)) * products_scale;
                store_u32(products + at, pack_half_word(a, b));
            }
        }
    }
}

/// Where the sums at the end of a chunk stand, of each channel: one of the state, then one a warp of what its later tokens
/// contribute, and one a warp of the rounding of their products.
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
    let to = ends_at(place, chunk, panel, heads, plan) + (warp + 1u32) * 64u32;
    let mut sums = Array::<f32>::new(16usize);
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
        sums[comptime!(2 * j)] = low;
        sums[comptime!(2 * j + 1)] = high;
    }
    write_column_sums(ends, to, &mut sums, lane);
}

/// The sums over a span's tokens of what f16 leaves of the products in the registers, times `scale`, is more than they are.
#[cube]
pub(super) fn sum_rounding(
    ends: &mut [f32],
    place: &Place,
    chunk: u32,
    panel: u32,
    heads: u32,
    scale: f32,
    row: u32,
    warp: u32,
    lane: u32,
    count: u32,
    #[comptime] plan: WalkPlan,
) {
    let products = comptime!(plan.products());
    let to = ends_at(place, chunk, panel, heads, plan) + (warp + 5u32) * 64u32;
    // The inverse of a power of two.
    let back = f32::reinterpret((254u32 << 23u32) - u32::reinterpret(scale));
    let mut sums = Array::<f32>::new(16usize);
    #[unroll]
    for j in 0..8usize {
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        #[unroll]
        for half in 0..2usize {
            let i = comptime!(4 * j + 2 * half);
            let (a, b) = (read(products, i) * scale, read(products, comptime!(i + 1)) * scale);
            let word = pack_half_word(a, b);
            let inside = row + comptime!(8 * half as u32) < count;
            low += select(inside, f16_low(word) - a, 0.0f32);
            high += select(inside, f16_high(word) - b, 0.0f32);
        }
        sums[comptime!(2 * j)] = low * back;
        sums[comptime!(2 * j + 1)] = high * back;
    }
    write_column_sums(ends, to, &mut sums, lane);
}

/// Sums up a warp's rows of 64 columns, of which each unit has those of its row in `sums`, two a block of 8, and writes the
/// sums to `ends[to..]`. Units exchange halves of what they have, so that each ends with the sums of two columns: 14
/// exchanges, where sums of each column by all units would be 48.
#[cube]
fn write_column_sums(ends: &mut [f32], to: u32, sums: &mut Array<f32>, lane: u32) {
    #[unroll]
    for step in 0..3usize {
        let half = comptime!(8 >> step);
        let distance = comptime!(16u32 >> step as u32);
        let upper = lane & distance != 0u32;
        #[unroll]
        for i in 0..half {
            let (low, high) = (sums[i], sums[comptime!(i + half)]);
            let other = plane_shuffle_xor(select(upper, low, high), distance);
            sums[i] = select(upper, high, low) + other;
        }
    }
    let at = (to + 2u32 * lane) as usize;
    ends[at] = sums[0];
    ends[at + 1] = sums[1];
}

/// What reads the state is multiplied with the factor, what is written into it divided by it.
#[cube]
pub(crate) fn factor_of(factor: f32, #[comptime] plan: WalkPlan) -> f32 {
    if comptime!(plan.roles.against_time) { reciprocal(factor) } else { factor * 1.0f32 }
}

/// The product of the state before a chunk's last span with the gradient of that after it, which is in the registers,
/// times the decay between them, `factors[at..]`: one sum a channel.
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
    let block = border_at(place, chunk, panel, heads, plan);
    let from = border_words(address_of_mut(borders), block, unit, plan);
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(16 * plan.panels()) {
        let word = load_global(from, comptime!(n * BORDER_STRIDE));
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
