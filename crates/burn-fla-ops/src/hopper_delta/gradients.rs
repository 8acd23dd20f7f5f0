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

use super::parts::{Decays, copy_rows, load_tile, publish, strength};
use super::plan::{CHUNK, DECAYED, DECAYS, GRADIENT_STAGES, GradientPlan, PANEL, SLICE, TOKENS};
use crate::hopper_walk::table::CHUNK_WORDS;
use crate::tile::hopper::{
    Acc, Frag, Ring, arrive, barrier_arrive, barrier_expect, barrier_fence, bf16_high, bf16_low, column_of, commit,
    commit_stores, declare, declare_fragment, exp2, fence, fence_shared, give_registers, k_major, load_3d, load_f32,
    load_u32, mma_registers, mma_shared, mn_major, pack, read, row_of, scale, store_3d, store_f32, swizzled,
    sync_warpgroup, take_registers, wait, wait_stores_read, write,
};

/// Products of output gradients and written values; those of value gradients.
const OUTER: Acc = Acc::new("a", 64);
const INNER: Acc = Acc::new("x", 64);
/// Sums of a token, of which each chunk has two sets in turn: `q · dq`, `k · dk'`, `k · dk″`, inter.
const SUMS: usize = 4 * CHUNK;
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

/// Where the tiles are.
#[derive(CubeType, Clone, Copy)]
struct Tiles {
    slices: u32,
    q: u32,
    k: u32,
    out: u32,
}

#[derive(CubeType, Clone, Copy)]
struct Chunk {
    head: u32,
    start: u32,
    length: u32,
}

#[cube]
fn chunk_of(index: u32, table: &[i32], table_at: u32, heads: u32) -> Chunk {
    let at = (table_at + index / heads * comptime!(CHUNK_WORDS as u32)) as usize;
    Chunk { head: index % heads, start: table[at] as u32, length: table[at + 1] as u32 }
}

/// What tokens read with, over all value channels: products between tokens, `do Sᵀ` and `dv Sᵀ`.
#[cube]
fn read_slices(t: &Tiles, ring: &Ring, first: u32, #[comptime] plan: GradientPlan) {
    let of_queries = comptime!(plan.of_queries());
    let of_keys = comptime!(plan.of_keys());
    for slice in 0..comptime!(plan.slices() as u32) {
        let step = first + slice;
        ring.wait_full(step);
        let w0 = t.slices + ring.stage(step) * comptime!((plan.slice_panels() * PANEL) as u32);
        let do0 = w0 + comptime!(PANEL as u32);
        let dv0 = w0 + comptime!(2 * PANEL as u32);
        let s0 = w0 + comptime!(3 * PANEL as u32);
        fence();
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(OUTER, k_major(do0, CHUNK, n), k_major(w0, CHUNK, n), keep, false, false);
        }
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(INNER, k_major(dv0, CHUNK, n), k_major(w0, CHUNK, n), keep, false, false);
        }
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(of_queries, k_major(do0, CHUNK, n), mn_major(s0, 64usize, n), keep, false, true);
        }
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(of_keys, k_major(dv0, CHUNK, n), mn_major(s0, 64usize, n), keep, false, true);
        }
        commit();
        wait(0u32);
        if UNIT_POS % 128u32 == 0u32 {
            ring.release(step);
        }
    }
}

/// What tokens write with: products between tokens, transposed, and `W Zᵀ`.
#[cube]
fn write_slices(t: &Tiles, ring: &Ring, first: u32, #[comptime] plan: GradientPlan) {
    let of_keys = comptime!(plan.of_keys());
    for slice in 0..comptime!(plan.slices() as u32) {
        let step = first + slice;
        ring.wait_full(step);
        let w0 = t.slices + ring.stage(step) * comptime!((plan.slice_panels() * PANEL) as u32);
        let do0 = w0 + comptime!(PANEL as u32);
        let dv0 = w0 + comptime!(2 * PANEL as u32);
        let z0 = w0 + comptime!(((3 + plan.panels()) * PANEL) as u32);
        fence();
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(OUTER, k_major(w0, CHUNK, n), k_major(do0, CHUNK, n), keep, false, false);
        }
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(INNER, k_major(w0, CHUNK, n), k_major(dv0, CHUNK, n), keep, false, false);
        }
        #[unroll]
        for n in 0..4usize {
            let keep = slice + comptime!(n as u32);
            mma_shared(of_keys, k_major(w0, CHUNK, n), mn_major(z0, 64usize, n), keep, false, true);
        }
        commit();
        wait(0u32);
        if UNIT_POS % 128u32 == 0u32 {
            ring.release(step);
        }
    }
}

/// dq, the part of dk with which tokens read, dβ and what dg takes of them.
#[cube]
fn reader(
    t: &Tiles,
    g: &[f32],
    sums: &mut [f32],
    set: usize,
    dbeta: &mut [f32],
    c: &Chunk,
    heads: u32,
    warp: u32,
    lane: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let of_queries = comptime!(plan.of_queries());
    let of_keys = comptime!(plan.of_keys());
    let row = row_of(warp, lane, 0usize);
    let low = g[CHUNK + row as usize];
    let high = g[CHUNK + row as usize + 8];
    scale_rows(of_queries, low * out_scale, high * out_scale);
    scale_rows(of_keys, -low, -high);
    let products = diagonal(INNER, row, lane);
    pack_between(TOKENS, OUTER, g, row, lane, c.length, out_scale, false, false, plan);
    pack_between(DECAYED, INNER, g, row, lane, c.length, -1.0f32, true, false, plan);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(of_queries, TOKENS, n, mn_major(t.k, CHUNK, n), 1u32, true);
    }
    #[unroll]
    for n in 0..4usize {
        mma_registers(of_keys, DECAYED, n, mn_major(t.k, CHUNK, n), 1u32, true);
    }
    commit();
    wait(0u32);
    let keys = row_sums(of_keys, t.k, row, lane);
    let queries = row_sums(of_queries, t.q, row, lane);
    if lane % 4u32 == 0u32 {
        #[unroll]
        for half in 0..2usize {
            let i = row + comptime!(8 * half as u32);
            let product = if comptime!(half == 0) { products.low } else { products.high };
            let strength = g[DECAYS + i as usize];
            if comptime!(plan.gated) {
                sums[set + i as usize] = if comptime!(half == 0) { queries.low } else { queries.high };
                sums[set + CHUNK + i as usize] = if comptime!(half == 0) { keys.low } else { keys.high };
            }
            if i < c.length {
                // w and dv both have the factor β.
                dbeta[((c.start + i) * heads + c.head) as usize] = product / strength / strength;
            }
        }
    }
}

/// The part of dk with which tokens write, and what dg takes of it.
#[cube]
fn writer(
    t: &Tiles,
    g: &[f32],
    sums: &mut [f32],
    set: usize,
    c: &Chunk,
    warp: u32,
    lane: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let of_keys = comptime!(plan.of_keys());
    let row = row_of(warp, lane, 0usize);
    scale_rows(of_keys, g[2 * CHUNK + row as usize], g[2 * CHUNK + row as usize + 8]);
    pack_between(TOKENS, OUTER, g, row, lane, c.length, out_scale, false, true, plan);
    pack_between(DECAYED, INNER, g, row, lane, c.length, -1.0f32, true, true, plan);
    let inter = row_sums(of_keys, t.k, row, lane);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(of_keys, TOKENS, n, mn_major(t.q, CHUNK, n), 1u32, true);
    }
    #[unroll]
    for n in 0..4usize {
        mma_registers(of_keys, DECAYED, n, mn_major(t.k, CHUNK, n), 1u32, true);
    }
    commit();
    wait(0u32);
    if comptime!(plan.gated) {
        let all = row_sums(of_keys, t.k, row, lane);
        if lane % 4u32 == 0u32 {
            let at = set + row as usize;
            sums[at + 2 * CHUNK] = all.low - inter.low;
            sums[at + 2 * CHUNK + 8] = all.high - inter.high;
            sums[at + 3 * CHUNK] = inter.low;
            sums[at + 3 * CHUNK + 8] = inter.high;
        }
    }
}

/// A number for each of a unit's two rows.
#[derive(CubeType, Clone, Copy)]
struct Rows {
    low: f32,
    high: f32,
}

/// Multiplies the rows of an accumulator.
#[cube]
fn scale_rows(#[comptime] acc: Acc, low: f32, high: f32) {
    #[unroll]
    for n in 0..comptime!(acc.len()) {
        scale(acc, n, if comptime!(n / 2 % 2 == 0) { low } else { high });
    }
}

/// Products between tokens, masked, times the decay between both and a factor, as a left operand. `transposed`: a row is the
/// token that is read, a column the one that reads.
#[cube]
fn pack_between(
    #[comptime] to: Frag,
    #[comptime] acc: Acc,
    g: &[f32],
    row: u32,
    lane: u32,
    length: u32,
    factor: f32,
    #[comptime] strict: bool,
    #[comptime] transposed: bool,
    #[comptime] plan: GradientPlan,
) {
    #[unroll]
    for j in 0..8usize {
        #[unroll]
        for half in 0..2usize {
            let own = row + comptime!(8 * half as u32);
            let other = column_of(lane, comptime!(4 * j));
            let i = comptime!(4 * j + 2 * half);
            let low = read(acc, i) * between(g, own, other, length, factor, strict, transposed, plan);
            let high =
                read(acc, comptime!(i + 1)) * between(g, own, other + 1u32, length, factor, strict, transposed, plan);
            pack(to, comptime!(2 * j + half), low, high);
        }
    }
}

#[cube]
fn between(
    g: &[f32],
    own: u32,
    other: u32,
    length: u32,
    factor: f32,
    #[comptime] strict: bool,
    #[comptime] transposed: bool,
    #[comptime] plan: GradientPlan,
) -> f32 {
    let reader = if comptime!(transposed) { other } else { own };
    let source = if comptime!(transposed) { own } else { other };
    let mut value = factor + 0.0f32;
    if comptime!(plan.gated) {
        value *= exp2(g[reader as usize] - g[source as usize]);
    }
    let kept = if comptime!(strict) { source < reader } else { source <= reader };
    select(kept && reader < length, value, 0.0f32)
}

/// The diagonal at this unit's two rows.
#[cube]
fn diagonal(#[comptime] acc: Acc, row: u32, lane: u32) -> Rows {
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(acc.len()) {
        let column = column_of(lane, n);
        if comptime!(n / 2 % 2 == 0) {
            low += select(column == row, read(acc, n), 0.0f32);
        } else {
            high += select(column == row + 8u32, read(acc, n), 0.0f32);
        }
    }
    Rows { low: over_row(low), high: over_row(high) }
}

/// The products of this unit's two rows with the same rows of a tile.
#[cube]
fn row_sums(#[comptime] acc: Acc, tile: u32, row: u32, lane: u32) -> Rows {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    #[unroll]
    for j in 0..comptime!(acc.columns() / 8) {
        let at = (base ^ comptime!((j % 8 * 16) as u32)) + comptime!((j / 8 * PANEL) as u32);
        let first = load_u32(at);
        let second = load_u32(at + 1024u32);
        low += bf16_low(first) * read(acc, comptime!(4 * j)) + bf16_high(first) * read(acc, comptime!(4 * j + 1));
        high +=
            bf16_low(second) * read(acc, comptime!(4 * j + 2)) + bf16_high(second) * read(acc, comptime!(4 * j + 3));
    }
    Rows { low: over_row(low), high: over_row(high) }
}

/// The sum over the four units of a row.
#[cube]
fn over_row(x: f32) -> f32 {
    let two = x + plane_shuffle_xor(x, 1u32);
    two + plane_shuffle_xor(two, 2u32)
}

/// Stores the panels of a chunk that a warpgroup has written.
#[cube]
fn store_panels(
    t: &Tiles,
    rows: &mut [u32],
    map: u64,
    c: &Chunk,
    heads: u32,
    id: u32,
    unit: u32,
    #[comptime] plan: GradientPlan,
) {
    fence_shared();
    sync_warpgroup(id, 128u32);
    if c.length == comptime!(CHUNK as u32) {
        if unit == 0u32 {
            #[unroll]
            for n in 0..comptime!(plan.panels()) {
                store_3d(t.out + comptime!((n * PANEL) as u32), map, comptime!(64 * n as u32), c.head, c.start);
            }
            commit_stores();
        }
    } else {
        let width = comptime!(plan.keys as u32);
        let stride = heads * comptime!(plan.keys as u32 / 2);
        let first = (c.start * heads + c.head) * comptime!(plan.keys as u32 / 2);
        #[unroll]
        for n in 0..comptime!(plan.panels()) {
            let from = t.out + comptime!((n * PANEL) as u32);
            copy_rows(from, rows, first, stride, comptime!(64 * n as u32), width, c.length, unit);
        }
        sync_warpgroup(id, 128u32);
    }
}

/// One warp sums up a chunk's dg: see the equations above.
#[cube]
fn finish_gate(sums: &[f32], set: u32, dg: &mut [f32], across: f32, c: &Chunk, heads: u32, lane: u32) {
    let at = (set * comptime!(SUMS as u32) + lane) as usize;
    let after_low = select(lane < c.length, sums[at] + sums[at + CHUNK] - sums[at + 2 * CHUNK], 0.0f32);
    let inter_low = select(lane < c.length, sums[at + 3 * CHUNK], 0.0f32);
    let at = at + 32;
    let after_high = select(lane + 32u32 < c.length, sums[at] + sums[at + CHUNK] - sums[at + 2 * CHUNK], 0.0f32);
    let inter_high = select(lane + 32u32 < c.length, sums[at + 3 * CHUNK], 0.0f32);
    let to_low = plane_inclusive_sum(after_low);
    let to_high = plane_inclusive_sum(after_high) + plane_broadcast(to_low, 31u32);
    let total = plane_broadcast(to_high, 31u32);
    let by_low = plane_inclusive_sum(inter_low);
    let by_high = plane_inclusive_sum(inter_high) + plane_broadcast(by_low, 31u32);
    if lane < c.length {
        let value = across + total - to_low + after_low + by_low - inter_low;
        dg[((c.start + lane) * heads + c.head) as usize] = value;
    }
    if lane + 32u32 < c.length {
        let value = across + total - to_high + after_high + by_high - inter_high;
        dg[((c.start + lane + 32u32) * heads + c.head) as usize] = value;
    }
}
