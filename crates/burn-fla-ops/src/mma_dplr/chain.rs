//! The chain: one cube takes one segment of one head and 64 or 128 value channels from chunk to chunk; each of its four
//! warps has 16 or 32 rows of the transposed state in registers.
//!
//! The equations are those of [`crate::hopper_dplr::chain`]. All products are of transposed outputs, so the state is the left
//! operand of what tokens read, and this of the next state. No warp waits for another one but for the tiles.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::plan::ChainPlan;
use crate::hopper_delta::segments;
use crate::hopper_dplr::plan::Task;
use crate::hopper_walk::parts::{Place, chunk_at, place};
use crate::hopper_walk::plan::{CHUNK, PANEL};
use crate::hopper_walk::states::{load_start, set_unit_vectors, store_end};
use crate::mma_walk::key::scale_states;
use crate::mma_walk::loads::{load_tile, tokens_from};
use crate::mma_walk::outputs::write_outputs;
use crate::mma_walk::parts::{band_at, band_in_tile, outputs_of_state, update_state};
use crate::mma_walk::plan::{LEFT, RIGHT};
use crate::tile::mma::{
    RowPair, across_first, address_of, address_of_mut, commit_copies, copy_16, declare, declare_fragment, down_first,
    load, multiply, pack_step, store_rows, unit_again, wait_copies,
};

#[cube(launch_unchecked)]
pub(super) fn chain(
    first: &[u32],
    second: &[u32],
    out: &[u32],
    into: &[u32],
    scores: &[u32],
    values: &[u32],
    o: &mut [u32],
    borders: &mut [u32],
    decays: &[u32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    heads: u32,
    #[comptime] plan: ChainPlan,
) {
    let walk = comptime!(plan.mma.walk);
    let stages = comptime!(walk.stages as u32);
    let bands = comptime!(plan.mma.bands);
    let padded = comptime!(plan.padded());
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!(walk.stages * plan.stage_bytes() / 4), 1024usize);
    let factors = Shared::<[f32]>::new_aligned_slice(comptime!(walk.stages * plan.padded()), 128usize);
    let first_tile = generic_to_shared::<u32>(tiles.as_ptr());
    let shared_g = generic_to_shared::<f32>(factors.as_ptr());
    #[unroll]
    for band in 0..bands {
        declare(comptime!(plan.mma.state(band)));
        declare(comptime!(plan.mma.out(band)));
    }
    declare_fragment(comptime!(plan.read()));
    declare_fragment(LEFT);
    declare_fragment(RIGHT);

    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    let p = place(CUBE_POS_X, table, heads, walk);
    #[unroll]
    for band in 0..bands {
        let at = band_at(&p, warp, lane, band, plan.mma);
        let state = comptime!(plan.mma.state(band));
        load_start(initial, &p, at.panel, heads, at.row, lane, state, walk);
        if comptime!(plan.task == Task::SegmentStates) {
            set_unit_vectors(at.panel, at.row, lane, comptime!(segments::transition(plan.values)), state);
        }
    }
    if comptime!(stages > 1) {
        if p.chunks > 0u32 {
            let chunk = chunk_at(0u32, p.chunks, walk);
            load_chunk(first_tile, shared_g, first, second, out, into, scores, values, decays, &p, chunk, heads, plan);
            commit_copies();
        }
    }
    for i in 0..p.chunks {
        let chunk = chunk_at(i, p.chunks, walk);
        let start = chunk * comptime!(CHUNK as u32);
        let stage = i % stages;
        let t = first_tile + stage * comptime!(plan.stage_bytes() as u32);
        let g0 = (stage * comptime!(padded as u32)) as usize;
        if comptime!(stages > 1) {
            wait_copies(0u32);
            sync_cube();
            if i + 1u32 < p.chunks {
                let next = (i + 1u32) % stages;
                load_chunk(
                    first_tile + next * comptime!(plan.stage_bytes() as u32),
                    shared_g + next * comptime!(4 * padded as u32),
                    first,
                    second,
                    out,
                    into,
                    scores,
                    values,
                    decays,
                    &p,
                    chunk_at(i + 1u32, p.chunks, walk),
                    heads,
                    plan,
                );
            }
            commit_copies();
        } else {
            sync_cube();
            load_chunk(t, shared_g, first, second, out, into, scores, values, decays, &p, chunk, heads, plan);
            commit_copies();
            wait_copies(0u32);
            sync_cube();
        }
        let v0 = t + comptime!(plan.values_at());
        if comptime!(plan.with_borders()) {
            let unit = unit_again();
            let border = (p.border + chunk) * heads + p.head;
            write_borders(address_of_mut(borders), &p, border, unit / 32u32, unit % 32u32, plan);
        }
        #[unroll]
        for half in 0..comptime!(plan.mma.halves()) {
            let lane = unit_again() % 32u32;
            outputs_of_state(t, lane, half, plan.mma);
            pack_read(half, plan);
        }
        if comptime!(plan.with_outputs()) {
            let count = u32::min(p.length - start, comptime!(CHUNK as u32));
            #[unroll]
            for half in 0..comptime!(plan.mma.halves()) {
                let unit = unit_again();
                let (warp, lane) = (unit / 32u32, unit % 32u32);
                outputs_of_state(t + comptime!(plan.out_at()), lane, half, plan.mma);
                outputs_of_values(t + comptime!(plan.scores_at()), v0, warp, lane, half, plan);
                let to = tokens_from(address_of_mut(o), p.start + start, count);
                write_outputs(&to, &p, heads, warp, lane, half, plan.mma);
            }
        }
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        scale_states(&factors, g0, &p, warp, lane, plan.mma);
        update_state(t + comptime!(plan.added_at()), v0, &factors, g0, warp, lane, plan.mma);
        write_read(t + comptime!(plan.second_at()), lane, plan);
    }
    if comptime!(walk.last) {
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        #[unroll]
        for band in 0..bands {
            let at = band_at(&p, warp, lane, band, plan.mma);
            let state = comptime!(plan.mma.state(band));
            store_end(last, &p, at.panel, heads, at.row, lane, state, walk);
        }
    }
}

/// Starts loading the operands of a chunk, to `to`, and its decays, to `factors`.
#[cube]
fn load_chunk(
    to: u32,
    factors: u32,
    first: &[u32],
    second: &[u32],
    out: &[u32],
    into: &[u32],
    scores: &[u32],
    values: &[u32],
    decays: &[u32],
    p: &Place,
    chunk: u32,
    heads: u32,
    #[comptime] plan: ChainPlan,
) {
    let walk = comptime!(plan.mma.walk);
    let units = comptime!(plan.mma.units());
    let panels = comptime!(walk.panels());
    let padded = comptime!(plan.padded());
    let start = chunk * comptime!(CHUNK as u32);
    let count = u32::min(p.length - start, comptime!(CHUNK as u32));
    let block = (p.border + chunk) * heads + p.head;
    let row = block * comptime!(CHUNK as u32);
    let rows = comptime!(CHUNK as u32);
    load_tile(to, address_of(first), 0u32, row, 0u32, 1u32, rows, padded, panels, units);
    let at = to + comptime!(plan.second_at());
    load_tile(at, address_of(second), 0u32, row, 0u32, 1u32, rows, padded, panels, units);
    let at = to + comptime!(plan.added_at());
    load_tile(at, address_of(into), 0u32, row, 0u32, 1u32, rows, padded, panels, units);
    let at = to + comptime!(plan.values_at());
    let channel = p.slice * comptime!(64 * walk.warpgroups as u32);
    let token = p.start + start;
    // Columns of a transition have no values.
    load_tile(at, address_of(values), channel, token, p.head, heads, count, plan.values, walk.warpgroups, units);
    if comptime!(plan.with_outputs()) {
        let at = to + comptime!(plan.out_at());
        load_tile(at, address_of(out), 0u32, row, 0u32, 1u32, rows, padded, panels, units);
        let at = to + comptime!(plan.scores_at());
        load_tile(at, address_of(scores), 0u32, row, 0u32, 1u32, rows, CHUNK, 1usize, units);
    }
    let unit = unit_again();
    if unit < comptime!(padded as u32 / 4) {
        let from = u64::cast_from(block) * comptime!(4 * padded as u64) + u64::cast_from(unit * 16u32);
        copy_16(factors + unit * 16u32, 0usize, address_of(decays) + from, 16u32);
    }
}

/// Rounds what the tokens of a half read.
#[cube]
fn pack_read(#[comptime] half: usize, #[comptime] plan: ChainPlan) {
    let groups = comptime!(plan.mma.half_groups());
    #[unroll]
    for band in 0..comptime!(plan.mma.bands) {
        #[unroll]
        for n in 0..groups {
            let step = comptime!(4 * band + half * groups + n);
            pack_step(plan.read(), step, comptime!(plan.mma.out(band)), n);
        }
    }
}

/// Adds to the outputs of a half what they take of values: with time `Vᵀ Pᵀ`, against time `doᵀ P`.
#[cube]
fn outputs_of_values(scores: u32, v: u32, warp: u32, lane: u32, #[comptime] half: usize, #[comptime] plan: ChainPlan) {
    let against_time = comptime!(plan.against_time());
    let groups = comptime!(plan.mma.half_groups());
    let right = if comptime!(against_time) { down_first(scores, lane) } else { across_first(scores, lane) };
    let first = comptime!(half * groups);
    let end = comptime!(first + groups);
    // P has nothing above its diagonal.
    #[unroll]
    for step in comptime!(if against_time { first } else { 0 })..comptime!(if against_time { 4 } else { end }) {
        #[unroll]
        for band in 0..comptime!(plan.mma.bands) {
            load(LEFT, band, band_in_tile(v, warp, lane, band, plan.mma), comptime!(step * 2048), true);
        }
        let from = comptime!(if against_time { first } else { usize::max(first, step) });
        let to = comptime!(if against_time { usize::min(end, step + 1) } else { end });
        #[unroll]
        for c in from..to {
            let piece = comptime!(32 * if against_time { c } else { step } as u32);
            let offset = comptime!(2048 * if against_time { step } else { c });
            load(RIGHT, comptime!(c % 4), right ^ piece, offset, against_time);
            let tile = comptime!(2 * (c - first));
            #[unroll]
            for band in 0..comptime!(plan.mma.bands) {
                let out = comptime!(plan.mma.out(band));
                multiply(out, tile, LEFT, band, RIGHT, comptime!(c % 4), 0usize);
                multiply(out, comptime!(tile + 1), LEFT, band, RIGHT, comptime!(c % 4), 1usize);
            }
        }
    }
}

/// Adds to the states what was read, with the rows of a tile.
#[cube]
fn write_read(rows: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let right = down_first(rows, lane);
    #[unroll]
    for step in 0..4usize {
        #[unroll]
        for c in 0..comptime!(plan.mma.steps()) {
            let offset = comptime!(c / 4 * PANEL + step * 2048);
            load(RIGHT, comptime!(c % 4), right ^ comptime!((c % 4 * 32) as u32), offset, true);
            #[unroll]
            for band in 0..comptime!(plan.mma.bands) {
                let state = comptime!(plan.mma.state(band));
                let left = comptime!(4 * band + step);
                multiply(state, comptime!(2 * c), plan.read(), left, RIGHT, comptime!(c % 4), 0usize);
                multiply(state, comptime!(2 * c + 1), plan.read(), left, RIGHT, comptime!(c % 4), 1usize);
            }
        }
    }
}

/// Keeps the state at a border of a chunk, rounded: `[chunk, head, V, K]`, both in whole panels.
#[cube]
fn write_borders(to: u64, place: &Place, border: u32, warp: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let row_bytes = comptime!(2 * plan.padded() as u64);
    let rows = comptime!(plan.border_rows() as u32);
    #[unroll]
    for band in 0..comptime!(plan.mma.bands) {
        let at = band_at(place, warp, lane, band, plan.mma);
        let row = u64::cast_from(border) * u64::cast_from(rows) + u64::cast_from(at.panel * 64u32 + at.row);
        let columns = u32::new(comptime!(plan.padded() as i64));
        let rows = RowPair {
            address: to + row * row_bytes,
            step: u64::new(comptime!(16 * plan.padded() as i64)),
            first_columns: columns,
            second_columns: columns,
        };
        store_rows(comptime!(plan.mma.state(band)), &rows, lane, comptime!(plan.padded()));
    }
}
