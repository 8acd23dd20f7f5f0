//! The steps that the kernels share, and those of the chain.

use cubecl::prelude::*;

use super::plan::ChainPlan;
use crate::hopper_walk::parts::Place;
use crate::hopper_walk::plan::PANEL;
use crate::mma_walk::loads::Source;
use crate::mma_walk::outputs::{rows_at, store_block};
use crate::mma_walk::parts::{band_at, band_in_tile};
use crate::mma_walk::plan::{LEFT, OF_OUTPUTS, OF_VALUES, RIGHT};
use crate::tile::mma::{
    Acc, Frag, RowPair, across_first, bf16_high, bf16_low, down_first, exp2, load, multiply, pack, pack_step, read,
    scale, store_rows, word, write,
};

/// Right operands beside those of [`crate::hopper_delta::plan`], among which is the name of [`RIGHT`].
pub(super) const COLUMNS: Frag = Frag::new("b", 64);

/// Adds the product of a left operand of 16 rows, of its steps `first` to `last`, and those rows of a tile: `acc += F T`, the
/// tile's columns in groups of 16. The whole warp takes the same steps.
#[cube]
pub(crate) fn add_rows(
    #[comptime] acc: Acc,
    #[comptime] left: Frag,
    tile: u32,
    first: u32,
    last: u32,
    lane: u32,
    #[comptime] groups: usize,
) {
    let right = down_first(tile, lane);
    #[unroll]
    for step in 0..4usize {
        if first <= comptime!(step as u32) && comptime!(step as u32) <= last {
            #[unroll]
            for c in 0..groups {
                let offset = comptime!(c / 4 * PANEL + step * 2048);
                load(COLUMNS, comptime!(c % 4), right ^ comptime!((c % 4 * 32) as u32), offset, true);
                multiply(acc, comptime!(2 * c), left, step, COLUMNS, comptime!(c % 4), 0usize);
                multiply(acc, comptime!(2 * c + 1), left, step, COLUMNS, comptime!(c % 4), 1usize);
            }
        }
    }
}

/// `vᵀ − e^G ∘ read`: what the state does not hold yet of the values of a half's tokens.
#[cube]
pub(super) fn pack_missing(
    v: u32,
    decays: &[f32],
    g0: usize,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: ChainPlan,
) {
    let groups = comptime!(plan.mma.half_groups());
    let written = comptime!(plan.written());
    #[unroll]
    for n in 0..groups {
        let step = comptime!(half * groups + n);
        let at = g0 + comptime!(OF_OUTPUTS + 16 * step) + (lane % 4u32 * 2u32) as usize;
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            load(LEFT, band, band_in_tile(v, warp, lane, band, plan.mma), comptime!(step * 2048), true);
            let out = comptime!(plan.mma.out(band));
            #[unroll]
            for i in 0..4usize {
                let found = word(LEFT, comptime!(4 * band + i));
                let register = comptime!(8 * n + i / 2 * 4 + i % 2 * 2);
                let mut low = read(out, register);
                let mut high = read(out, comptime!(register + 1));
                if comptime!(plan.gated) {
                    low *= decays[at + comptime!(i / 2 * 8)];
                    high *= decays[at + comptime!(i / 2 * 8 + 1)];
                }
                pack(written, comptime!(16 * band + 4 * step + i), bf16_low(found) - low, bf16_high(found) - high);
            }
        }
    }
}

/// Multiplies the outputs of a half with a factor and, with a gate, the decay from the state to their tokens.
#[cube]
pub(super) fn scale_outputs(
    decays: &[f32],
    g0: usize,
    lane: u32,
    factor: f32,
    #[comptime] half: usize,
    #[comptime] plan: ChainPlan,
) {
    let from = g0 + comptime!(OF_OUTPUTS + half * plan.mma.half_groups() * 16) + (lane % 4u32 * 2u32) as usize;
    #[unroll]
    for j in 0..comptime!(2 * plan.mma.half_groups()) {
        let mut even = factor * 1.0f32;
        let mut odd = factor * 1.0f32;
        if comptime!(plan.gated) {
            even *= decays[from + comptime!(8 * j)];
            odd *= decays[from + comptime!(8 * j + 1)];
        }
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            let out = comptime!(plan.mma.out(band));
            scale(out, comptime!(4 * j), even);
            scale(out, comptime!(4 * j + 1), odd);
            scale(out, comptime!(4 * j + 2), even);
            scale(out, comptime!(4 * j + 3), odd);
        }
    }
}

/// Rounds the outputs of a half: what the system is solved for.
#[cube]
pub(super) fn pack_outputs(#[comptime] half: usize, #[comptime] plan: ChainPlan) {
    let groups = comptime!(plan.mma.half_groups());
    #[unroll]
    for band in 0..comptime!(plan.mma.bands) {
        #[unroll]
        for n in 0..groups {
            let step = comptime!(4 * band + half * groups + n);
            pack_step(plan.written(), step, comptime!(plan.mma.out(band)), n);
        }
    }
}

/// Adds to the outputs of a half what the chunk's tokens give: with time `Wᵀ Pᵀ`, of what they have written; against time
/// `doᵀ P`, of the tile `v`.
#[cube]
pub(super) fn outputs_of_tokens(
    scores: u32,
    v: u32,
    warp: u32,
    lane: u32,
    #[comptime] half: usize,
    #[comptime] plan: ChainPlan,
) {
    let against_time = comptime!(plan.against_time());
    let groups = comptime!(plan.mma.half_groups());
    let right = if comptime!(against_time) { down_first(scores, lane) } else { across_first(scores, lane) };
    let first = comptime!(half * groups);
    let end = comptime!(first + groups);
    // P has nothing above its diagonal.
    #[unroll]
    for step in comptime!(if against_time { first } else { 0 })..comptime!(if against_time { 4 } else { end }) {
        if comptime!(against_time) {
            #[unroll]
            for band in 0..comptime!(plan.mma.bands) {
                load(LEFT, band, band_in_tile(v, warp, lane, band, plan.mma), comptime!(step * 2048), true);
            }
        }
        let from = comptime!(if against_time { first } else { usize::max(first, step) });
        let to = comptime!(if against_time { usize::min(end, step + 1) } else { end });
        #[unroll]
        for c in from..to {
            let piece = comptime!(32 * if against_time { c } else { step } as u32);
            let offset = comptime!(2048 * if against_time { step } else { c });
            load(RIGHT, comptime!(c % 4), right ^ piece, offset, against_time);
            #[unroll]
            for band in 0..comptime!(plan.mma.bands) {
                let out = comptime!(plan.mma.out(band));
                let left = comptime!(if against_time { LEFT } else { plan.written() });
                let at = comptime!(if against_time { band } else { 4 * band + step });
                let tile = comptime!(2 * (c - first));
                multiply(out, tile, left, at, RIGHT, comptime!(c % 4), 0usize);
                multiply(out, comptime!(tile + 1), left, at, RIGHT, comptime!(c % 4), 1usize);
            }
        }
    }
}

/// Solves for what tokens write, in its place: `Xᵀ ← Xᵀ Mᵀ`, against time `Xᵀ M`. A group of 16 tokens is overwritten when
/// no other one needs it any more.
#[cube]
pub(super) fn solve(inverse: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let against_time = comptime!(plan.against_time());
    let written = comptime!(plan.written());
    let right = if comptime!(against_time) { down_first(inverse, lane) } else { across_first(inverse, lane) };
    #[unroll]
    for n in 0..4usize {
        let c = comptime!(if against_time { n } else { 3 - n });
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            #[unroll]
            for i in 0..8usize {
                write(comptime!(plan.mma.out(band)), i, 0.0f32);
            }
        }
        #[unroll]
        for step in comptime!(if against_time { c } else { 0 })..comptime!(if against_time { 4 } else { c + 1 }) {
            let piece = comptime!(32 * if against_time { c } else { step } as u32);
            let offset = comptime!(2048 * if against_time { step } else { c });
            load(RIGHT, comptime!(step % 4), right ^ piece, offset, against_time);
            #[unroll]
            for band in 0..comptime!(plan.mma.bands) {
                let out = comptime!(plan.mma.out(band));
                let at = comptime!(4 * band + step);
                multiply(out, 0usize, written, at, RIGHT, comptime!(step % 4), 0usize);
                multiply(out, 1usize, written, at, RIGHT, comptime!(step % 4), 1usize);
            }
        }
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            pack_step(written, comptime!(4 * band + c), comptime!(plan.mma.out(band)), 0usize);
        }
    }
}

/// The rows of tokens `row` and eight on in a tensor `[tokens, heads, channels]` of a chunk of `length` tokens from `start` on.
#[cube]
pub(super) fn token_rows(
    to: u64,
    start: u32,
    length: u32,
    head: u32,
    heads: u32,
    row: u32,
    #[comptime] channels: usize,
) -> RowPair {
    let width = comptime!(channels as u32);
    let stride = heads * width * 2u32;
    let first = u64::cast_from(start + row) * u64::cast_from(stride);
    RowPair {
        address: to + first + u64::cast_from(head * width * 2u32),
        step: u64::cast_from(8u32 * stride),
        first_columns: select(row < length, width, 0u32),
        second_columns: select(row + 8u32 < length, width, 0u32),
    }
}

/// Writes what the system was solved for to device memory.
#[cube]
pub(super) fn store_written(to: &Source, place: &Place, heads: u32, warp: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let written = comptime!(plan.written());
    #[unroll]
    for band in 0..comptime!(plan.mma.bands) {
        let rows = rows_at(to, place, heads, warp, lane, band, plan.mma);
        #[unroll]
        for block in 0..8usize {
            let at = comptime!(16 * band + 2 * block);
            store_block(word(written, at), word(written, comptime!(at + 1)), &rows, lane, block);
        }
    }
}

/// Keeps the state at a border of a chunk, rounded: `[chunk, head, V, K]`.
#[cube]
pub(super) fn write_borders(
    to: u64,
    place: &Place,
    chunk: u32,
    heads: u32,
    warp: u32,
    lane: u32,
    #[comptime] plan: ChainPlan,
) {
    let (keys, values) = comptime!((plan.mma.walk.inner as u32, plan.mma.walk.outer as u32));
    let border = (place.border + chunk) * heads + place.head;
    #[unroll]
    for band in 0..comptime!(plan.mma.bands) {
        let at = band_at(place, warp, lane, band, plan.mma);
        let channel = at.panel * 64u32 + at.row;
        let row =
            u64::cast_from(border) * comptime!((keys * values * 2) as u64) + u64::cast_from(channel * keys * 2u32);
        let state = comptime!(plan.mma.state(band));
        // A band is inside as a whole, or outside.
        let columns = select(channel < values, keys, 0u32);
        let rows = RowPair {
            address: to + row,
            step: u64::new(comptime!(16 * keys as i64)),
            first_columns: columns,
            second_columns: columns,
        };
        store_rows(state, &rows, lane, comptime!(keys as usize));
    }
}

/// Lets the states decay over the chunk.
#[cube]
pub(super) fn decay_states(decays: &[f32], g0: usize, #[comptime] plan: ChainPlan) {
    if comptime!(plan.gated) {
        let decay = exp2(decays[g0 + 63]);
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            #[unroll]
            for n in 0..comptime!(8 * plan.mma.steps()) {
                scale(comptime!(plan.mma.state(band)), n, decay);
            }
        }
    }
}

/// Adds to the states what tokens leave, each times its factor: of what they have written, or with `of_values` of the tile
/// `v`.
#[cube]
pub(super) fn update_states(
    rows: u32,
    v: u32,
    decays: &[f32],
    g0: usize,
    factor: f32,
    warp: u32,
    lane: u32,
    #[comptime] of_values: bool,
    #[comptime] plan: ChainPlan,
) {
    let right = down_first(rows, lane);
    let written = comptime!(plan.written());
    let from = g0 + OF_VALUES + (lane % 4u32 * 2u32) as usize;
    let as_is = comptime!(!plan.gated && !of_values && !plan.against_time());
    #[unroll]
    for step in 0..4usize {
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            if comptime!(of_values) {
                load(LEFT, band, band_in_tile(v, warp, lane, band, plan.mma), comptime!(step * 2048), true);
            }
            if comptime!(!as_is) {
                #[unroll]
                for i in 0..4usize {
                    let to = comptime!(4 * band + i);
                    let found = if comptime!(of_values) {
                        word(LEFT, to)
                    } else {
                        word(written, comptime!(16 * band + 4 * step + i))
                    };
                    let mut even = factor * 1.0f32;
                    let mut odd = factor * 1.0f32;
                    if comptime!(plan.gated) {
                        even *= decays[from + comptime!(16 * step + i / 2 * 8)];
                        odd *= decays[from + comptime!(16 * step + i / 2 * 8 + 1)];
                    }
                    pack(LEFT, to, bf16_low(found) * even, bf16_high(found) * odd);
                }
            }
        }
        #[unroll]
        for c in 0..comptime!(plan.mma.steps()) {
            let offset = comptime!(c / 4 * PANEL + step * 2048);
            load(RIGHT, comptime!(c % 4), right ^ comptime!((c % 4 * 32) as u32), offset, true);
            #[unroll]
            for band in 0..comptime!(plan.mma.bands) {
                let state = comptime!(plan.mma.state(band));
                let left = comptime!(if as_is { written } else { LEFT });
                let at = comptime!(if as_is { 4 * band + step } else { band });
                multiply(state, comptime!(2 * c), left, at, RIGHT, comptime!(c % 4), 0usize);
                multiply(state, comptime!(2 * c + 1), left, at, RIGHT, comptime!(c % 4), 1usize);
            }
        }
    }
}
