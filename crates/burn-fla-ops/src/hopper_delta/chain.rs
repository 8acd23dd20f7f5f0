//! The chain: one cube takes one segment of one head and 64 or 128 value channels from chunk to chunk, with the transposed
//! state in registers, value channels × key channels.
//!
//! ```text
//! with time:      W = M (v − e^G ∘ K S)             o = scale (e^G ∘ Q S + P W)          S ← e^{G_last} S + (e^{G_last − G} ∘ K)ᵀ W
//! against time:   dv = Mᵀ (e^{G_last − G} ∘ K Z + Pᵀ do)      Z ← e^{G_last} Z + scale (e^G ∘ Q)ᵀ do − (e^G ∘ K)ᵀ dv
//! ```
//!
//! with `P_ij = scale e^{G_i − G_j} (q_i · k_j)` for `j ≤ i`, and M of [`super::prepare`]. Everything between two states is
//! transposed, channels × tokens, so what one product leaves in registers is the left operand of the next one: nothing on
//! the way from state to state goes through shared memory.
//!
//! One warp loads tiles by tensor memory copies, one the decays; the other warpgroups walk, and share the work of P.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::parts::{
    Decays, Place, chunk_at, copy_rows, load_state, pack_all, pack_columns, pack_missing, pack_transposed, place,
    publish_transposed, put_transposed, scale_columns, store_state, write_scores,
};
use super::plan::{CHUNK, ChainPlan, DECAYED, DECAYS, OUT, PANEL, READ, TOKENS, Task, WRITTEN};
use crate::hopper_walk::parts::{load_tile, publish};
use crate::tile::hopper::{
    Ring, barrier_arrive, barrier_expect, barrier_fence, commit, commit_stores, declare, declare_fragment, exp2, fence,
    fence_shared, give_registers, k_major, mma_registers, mma_shared, mn_major, row_of, scale, store_3d,
    sync_warpgroup, take_registers, wait, wait_stores_read,
};

/// The barrier at which all walking warpgroups meet.
const TOGETHER: u32 = 8;

#[cube(launch_unchecked)]
pub(super) fn chain(
    q: &TensorMap<bf16, Tiled>,
    k: &TensorMap<bf16, Tiled>,
    v: &TensorMap<bf16, Tiled>,
    inverse: &TensorMap<bf16, Tiled>,
    o: &TensorMap<bf16, Tiled>,
    borders: &TensorMap<bf16, Tiled>,
    rows: &mut [u32],
    g: &[f32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    heads: u32,
    groups: u32,
    items: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let warpgroups = comptime!(plan.warpgroups);
    let panels = comptime!(plan.panels());
    let stages = comptime!(plan.stages);
    let state = comptime!(plan.state());
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let narrow = comptime!((plan.warpgroups * PANEL) as u32);
    let queries = comptime!(plan.with_queries() as usize);
    let kept = comptime!(plan.with_borders() as usize);
    let shared_q = Shared::<[u32]>::new_aligned_slice(comptime!(queries * stages * panels * PANEL / 4 + 32), 1024usize);
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(stages * panels * PANEL / 4), 1024usize);
    let shared_v = Shared::<[u32]>::new_aligned_slice(comptime!(stages * warpgroups * PANEL / 4), 1024usize);
    let shared_m = Shared::<[u32]>::new_aligned_slice(comptime!(stages * PANEL / 4), 1024usize);
    let shared_p = Shared::<[u32]>::new_aligned_slice(comptime!(queries * 2 * PANEL / 4 + 32), 1024usize);
    let shared_o = Shared::<[u32]>::new_aligned_slice(comptime!(warpgroups * PANEL / 4), 1024usize);
    let shared_s =
        Shared::<[u32]>::new_aligned_slice(comptime!(kept * warpgroups * panels * PANEL / 4 + 32), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * DECAYS), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages));
    let tiles_q = generic_to_shared::<u32>(shared_q.as_ptr());
    let tiles_k = generic_to_shared::<u32>(shared_k.as_ptr());
    let tiles_v = generic_to_shared::<u32>(shared_v.as_ptr());
    let tiles_m = generic_to_shared::<u32>(shared_m.as_ptr());
    let tiles_p = generic_to_shared::<u32>(shared_p.as_ptr());
    let tiles_o = generic_to_shared::<u32>(shared_o.as_ptr());
    let tiles_s = generic_to_shared::<u32>(shared_s.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), comptime!(stages as u32));
    declare(state);
    declare(READ);
    declare_fragment(comptime!(plan.operand()));
    declare_fragment(TOKENS);
    declare_fragment(DECAYED);
    if comptime!(plan.with_queries()) {
        declare(comptime!(plan.scores()));
        declare(comptime!(if plan.against_time() { WRITTEN } else { OUT }));
    }
    if UNIT_POS == 0 {
        // The copies' arrival, and that of each unit of the warp that sums decays.
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
        give_registers(40u32);
        if warp == 0u32 {
            if lane == 0u32 {
                let map_q = tensor_map_address(q);
                let map_k = tensor_map_address(k);
                let map_v = tensor_map_address(v);
                let map_m = tensor_map_address(inverse);
                while index < work {
                    let p = place(index, table, heads, plan);
                    let channel = p.slice * comptime!(64 * warpgroups as u32);
                    let key_head = p.head / groups;
                    for i in 0..p.chunks {
                        let token = p.start + chunk_at(i, p.chunks, plan) * comptime!(CHUNK as u32);
                        ring.wait_room(step);
                        let full = ring.full(step);
                        let stage = ring.stage(step);
                        barrier_expect(full, comptime!(plan.stage_bytes() as u32));
                        load_tile(tiles_k + stage * wide, map_k, 0u32, key_head, token, full, panels);
                        load_tile(tiles_m + stage * comptime!(PANEL as u32), map_m, 0u32, p.head, token, full, 1usize);
                        load_tile(tiles_v + stage * narrow, map_v, channel, p.head, token, full, warpgroups);
                        if comptime!(plan.with_queries()) {
                            load_tile(tiles_q + stage * wide, map_q, 0u32, key_head, token, full, panels);
                        }
                        step += 1u32;
                    }
                    index += CUBE_COUNT_X;
                }
            }
        } else if warp == 1u32 {
            while index < work {
                let p = place(index, table, heads, plan);
                for i in 0..p.chunks {
                    let first = chunk_at(i, p.chunks, plan) * comptime!(CHUNK as u32);
                    let count = u32::min(p.length - first, comptime!(CHUNK as u32));
                    ring.wait_room(step);
                    let to = (ring.stage(step) * comptime!(DECAYS as u32)) as usize;
                    let sums = Decays::of(g, p.start + first, count, p.head, heads, lane, comptime!(plan.gated));
                    sums.write(&mut shared_g, to, count, lane);
                    barrier_arrive(ring.full(step));
                    step += 1u32;
                }
                index += CUBE_COUNT_X;
            }
        }
    } else {
        take_registers(232u32);
        let elected = UNIT_POS % 128u32 == 0u32;
        let unit = UNIT_POS % 128u32;
        let row = row_of(warp, lane, 0usize);
        let o0 = tiles_o + warpgroup * comptime!(PANEL as u32);
        let s0 = tiles_s + warpgroup * wide;
        let map_o = tensor_map_address(o);
        let map_s = tensor_map_address(borders);
        let id = warpgroup + 1u32;
        while index < work {
            let p = place(index, table, heads, plan);
            let panel = p.slice * comptime!(warpgroups as u32) + warpgroup;
            load_state(initial, &p, panel, heads, row, lane, plan);
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, plan);
                let first = chunk * comptime!(CHUNK as u32);
                let count = u32::min(p.length - first, comptime!(CHUNK as u32));
                ring.wait_full(step);
                let stage = ring.stage(step);
                let t = Tiles {
                    q: tiles_q + stage * wide,
                    k: tiles_k + stage * wide,
                    v: tiles_v + stage * narrow + warpgroup * comptime!(PANEL as u32),
                    m: tiles_m + stage * comptime!(PANEL as u32),
                    p: tiles_p + (step % 2u32) * comptime!(PANEL as u32),
                    o: o0,
                    s: s0,
                    g: stage * comptime!(DECAYS as u32),
                };
                if comptime!(plan.with_borders()) {
                    // What was stored from these tiles has been read.
                    if elected {
                        wait_stores_read(0u32);
                    }
                    sync_warpgroup(id, 128u32);
                    publish(s0, state, row, lane);
                }
                pack_all(comptime!(plan.operand()), state);
                if comptime!(plan.against_time()) {
                    against_time(&t, &shared_g, warpgroup, warp, lane, count, out_scale, plan);
                } else {
                    with_time(&t, &shared_g, warpgroup, warp, lane, count, out_scale, plan);
                }
                if comptime!(plan.task == Task::Outputs) {
                    if elected {
                        wait_stores_read(0u32);
                    }
                    sync_warpgroup(id, 128u32);
                    publish_transposed(o0, OUT, warp, lane);
                }
                let channel = panel * 64u32;
                fence_shared();
                sync_warpgroup(id, 128u32);
                if comptime!(plan.stores()) {
                    store_tiles(&p, &t, rows, map_o, map_s, chunk, panel, channel, count, heads, unit, plan);
                }
                if elected {
                    ring.release(step);
                }
                step += 1u32;
            }
            if comptime!(plan.task != Task::Values) {
                store_state(last, &p, panel, heads, row, lane, plan);
            }
            index += CUBE_COUNT_X;
        }
        if elected {
            wait_stores_read(0u32);
        }
    }
}

/// Where a warpgroup finds a chunk.
#[derive(CubeType, Clone, Copy)]
struct Tiles {
    q: u32,
    k: u32,
    /// Values, or against time the gradient of the outputs.
    v: u32,
    m: u32,
    p: u32,
    o: u32,
    s: u32,
    /// The first of its decays.
    g: u32,
}

/// Starts the product of the scores that this warpgroup has a share of: all queries, and its key tokens.
#[cube]
fn start_scores(t: &Tiles, warpgroup: u32, #[comptime] plan: ChainPlan) {
    let scores = comptime!(plan.scores());
    let k0 = t.k + warpgroup * comptime!((plan.scores().columns() * 128) as u32);
    let q0 = t.q;
    #[unroll]
    for n in 0..comptime!(4 * plan.panels()) {
        let keep = comptime!(n as u32);
        mma_shared(scores, k_major(q0, CHUNK, n), k_major(k0, CHUNK, n), keep, false, false);
    }
    commit();
}

/// Hands this warpgroup's share of the scores to all.
#[cube]
fn share_scores(
    t: &Tiles,
    g: &[f32],
    warpgroup: u32,
    row: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let first = warpgroup * comptime!(plan.scores().columns() as u32);
    write_scores(t.p, g, t.g as usize, first, row, lane, count, out_scale, plan);
    fence_shared();
    sync_warpgroup(TOGETHER, comptime!(128 * plan.warpgroups as u32));
}

/// From the state before a chunk to that after it, and its outputs or the values that it writes.
#[cube]
fn with_time(
    t: &Tiles,
    g: &[f32],
    warpgroup: u32,
    warp: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let state = comptime!(plan.state());
    let operand = comptime!(plan.operand());
    let steps = comptime!(4 * plan.panels());
    let row = row_of(warp, lane, 0usize);
    let at = t.g as usize;
    let grown = at + CHUNK;
    let left = at + 2 * CHUNK;
    fence();
    // Scores first: they become P while what follows is under way. Started before the state is packed, they made ptxas wait
    // for them there (C7517).
    if comptime!(plan.with_queries()) {
        start_scores(t, warpgroup, plan);
    }
    #[unroll]
    for n in 0..steps {
        mma_registers(READ, operand, n, k_major(t.k, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    if comptime!(plan.with_queries()) {
        #[unroll]
        for n in 0..steps {
            mma_registers(OUT, operand, n, k_major(t.q, CHUNK, n), comptime!(n as u32), false);
        }
        commit();
        wait(1u32);
    } else {
        wait(0u32);
    }
    pack_missing(TOKENS, READ, t.v, g, grown, warp, lane);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(READ, TOKENS, n, k_major(t.m, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    if comptime!(plan.with_queries()) {
        share_scores(t, g, warpgroup, row, lane, count, out_scale, plan);
    }
    wait(0u32);
    pack_columns(DECAYED, READ, g, left, lane, 1.0f32);
    if comptime!(plan.gated) {
        let decay = exp2(g[at + 63]);
        #[unroll]
        for n in 0..comptime!(state.len()) {
            scale(state, n, decay);
        }
    }
    if comptime!(plan.with_queries()) {
        pack_all(TOKENS, READ);
        scale_columns(OUT, g, grown, lane, out_scale);
    }
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, DECAYED, n, mn_major(t.k, CHUNK, n), 1u32, true);
    }
    commit();
    if comptime!(plan.with_queries()) {
        #[unroll]
        for n in 0..4usize {
            mma_registers(OUT, TOKENS, n, k_major(t.p, CHUNK, n), 1u32, false);
        }
        commit();
    } else if comptime!(plan.stores()) {
        publish_transposed(t.o, READ, warp, lane);
    }
    wait(0u32);
}

/// From the gradient of the state after a chunk to that of the state before it, and those of its values.
#[cube]
fn against_time(
    t: &Tiles,
    g: &[f32],
    warpgroup: u32,
    warp: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let state = comptime!(plan.state());
    let operand = comptime!(plan.operand());
    let row = row_of(warp, lane, 0usize);
    let at = t.g as usize;
    let grown = at + CHUNK;
    let left = at + 2 * CHUNK;
    fence();
    start_scores(t, warpgroup, plan);
    #[unroll]
    for n in 0..comptime!(4 * plan.panels()) {
        mma_registers(READ, operand, n, k_major(t.k, CHUNK, n), comptime!(n as u32), false);
    }
    commit();
    put_transposed(TOKENS, t.v, warp, lane);
    wait(1u32);
    share_scores(t, g, warpgroup, row, lane, count, out_scale, plan);
    wait(0u32);
    scale_columns(READ, g, left, lane, 1.0f32);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(READ, TOKENS, n, mn_major(t.p, CHUNK, n), 1u32, true);
    }
    commit();
    pack_transposed(DECAYED, t.v, g, grown, warp, lane, out_scale);
    if comptime!(plan.gated) {
        let decay = exp2(g[at + 63]);
        #[unroll]
        for n in 0..comptime!(state.len()) {
            scale(state, n, decay);
        }
    }
    wait(0u32);
    pack_all(TOKENS, READ);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(WRITTEN, TOKENS, n, mn_major(t.m, CHUNK, n), comptime!(n as u32), true);
    }
    commit();
    #[unroll]
    for n in 0..4usize {
        mma_registers(state, DECAYED, n, mn_major(t.q, CHUNK, n), 1u32, true);
    }
    commit();
    wait(1u32);
    pack_columns(TOKENS, WRITTEN, g, grown, lane, -1.0f32);
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
    channel: u32,
    count: u32,
    heads: u32,
    unit: u32,
    #[comptime] plan: ChainPlan,
) {
    let token = p.start + chunk * comptime!(CHUNK as u32);
    let whole = count == comptime!(CHUNK as u32);
    if unit == 0u32 {
        if whole {
            store_3d(t.o, map_o, channel, p.head, token);
        }
        if comptime!(plan.with_borders()) {
            let border = (p.border + chunk) * heads + p.head;
            #[unroll]
            for n in 0..comptime!(plan.panels()) {
                let from = t.s + comptime!((n * PANEL) as u32);
                store_3d(from, map_s, comptime!(64 * n as u32), panel * 64u32, border);
            }
        }
        commit_stores();
    }
    if !whole {
        let width = comptime!(plan.values as u32);
        let first = (token * heads + p.head) * comptime!(plan.values as u32 / 2);
        copy_rows(t.o, rows, first, heads * comptime!(plan.values as u32 / 2), channel, width, count, unit);
        // The tile is written again by others.
        sync_warpgroup(panel % comptime!(plan.warpgroups as u32) + 1u32, 128u32);
    }
}
