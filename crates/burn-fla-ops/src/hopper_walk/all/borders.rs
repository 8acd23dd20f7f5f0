//! The states at the borders of chunks.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use crate::hopper_walk::loads::{load_decays, load_tensors};
use crate::hopper_walk::parts::{Place, add_product, chunk_at, decayed_values, place_beside, publish};
use crate::hopper_walk::plan::{CHUNK, PANEL, VALUES, WalkPlan};
use crate::hopper_walk::states::load_state;
use crate::tile::hopper::{
    Ring, barrier_fence, commit, commit_stores, declare, declare_fragment, exp2, fence, fence_shared, give_registers,
    row_of, scale_rows, store_3d, sync_warpgroup, take_registers, wait, wait_stores_read, warpgroup,
};

/// The row of the states at borders, 64 each, at which that before a chunk begins.
#[cube]
pub(super) fn border_row(place: &Place, chunk: u32, heads: u32) -> u32 {
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
    rates: &[f32],
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
            load_decays(&ring, &mut shared_g, g, levels, rates, g, table, levels, work, heads, lane, plan);
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
                add_product(state, VALUES, tiles_k + to);
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
