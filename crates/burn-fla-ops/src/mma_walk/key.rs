//! The steps of a walk with a decay by channel: what [`crate::hopper_walk::key`] does, on transposed outputs.

use cubecl::prelude::*;

use super::loads::Source;
use super::outputs::{rows_at, store_block};
use super::parts::{band_at, band_in_tile};
use super::plan::{LEFT, MmaPlan, RIGHT};
use crate::hopper_walk::parts::Place;
use crate::hopper_walk::plan::{BESIDE, Borders, CHUNK};
use crate::hopper_walk::products::{ends_at, factor_of};
use crate::tile::mma::{
    bf16_high, bf16_low, column_of, copy_16, f16_high, f16_low, load, pack_half_word, read, scale, swizzled,
    unit_again, word, write,
};

/// Starts copying the factors of a whole chunk, `vectors[at..]`, to shared memory: of the state before its own
/// contribution, then after it.
#[cube]
pub(super) fn load_factors(to: u32, vectors: u64, at: u32, #[comptime] plan: MmaPlan) {
    let keys = comptime!(plan.walk.decaying() as u32);
    let channels = comptime!(plan.walk.decay_channels() as u32);
    let pieces = comptime!(channels / 4);
    let mut piece = unit_again();
    while piece < comptime!(2 * pieces) {
        let after = piece / pieces;
        let channel = piece % pieces * 4u32;
        let from = if comptime!(plan.walk.roles.against_time) { 1u32 - after } else { after + 0u32 };
        let source = vectors + u64::cast_from((at + from * keys + channel) * 4u32);
        copy_16(to + piece * 16u32, 0usize, source, select(channel < keys, 16u32, 0u32));
        piece += comptime!(plan.units() as u32);
    }
}

/// Multiplies the state with `factors[at..]`, a number for each channel that decays.
#[cube]
pub(crate) fn scale_states(factors: &[f32], at: usize, place: &Place, warp: u32, lane: u32, #[comptime] plan: MmaPlan) {
    if comptime!(!plan.walk.factors()) {
        #[unroll]
        for j in 0..comptime!(2 * plan.steps()) {
            let channel = at + column_of(lane, comptime!(4 * j)) as usize;
            let even = factors[channel];
            let odd = factors[channel + 1];
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                let state = comptime!(plan.state(band));
                scale(state, comptime!(4 * j), even);
                scale(state, comptime!(4 * j + 1), odd);
                scale(state, comptime!(4 * j + 2), even);
                scale(state, comptime!(4 * j + 3), odd);
            }
        }
    } else {
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            let state = comptime!(plan.state(band));
            let here = band_at(place, warp, lane, band, plan);
            let channel = at + (here.panel * 64u32 + here.row) as usize;
            let low = factors[channel];
            let high = factors[channel + 8];
            #[unroll]
            for n in 0..comptime!(8 * plan.steps()) {
                scale(state, n, if comptime!(n / 2 % 2 == 0) { low } else { high });
            }
        }
    }
}

/// The sums over a span's tokens of the tile `x` times what the state alone gives to the outputs, in the registers.
#[cube]
pub(super) fn sum_of_state(
    ends: &mut [f32],
    place: &Place,
    chunk: u32,
    heads: u32,
    x: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let first = comptime!(half * plan.half_groups());
    #[unroll]
    for band in 0..comptime!(plan.bands) {
        let out = comptime!(plan.out(band));
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        #[unroll]
        for step in 0..comptime!(plan.half_groups()) {
            let down = comptime!((first + step) * 2048);
            load(LEFT, band, band_in_tile(x, warp, lane, band, plan), down, true);
            #[unroll]
            for tile in 0..2usize {
                let i = comptime!(8 * step + 4 * tile);
                let a = word(LEFT, comptime!(4 * band + 2 * tile));
                let b = word(LEFT, comptime!(4 * band + 2 * tile + 1));
                low += bf16_low(a) * read(out, i) + bf16_high(a) * read(out, comptime!(i + 1));
                high += bf16_low(b) * read(out, comptime!(i + 2)) + bf16_high(b) * read(out, comptime!(i + 3));
            }
        }
        write_end(ends, low, high, place, chunk, heads, warp, lane, band, comptime!(1 + half), plan);
    }
}

/// Writes the outputs without their own tokens times the tile `x`, in f16 with a scale for 16 tokens and the warp's
/// channels: the largest of them uses all of f16, and the scale's inverse goes to `scales[at..]`.
#[cube]
pub(super) fn write_products(
    to: &Source,
    scales: &mut [f32],
    at: u32,
    x: u32,
    ends: &mut [f32],
    chunk: u32,
    first_span: bool,
    place: &Place,
    heads: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let mut more_low = Array::<f32>::new(comptime!(plan.bands));
    let mut more_high = Array::<f32>::new(comptime!(plan.bands));
    #[unroll]
    for band in 0..comptime!(plan.bands) {
        more_low[band] = f32::new(0.0);
        more_high[band] = f32::new(0.0);
    }
    #[unroll]
    for step in 0..comptime!(plan.half_groups()) {
        let group = comptime!(half * plan.half_groups() + step);
        if comptime!(16 * group as u32) < to.end {
            let mut found = Array::<f32>::new(comptime!(8 * plan.bands));
            let mut largest = f32::new(0.0);
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                let out = comptime!(plan.out(band));
                load(LEFT, band, band_in_tile(x, warp, lane, band, plan), comptime!(group * 2048), true);
                #[unroll]
                for n in 0..4usize {
                    // Tokens that are not there are zeros.
                    let factor = word(LEFT, comptime!(4 * band + n));
                    let a = read(out, comptime!(8 * step + 2 * n)) * bf16_low(factor);
                    let b = read(out, comptime!(8 * step + 2 * n + 1)) * bf16_high(factor);
                    found[comptime!(8 * band + 2 * n)] = a;
                    found[comptime!(8 * band + 2 * n + 1)] = b;
                    largest = f32::max(largest, f32::max(f32::abs(a), f32::abs(b)));
                }
            }
            let largest = plane_max(largest);
            // The exponent of the largest, with room for its inverse.
            let exponent = u32::max(u32::reinterpret(largest) >> 23u32, 15u32);
            if lane == 0u32 {
                scales[(at + comptime!(16 * group as u32)) as usize] = f32::reinterpret((exponent - 14u32) << 23u32);
            }
            let factor = f32::reinterpret((268u32 - exponent) << 23u32);
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                let rows = rows_at(to, place, heads, warp, lane, band, plan);
                #[unroll]
                for tile in 0..2usize {
                    let i = comptime!(8 * band + 4 * tile);
                    let low = pack_half_word(found[i] * factor, found[comptime!(i + 1)] * factor);
                    let high = pack_half_word(found[comptime!(i + 2)] * factor, found[comptime!(i + 3)] * factor);
                    store_block(low, high, &rows, lane, comptime!(2 * group + tile));
                    if comptime!(plan.walk.roles.borders == Borders::Multiply) {
                        let (a, b) = (found[i], found[comptime!(i + 1)]);
                        let (c, d) = (found[comptime!(i + 2)], found[comptime!(i + 3)]);
                        let back = f32::reinterpret((exponent - 14u32) << 23u32);
                        more_low[band] += (f16_low(low) * back - a) + (f16_high(low) * back - b);
                        more_high[band] += (f16_low(high) * back - c) + (f16_high(high) * back - d);
                    }
                }
            }
        }
    }
    if comptime!(plan.walk.roles.borders == Borders::Multiply) {
        // What the products at the end of a chunk were rounded up by: see [`crate::hopper_walk::gate`].
        if first_span {
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                let place_of = comptime!(1 + plan.halves() + half);
                write_end(ends, more_low[band], more_high[band], place, chunk, heads, warp, lane, band, place_of, plan);
            }
        }
    }
}

/// Sums up what the lanes of a row have, and writes it to one of the places at the end of a chunk.
#[cube]
fn write_end(
    ends: &mut [f32],
    low: f32,
    high: f32,
    place: &Place,
    chunk: u32,
    heads: u32,
    warp: u32,
    lane: u32,
    #[comptime] band: usize,
    #[comptime] at: usize,
    #[comptime] plan: MmaPlan,
) {
    let mut low = low + 0.0f32;
    let mut high = high + 0.0f32;
    low += plane_shuffle_xor(low, 1u32);
    low += plane_shuffle_xor(low, 2u32);
    high += plane_shuffle_xor(high, 1u32);
    high += plane_shuffle_xor(high, 2u32);
    if lane % 4u32 == 0u32 {
        let here = band_at(place, warp, lane, band, plan);
        let to = (ends_at(place, chunk, here.panel, heads, plan.walk) + comptime!(64 * at as u32) + here.row) as usize;
        ends[to] = low;
        ends[to + 8] = high;
    }
}

/// Adds each token's own part to its outputs, `own · v`, and multiplies them with the tile of factors.
#[cube]
pub(super) fn finish_outputs(
    own: &[f32],
    v: u32,
    factors: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let column = (lane % 4u32 * 2u32) as usize;
    #[unroll]
    for step in 0..comptime!(plan.half_groups()) {
        let group = comptime!(half * plan.half_groups() + step);
        let down = comptime!(group * 2048);
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            let out = comptime!(plan.out(band));
            load(LEFT, band, band_in_tile(v, warp, lane, band, plan), down, true);
            load(RIGHT, band, band_in_tile(factors, warp, lane, band, plan), down, true);
            #[unroll]
            for n in 0..4usize {
                let i = comptime!(8 * step + 2 * n);
                let value = word(LEFT, comptime!(4 * band + n));
                let factor = word(RIGHT, comptime!(4 * band + n));
                let even = own[column + comptime!(16 * group + n / 2 * 8)];
                let odd = own[column + comptime!(16 * group + n / 2 * 8 + 1)];
                let a = read(out, i) + even * bf16_low(value);
                let b = read(out, comptime!(i + 1)) + odd * bf16_high(value);
                write(out, i, a * factor_of(bf16_low(factor), plan.walk));
                write(out, comptime!(i + 1), b * factor_of(bf16_high(factor), plan.walk));
            }
        }
    }
}

/// Adds the tokens' own values with their weights, `own[at..]`, to the outputs of a half: of the values at `v` they are
/// those one row later, against time one row before.
#[cube]
pub(super) fn add_own_values(
    own: &[f32],
    at: usize,
    v: u32,
    warp: u32,
    lane: u32,
    out_scale: f32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let column = at + (lane % 4u32 * 2u32) as usize;
    #[unroll]
    for step in 0..comptime!(plan.half_groups()) {
        let group = comptime!(half * plan.half_groups() + step);
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            let out = comptime!(plan.out(band));
            load(LEFT, band, band_beside(v, warp, lane, band, plan), comptime!(group * 2048), true);
            #[unroll]
            for n in 0..4usize {
                let i = comptime!(8 * step + 2 * n);
                let value = word(LEFT, comptime!(4 * band + n));
                let even = own[column + comptime!(16 * group + n / 2 * 8)] * out_scale;
                let odd = own[column + comptime!(16 * group + n / 2 * 8 + 1)] * out_scale;
                write(out, i, read(out, i) + even * bf16_low(value));
                write(out, comptime!(i + 1), read(out, comptime!(i + 1)) + odd * bf16_high(value));
            }
        }
    }
}

/// [`super::parts::band_in_values`] of the rows one later, against time one before.
#[cube]
fn band_beside(v: u32, warp: u32, lane: u32, #[comptime] band: usize, #[comptime] plan: MmaPlan) -> u32 {
    let at = warp * comptime!(plan.bands as u32) + comptime!(band as u32);
    let panel = v + at / 4u32 * comptime!(plan.walk.value_panel() as u32);
    let row = (lane / 16u32) * 8u32 + lane % 8u32;
    let byte = (lane / 8u32) % 2u32 * 16u32;
    let address = if comptime!(plan.walk.roles.against_time) {
        swizzled(panel - comptime!(128 * BESIDE as u32), row + comptime!(BESIDE as u32 - 1), byte)
    } else {
        swizzled(panel, row + 1u32, byte)
    };
    address ^ ((at % 4u32) * 32u32)
}

/// Where the scales of a chunk's products begin, for the channels of a warp.
#[cube]
pub(super) fn scales_at(place: &Place, chunk: u32, warp: u32, heads: u32, #[comptime] plan: MmaPlan) -> u32 {
    let group = place.slice * comptime!(plan.warps() as u32) + warp;
    (((place.border + chunk) * heads + place.head) * comptime!(plan.channel_groups() as u32) + group)
        * comptime!(CHUNK as u32)
}
