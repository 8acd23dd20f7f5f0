//! What leaves a step: outputs, and their products with another tensor.

use cubecl::prelude::*;

use super::loads::Source;
use super::parts::{band_at, band_in_tile, band_in_values};
use super::plan::{LEFT, MmaPlan};
use crate::hopper_walk::parts::Place;
use crate::ssd::Skip;
use crate::tile::mma::{bf16_high, bf16_low, load, pack_pair, read, store_global_pair, transpose, word, write};

/// Writes the outputs of a half to device memory.
#[cube]
pub(crate) fn write_outputs(
    to: &Source,
    place: &Place,
    heads: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    #[unroll]
    for band in 0..comptime!(plan.bands) {
        let out = comptime!(plan.out(band));
        let rows = rows_at(to, place, heads, warp, lane, band, plan);
        #[unroll]
        for j in 0..comptime!(2 * plan.half_groups()) {
            let low = pack_pair(out, comptime!(4 * j));
            let high = pack_pair(out, comptime!(4 * j + 2));
            store_block(low, high, &rows, lane, comptime!(2 * half * plan.half_groups() + j));
        }
    }
}

/// Where a lane stores four channels of every eighth token.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    address: u64,
    /// Bytes between two of them.
    stride: u64,
    /// How many there are, and whether the first one is.
    count: u32,
    begins: bool,
}

/// [`Rows`] of a band: of its four channels, 0 or 4 in the first half of the band, 8 or 12 in the second.
#[cube]
pub(crate) fn rows_at(
    to: &Source,
    place: &Place,
    heads: u32,
    warp: u32,
    lane: u32,
    #[comptime] band: usize,
    #[comptime] plan: MmaPlan,
) -> Rows {
    let outer = comptime!(plan.walk.outer as u32);
    let at = band_at(place, warp, lane, band, plan);
    let own = (lane % 4u32 / 2u32) * 4u32 + (lane % 2u32) * 8u32;
    let channel = at.panel * 64u32 + at.unit / 32u32 * 16u32 + own;
    let stride = heads * comptime!(outer * 2);
    let first = u64::cast_from(to.token + lane / 4u32) * u64::cast_from(stride);
    let left = to.end + 7u32 - u32::min(lane / 4u32, to.end + 7u32);
    Rows {
        address: to.address + first + u64::cast_from((place.head * outer + channel) * 2u32),
        stride: u64::cast_from(stride * 8u32),
        count: select(channel < outer, left / 8u32, 0u32),
        begins: lane / 4u32 >= to.begin,
    }
}

/// Writes 16 channels of the `block`-th eight tokens, which lanes hold as the transposed outputs are: of channels in the
/// first half a word in `low`, of the others in `high`.
///
/// Transposed, a lane has two channels of a token in each half; neighbours exchange them so that each has four of one.
#[cube]
pub(crate) fn store_block(low: u32, high: u32, rows: &Rows, lane: u32, #[comptime] block: usize) {
    let odd = lane % 2u32 == 1u32;
    let low = transpose(low);
    let high = transpose(high);
    let kept = select(odd, high, low);
    let other = plane_shuffle_xor(select(odd, low, high), 1u32);
    let first = select(odd, other, kept);
    let second = select(odd, kept, other);
    let address = rows.address + rows.stride * comptime!(block as u64);
    let mut there = comptime!(block as u32) < rows.count;
    if comptime!(block == 0) {
        there = there && rows.begins;
    }
    store_global_pair(address, first, second, there);
}

/// Adds `D ∘ x` to the outputs of a half, with the values at `v`: see [`crate::hopper_walk::steps`].
#[cube]
pub(super) fn add_inputs(
    skip: &[f32],
    place: &Place,
    v: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let outer = comptime!(plan.walk.outer as u32);
    #[unroll]
    for band in 0..comptime!(plan.bands) {
        let out = comptime!(plan.out(band));
        let by_channel = comptime!(plan.walk.skip() == Skip::Channel);
        let at = band_at(place, warp, lane, band, plan);
        let channel = at.panel * 64u32 + at.row;
        // What is past the last channel is not stored.
        let first = place.head * outer + u32::min(channel, outer - 1u32);
        let second = place.head * outer + u32::min(channel + 8u32, outer - 1u32);
        let first = if comptime!(by_channel) { first } else { place.head + 0u32 };
        let second = if comptime!(by_channel) { second } else { place.head + 0u32 };
        let (low, high) = (skip[first as usize], skip[second as usize]);
        #[unroll]
        for step in 0..comptime!(plan.half_groups()) {
            let group = comptime!(half * plan.half_groups() + step);
            load(LEFT, band, band_in_values(v, warp, lane, band, plan), comptime!(group * 2048), true);
            #[unroll]
            for n in 0..4usize {
                let i = comptime!(8 * step + 2 * n);
                let value = word(LEFT, comptime!(4 * band + n));
                let weight = if comptime!(n % 2 == 0) { low } else { high };
                write(out, i, read(out, i) + weight * bf16_low(value));
                write(out, comptime!(i + 1), read(out, comptime!(i + 1)) + weight * bf16_high(value));
            }
        }
    }
}

/// The products of each token's outputs with the same of the tile `x`, summed over this warp's channels.
#[cube]
pub(super) fn output_products(
    x: u32,
    dots: &mut [f32],
    at: u32,
    place: &Place,
    heads: u32,
    warp: u32,
    lane: u32,
    count: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let groups = comptime!(plan.half_groups());
    let mut sums = Array::<f32>::new(comptime!(4 * groups));
    #[unroll]
    for i in 0..comptime!(4 * groups) {
        sums[i] = f32::new(0.0);
    }
    #[unroll]
    for step in 0..groups {
        let down = comptime!((half * groups + step) * 2048);
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            load(LEFT, band, band_in_tile(x, warp, lane, band, plan), down, true);
            #[unroll]
            for tile in 0..2usize {
                let out = comptime!(plan.out(band));
                let low = word(LEFT, comptime!(4 * band + 2 * tile));
                let high = word(LEFT, comptime!(4 * band + 2 * tile + 1));
                let j = comptime!(2 * step + tile);
                let i = comptime!(4 * j);
                let even = bf16_low(low) * read(out, i) + bf16_low(high) * read(out, comptime!(i + 2));
                let odd = bf16_high(low) * read(out, comptime!(i + 1)) + bf16_high(high) * read(out, comptime!(i + 3));
                sums[comptime!(2 * j)] += even;
                sums[comptime!(2 * j + 1)] += odd;
            }
        }
    }
    // Lanes whose numbers are of the same tokens exchange halves of what they have left: the upper lane keeps the upper one.
    #[unroll]
    for round in 0..3usize {
        let kept = comptime!((2 * groups) >> round);
        let bit = comptime!(16u32 >> round as u32);
        let upper = lane & bit != 0u32;
        #[unroll]
        for i in 0..kept {
            let first = sums[i];
            let second = sums[comptime!(i + kept)];
            let sent = select(upper, first, second);
            sums[i] = select(upper, second, first) + plane_shuffle_xor(sent, bit);
        }
    }
    // Of 64 tokens a lane has 2 l and the next; of 32, one in the order of its bits.
    #[unroll]
    for i in 0..comptime!(groups / 2) {
        let token = if comptime!(groups == 4) {
            2u32 * lane + comptime!(i as u32)
        } else {
            lane / 8u32 * 8u32 + (lane % 4u32) * 2u32 + (lane / 4u32) % 2u32 + comptime!(32 * half as u32)
        };
        if token < count {
            dots[((at + token) * heads + place.head) as usize] = sums[i];
        }
    }
}
