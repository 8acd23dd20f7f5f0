//! The warpgroup beside the walk: all that is between the tokens of a chunk, tokens × channels.
//!
//! With time it follows the walk, which hands it the state before each chunk and the values W that its tokens write, and
//! makes the outputs of them. Against time it goes ahead, and hands the walk what the outputs alone contribute to the
//! gradients of the values.

use cubecl::prelude::*;

use super::chain::{Area, Tiles, arrive_warp, release_warp};
use super::parts::pack_scores;
use super::place::{chunk_at, place};
use super::plan::{CHUNK, ChainPlan, OUT, PANEL, SCORES, TOKENS, Task};
use crate::hopper_walk::parts::publish;
use crate::tile::hopper::{
    commit, fence, fence_shared, k_major, load_f32, mma_registers, mma_shared, mn_major, row_of, scale_rows, wait,
};
use crate::tile::mma::{down_first, load};

/// Takes the same steps as the walk.
#[cube]
pub(super) fn run(
    area: &Area,
    table: &[i32],
    work: u32,
    heads: u32,
    out_scale: f32,
    warp: u32,
    lane: u32,
    #[comptime] plan: ChainPlan,
) {
    let row = row_of(warp, lane, 0usize);
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, comptime!(plan.slices()));
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, comptime!(plan.against_time()));
            let count = u32::min(p.length - chunk * comptime!(CHUNK as u32), comptime!(CHUNK as u32));
            let t = area.at(step, 0u32, plan);
            area.tiles.wait_full(step);
            if comptime!(plan.task == Task::Outputs) {
                outputs(area, &t, step, warp, lane, count, out_scale, plan);
            } else {
                of_outputs(area, &t, step, row, lane, count, out_scale, plan);
            }
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}

/// The outputs of a chunk, `scale e^G ∘ Q S + P W`, are written where they are stored from.
#[cube]
fn outputs(
    area: &Area,
    t: &Tiles,
    step: u32,
    warp: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let row = row_of(warp, lane, 0usize);
    let steps = comptime!(4 * plan.panels());
    let queries = comptime!(plan.operand());
    // Both products read the queries from registers: with 64 columns, one that reads both operands from shared memory needs
    // all of its bandwidth.
    let first = down_first(t.q + warp * comptime!((PANEL / 4) as u32), lane);
    #[unroll]
    for n in 0..steps {
        load(queries, n, first ^ comptime!((n % 4 * 32) as u32), comptime!(n / 4 * PANEL), false);
    }
    fence();
    #[unroll]
    for n in 0..steps {
        mma_registers(SCORES, queries, n, k_major(t.k, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    area.states.wait_full(step);
    fence();
    #[unroll]
    for n in 0..steps {
        mma_registers(OUT, queries, n, k_major(t.s, 64usize, n), comptime!(n as u32), false);
    }
    commit();
    let low = load_f32(t.grown + row * 4u32) * out_scale;
    let high = load_f32(t.grown + row * 4u32 + 32u32) * out_scale;
    wait(1u32);
    pack_scores(t.g, row, lane, count, out_scale, plan);
    wait(0u32);
    release_warp(&area.states, step, lane);
    release_warp(&area.tiles, step, lane);
    scale_rows(OUT, low, high);
    area.handed.wait_full(step);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(OUT, TOKENS, n, mn_major(t.x, CHUNK, n), 1u32, true);
    }
    commit();
    area.stores.wait_room(step);
    wait(0u32);
    release_warp(&area.handed, step, lane);
    publish(t.o, OUT, row, lane);
    fence_shared();
    arrive_warp(area.stores.full(step), lane);
}

/// `Pᵀ do` of a chunk is handed to the walk.
#[cube]
fn of_outputs(
    area: &Area,
    t: &Tiles,
    step: u32,
    row: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    fence();
    #[unroll]
    for n in 0..comptime!(4 * plan.panels()) {
        mma_shared(SCORES, k_major(t.k, CHUNK, n), k_major(t.q, CHUNK, n), comptime!(n as u32), false, false);
    }
    commit();
    wait(0u32);
    pack_scores(t.g, row, lane, count, out_scale, plan);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(OUT, TOKENS, n, mn_major(t.v, CHUNK, n), comptime!(n as u32), true);
    }
    commit();
    wait(0u32);
    release_warp(&area.tiles, step, lane);
    area.handed.wait_room(step);
    publish(t.x, OUT, row, lane);
    arrive_warp(area.handed.full(step), lane);
}
