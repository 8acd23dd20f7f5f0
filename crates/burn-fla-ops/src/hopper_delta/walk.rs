//! The warpgroups that walk: what the next state waits for, and nothing else.
//!
//! Everything between two states is transposed, channels × tokens, so what one product leaves in registers is the left
//! operand of the next one: nothing on the way from state to state goes through shared memory. All else that these
//! warpgroups do stands behind the start of a product, so that it is done while that runs.

use cubecl::prelude::*;

use super::chain::{Area, Tiles, arrive_warp, release_warp};
use super::parts::{load_factors, pack_all, pack_columns, pack_sum, publish_transposed, put_transposed, scale_operand};
use super::place::{load_state, place, store_state};
use super::plan::{CHUNK, ChainPlan, DECAYED, FACTORS, HELD, LEFT, READ, TOKENS, Task, WRITTEN};
use crate::hopper_walk::parts::publish;
use crate::tile::hopper::{
    commit, exp2, fence, fence_shared, k_major, load_f32, mma_registers, mn_major, row_of, scale, wait,
};

/// Walks the segments of a cube.
#[cube]
pub(super) fn run(
    area: &Area,
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    work: u32,
    heads: u32,
    out_scale: f32,
    warpgroup: u32,
    warp: u32,
    lane: u32,
    #[comptime] plan: ChainPlan,
) {
    let row = row_of(warp, lane, 0usize);
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, comptime!(plan.slices()));
        let panel = p.slice * comptime!(plan.warpgroups as u32) + warpgroup;
        load_state(initial, &p, panel, heads, row, lane, comptime!(plan.segment_state()));
        for _ in 0..p.chunks {
            let t = area.at(step, warpgroup, plan);
            area.tiles.wait_full(step);
            if comptime!(plan.against_time()) {
                against_time(area, &t, step, warp, lane, out_scale, plan);
            } else {
                with_time(area, &t, step, warp, lane, plan);
            }
            release_warp(&area.tiles, step, lane);
            if comptime!(plan.with_borders()) {
                fence_shared();
                arrive_warp(area.stores.full(step), lane);
            }
            step += 1u32;
        }
        if comptime!(plan.task != Task::Values) {
            store_state(last, &p, panel, heads, row, lane, comptime!(plan.segment_state()));
        }
        index += CUBE_COUNT_X;
    }
}

/// Starts what is read from the state, then hands the state on, or writes it where it is stored from.
#[cube]
fn read_state(area: &Area, t: &Tiles, step: u32, warp: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let row = row_of(warp, lane, 0usize);
    let state = comptime!(plan.state());
    let operand = comptime!(plan.operand());
    pack_all(operand, state);
    fence();
    #[unroll]
    for n in 0..comptime!(4 * plan.panels()) {
        mma_registers(READ, operand, n, k_major(t.k, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    if comptime!(plan.task == Task::Outputs) {
        area.states.wait_room(step);
        publish(t.s, state, row, lane);
        fence_shared();
        arrive_warp(area.states.full(step), lane);
    } else if comptime!(plan.with_borders()) {
        area.stores.wait_room(step);
        publish(t.s, state, row, lane);
    }
}

/// Decays the state to the other end of the chunk.
#[cube]
fn decay_state(decay: f32, #[comptime] plan: ChainPlan) {
    if comptime!(plan.gated) {
        let state = comptime!(plan.state());
        #[unroll]
        for n in 0..comptime!(state.len()) {
            scale(state, n, decay);
        }
    }
}

/// From the state before a chunk to that after it, and the values that its tokens write.
#[cube]
fn with_time(area: &Area, t: &Tiles, step: u32, warp: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let state = comptime!(plan.state());
    read_state(area, t, step, warp, lane, plan);
    put_transposed(HELD, t.v, warp, lane);
    load_factors(FACTORS, t.grown, lane);
    load_factors(LEFT, t.left, lane);
    let decay = exp2(load_f32(t.g + comptime!(4 * CHUNK as u32 - 4)));
    wait(0u32);
    // What the state does not hold yet of the values.
    pack_sum(TOKENS, HELD, READ, FACTORS, true);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(READ, TOKENS, n, k_major(t.m, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    decay_state(decay, plan);
    wait(0u32);
    pack_columns(DECAYED, READ, LEFT, 1.0f32);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, DECAYED, n, mn_major(t.k, CHUNK, n), 1u32, true);
    }
    commit();
    if comptime!(plan.task == Task::Outputs) {
        area.handed.wait_room(step);
        publish_transposed(t.x, READ, warp, lane);
        fence_shared();
        arrive_warp(area.handed.full(step), lane);
    } else if comptime!(plan.task == Task::Values) {
        publish_transposed(t.o, READ, warp, lane);
    }
    wait(0u32);
}

/// From the gradient of the state after a chunk to that of the state before it, and those of its values.
#[cube]
fn against_time(area: &Area, t: &Tiles, step: u32, warp: u32, lane: u32, out_scale: f32, #[comptime] plan: ChainPlan) {
    let state = comptime!(plan.state());
    read_state(area, t, step, warp, lane, plan);
    load_factors(FACTORS, t.grown, lane);
    load_factors(LEFT, t.left, lane);
    let decay = exp2(load_f32(t.g + comptime!(4 * CHUNK as u32 - 4)));
    put_transposed(DECAYED, t.v, warp, lane);
    area.handed.wait_full(step);
    put_transposed(HELD, t.x, warp, lane);
    release_warp(&area.handed, step, lane);
    wait(0u32);
    pack_sum(TOKENS, HELD, READ, LEFT, false);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(WRITTEN, TOKENS, n, mn_major(t.m, CHUNK, n), comptime!(n as u32), true);
    }
    commit();
    decay_state(decay, plan);
    scale_operand(DECAYED, FACTORS, out_scale);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, DECAYED, n, mn_major(t.q, CHUNK, n), 1u32, true);
    }
    commit();
    wait(1u32);
    pack_columns(TOKENS, WRITTEN, FACTORS, -1.0f32);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, TOKENS, n, mn_major(t.k, CHUNK, n), 1u32, true);
    }
    commit();
    if comptime!(plan.stores()) {
        publish_transposed(t.o, WRITTEN, warp, lane);
    }
    wait(0u32);
}
