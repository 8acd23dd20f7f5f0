//! The walk for dq, dk, dv and dg.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::loader::{load_chunks, sum_gates};
use super::{ACROSS, KEY_SUMS, sums as numbers};
use crate::hopper_walk::QUERIES;
use crate::hopper_walk::loads::load_decays;
use crate::hopper_walk::parts::{
    Place, add_product, chunk_at, copy_rows, decayed_scores, decayed_values, multiply, place_beside, publish, row_sum,
};
use crate::hopper_walk::plan::{ALL_TILES, CHUNK, DECAYED, OUT, PANEL, SCORES, VALUES, WalkPlan};
use crate::hopper_walk::states::{load_state, store_state};
use crate::hopper_walk::steps::add_inputs;
use crate::ssd::Skip;
use crate::tile::hopper::{
    Ring, barrier_arrive, barrier_fence, bf16_high, bf16_low, commit, commit_stores, declare, declare_fragment, exp2,
    fence, fence_shared, give_registers, k_major, load_u32, mma_shared, mn_major, read, row_of, scale_rows, store_3d,
    swizzled, sync_warpgroup, take_registers, unit_again, wait, wait_stores_read, warpgroup,
};

/// The product of the state in the tile with that in the registers: one sum a warp.
#[cube]
fn product_of_states(tile: u32, row: u32, lane: u32, #[comptime] plan: WalkPlan) -> f32 {
    let state = comptime!(plan.state());
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    let mut sum = f32::new(0.0);
    #[unroll]
    for j in 0..8usize {
        #[unroll]
        for half in 0..2usize {
            let word = load_u32((base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32));
            let i = comptime!(4 * j + 2 * half);
            sum += bf16_low(word) * read(state, i);
            sum += bf16_high(word) * read(state, comptime!(i + 1));
        }
    }
    plane_sum(sum)
}

/// A chunk's rows from a tile to `map`, or where there are fewer than a tile has, one by one to `rows`.
#[cube]
fn store_chunk(
    tile: u32,
    map: u64,
    rows: &mut [u32],
    place: &Place,
    token: u32,
    heads: u32,
    count: u32,
    unit: u32,
    elected: bool,
    #[comptime] plan: WalkPlan,
) {
    if count == comptime!(CHUNK as u32) {
        if elected {
            store_3d(tile, map, 0u32, place.head, token);
            commit_stores();
        }
    } else {
        // What stands beside these rows belongs to others. They are read before the warpgroup meets again, which it does
        // before it writes here.
        let kept = (u32::new(0), count + 0u32);
        copy_rows(tile, rows, token * heads + place.head, heads, 0u32, kept, unit, plan);
    }
}

/// All gradients, a warpgroup a head.
///
/// The products of the next output's scores run while the output before is summed up and stored.
#[cube(launch_unchecked)]
pub(super) fn walk_all(
    q: &TensorMap<bf16, Tiled>,
    k: &TensorMap<bf16, Tiled>,
    v: &TensorMap<bf16, Tiled>,
    grad: &TensorMap<bf16, Tiled>,
    borders: &TensorMap<bf16, Tiled>,
    dq: &TensorMap<bf16, Tiled>,
    dk: &TensorMap<bf16, Tiled>,
    dv: &TensorMap<bf16, Tiled>,
    rows_dq: &mut [u32],
    rows_dk: &mut [u32],
    rows_dv: &mut [u32],
    dg: &mut [f32],
    key_sums: &mut [f32],
    g: &[f32],
    levels: &[u32],
    rates: &[f32],
    skip: &[f32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    between: &[f32],
    heads: u32,
    items: u32,
    out_scale: f32,
    in_factor: f32,
    last_factor: f32,
    #[comptime] plan: WalkPlan,
) {
    let stages = comptime!(plan.stages);
    let state = comptime!(plan.state());
    let with_time = comptime!(WalkPlan { roles: QUERIES, ..plan });
    let shared = Shared::<[u32]>::new_aligned_slice(comptime!(stages * plan.heads * ALL_TILES * PANEL / 4), 1024usize);
    let shared_z = Shared::<[u32]>::new_aligned_slice(comptime!(plan.heads * PANEL / 4), 1024usize);
    let shared_o = Shared::<[u32]>::new_aligned_slice(comptime!(2 * plan.heads * PANEL / 4), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * plan.decays()), 128usize);
    let mut sums = Shared::<[f32]>::new_aligned_slice(comptime!(plan.heads * numbers(&plan)), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages + 2));
    let tiles = generic_to_shared::<u32>(shared.as_ptr());
    let tiles_z = generic_to_shared::<u32>(shared_z.as_ptr());
    let tiles_o = generic_to_shared::<u32>(shared_o.as_ptr());
    let barrier = generic_to_shared::<u64>(barriers.as_ptr());
    let ring = Ring::new(barrier, comptime!(stages as u32));
    let ring_g = Ring::new(barrier + comptime!(16 * stages as u32), 1u32);
    declare(state);
    declare(SCORES);
    declare(OUT);
    declare_fragment(DECAYED);
    declare_fragment(VALUES);
    if UNIT_POS == 0 {
        ring.init(33u32, comptime!(plan.warpgroups as u32));
        ring_g.init(comptime!(plan.warpgroups as u32), 1u32);
        barrier_fence();
    }
    sync_cube();

    let work = items * (heads / comptime!(plan.heads as u32));
    let warpgroup = warpgroup();
    let warp = (UNIT_POS % 128u32) / 32u32;
    let lane = UNIT_POS % 32u32;
    if warpgroup == comptime!(plan.warpgroups as u32) {
        give_registers(40u32);
        if warp == 0u32 {
            if lane == 0u32 {
                let (map_q, map_k, map_v) = (tensor_map_address(q), tensor_map_address(k), tensor_map_address(v));
                let maps = (map_q, map_k, map_v, tensor_map_address(grad), tensor_map_address(borders));
                load_chunks(&ring, tiles, maps, table, work, heads, plan);
            }
        } else if warp == 1u32 {
            load_decays(&ring, &mut shared_g, g, levels, rates, g, table, levels, work, heads, lane, plan);
        } else if warp == 2u32 {
            sum_gates(&ring_g, &sums, dg, key_sums, table, work, heads, lane, plan);
        }
    } else {
        take_registers(comptime!(plan.registers()));
        let (map_dq, map_dk, map_dv) = (tensor_map_address(dq), tensor_map_address(dk), tensor_map_address(dv));
        let elected = UNIT_POS % 128u32 == 0u32;
        let beside = warpgroup % comptime!(plan.heads as u32);
        let z0 = tiles_z + beside * comptime!(PANEL as u32);
        let o0 = tiles_o + beside * comptime!(2 * PANEL as u32);
        let o1 = o0 + comptime!(PANEL as u32);
        let id = warpgroup + 1u32;
        let mut step = 0u32;
        let mut index = CUBE_POS_X;
        while index < work {
            let p = place_beside(index, beside, table, heads, plan);
            let row = row_of(warp, lane, 0usize);
            load_state(initial, between, &p, 0u32, heads, row, lane, in_factor, state, plan);
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, plan);
                let start = chunk * comptime!(CHUNK as u32);
                let count = u32::min(p.length - start, comptime!(CHUNK as u32));
                let token = p.start + start;
                ring.wait_full(step);
                let unit = unit_again() % 128u32;
                let (warp, lane) = (unit / 32u32, unit % 32u32);
                let row = row_of(warp, lane, 0usize);
                let stage = ring.stage(step) * comptime!(plan.heads as u32) + beside;
                let q0 = tiles + stage * comptime!((ALL_TILES * PANEL) as u32);
                let k0 = q0 + comptime!(PANEL as u32);
                let v0 = q0 + comptime!(2 * PANEL as u32);
                let d0 = q0 + comptime!(3 * PANEL as u32);
                let s0 = q0 + comptime!(4 * PANEL as u32);
                let mut g0 = (stage * comptime!(CHUNK as u32)) as usize;
                if comptime!(plan.steps.is_some()) {
                    g0 += (ring.stage(step) * comptime!((plan.heads * CHUNK) as u32)) as usize;
                }
                // v · do, while the state's gradient goes to shared memory as an operand.
                fence();
                multiply(SCORES, v0, d0, 1usize);
                commit();
                publish(z0, state, row, lane);
                let g_last = shared_g[g0 + 63];
                let decay = exp2(g_last);
                let across = product_of_states(s0, row, lane, plan) * decay * last_factor;
                if elected {
                    wait_stores_read(0u32);
                }
                fence_shared();
                sync_warpgroup(id, 128u32);
                fence();
                multiply(OUT, v0, z0, 1usize);
                commit();
                wait(1u32);
                decayed_scores(DECAYED, &shared_g, g0, row, lane, count, out_scale, plan);
                // k · q
                fence();
                multiply(SCORES, k0, q0, 1usize);
                commit();
                decayed_values(q0, &shared_g, g0, g_last, count, warp, lane, plan);
                scale_rows(state, decay, decay);
                let g_low = shared_g[g0 + row as usize];
                let g_high = shared_g[g0 + row as usize + 8];
                let mut e_low = exp2(g_last - g_low) * out_scale;
                let mut e_high = exp2(g_last - g_high) * out_scale;
                if comptime!(plan.steps.is_some()) {
                    let at = g0 + comptime!(plan.rows_at()) + row as usize;
                    e_low = exp2(g_last - shared_g[at]) * out_scale;
                    e_high = exp2(g_last - shared_g[at + 8]) * out_scale;
                }
                wait(1u32);
                scale_rows(OUT, e_low, e_high);
                // What the state alone contributes.
                let inter_low = row_sum(k0, OUT, row, lane, 0usize);
                let inter_high = row_sum(k0, OUT, row, lane, 1usize);
                fence();
                add_product(OUT, DECAYED, q0);
                commit();
                add_product(state, VALUES, d0);
                commit();
                wait(1u32);
                // dk, and k · q with its decays.
                let keys_low = row_sum(k0, OUT, row, lane, 0usize);
                let keys_high = row_sum(k0, OUT, row, lane, 1usize);
                publish(o0, OUT, row, lane);
                decayed_scores(DECAYED, &shared_g, g0, row, lane, count, out_scale, plan);
                // do · v
                fence();
                multiply(SCORES, d0, v0, 1usize);
                #[unroll]
                for n in 0..4usize {
                    let keep = comptime!(n as u32);
                    mma_shared(OUT, k_major(k0, CHUNK, n), mn_major(z0, 64usize, n), keep, false, true);
                }
                commit();
                fence_shared();
                sync_warpgroup(id, 128u32);
                store_chunk(o0, map_dk, rows_dk, &p, token, heads, count, unit, elected, plan);
                wait(0u32);
                scale_rows(OUT, e_low, e_high);
                fence();
                add_product(OUT, DECAYED, d0);
                commit();
                decayed_scores(VALUES, &shared_g, g0, row, lane, count, out_scale, with_time);
                wait(0u32);
                // dv
                if comptime!(plan.skip() != Skip::None) {
                    add_inputs(skip, p.head, 0u32, d0, row, lane, comptime!(plan.turned()));
                }
                publish(o1, OUT, row, lane);
                fence();
                multiply(OUT, d0, s0, 1usize);
                commit();
                if elected {
                    // dk has left the tile that dq goes to.
                    wait_stores_read(0u32);
                }
                fence_shared();
                sync_warpgroup(id, 128u32);
                store_chunk(o1, map_dv, rows_dv, &p, token, heads, count, unit, elected, comptime!(plan.turned()));
                let e_low = exp2(g_low) * out_scale;
                let e_high = exp2(g_high) * out_scale;
                wait(0u32);
                scale_rows(OUT, e_low, e_high);
                fence();
                add_product(OUT, VALUES, k0);
                commit();
                wait(0u32);
                // dq
                let low = row_sum(q0, OUT, row, lane, 0usize) - (keys_low - inter_low);
                let high = row_sum(q0, OUT, row, lane, 1usize) - (keys_high - inter_high);
                publish(o0, OUT, row, lane);
                ring_g.wait_room(step);
                let at = (beside * comptime!(numbers(&plan) as u32)) as usize;
                if lane % 4u32 == 0u32 {
                    let to = at + row as usize;
                    sums[to] = select(row < count, low, 0.0f32);
                    sums[to + 8] = select(row + 8u32 < count, high, 0.0f32);
                    sums[to + 64] = select(row < count, inter_low, 0.0f32);
                    sums[to + 72] = select(row + 8u32 < count, inter_high, 0.0f32);
                    if comptime!(plan.steps.is_some()) {
                        sums[to + KEY_SUMS] = keys_low;
                        sums[to + KEY_SUMS + 8] = keys_high;
                    }
                }
                if lane == 0u32 {
                    sums[at + ACROSS + warp as usize] = across;
                }
                fence_shared();
                sync_warpgroup(id, 128u32);
                store_chunk(o0, map_dq, rows_dq, &p, token, heads, count, unit, elected, plan);
                if elected {
                    barrier_arrive(ring_g.full(step));
                    ring.release(step);
                }
                step += 1u32;
            }
            store_state(last, &p, 0u32, heads, row, lane, last_factor, state, plan);
            index += CUBE_COUNT_X;
        }
        if elected {
            wait_stores_read(0u32);
        }
    }
}
