//! All gradients of a problem with a decay by token in one walk against time, where a head has no more channels than a
//! warpgroup walks.
//!
//! ```text
//! dk_i = scale (e^{G_last − G_i} v_i Zᵀ + Σ_{j ≥ i} e^{G_j − G_i} (v_i · do_j) q_j)
//! dv_i = scale (e^{G_last − G_i} Z k_i  + Σ_{j ≥ i} e^{G_j − G_i} (k_i · q_j) do_j)        Z: [K, V], the gradient of the state
//! dq_i = scale (e^{G_i} S do_i          + Σ_{j ≤ i} e^{G_i − G_j} (do_i · v_j) k_j)        S: [K, V], before the chunk
//! ```
//!
//! The states S at the borders of chunks come from a walk with time that does nothing else ([`write_borders`]): the decay's
//! gradient needs them here, so that dq takes nothing more from memory. Counted with K = V = 64 and in tensors of `B·T·H·K`
//! bf16 (a state at a border is as large as a chunk of one): 3 for the states, 8 for the rest, where a walk for dq with the
//! states and one for dk and dv are 13. What the decay's gradient is summed up from ([`super::gate`]) stays in shared memory.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

use burn::tensor::DType;
use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::gate::{Terms, sum_chunk};
use super::gradients::{Gradients, Sides, Wanted};
use super::launch::{Decays, HopperWalk, Walk};
use super::loads::{load_decays, load_tensors};
use super::parts::{Place, chunk_at, copy_rows, decayed_scores, decayed_values, place, place_beside, publish, row_sum};
use super::plan::{ALL_TILES, Axis, CHUNK, DECAYED, OUT, PANEL, SCORES, VALUES, WalkPlan};
use super::states::{load_state, store_state};
use super::{KEYS, QUERIES};
use crate::bridge::{CubeTensor, alloc};
use crate::tile::hopper::{
    Ring, barrier_arrive, barrier_expect, barrier_fence, bf16_high, bf16_low, commit, commit_stores, declare,
    declare_fragment, exp2, fence, fence_shared, give_registers, k_major, load_3d, load_u32, mma_registers, mma_shared,
    mn_major, read, row_of, scale_rows, store_3d, swizzled, sync_warpgroup, take_registers, unit_again, wait,
    wait_stores_read, warpgroup, words,
};

/// Numbers of which a chunk's gradient of the decay is summed up: two a token, and one of each warp.
const SUMS: usize = 2 * CHUNK + 4;

/// The row of the states at borders, 64 each, at which that before a chunk begins.
#[cube]
fn border_row(place: &Place, chunk: u32, heads: u32) -> u32 {
    ((place.border + chunk) * heads + place.head) * 64u32
}

/// The states before all chunks, in bf16, to `borders`. In the roles of the walk for dq: `k` are the values, `v` the keys.
#[cube(launch_unchecked)]
pub(super) fn write_borders(
    k: &TensorMap<bf16, Tiled>,
    v: &TensorMap<bf16, Tiled>,
    borders: &TensorMap<bf16, Tiled>,
    g: &[f32],
    levels: &[u32],
    table: &[i32],
    initial: &[f32],
    between: &[f32],
    heads: u32,
    items: u32,
    #[comptime] plan: WalkPlan,
) {
    let stages = comptime!(plan.stages);
    let state = comptime!(plan.state());
    let size = comptime!(stages * plan.heads * PANEL / 4);
    let shared_k = Shared::<[u32]>::new_aligned_slice(size, 1024usize);
    let shared_v = Shared::<[u32]>::new_aligned_slice(size, 1024usize);
    // Two a head, in turn.
    let shared_s = Shared::<[u32]>::new_aligned_slice(comptime!(2 * plan.heads * PANEL / 4), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * plan.decays()), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages));
    let tiles_k = generic_to_shared::<u32>(shared_k.as_ptr());
    let tiles_v = generic_to_shared::<u32>(shared_v.as_ptr());
    let tiles_s = generic_to_shared::<u32>(shared_s.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), comptime!(stages as u32));
    declare(state);
    declare_fragment(VALUES);
    if UNIT_POS == 0 {
        ring.init(33u32, comptime!(plan.warpgroups as u32));
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
                let (map_k, map_v) = (tensor_map_address(k), tensor_map_address(v));
                let tiles = (tiles_k, tiles_k, tiles_v);
                load_tensors(&ring, tiles, (map_k, map_k, map_v), table, levels, work, heads, true, plan);
            }
        } else if warp == 1u32 {
            load_decays(&ring, &mut shared_g, g, levels, g, g, table, levels, work, heads, lane, plan);
        }
    } else {
        take_registers(comptime!(plan.registers()));
        let map = tensor_map_address(borders);
        let elected = UNIT_POS % 128u32 == 0u32;
        let row = row_of(warp, lane, 0usize);
        let beside = warpgroup % comptime!(plan.heads as u32);
        let mut step = 0u32;
        let mut index = CUBE_POS_X;
        while index < work {
            let p = place_beside(index, beside, table, heads, plan);
            load_state(initial, between, &p, 0u32, heads, row, lane, 1.0f32, state, plan);
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, plan);
                let count = u32::min(p.length - chunk * comptime!(CHUNK as u32), comptime!(CHUNK as u32));
                let s0 = tiles_s + (step % 2u32 * comptime!(plan.heads as u32) + beside) * comptime!(PANEL as u32);
                publish(s0, state, row, lane);
                if elected {
                    // The store before this one has read what the next chunk writes to.
                    wait_stores_read(0u32);
                }
                fence_shared();
                sync_warpgroup(warpgroup + 1u32, 128u32);
                if elected {
                    store_3d(s0, map, 0u32, 0u32, border_row(&p, chunk, heads));
                    commit_stores();
                }
                ring.wait_full(step);
                let stage = ring.stage(step);
                let to = (stage * comptime!(plan.heads as u32) + beside) * comptime!(PANEL as u32);
                let g0 = (stage * comptime!(plan.decays() as u32) + beside * comptime!(CHUNK as u32)) as usize;
                let g_last = shared_g[g0 + 63];
                decayed_values(tiles_v + to, &shared_g, g0, g_last, count, warp, lane, plan);
                let decay = exp2(g_last);
                scale_rows(state, decay, decay);
                fence();
                #[unroll]
                for n in 0..4usize {
                    mma_registers(state, VALUES, n, mn_major(tiles_k + to, CHUNK, n), 1u32, true);
                }
                commit();
                wait(0u32);
                if elected {
                    ring.release(step);
                }
                step += 1u32;
            }
            index += CUBE_COUNT_X;
        }
        if elected {
            wait_stores_read(0u32);
        }
    }
}

/// The tiles of each chunk to those of a stage: q, k, v, do and the state before it. One unit.
#[cube]
fn load_chunks(
    ring: &Ring,
    tiles: u32,
    maps: (u64, u64, u64, u64, u64),
    table: &[i32],
    work: u32,
    heads: u32,
    #[comptime] plan: WalkPlan,
) {
    let (map_q, map_k, map_v, map_grad, map_borders) = maps;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, plan);
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, plan);
            let token = p.start + chunk * comptime!(CHUNK as u32);
            ring.wait_room(step);
            let full = ring.full(step);
            barrier_expect(full, comptime!((plan.heads * ALL_TILES * PANEL) as u32));
            #[unroll]
            for beside in 0..comptime!(plan.heads as u32) {
                let p = place_beside(index, beside, table, heads, plan);
                let to = tiles
                    + (ring.stage(step) * comptime!(plan.heads as u32) + beside)
                        * comptime!((ALL_TILES * PANEL) as u32);
                load_3d(to, map_q, 0u32, p.outer_head, token, full);
                load_3d(to + comptime!(PANEL as u32), map_k, 0u32, p.outer_head, token, full);
                load_3d(to + comptime!(2 * PANEL as u32), map_v, 0u32, p.inner_head, token, full);
                load_3d(to + comptime!(3 * PANEL as u32), map_grad, 0u32, p.inner_head, token, full);
                let border = border_row(&p, chunk, heads);
                load_3d(to + comptime!(4 * PANEL as u32), map_borders, 0u32, 0u32, border, full);
            }
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}

/// The decay's gradient of each chunk, from what its warpgroup has left in `sums`; one warp.
#[cube]
fn sum_gates(
    ring: &Ring,
    sums: &[f32],
    dg: &mut [f32],
    table: &[i32],
    work: u32,
    heads: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, plan);
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, plan);
            let first = chunk * comptime!(CHUNK as u32);
            let count = u32::min(p.length - first, comptime!(CHUNK as u32));
            ring.wait_full(step);
            #[unroll]
            for beside in 0..comptime!(plan.heads as u32) {
                let p = place_beside(index, beside, table, heads, plan);
                let at = comptime!(beside as usize * SUMS);
                let mut across = f32::new(0.0);
                #[unroll]
                for warp in 0..4usize {
                    across += sums[comptime!(at + 2 * CHUNK + warp)];
                }
                let token = at + lane as usize;
                let low = Terms { after: sums[token], inter: sums[token + 64] };
                let high = Terms { after: sums[token + 32], inter: sums[token + 96] };
                let (low, high) = sum_chunk(&low, &high);
                let to = ((p.start + first + lane) * heads + p.head) as usize;
                if lane < count {
                    dg[to] = across + low;
                }
                if lane + 32u32 < count {
                    dg[to + 32 * heads as usize] = across + high;
                }
            }
            sync_plane();
            if lane == 0u32 {
                ring.release(step);
            }
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}

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

/// The walk for dq, dk, dv and dg. A warpgroup a head.
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
    g: &[f32],
    levels: &[u32],
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
    let mut sums = Shared::<[f32]>::new_aligned_slice(comptime!(plan.heads * SUMS), 128usize);
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
            load_decays(&ring, &mut shared_g, g, levels, g, g, table, levels, work, heads, lane, plan);
        } else if warp == 2u32 {
            sum_gates(&ring_g, &sums, dg, table, work, heads, lane, plan);
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
                let g0 = (stage * comptime!(CHUNK as u32)) as usize;
                // v · do, while the state's gradient goes to shared memory as an operand.
                fence();
                #[unroll]
                for n in 0..4usize {
                    let keep = comptime!(n as u32);
                    mma_shared(SCORES, k_major(v0, CHUNK, n), k_major(d0, CHUNK, n), keep, false, false);
                }
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
                #[unroll]
                for n in 0..4usize {
                    let keep = comptime!(n as u32);
                    mma_shared(OUT, k_major(v0, CHUNK, n), k_major(z0, 64usize, n), keep, false, false);
                }
                commit();
                wait(1u32);
                decayed_scores(DECAYED, &shared_g, g0, row, lane, count, out_scale, plan);
                // k · q
                fence();
                #[unroll]
                for n in 0..4usize {
                    let keep = comptime!(n as u32);
                    mma_shared(SCORES, k_major(k0, CHUNK, n), k_major(q0, CHUNK, n), keep, false, false);
                }
                commit();
                decayed_values(q0, &shared_g, g0, g_last, count, warp, lane, plan);
                scale_rows(state, decay, decay);
                let g_low = shared_g[g0 + row as usize];
                let g_high = shared_g[g0 + row as usize + 8];
                let e_low = exp2(g_last - g_low) * out_scale;
                let e_high = exp2(g_last - g_high) * out_scale;
                wait(1u32);
                scale_rows(OUT, e_low, e_high);
                // What the state alone contributes.
                let inter_low = row_sum(k0, OUT, row, lane, 0usize);
                let inter_high = row_sum(k0, OUT, row, lane, 1usize);
                fence();
                #[unroll]
                for n in 0..4usize {
                    mma_registers(OUT, DECAYED, n, mn_major(q0, CHUNK, n), 1u32, true);
                }
                commit();
                #[unroll]
                for n in 0..4usize {
                    mma_registers(state, VALUES, n, mn_major(d0, CHUNK, n), 1u32, true);
                }
                commit();
                wait(1u32);
                // dk, and k · q with its decays.
                let keys_low = row_sum(k0, OUT, row, lane, 0usize);
                let keys_high = row_sum(k0, OUT, row, lane, 1usize);
                publish(o0, OUT, row, lane);
                decayed_scores(DECAYED, &shared_g, g0, row, lane, count, out_scale, plan);
                // do · v
                fence();
                #[unroll]
                for n in 0..4usize {
                    let keep = comptime!(n as u32);
                    mma_shared(SCORES, k_major(d0, CHUNK, n), k_major(v0, CHUNK, n), keep, false, false);
                }
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
                #[unroll]
                for n in 0..4usize {
                    mma_registers(OUT, DECAYED, n, mn_major(d0, CHUNK, n), 1u32, true);
                }
                commit();
                decayed_scores(VALUES, &shared_g, g0, row, lane, count, out_scale, with_time);
                wait(0u32);
                // dv
                publish(o1, OUT, row, lane);
                fence();
                #[unroll]
                for n in 0..4usize {
                    let keep = comptime!(n as u32);
                    mma_shared(OUT, k_major(d0, CHUNK, n), k_major(s0, 64usize, n), keep, false, false);
                }
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
                #[unroll]
                for n in 0..4usize {
                    mma_registers(OUT, VALUES, n, mn_major(k0, CHUNK, n), 1u32, true);
                }
                commit();
                wait(0u32);
                // dq
                let low = row_sum(q0, OUT, row, lane, 0usize) - (keys_low - inter_low);
                let high = row_sum(q0, OUT, row, lane, 1usize) - (keys_high - inter_high);
                publish(o0, OUT, row, lane);
                ring_g.wait_room(step);
                let at = (beside * comptime!(SUMS as u32)) as usize;
                if lane % 4u32 == 0u32 {
                    let to = at + row as usize;
                    sums[to] = select(row < count, low, 0.0f32);
                    sums[to + 8] = select(row + 8u32 < count, high, 0.0f32);
                    sums[to + 64] = select(row < count, inter_low, 0.0f32);
                    sums[to + 72] = select(row + 8u32 < count, inter_high, 0.0f32);
                }
                if lane == 0u32 {
                    sums[at + comptime!(2 * CHUNK) + warp as usize] = across;
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

impl HopperWalk {
    /// Whether [`Self::all_gradients`] takes this problem.
    pub(super) fn takes_all_gradients(&self) -> bool {
        self.axis == Axis::Token && self.takes_both_gradients()
    }

    /// [`Self::gradients`] in one walk, with the decay's.
    pub(super) fn all_gradients(
        &self,
        sides: Sides<'_>,
        decays: &Decays,
        states: [Option<&CubeTensor>; 2],
        wanted: Wanted,
        gate: &CubeTensor,
    ) -> Gradients {
        let Sides { reading: q, writing: k, other_reading: grad, other_writing: v } = sides;
        let [initial, grad_state] = states;
        let borders = self.borders(&sides, decays, initial);
        let (in_factor, last_factor) = (self.scale.recip(), self.scale);
        let w = Walk {
            roles: KEYS,
            q: v,
            k: grad,
            v: q,
            initial: grad_state,
            in_factor,
            last_factor,
            last: wanted.state,
            between: None,
        };
        let plan = WalkPlan { initial: grad_state.is_some(), last: wanted.state, ..self.plan(KEYS) };
        let plan = plan.paired(self.heads, self.items, self.engine.processors).with_all();
        let g = &decays.g;
        let unused = alloc(g, [32], DType::F32);
        let between = self.between(&w, decays, &unused);
        let [b, t, _, _] = v.meta.shape().dims::<4>();
        let [dq, dk] = [q, k].map(|x| alloc(x, [b, t, self.heads, self.keys], x.dtype));
        let dv = alloc(v, [b, t, self.heads, self.values], v.dtype);
        let dg = alloc(g, gate.meta.shape().dims::<3>(), DType::F32);
        let last = if wanted.state { alloc(g, self.state_shape(), DType::F32) } else { unused.clone() };
        // SAFETY: rows, states and sums are indexed inside of what the table and the shapes, checked by the public
        // function, say; the buffers above have these sizes.
        unsafe {
            walk_all::launch_unchecked(
                &g.client,
                self.cubes_of(&plan),
                CubeDim::new_1d(plan.units() as u32),
                self.map(q),
                self.map(k),
                self.map(v),
                self.map(grad),
                self.map(&borders),
                self.map(&dq),
                self.map(&dk),
                self.map(&dv),
                words(&dq),
                words(&dk),
                words(&dv),
                dg.clone().into_buffer_arg(),
                g.clone().into_buffer_arg(),
                words(g),
                decays.table.clone().into_buffer_arg(),
                grad_state.unwrap_or(&unused).clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                between.into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                self.scale,
                in_factor,
                last_factor,
                plan,
            );
        }
        Gradients {
            reading: Some(dq),
            writing: Some(dk),
            other_reading: None,
            other_writing: Some(dv),
            gate: Some(burn_cubecl::kernel::cast(dg, gate.dtype)),
            state: wanted.state.then_some(last),
        }
    }

    /// The states before all chunks, one below the other.
    fn borders(&self, sides: &Sides<'_>, decays: &Decays, initial: Option<&CubeTensor>) -> CubeTensor {
        let (k, v) = (sides.other_writing, sides.writing);
        let (in_factor, last_factor) = (1.0, 1.0);
        let w = Walk { roles: QUERIES, q: k, k, v, initial, in_factor, last_factor, last: false, between: None };
        let plan = WalkPlan { initial: initial.is_some(), ..self.plan(QUERIES) };
        let plan = plan.paired(self.heads, self.items, self.engine.processors);
        let g = &decays.g;
        let unused = alloc(g, [32], DType::F32);
        let between = self.between(&w, decays, &unused);
        let borders = alloc(g, [1, self.chunks * self.heads * 64, 1, 64], DType::BF16);
        // SAFETY: as in `all_gradients`.
        unsafe {
            write_borders::launch_unchecked(
                &g.client,
                self.cubes_of(&plan),
                CubeDim::new_1d(plan.units() as u32),
                self.map(k),
                self.map(v),
                self.map(&borders),
                g.clone().into_buffer_arg(),
                words(g),
                decays.table.clone().into_buffer_arg(),
                initial.unwrap_or(&unused).clone().into_buffer_arg(),
                between.into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                plan,
            );
        }
        borders
    }

    /// A cube for each processor that there is work for.
    fn cubes_of(&self, plan: &WalkPlan) -> CubeCount {
        let work = self.items * (self.heads / plan.heads) * plan.slices();
        CubeCount::new_1d(work.min(self.engine.processors) as u32)
    }
}
