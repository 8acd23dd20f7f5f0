//! The chain: one cube takes one segment of one head and 64 or 128 value channels from chunk to chunk, with the transposed
//! state in registers, value channels × key channels.
//!
//! ```text
//! with time:      o = Q′ S + P V            S ← e^{G_C} ∘ S + B̂ᵀ (Ã S) + K′ᵀ V
//! against time:   dv = K′ Z + Pᵀ do         Z ← e^{G_C} ∘ Z + Ãᵀ (B̂ Z) + Q′ᵀ do
//! ```
//!
//! These are one kernel: against time the operands change places, and P is transposed. Everything between two states is
//! transposed, channels × tokens, so what one product leaves in registers is the left operand of the next one.
//!
//! One warp loads tiles by tensor memory copies, and the decays; the others walk.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::parts::{panel_of, scale_by};
use super::plan::{CHUNK, ChainPlan, OUT, PANEL, READ, TOKENS, VALUES};
use crate::hopper_delta::parts::{copy_rows, pack_all, publish_transposed, put_transposed};
use crate::hopper_delta::place::{Place, chunk_at, load_state, place, store_state};
use crate::hopper_walk::parts::{load_tile, publish};
use crate::tile::hopper::{
    Ring, barrier_arrive, barrier_expect, barrier_fence, commit, commit_stores, declare, declare_fragment, fence,
    fence_shared, k_major, load_3d, mma_registers, mn_major, row_of, store_3d, sync_warpgroup, wait, wait_stores_read,
};

/// Where a warpgroup finds a chunk.
#[derive(CubeType, Clone, Copy)]
struct Tiles {
    /// What the state is read with, and what that is written with.
    first: u32,
    second: u32,
    /// What outputs read the state with, and values are written with.
    out: u32,
    into: u32,
    /// What outputs take of values.
    scores: u32,
    values: u32,
    o: u32,
    s: u32,
}

#[cube(launch_unchecked)]
pub(super) fn chain(
    first: &TensorMap<bf16, Tiled>,
    second: &TensorMap<bf16, Tiled>,
    out: &TensorMap<bf16, Tiled>,
    into: &TensorMap<bf16, Tiled>,
    scores: &TensorMap<bf16, Tiled>,
    values: &TensorMap<bf16, Tiled>,
    o: &TensorMap<bf16, Tiled>,
    borders: &TensorMap<bf16, Tiled>,
    rows: &mut [u32],
    decays: &[f32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    heads: u32,
    items: u32,
    #[comptime] plan: ChainPlan,
) {
    let warpgroups = comptime!(plan.warpgroups);
    let panels = comptime!(plan.panels());
    let padded = comptime!(plan.padded());
    let stages = comptime!(plan.stages);
    let state = comptime!(plan.state());
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let kept = comptime!(plan.with_borders() as usize);
    let outputs = comptime!(plan.with_outputs() as usize);
    let shared = Shared::<[u32]>::new_aligned_slice(comptime!(stages * plan.stage_bytes() / 4), 1024usize);
    let shared_o = Shared::<[u32]>::new_aligned_slice(comptime!(outputs * warpgroups * PANEL / 4 + 32), 1024usize);
    let shared_s =
        Shared::<[u32]>::new_aligned_slice(comptime!(kept * warpgroups * panels * PANEL / 4 + 32), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * padded), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages));
    let tiles = generic_to_shared::<u32>(shared.as_ptr());
    let tiles_o = generic_to_shared::<u32>(shared_o.as_ptr());
    let tiles_s = generic_to_shared::<u32>(shared_s.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), comptime!(stages as u32));
    declare(state);
    declare(READ);
    declare_fragment(comptime!(plan.operand()));
    declare_fragment(TOKENS);
    declare_fragment(VALUES);
    if comptime!(plan.with_outputs()) {
        declare(OUT);
    }
    if UNIT_POS == 0 {
        // The copies' arrival, and that of each unit of the warp that brings decays.
        ring.init(33u32, comptime!(warpgroups as u32));
        barrier_fence();
    }
    sync_cube();

    let work = items * heads * comptime!(plan.slices() as u32);
    let warpgroup = UNIT_POS / 128u32;
    let warp = (UNIT_POS % 128u32) / 32u32;
    let lane = UNIT_POS % 32u32;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    if warpgroup == comptime!(warpgroups as u32) {
        let map_first = tensor_map_address(first);
        let map_second = tensor_map_address(second);
        let map_out = tensor_map_address(out);
        let map_into = tensor_map_address(into);
        let map_scores = tensor_map_address(scores);
        let map_values = tensor_map_address(values);
        while index < work {
            let p = place(index, table, heads, comptime!(plan.slices()));
            let channel = p.slice * comptime!(64 * warpgroups as u32);
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, comptime!(plan.against_time()));
                let block = (p.border + chunk) * heads + p.head;
                // Loaded before the stage is free.
                let mut found = Array::<f32>::new(comptime!(2 * panels));
                #[unroll]
                for n in 0..comptime!(2 * panels) {
                    found[n] = decays[(block * comptime!(padded as u32) + lane + comptime!(32 * n as u32)) as usize];
                }
                ring.wait_room(step);
                let full = ring.full(step);
                let stage = ring.stage(step);
                if lane == 0u32 {
                    let token = p.start + chunk * comptime!(CHUNK as u32);
                    let t = tiles_at(tiles, stage, tiles_o, tiles_s, plan);
                    barrier_expect(full, comptime!(plan.stage_bytes() as u32));
                    load_block(t.first, map_first, block, full, panels);
                    load_block(t.into, map_into, block, full, panels);
                    load_tile(t.values, map_values, channel, p.head, token, full, warpgroups);
                    load_block(t.second, map_second, block, full, panels);
                    if comptime!(plan.with_outputs()) {
                        load_block(t.out, map_out, block, full, panels);
                        load_block(t.scores, map_scores, block, full, 1usize);
                    }
                }
                #[unroll]
                for n in 0..comptime!(2 * panels) {
                    shared_g[(stage * comptime!(padded as u32) + lane + comptime!(32 * n as u32)) as usize] = found[n];
                }
                barrier_arrive(full);
                step += 1u32;
            }
            index += CUBE_COUNT_X;
        }
    } else {
        let unit = UNIT_POS % 128u32;
        let elected = unit == 0u32;
        let row = row_of(warp, lane, 0usize);
        let map_o = tensor_map_address(o);
        let map_s = tensor_map_address(borders);
        let id = warpgroup + 1u32;
        while index < work {
            let p = place(index, table, heads, comptime!(plan.slices()));
            let panel = p.slice * comptime!(warpgroups as u32) + warpgroup;
            load_state(initial, &p, panel, heads, row, lane, comptime!(plan.segment_state()));
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, comptime!(plan.against_time()));
                let count = u32::min(p.length - chunk * comptime!(CHUNK as u32), comptime!(CHUNK as u32));
                let stage = ring.stage(step);
                let mut t = tiles_at(tiles, stage, tiles_o, tiles_s, plan);
                t.values += warpgroup * comptime!(PANEL as u32);
                t.o += warpgroup * comptime!(PANEL as u32);
                t.s += warpgroup * wide;
                // What was stored from these tiles has been read.
                if elected {
                    wait_stores_read(0u32);
                }
                sync_warpgroup(id, 128u32);
                if comptime!(plan.with_borders()) {
                    publish(t.s, state, row, lane);
                }
                pack_all(comptime!(plan.operand()), state);
                ring.wait_full(step);
                walk(&t, &shared_g, (stage * comptime!(padded as u32)) as usize, warp, lane, plan);
                fence_shared();
                sync_warpgroup(id, 128u32);
                if comptime!(plan.stores()) {
                    store_tiles(&p, &t, rows, map_o, map_s, chunk, panel, count, heads, unit, id, plan);
                }
                if elected {
                    ring.release(step);
                }
                step += 1u32;
            }
            if comptime!(plan.with_last()) {
                store_state(last, &p, panel, heads, row, lane, comptime!(plan.segment_state()));
            }
            index += CUBE_COUNT_X;
        }
        if elected {
            wait_stores_read(0u32);
        }
    }
}

/// The tiles of a stage, and those that are stored from.
#[cube]
fn tiles_at(tiles: u32, stage: u32, o: u32, s: u32, #[comptime] plan: ChainPlan) -> Tiles {
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let values = tiles + stage * comptime!(plan.stage_bytes() as u32);
    let first = values + comptime!((plan.warpgroups * PANEL) as u32);
    let second = first + wide;
    let into = second + wide;
    let out = into + wide;
    Tiles { first, second, out, into, scores: out + wide, values, o, s }
}

/// Loads the panels of a whole chunk of one head.
#[cube]
pub(super) fn load_block(to: u32, map: u64, block: u32, full: u32, #[comptime] panels: usize) {
    #[unroll]
    for n in 0..panels {
        load_3d(panel_of(to, n), map, comptime!(64 * n as u32), 0u32, block, full);
    }
}

/// From the state at one end of a chunk, which is the left operand already, to that at its other end, and its outputs.
#[cube]
fn walk(t: &Tiles, g: &[f32], at: usize, warp: u32, lane: u32, #[comptime] plan: ChainPlan) {
    let state = comptime!(plan.state());
    let operand = comptime!(plan.operand());
    let steps = comptime!(4 * plan.panels());
    put_transposed(VALUES, t.values, warp, lane);
    scale_by(state, g, at, lane);
    fence();
    #[unroll]
    for n in 0..steps {
        mma_registers(READ, operand, n, k_major(t.first, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, VALUES, n, mn_major(t.into, CHUNK, n), 1u32, true);
    }
    commit();
    if comptime!(plan.with_outputs()) {
        #[unroll]
        for n in 0..steps {
            mma_registers(OUT, operand, n, k_major(t.out, CHUNK, n), comptime!(n as u32), false);
        }
        #[unroll]
        for n in 0..4usize {
            if comptime!(plan.against_time()) {
                mma_registers(OUT, VALUES, n, mn_major(t.scores, CHUNK, n), 1u32, true);
            } else {
                mma_registers(OUT, VALUES, n, k_major(t.scores, CHUNK, n), 1u32, false);
            }
        }
        commit();
        wait(2u32);
    } else {
        wait(1u32);
    }
    pack_all(TOKENS, READ);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, TOKENS, n, mn_major(t.second, CHUNK, n), 1u32, true);
    }
    commit();
    if comptime!(plan.with_outputs()) {
        wait(1u32);
        publish_transposed(t.o, OUT, warp, lane);
    }
    wait(0u32);
}

/// Stores what a chunk leaves in shared memory.
#[cube]
fn store_tiles(
    p: &Place,
    t: &Tiles,
    rows: &mut [u32],
    map_o: u64,
    map_s: u64,
    chunk: u32,
    panel: u32,
    count: u32,
    heads: u32,
    unit: u32,
    id: u32,
    #[comptime] plan: ChainPlan,
) {
    let token = p.start + chunk * comptime!(CHUNK as u32);
    let channel = panel * 64u32;
    let whole = count == comptime!(CHUNK as u32);
    if unit == 0u32 {
        if comptime!(plan.with_outputs()) && whole {
            store_3d(t.o, map_o, channel, p.head, token);
        }
        if comptime!(plan.with_borders()) {
            let border = (p.border + chunk) * heads + p.head;
            #[unroll]
            for n in 0..comptime!(plan.panels()) {
                store_3d(panel_of(t.s, n), map_s, comptime!(64 * n as u32), channel, border);
            }
        }
        commit_stores();
    }
    if comptime!(plan.with_outputs()) && !whole {
        let width = comptime!(plan.values as u32);
        let first = (token * heads + p.head) * comptime!(plan.values as u32 / 2);
        copy_rows(t.o, rows, first, heads * comptime!(plan.values as u32 / 2), channel, width, count, unit);
        // The tile is written again by others.
        sync_warpgroup(id, 128u32);
    }
}
