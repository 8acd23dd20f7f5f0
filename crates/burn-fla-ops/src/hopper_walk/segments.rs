//! What few heads need: the sequence is cut into segments, the state of each is computed from nothing, all at once, and a
//! scan over segments turns these into the states from which they are walked.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::key::{factors_of_span, plain_values, scale_state};
use super::loads::load_tensors;
use super::parts::{add_product, chunk_at, decayed_values, decays_of_chunk, parts_of, place, span_at, spans_of};
use super::plan::{Axis, PANEL, VALUES, WalkPlan};
use super::states::{load_state, store_end};
use super::table::{ITEM_WORDS, SEQUENCE_WORDS};
use crate::tile::hopper::{
    Ring, barrier_arrive, barrier_fence, commit, declare, declare_fragment, exp2, fence, give_registers, next, row_of,
    scale_rows, sync_warpgroup, take_registers, wait, warpgroup,
};

/// The state at the end of each segment, from the initial one where the walk enters its sequence, from zero elsewhere;
/// and the total decay of each, as a power of two (with a decay by channel: of each, as a factor).
#[cube(launch_unchecked)]
pub(super) fn segment_states(
    k: &TensorMap<bf16, Tiled>,
    v: &TensorMap<bf16, Tiled>,
    g: &[f32],
    gates: &[u32],
    vectors: &[f32],
    levels: &[u32],
    table: &[i32],
    initial: &[f32],
    ends: &mut [f32],
    totals: &mut [f32],
    heads: u32,
    items: u32,
    in_factor: f32,
    #[comptime] plan: WalkPlan,
) {
    let warpgroups = comptime!(plan.warpgroups);
    let panels = comptime!(plan.panels());
    let stages = comptime!(plan.stages);
    let state = comptime!(plan.state());
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let narrow = comptime!((plan.warpgroups * PANEL) as u32);
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(stages * panels * PANEL / 4), 1024usize);
    let shared_v = Shared::<[u32]>::new_aligned_slice(comptime!(stages * warpgroups * PANEL / 4), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * plan.decays()), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages));
    let tiles_k = generic_to_shared::<u32>(shared_k.as_ptr());
    let tiles_v = generic_to_shared::<u32>(shared_v.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), comptime!(stages as u32));
    declare(state);
    declare_fragment(VALUES);
    if UNIT_POS == 0 {
        ring.init(33u32, comptime!(warpgroups as u32));
        barrier_fence();
    }
    sync_cube();

    let work = items * heads * comptime!(plan.slices() as u32);
    let warpgroup = warpgroup();
    let warp = (UNIT_POS % 128u32) / 32u32;
    let lane = UNIT_POS % 32u32;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    if warpgroup == comptime!(warpgroups as u32) {
        give_registers(40u32);
        if warp == 0u32 {
            if lane == 0u32 {
                let (map_k, map_v) = (tensor_map_address(k), tensor_map_address(v));
                let tiles = (tiles_k, tiles_k, tiles_v);
                load_tensors(&ring, tiles, (map_k, map_k, map_v), table, levels, work, heads, true, plan);
            }
        } else if warp == 1u32 {
            while index < work {
                let p = place(index, table, heads, plan);
                let mut total = f32::new(0.0);
                let mut products = Array::<f32>::new(comptime!(plan.decay_channels() / 32));
                #[unroll]
                for c in 0..comptime!(plan.decay_channels() / 32) {
                    products[c] = f32::new(1.0);
                }
                for i in 0..p.chunks {
                    let chunk = chunk_at(i, p.chunks, plan);
                    let parts = parts_of(levels, &p, chunk, heads, plan);
                    let spans = spans_of(&p, chunk, parts, plan);
                    // Counted so that it is not unrolled.
                    let mut n = 0u32;
                    while n < spans {
                        ring.wait_room(step);
                        let to = (ring.stage(step) * comptime!(plan.decays() as u32)) as usize;
                        if comptime!(plan.by_channel()) {
                            let span = span_at(&p, chunk, n, parts, spans, plan);
                            factors_of_span(
                                vectors,
                                gates,
                                &mut shared_g,
                                to,
                                &p,
                                chunk,
                                parts,
                                &span,
                                heads,
                                lane,
                                plan,
                            );
                            #[unroll]
                            for c in 0..comptime!(plan.decay_channels() / 32) {
                                let at = to + lane as usize + comptime!(32 * c);
                                products[c] *= shared_g[at] * shared_g[at + comptime!(plan.decay_channels())];
                            }
                        } else {
                            decays_of_chunk(g, vectors, &mut shared_g, to, &p, chunk, heads, lane, plan);
                            sync_plane();
                            total += shared_g[to + 63];
                        }
                        barrier_arrive(ring.full(step));
                        step += 1u32;
                        n = next(n);
                    }
                }
                if comptime!(plan.by_channel()) {
                    let at = (p.item * heads + p.head) * comptime!(plan.decay_channels() as u32) + lane;
                    if p.slice == 0u32 {
                        #[unroll]
                        for c in 0..comptime!(plan.decay_channels() / 32) {
                            totals[(at + comptime!(32 * c as u32)) as usize] = products[c];
                        }
                    }
                } else if lane == 0u32 {
                    totals[(p.item * heads + p.head) as usize] = total;
                }
                index += CUBE_COUNT_X;
            }
        }
    } else {
        take_registers(232u32);
        let elected = UNIT_POS % 128u32 == 0u32;
        let row = row_of(warp, lane, 0usize);
        while index < work {
            let p = place(index, table, heads, plan);
            let panel = p.slice * comptime!(warpgroups as u32) + warpgroup;
            // No state of another segment is there yet.
            load_state(
                initial,
                initial,
                &p,
                panel,
                heads,
                row,
                lane,
                in_factor,
                state,
                comptime!(WalkPlan { segmented: false, ..plan }),
            );
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, plan);
                let parts = parts_of(levels, &p, chunk, heads, plan);
                let spans = spans_of(&p, chunk, parts, plan);
                for n in 0..spans {
                    let count = span_at(&p, chunk, n, parts, spans, plan).count;
                    ring.wait_full(step);
                    let stage = ring.stage(step);
                    let k0 = tiles_k + stage * wide;
                    let v0 = tiles_v + stage * narrow + warpgroup * comptime!(PANEL as u32);
                    let g0 = (stage * comptime!(plan.decays() as u32)) as usize;
                    if comptime!(plan.by_channel()) {
                        plain_values(v0, count, warp, lane);
                        scale_state(&shared_g, g0, panel, row, lane, plan);
                    } else {
                        let g_last = shared_g[g0 + 63];
                        decayed_values(v0, &shared_g, g0, g_last, count, warp, lane, plan);
                        let decay = exp2(g_last);
                        scale_rows(state, decay, decay);
                    }
                    fence();
                    add_product(state, VALUES, k0);
                    commit();
                    wait(0u32);
                    if comptime!(plan.by_channel()) {
                        let after = g0 + comptime!(plan.decay_channels());
                        scale_state(&shared_g, after, panel, row, lane, plan);
                        // The factors are read by all.
                        sync_warpgroup(warpgroup + 1u32, 128u32);
                    }
                    if elected {
                        ring.release(step);
                    }
                    step += 1u32;
                }
            }
            store_end(ends, &p, panel, heads, row, lane, state, plan);
            index += CUBE_COUNT_X;
        }
    }
}

/// `S_i ← e^{total_i} S_{i−1} + S_i` over the segments of each sequence, in the order of the walk: one unit an element of a
/// state `[K, V]`.
#[cube(launch)]
pub(super) fn pass_states(
    states: &mut [f32],
    totals: &[f32],
    table: &[i32],
    heads: u32,
    items: u32,
    count: u32,
    #[comptime] plan: WalkPlan,
) {
    let size = comptime!((plan.inner * plan.outer) as u32);
    let at = ABSOLUTE_POS as u32;
    if at >= count {
        terminate!();
    }
    let element = at % size;
    let head = (at / size) % heads;
    let sequence = at / size / heads;
    let words = (items * comptime!(ITEM_WORDS as u32) + sequence * comptime!(SEQUENCE_WORDS as u32)) as usize;
    let first = table[words] as u32;
    let segments = table[words + 1] as u32;
    let values = comptime!(plan.values() as u32);
    let channel = if comptime!(plan.axis == Axis::Value) { element % values } else { element / values };
    let mut state = f32::new(0.0);
    for i in 0..segments {
        let item = first + if comptime!(plan.roles.against_time) { segments - 1u32 - i } else { i + 0u32 };
        let here = (item * heads + head) as usize;
        let to = here * comptime!(plan.inner * plan.outer) + element as usize;
        let decay = if comptime!(plan.by_channel()) {
            totals[here * comptime!(plan.decay_channels()) + channel as usize]
        } else {
            exp2(totals[here])
        };
        state = decay * state + states[to];
        states[to] = state;
    }
}
