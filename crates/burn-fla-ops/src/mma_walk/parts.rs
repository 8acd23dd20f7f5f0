//! The steps of a walk.

use cubecl::prelude::*;

use super::plan::{DECAYS, LEFT, MmaPlan, OF_OUTPUTS, OF_VALUES, RIGHT, SCORES};
use crate::hopper_walk::key::sees;
use crate::hopper_walk::parts::{Place, factor};
use crate::hopper_walk::plan::{CHUNK, PANEL};
use crate::hopper_walk::steps::Sums;
use crate::tile::mma::{
    across_first, bf16_high, bf16_low, down_first, exp2, load, multiply, pack, pack_step, pack_word, read, scale,
    store_u32, swizzled, word, write, zero,
};

/// Where a band of a warp stands: its panel of 64 outer channels, its row in it, and the unit of four bands to a panel.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Band {
    pub(crate) panel: u32,
    pub(crate) row: u32,
    pub(crate) unit: u32,
}

#[cube]
pub(crate) fn band_at(place: &Place, warp: u32, lane: u32, #[comptime] band: usize, #[comptime] plan: MmaPlan) -> Band {
    let at = warp * comptime!(plan.bands as u32) + comptime!(band as u32);
    Band {
        panel: place.slice * comptime!(plan.walk.warpgroups as u32) + at / 4u32,
        row: (at % 4u32) * 16u32 + lane / 4u32,
        unit: (at % 4u32) * 32u32 + lane,
    }
}

/// A lane's address of the band's columns in a tile of the cube's outer channels, as a transposed left operand.
#[cube]
pub(crate) fn band_in_tile(tile: u32, warp: u32, lane: u32, #[comptime] band: usize, #[comptime] plan: MmaPlan) -> u32 {
    band_in_panels(tile, warp, lane, band, PANEL, plan)
}

/// The same in a tile of values, whose panels may have rows around the chunk's.
#[cube]
pub(super) fn band_in_values(
    tile: u32,
    warp: u32,
    lane: u32,
    #[comptime] band: usize,
    #[comptime] plan: MmaPlan,
) -> u32 {
    band_in_panels(tile, warp, lane, band, comptime!(plan.walk.value_panel()), plan)
}

#[cube]
fn band_in_panels(
    tile: u32,
    warp: u32,
    lane: u32,
    #[comptime] band: usize,
    #[comptime] bytes: usize,
    #[comptime] plan: MmaPlan,
) -> u32 {
    let at = warp * comptime!(plan.bands as u32) + comptime!(band as u32);
    across_first(tile + at / 4u32 * comptime!(bytes as u32), lane) ^ ((at % 4u32) * 32u32)
}

/// One warp writes a chunk's decays to `to[at..]`, from the log decays of two tokens a lane, in powers of two.
#[cube]
pub(crate) fn write_decays(
    to: &mut [f32],
    at: usize,
    low: f32,
    high: f32,
    lane: u32,
    out_scale: f32,
    #[comptime] plan: MmaPlan,
) {
    write_sums(to, at, &Sums::of_decays(low, high), lane, out_scale, plan);
}

/// The same from their running sums.
#[cube]
pub(super) fn write_sums(to: &mut [f32], at: usize, sums: &Sums, lane: u32, out_scale: f32, #[comptime] plan: MmaPlan) {
    let (low, high) = (sums.low, sums.high);
    let last = plane_broadcast(high, 31u32);
    let at = at + lane as usize;
    to[at] = low;
    to[at + 32] = high;
    if comptime!(plan.walk.steps.is_some()) {
        to[at + DECAYS] = sums.written_low;
        to[at + comptime!(DECAYS + 32)] = sums.written_high;
    }
    let from_low = exp2(low);
    let from_high = exp2(high);
    let to_low = exp2(last - sums.written_low);
    let to_high = exp2(last - sums.written_high);
    if comptime!(plan.walk.roles.against_time) {
        to[at + OF_OUTPUTS] = to_low * out_scale;
        to[at + comptime!(OF_OUTPUTS + 32)] = to_high * out_scale;
        to[at + OF_VALUES] = from_low;
        to[at + comptime!(OF_VALUES + 32)] = from_high;
    } else {
        to[at + OF_OUTPUTS] = from_low * out_scale;
        to[at + comptime!(OF_OUTPUTS + 32)] = from_high * out_scale;
        to[at + OF_VALUES] = to_low;
        to[at + comptime!(OF_VALUES + 32)] = to_high;
    }
}

/// A warp's part of the scores, with the decay between their tokens, rounded to bf16: to the tile `to`, a row a token of
/// the output.
#[cube]
pub(super) fn write_scores(
    to: u32,
    q: u32,
    k: u32,
    decays: &[f32],
    g0: usize,
    own: &mut [f32],
    warp: u32,
    lane: u32,
    out_scale: f32,
    #[comptime] plan: MmaPlan,
) {
    let warps = comptime!(plan.warps() as u32);
    let groups = comptime!(plan.score_groups());
    for turn in 0..comptime!(plan.score_turns() as u32) {
        // Which 16 rows, and the first group of 16 columns: the second four of eight warps have the second half of them.
        let rows = (warp + turn * warps) % 4u32;
        let first = warp / 4u32 * 2u32;
        #[unroll]
        for i in 0..comptime!(8 * groups) {
            write(SCORES, i, 0.0f32);
        }
        let left = down_first(q, lane) + rows * 2048u32;
        let right = across_first(k, lane) + first * 2048u32;
        #[unroll]
        for step in 0..comptime!(plan.steps()) {
            let columns = comptime!((step % 4 * 32) as u32);
            let panel = comptime!(step / 4 * PANEL);
            load(LEFT, 0usize, left ^ columns, panel, false);
            #[unroll]
            for c in 0..groups {
                load(RIGHT, c, right ^ columns, comptime!(panel + c * 2048), false);
                multiply(SCORES, comptime!(2 * c), LEFT, 0usize, RIGHT, c, 0usize);
                multiply(SCORES, comptime!(2 * c + 1), LEFT, 0usize, RIGHT, c, 1usize);
            }
        }
        let row = rows * 16u32 + lane / 4u32;
        let base = swizzled(to, row, (lane % 4u32) * 4u32) ^ (first * 32u32);
        // All words before the first is stored: a store is in the way of loads.
        let mut words = Array::<u32>::new(comptime!(4 * groups));
        let mut own_low = f32::new(0.0);
        let mut own_high = f32::new(0.0);
        let g_row = g0 + comptime!(plan.rows_at()) + row as usize;
        let g_low = if comptime!(plan.walk.by_channel()) { f32::new(0.0) } else { decays[g_row] };
        let g_high = if comptime!(plan.walk.by_channel()) { f32::new(0.0) } else { decays[g_row + 8] };
        #[unroll]
        for j in 0..comptime!(2 * groups) {
            let column = first * 16u32 + comptime!(8 * j as u32) + (lane % 4u32) * 2u32;
            let g_column = g0 + comptime!(plan.columns_at()) + column as usize;
            let g_a = if comptime!(plan.walk.by_channel()) { f32::new(0.0) } else { decays[g_column] };
            let g_b = if comptime!(plan.walk.by_channel()) { f32::new(0.0) } else { decays[g_column + 1] };
            #[unroll]
            for half in 0..2usize {
                let row = row + comptime!(8 * half as u32);
                let i = comptime!(4 * j + 2 * half);
                let a = read(SCORES, i) * out_scale;
                let b = read(SCORES, comptime!(i + 1)) * out_scale;
                let at = comptime!(2 * j + half);
                if comptime!(plan.walk.by_channel()) {
                    if comptime!(plan.walk.factors()) {
                        let found = select(column == row, a, select(column + 1u32 == row, b, 0.0f32));
                        if comptime!(half == 0) {
                            own_low += found;
                        } else {
                            own_high += found;
                        }
                    }
                    // What is masked may be infinite.
                    let a = select(sees(row, column, comptime!(CHUNK as u32), plan.walk), a, 0.0f32);
                    let b = select(sees(row, column + 1u32, comptime!(CHUNK as u32), plan.walk), b, 0.0f32);
                    words[at] = pack_word(a, b);
                } else {
                    let g_row = if comptime!(half == 0) { g_low } else { g_high };
                    let a = a * factor(row, column, g_row, g_a, comptime!(CHUNK as u32), plan.walk);
                    let b = b * factor(row, column + 1u32, g_row, g_b, comptime!(CHUNK as u32), plan.walk);
                    words[at] = pack_word(a, b);
                }
            }
        }
        #[unroll]
        for j in 0..comptime!(2 * groups) {
            let piece = base ^ comptime!((j * 16) as u32);
            store_u32(piece, words[comptime!(2 * j)]);
            store_u32(piece + 1024u32, words[comptime!(2 * j + 1)]);
        }
        if comptime!(plan.walk.factors()) {
            own_low += plane_shuffle_xor(own_low, 1u32);
            own_low += plane_shuffle_xor(own_low, 2u32);
            own_high += plane_shuffle_xor(own_high, 1u32);
            own_high += plane_shuffle_xor(own_high, 2u32);
            // The item that has these rows' diagonal.
            if lane % 4u32 == 0u32 && (comptime!(groups == 4) || rows / 2u32 * 2u32 == first) {
                own[row as usize] = own_low;
                own[row as usize + 8] = own_high;
            }
        }
    }
}

/// What the state gives to the outputs of a half: `S qᵀ`, the transposed state as the left operand.
#[cube]
pub(crate) fn outputs_of_state(q: u32, lane: u32, #[comptime] half: usize, #[comptime] plan: MmaPlan) {
    #[unroll]
    for band in 0..comptime!(plan.bands) {
        zero(comptime!(plan.out(band)));
    }
    let right = across_first(q, lane);
    let first = comptime!(half * plan.half_groups());
    #[unroll]
    for step in 0..comptime!(plan.steps()) {
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            pack_step(LEFT, band, comptime!(plan.state(band)), step);
        }
        let panel = comptime!(step / 4 * PANEL);
        #[unroll]
        for c in 0..comptime!(plan.half_groups()) {
            let offset = comptime!(panel + (first + c) * 2048);
            load(RIGHT, c, right ^ comptime!((step % 4 * 32) as u32), offset, false);
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                multiply(comptime!(plan.out(band)), comptime!(2 * c), LEFT, band, RIGHT, c, 0usize);
                multiply(comptime!(plan.out(band)), comptime!(2 * c + 1), LEFT, band, RIGHT, c, 1usize);
            }
        }
    }
}

/// Multiplies the outputs with `out_scale` and, where it is by token, their decay.
#[cube]
pub(super) fn scale_outputs(
    decays: &[f32],
    g0: usize,
    lane: u32,
    out_scale: f32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let from = g0 + comptime!(OF_OUTPUTS + half * plan.half_groups() * 16) + (lane % 4u32 * 2u32) as usize;
    #[unroll]
    for j in 0..comptime!(2 * plan.half_groups()) {
        let even = if comptime!(plan.walk.by_channel()) { out_scale * 1.0f32 } else { decays[from + comptime!(8 * j)] };
        let odd =
            if comptime!(plan.walk.by_channel()) { out_scale * 1.0f32 } else { decays[from + comptime!(8 * j + 1)] };
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            let out = comptime!(plan.out(band));
            scale(out, comptime!(4 * j), even);
            scale(out, comptime!(4 * j + 1), odd);
            scale(out, comptime!(4 * j + 2), even);
            scale(out, comptime!(4 * j + 3), odd);
        }
    }
}

/// What the chunk's own tokens give to the outputs of a half.
#[cube]
pub(super) fn outputs_of_chunk(
    scores: u32,
    v: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: MmaPlan,
) {
    let right = across_first(scores, lane);
    let first = comptime!(half * plan.half_groups());
    let end = comptime!(first + plan.half_groups());
    // Tokens of the output before all of a step's (against time: after) take no part of them.
    let first_step = comptime!(if plan.walk.roles.against_time { first } else { 0 });
    let end_step = comptime!(if plan.walk.roles.against_time { 4 } else { end });
    #[unroll]
    for step in first_step..end_step {
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            load(LEFT, band, band_in_values(v, warp, lane, band, plan), comptime!(step * 2048), true);
        }
        let from = comptime!(if plan.walk.roles.against_time { first } else { usize::max(first, step) });
        let to = comptime!(if plan.walk.roles.against_time { usize::min(end, step + 1) } else { end });
        #[unroll]
        for c in from..to {
            load(RIGHT, c, right ^ comptime!(step as u32 * 32), comptime!(c * 2048), false);
            let tile = comptime!(2 * (c - first));
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                multiply(comptime!(plan.out(band)), tile, LEFT, band, RIGHT, c, 0usize);
                multiply(comptime!(plan.out(band)), comptime!(tile + 1), LEFT, band, RIGHT, c, 1usize);
            }
        }
    }
}

/// Decays the state over the chunk, where the decay is not by key, and adds what its tokens contribute.
#[cube]
pub(crate) fn update_state(k: u32, v: u32, decays: &[f32], g0: usize, warp: u32, lane: u32, #[comptime] plan: MmaPlan) {
    if comptime!(!plan.walk.by_channel()) {
        let decay = exp2(decays[g0 + 63]);
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            #[unroll]
            for n in 0..comptime!(8 * plan.steps()) {
                scale(comptime!(plan.state(band)), n, decay);
            }
        }
    }
    let right = down_first(k, lane);
    let from = g0 + OF_VALUES + (lane % 4u32 * 2u32) as usize;
    #[unroll]
    for step in 0..4usize {
        let at = from + comptime!(16 * step);
        #[unroll]
        for band in 0..comptime!(plan.bands) {
            load(LEFT, band, band_in_values(v, warp, lane, band, plan), comptime!(step * 2048), true);
            if comptime!(!plan.walk.by_channel()) {
                #[unroll]
                for i in 0..4usize {
                    let register = comptime!(4 * band + i);
                    let found = word(LEFT, register);
                    let even = decays[at + comptime!(i / 2 * 8)];
                    let odd = decays[at + comptime!(i / 2 * 8 + 1)];
                    pack(LEFT, register, bf16_low(found) * even, bf16_high(found) * odd);
                }
            }
        }
        #[unroll]
        for c in 0..comptime!(plan.steps()) {
            let offset = comptime!(c / 4 * PANEL + step * 2048);
            load(RIGHT, comptime!(c % 4), right ^ comptime!((c % 4 * 32) as u32), offset, true);
            #[unroll]
            for band in 0..comptime!(plan.bands) {
                multiply(comptime!(plan.state(band)), comptime!(2 * c), LEFT, band, RIGHT, comptime!(c % 4), 0usize);
                multiply(
                    comptime!(plan.state(band)),
                    comptime!(2 * c + 1),
                    LEFT,
                    band,
                    RIGHT,
                    comptime!(c % 4),
                    1usize,
                );
            }
        }
    }
}
