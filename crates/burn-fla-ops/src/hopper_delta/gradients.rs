//! The gradients of queries, keys, writing strengths and decays: all chunks at once, from the states at their borders.
//!
//! With W the values that tokens write, S the state before a chunk, Z the gradient of that after it, and e the decay between
//! two tokens:
//!
//! ```text
//! dP_ij = scale e_ij (do_i · w_j) , j ≤ i           dX_ij = −e_ij (dv_i · w_j) , j < i
//! dq = scale e^G ∘ do Sᵀ + dP k                     dk = −e^G ∘ dv Sᵀ + dX k + e^{G_last − G} ∘ W Zᵀ + dPᵀ q + dXᵀ k
//! dβ_i = (dv_i · w_i) / β_i²
//! dg_t = e^{G_last} ⟨S, Z⟩ + Σ_{i ≥ t} (q_i · dq_i + k_i · dk'_i − k_i · dk″_i) + Σ_{j < t} inter_j
//! ```
//!
//! in dg, `dk'` is the first two terms of dk (as a reader), `dk″` its last two (as a writer inside the chunk), and inter the
//! product of k with the middle one. So no two large numbers cancel.
//!
//! One warpgroup computes what tokens read with, dq and dk', the other what they write with; value channels come in slices of
//! 64.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::gradient_parts::{
    INNER, OUTER, SUMS, Tiles, chunk_of, finish_gate, read_slices, reader, store_panels, write_slices, writer,
};
use super::parts::{Decays, strength};
use super::plan::{CHUNK, DECAYED, DECAYS, GRADIENT_STAGES, GradientPlan, PANEL, SLICE, TOKENS};
use crate::hopper_walk::parts::{load_tile, publish};
use crate::tile::hopper::{
    Ring, arrive, barrier_arrive, barrier_expect, barrier_fence, bf16_high, bf16_low, declare, declare_fragment, exp2,
    give_registers, load_3d, load_f32, load_u32, read, row_of, store_f32, sync_warpgroup, take_registers,
    wait_stores_read, write,
};

/// Where both warpgroups meet, and where the exchange is free again.
const TOGETHER: u32 = 8;
const FREE: u32 = 9;
/// Units that wait for the exchange or free it: a warpgroup and a warp.
const FREEING: u32 = 160;

#[cube(launch_unchecked)]
pub(super) fn gradients(
    q: &TensorMap<bf16, Tiled>,
    k: &TensorMap<bf16, Tiled>,
    written: &TensorMap<bf16, Tiled>,
    grad_o: &TensorMap<bf16, Tiled>,
    grad_v: &TensorMap<bf16, Tiled>,
    states: &TensorMap<bf16, Tiled>,
    grad_states: &TensorMap<bf16, Tiled>,
    dq: &TensorMap<bf16, Tiled>,
    dk: &TensorMap<bf16, Tiled>,
    query_rows: &mut [u32],
    key_rows: &mut [u32],
    dbeta: &mut [f32],
    dg: &mut [f32],
    g: &[f32],
    beta: &[f32],
    table: &[i32],
    heads: u32,
    groups: u32,
    chunks: u32,
    table_at: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let panels = comptime!(plan.panels());
    let slices = comptime!(plan.slices() as u32);
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let slice_bytes = comptime!((plan.slice_panels() * PANEL) as u32);
    let of_queries = comptime!(plan.of_queries());
    let of_keys = comptime!(plan.of_keys());
    let shared_slices =
        Shared::<[u32]>::new_aligned_slice(comptime!(GRADIENT_STAGES * plan.slice_panels() * PANEL / 4), 1024usize);
    let shared_q = Shared::<[u32]>::new_aligned_slice(comptime!(panels * PANEL / 4), 1024usize);
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(panels * PANEL / 4), 1024usize);
    let shared_o = Shared::<[u32]>::new_aligned_slice(comptime!(panels * PANEL / 4), 1024usize);
    // The first part of dk in f32, then all of it in bf16.
    let shared_e = Shared::<[f32]>::new_aligned_slice(comptime!(2 * panels * PANEL / 4), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(DECAYS + CHUNK), 128usize);
    let mut sums = Shared::<[f32]>::new_aligned_slice(comptime!(2 * SUMS), 128usize);
    let mut across = Shared::<[f32]>::new_aligned_slice(4usize, 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * GRADIENT_STAGES + 2));
    let tiles = generic_to_shared::<u32>(shared_slices.as_ptr());
    let q0 = generic_to_shared::<u32>(shared_q.as_ptr());
    let k0 = generic_to_shared::<u32>(shared_k.as_ptr());
    let o0 = generic_to_shared::<u32>(shared_o.as_ptr());
    let e0 = generic_to_shared::<f32>(shared_e.as_ptr());
    let barrier = generic_to_shared::<u64>(barriers.as_ptr());
    let ring = Ring::new(barrier, comptime!(GRADIENT_STAGES as u32));
    let own = Ring::new(barrier + comptime!(16 * GRADIENT_STAGES as u32), 1u32);
    declare(OUTER);
    declare(INNER);
    declare(of_queries);
    declare(of_keys);
    declare_fragment(TOKENS);
    declare_fragment(DECAYED);
    if UNIT_POS == 0 {
        ring.init(1u32, comptime!(2 + 2 * plan.gated as u32));
        // The copies' arrival, and that of each unit of the warp that sums decays; two warpgroups and with a gate a warp.
        own.init(33u32, comptime!(2 + plan.gated as u32));
        barrier_fence();
    }
    sync_cube();

    let work = chunks * heads;
    let warpgroup = UNIT_POS / 128u32;
    let warp = (UNIT_POS % 128u32) / 32u32;
    let lane = UNIT_POS % 32u32;
    let mut step = 0u32;
    let mut turn = 0u32;
    let mut index = CUBE_POS_X;
    if warpgroup == 2u32 {
        give_registers(40u32);
        if warp == 0u32 {
            if lane == 0u32 {
                let map_q = tensor_map_address(q);
                let map_k = tensor_map_address(k);
                let map_w = tensor_map_address(written);
                let map_o = tensor_map_address(grad_o);
                let map_v = tensor_map_address(grad_v);
                let map_s = tensor_map_address(states);
                let map_z = tensor_map_address(grad_states);
                while index < work {
                    let c = chunk_of(index, table, table_at, heads);
                    for slice in 0..slices {
                        ring.wait_room(step);
                        let full = ring.full(step);
                        let to = tiles + ring.stage(step) * slice_bytes;
                        let channel = slice * comptime!(SLICE as u32);
                        barrier_expect(full, slice_bytes);
                        load_tile(to, map_w, channel, c.head, c.start, full, 1usize);
                        load_tile(to + comptime!(PANEL as u32), map_o, channel, c.head, c.start, full, 1usize);
                        load_tile(to + comptime!(2 * PANEL as u32), map_v, channel, c.head, c.start, full, 1usize);
                        let s0 = to + comptime!(3 * PANEL as u32);
                        #[unroll]
                        for n in 0..panels {
                            let at = comptime!((n * PANEL) as u32);
                            load_3d(s0 + at, map_s, comptime!(64 * n as u32), channel, index, full);
                            load_3d(s0 + wide + at, map_z, comptime!(64 * n as u32), channel, index, full);
                        }
                        step += 1u32;
                    }
                    own.wait_room(turn);
                    let full = own.full(turn);
                    barrier_expect(full, 2u32 * wide);
                    load_tile(q0, map_q, 0u32, c.head / groups, c.start, full, panels);
                    load_tile(k0, map_k, 0u32, c.head / groups, c.start, full, panels);
                    turn += 1u32;
                    index += CUBE_COUNT_X;
                }
            }
        } else if warp == 1u32 {
            while index < work {
                let c = chunk_of(index, table, table_at, heads);
                let found = Decays::of(g, c.start, c.length, c.head, heads, lane, comptime!(plan.gated));
                let low = strength(beta, c.start, c.length, lane, c.head, heads);
                let high = strength(beta, c.start, c.length, lane + 32u32, c.head, heads);
                own.wait_room(turn);
                found.write(&mut shared_g, 0usize, c.length, lane);
                shared_g[comptime!(DECAYS) + lane as usize] = low;
                shared_g[comptime!(DECAYS + 32) + lane as usize] = high;
                barrier_arrive(own.full(turn));
                turn += 1u32;
                index += CUBE_COUNT_X;
            }
        } else if comptime!(plan.gated) {
            // The products of the states, and what the sums of the tokens become.
            let part = warp - 2u32;
            while index < work {
                let c = chunk_of(index, table, table_at, heads);
                let mut sum = f32::new(0.0);
                for _slice in 0..slices {
                    ring.wait_full(step);
                    let s0 = tiles + ring.stage(step) * slice_bytes + comptime!(3 * PANEL as u32);
                    // Both tiles have the same layout, whatever it is.
                    let from = s0 + part * comptime!((plan.panels() * PANEL / 2) as u32) + lane * 4u32;
                    for n in 0..comptime!((plan.panels() * PANEL / 256) as u32) {
                        let a = load_u32(from + n * 128u32);
                        let b = load_u32(from + wide + n * 128u32);
                        sum += bf16_low(a) * bf16_low(b) + bf16_high(a) * bf16_high(b);
                    }
                    sync_plane();
                    if lane == 0u32 {
                        ring.release(step);
                    }
                    step += 1u32;
                }
                let set = turn % 2u32;
                own.wait_full(turn);
                let own_share = plane_sum(sum) * exp2(shared_g[63]);
                if part == 1u32 {
                    across[set as usize] = own_share;
                }
                sync_warpgroup(TOGETHER, comptime!(plan.meeting()));
                if part == 0u32 {
                    if lane == 0u32 {
                        own.release(turn);
                    }
                    let product = own_share + across[set as usize];
                    finish_gate(&sums, set, dg, product, &c, heads, lane);
                }
                turn += 1u32;
                index += CUBE_COUNT_X;
            }
        }
    } else {
        take_registers(232u32);
        let t = Tiles { slices: tiles, q: q0, k: k0, out: if warpgroup == 0u32 { o0 } else { e0 } };
        if warpgroup == 0u32 {
            let map_q = tensor_map_address(dq);
            while index < work {
                let c = chunk_of(index, table, table_at, heads);
                let set = ((turn % 2u32) * comptime!(SUMS as u32)) as usize;
                read_slices(&t, &ring, step, plan);
                step += slices;
                own.wait_full(turn);
                reader(&t, &shared_g, &mut sums, set, dbeta, &c, heads, warp, lane, out_scale, plan);
                // Nobody reads the exchange any more.
                if turn > 0u32 {
                    sync_warpgroup(FREE, FREEING);
                }
                let unit = UNIT_POS % 128u32;
                #[unroll]
                for n in 0..comptime!(of_keys.len()) {
                    store_f32(e0 + unit * 4u32 + comptime!(512 * n as u32), read(of_keys, n));
                }
                if unit == 0u32 {
                    wait_stores_read(0u32);
                }
                sync_warpgroup(TOGETHER, comptime!(plan.meeting()));
                if unit == 0u32 {
                    own.release(turn);
                }
                publish(o0, of_queries, row_of(warp, lane, 0usize), lane);
                store_panels(&t, query_rows, map_q, &c, heads, 1u32, unit, plan);
                turn += 1u32;
                index += CUBE_COUNT_X;
            }
        } else {
            let map_k = tensor_map_address(dk);
            while index < work {
                let c = chunk_of(index, table, table_at, heads);
                let set = ((turn % 2u32) * comptime!(SUMS as u32)) as usize;
                write_slices(&t, &ring, step, plan);
                step += slices;
                own.wait_full(turn);
                writer(&t, &shared_g, &mut sums, set, &c, warp, lane, out_scale, plan);
                let unit = UNIT_POS % 128u32;
                sync_warpgroup(TOGETHER, comptime!(plan.meeting()));
                if unit == 0u32 {
                    own.release(turn);
                }
                #[unroll]
                for n in 0..comptime!(of_keys.len()) {
                    write(of_keys, n, read(of_keys, n) + load_f32(e0 + unit * 4u32 + comptime!(512 * n as u32)));
                }
                sync_warpgroup(2u32, 128u32);
                publish(e0, of_keys, row_of(warp, lane, 0usize), lane);
                store_panels(&t, key_rows, map_k, &c, heads, 2u32, unit, plan);
                index += CUBE_COUNT_X;
                turn += 1u32;
                if warp == 0u32 {
                    if lane == 0u32 {
                        wait_stores_read(0u32);
                    }
                    sync_plane();
                    if index < work {
                        arrive(FREE, FREEING);
                    }
                }
            }
        }
        if UNIT_POS % 128u32 == 0u32 {
            wait_stores_read(0u32);
        }
    }
}
