//! The chain: one cube takes one segment of one head and 64 or 128 value channels from chunk to chunk; each of its four
//! warps has 16 or 32 rows of the transposed state in registers.
//!
//! The equations are those of [`crate::hopper_delta::chain`]. All products are of transposed outputs, so what one leaves in
//! the registers of a warp is the left operand of the next one: the state for what its channels read, that for what they
//! write, and this for outputs and the next state. No warp waits for another one but for the tiles.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::parts::{
    decay_states, outputs_of_tokens, pack_missing, pack_outputs, scale_outputs, solve, store_written, update_states,
    write_borders,
};
use super::plan::ChainPlan;
use crate::hopper_delta::plan::Task;
use crate::hopper_delta::segments;
use crate::hopper_walk::parts::{Place, chunk_at, decay_at, place};
use crate::hopper_walk::plan::CHUNK;
use crate::hopper_walk::states::{load_start, set_unit_vectors, store_end};
use crate::mma_walk::loads::{load_tile, tokens_from};
use crate::mma_walk::outputs::write_outputs;
use crate::mma_walk::parts::{band_at, outputs_of_state, write_decays};
use crate::mma_walk::plan::{DECAYS, LEFT, RIGHT};
use crate::tile::mma::{address_of, address_of_mut, commit_copies, declare, declare_fragment, unit_again, wait_copies};

#[cube(launch_unchecked)]
pub(super) fn chain(
    q: &[u32],
    k: &[u32],
    v: &[u32],
    inverse: &[u32],
    scores: &[u32],
    rows: &mut [u32],
    borders: &mut [u32],
    g: &[f32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    heads: u32,
    groups: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let walk = comptime!(plan.mma.walk);
    let stages = comptime!(walk.stages as u32);
    let bands = comptime!(plan.mma.bands);
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!(walk.stages * plan.stage_bytes() / 4), 1024usize);
    let mut decays = Shared::<[f32]>::new_aligned_slice(comptime!(2 * DECAYS), 128usize);
    let first_tile = generic_to_shared::<u32>(tiles.as_ptr());
    #[unroll]
    for band in 0..bands {
        declare(comptime!(plan.mma.state(band)));
        declare(comptime!(plan.mma.out(band)));
    }
    declare_fragment(comptime!(plan.written()));
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
    if p.chunks > 0u32 {
        let chunk = chunk_at(0u32, p.chunks, walk);
        if comptime!(plan.gated) {
            if warp == 0u32 {
                let low = decay_at(g, &p, chunk * comptime!(CHUNK as u32) + lane, heads, walk);
                let high = decay_at(g, &p, chunk * comptime!(CHUNK as u32) + 32u32 + lane, heads, walk);
                write_decays(&mut decays, 0usize, low, high, lane, 1.0f32, plan.mma);
            }
        }
        if comptime!(stages > 1) {
            load_early(first_tile, k, v, inverse, scores, &p, chunk, heads, groups, plan);
            load_late(first_tile, q, scores, &p, chunk, heads, groups, plan);
            commit_copies();
        }
    }
    for i in 0..p.chunks {
        let chunk = chunk_at(i, p.chunks, walk);
        let start = chunk * comptime!(CHUNK as u32);
        let token = p.start + start;
        let count = u32::min(p.length - start, comptime!(CHUNK as u32));
        let t = first_tile + (i % stages) * comptime!(plan.stage_bytes() as u32);
        let g0 = ((i % 2u32) * comptime!(DECAYS as u32)) as usize;
        let g1 = (((i + 1u32) % 2u32) * comptime!(DECAYS as u32)) as usize;
        let follows = i + 1u32 < p.chunks;
        let next = chunk_at(u32::min(i + 1u32, p.chunks - 1u32), p.chunks, walk);
        // The next chunk's log decays, which are summed up at the end of this step.
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        let sums = comptime!(plan.gated) && warp == 0u32 && follows;
        let mut next_low = f32::new(0.0);
        let mut next_high = f32::new(0.0);
        if sums {
            next_low = decay_at(g, &p, next * comptime!(CHUNK as u32) + lane, heads, walk);
            next_high = decay_at(g, &p, next * comptime!(CHUNK as u32) + 32u32 + lane, heads, walk);
        }
        if comptime!(stages > 1) {
            wait_copies(0u32);
            sync_cube();
            if follows {
                let to = first_tile + ((i + 1u32) % stages) * comptime!(plan.stage_bytes() as u32);
                load_early(to, k, v, inverse, scores, &p, next, heads, groups, plan);
                load_late(to, q, scores, &p, next, heads, groups, plan);
            }
            commit_copies();
        } else {
            sync_cube();
            load_early(t, k, v, inverse, scores, &p, chunk, heads, groups, plan);
            commit_copies();
            load_late(t, q, scores, &p, chunk, heads, groups, plan);
            commit_copies();
            wait_copies(1u32);
            sync_cube();
        }
        if comptime!(plan.against_time()) {
            #[unroll]
            for half in 0..comptime!(plan.mma.halves()) {
                let unit = unit_again();
                let (warp, lane) = (unit / 32u32, unit % 32u32);
                outputs_of_state(t, lane, half, plan.mma);
                if comptime!(plan.gated) {
                    scale_outputs(&decays, g0, lane, 1.0f32, half, plan);
                }
                let v0 = t + comptime!(plan.values_at());
                outputs_of_tokens(t + comptime!(plan.scores_at()), v0, warp, lane, half, plan);
                pack_outputs(half, plan);
            }
        } else {
            #[unroll]
            for half in 0..comptime!(plan.mma.halves()) {
                let unit = unit_again();
                let (warp, lane) = (unit / 32u32, unit % 32u32);
                outputs_of_state(t, lane, half, plan.mma);
                pack_missing(t + comptime!(plan.values_at()), &decays, g0, warp, lane, half, plan);
            }
        }
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        solve(t + comptime!(plan.inverse_at()), lane, plan);
        if comptime!(plan.with_borders()) {
            store_written(&tokens_from(address_of_mut(rows), token, count), &p, heads, warp, lane, plan);
            write_borders(address_of_mut(borders), &p, chunk, heads, warp, lane, plan);
        }
        if comptime!(stages == 1 && plan.with_queries()) {
            wait_copies(0u32);
            sync_cube();
        }
        if comptime!(plan.task == Task::Outputs) {
            #[unroll]
            for half in 0..comptime!(plan.mma.halves()) {
                let unit = unit_again();
                let (warp, lane) = (unit / 32u32, unit % 32u32);
                outputs_of_state(t + comptime!(plan.queries_at()), lane, half, plan.mma);
                scale_outputs(&decays, g0, lane, out_scale, half, plan);
                outputs_of_tokens(t + comptime!(plan.scores_at()), t, warp, lane, half, plan);
                let to = tokens_from(address_of_mut(rows), token, count);
                write_outputs(&to, &p, heads, warp, lane, half, plan.mma);
            }
        }
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        decay_states(&decays, g0, plan);
        let v0 = t + comptime!(plan.values_at());
        if comptime!(plan.against_time()) {
            update_states(t + comptime!(plan.queries_at()), v0, &decays, g0, out_scale, warp, lane, true, plan);
            update_states(t, v0, &decays, g0, -1.0f32, warp, lane, false, plan);
        } else {
            update_states(t, v0, &decays, g0, 1.0f32, warp, lane, false, plan);
        }
        if sums {
            write_decays(&mut decays, g1, next_low + 0.0f32, next_high + 0.0f32, lane, 1.0f32, plan.mma);
        }
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

/// Starts loading what a chunk needs first: its keys, values and M, and against time its scores.
#[cube]
fn load_early(
    to: u32,
    k: &[u32],
    v: &[u32],
    inverse: &[u32],
    scores: &[u32],
    p: &Place,
    chunk: u32,
    heads: u32,
    groups: u32,
    #[comptime] plan: ChainPlan,
) {
    let walk = comptime!(plan.mma.walk);
    let units = comptime!(plan.mma.units());
    let start = chunk * comptime!(CHUNK as u32);
    let token = p.start + start;
    let count = u32::min(p.length - start, comptime!(CHUNK as u32));
    let key_head = p.head / groups;
    let key_heads = heads / groups;
    let channel = p.slice * comptime!(64 * walk.warpgroups as u32);
    load_tile(to, address_of(k), 0u32, token, key_head, key_heads, count, walk.inner, walk.panels(), units);
    let values = to + comptime!(plan.values_at());
    // Columns of a transition have no values.
    load_tile(values, address_of(v), channel, token, p.head, heads, count, plan.values, walk.warpgroups, units);
    let at = to + comptime!(plan.inverse_at());
    load_tile(at, address_of(inverse), 0u32, token, p.head, heads, count, CHUNK, 1usize, units);
    if comptime!(plan.against_time()) {
        let at = to + comptime!(plan.scores_at());
        load_tile(at, address_of(scores), 0u32, token, p.head, heads, count, CHUNK, 1usize, units);
    }
}

/// Starts loading what outputs, or against time the next state, need: queries and with time their scores.
#[cube]
fn load_late(
    to: u32,
    q: &[u32],
    scores: &[u32],
    p: &Place,
    chunk: u32,
    heads: u32,
    groups: u32,
    #[comptime] plan: ChainPlan,
) {
    if comptime!(plan.with_queries()) {
        let walk = comptime!(plan.mma.walk);
        let units = comptime!(plan.mma.units());
        let start = chunk * comptime!(CHUNK as u32);
        let token = p.start + start;
        let count = u32::min(p.length - start, comptime!(CHUNK as u32));
        let queries = to + comptime!(plan.queries_at());
        let key_heads = heads / groups;
        load_tile(
            queries,
            address_of(q),
            0u32,
            token,
            p.head / groups,
            key_heads,
            count,
            walk.inner,
            walk.panels(),
            units,
        );
        if comptime!(!plan.against_time()) {
            let at = to + comptime!(plan.scores_at());
            load_tile(at, address_of(scores), 0u32, token, p.head, heads, count, CHUNK, 1usize, units);
        }
    }
}
