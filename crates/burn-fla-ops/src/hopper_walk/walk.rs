//! The walk: one cube takes one segment of one head and 64 or 128 outer channels from chunk to chunk, with the state in
//! registers.
//!
//! In the words of the forward pass, with `G` the running sum of log decays inside a chunk:
//!
//! ```text
//! o_i = scale (e^{G_i} S q_i + Σ_{j ≤ i} e^{G_i − G_j} (q_i · k_j) v_j)
//! S  ← e^{G_last} S + Σ_j e^{G_last − G_j} v_j k_jᵀ
//! ```
//!
//! and against time the same with `e^{G_last − G_i}` in the row, `e^{G_j}` at the token, and the mask transposed. All
//! exponents that are kept are at most zero; what stands on the other side of the mask is selected away.
//!
//! With a decay by channel the tensors come prepared, and a chunk is walked in spans, whole but where decays are strong: see
//! [`super::prepare`] and [`super::key`].
//!
//! A unit's number is read anew in each part of a chunk, so that addresses are made where they are used: made before the loop
//! they were spilled.
//!
//! One warp loads q, k, v by tensor memory copies, one the decays, one what the outputs are multiplied with; each of the
//! other warpgroups keeps 64 rows of the transposed state. Where a head has no more than these, two warpgroups take a head
//! each, side by side (`plan.heads`).

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::{bf16, f16};

use super::bonus::add_beside;
use super::both::{Target, Tiles, values_of_chunk};
use super::key::{masked_scores, plain_values, scale_state};
use super::loads::{load_decays, load_factors, load_tensors};
use super::parts::{
    add_product, chunk_at, copy_rows, decayed_scores, decayed_values, multiply, parts_of, place_beside, publish,
    row_products, span_at, spans_of,
};
use super::plan::{Borders, CHUNK, DECAYED, OUT, PANEL, SCORES, VALUES, WalkPlan};
use super::products::{multiply_rows, products_of_span, sum_inter, sum_rounding, write_factored};
use super::shift::{Rows, kept_rows, token_at, whole};
use super::states::{border_at, load_state, multiply_border, store_state, write_border};
use super::steps::add_inputs;
use crate::ssd::Skip;
use crate::tile::hopper::{
    Ring, address_of_mut, barrier_fence, commit, commit_stores, declare, declare_fragment, exp2, fence, fence_shared,
    give_registers, next, row_of, scale_rows, store_3d, sync_warpgroup, take_registers, unit_again, wait,
    wait_stores_read, warpgroup,
};

#[cube(launch_unchecked)]
pub(super) fn walk(
    q: &TensorMap<bf16, Tiled>,
    k: &TensorMap<bf16, Tiled>,
    v: &TensorMap<bf16, Tiled>,
    x: &TensorMap<bf16, Tiled>,
    factors: &TensorMap<bf16, Tiled>,
    o: &TensorMap<bf16, Tiled>,
    o_both: &TensorMap<bf16, Tiled>,
    products: &TensorMap<f16, Tiled>,
    rows: &mut [u32],
    rows_both: &mut [u32],
    product_rows: &mut [u32],
    product_scales: &mut [f32],
    g: &[f32],
    gates: &[u32],
    vectors: &[f32],
    levels: &[u32],
    weights: &[f32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    between: &[f32],
    borders: &mut [u32],
    ends: &mut [f32],
    dots: &mut [f32],
    heads: u32,
    items: u32,
    tokens: u32,
    out_scale: f32,
    in_factor: f32,
    last_factor: f32,
    #[comptime] plan: WalkPlan,
) {
    let warpgroups = comptime!(plan.warpgroups);
    let panels = comptime!(plan.panels());
    let stages = comptime!(plan.stages);
    let state = comptime!(plan.state());
    let out = comptime!(plan.out());
    let tile = comptime!((plan.panels() * PANEL) as u32);
    let wide = comptime!((plan.heads * plan.panels() * PANEL) as u32);
    let narrow = comptime!((plan.warpgroups * plan.value_panel()) as u32);
    let shared_q = Shared::<[u32]>::new_aligned_slice(comptime!(stages * plan.heads * panels * PANEL / 4), 1024usize);
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(stages * plan.heads * panels * PANEL / 4), 1024usize);
    let shared_v =
        Shared::<[u32]>::new_aligned_slice(comptime!(stages * warpgroups * plan.value_panel() / 4), 1024usize);
    let shared_s = Shared::<[u32]>::new_aligned_slice(comptime!(warpgroups * panels * PANEL / 4), 1024usize);
    let shared_o = Shared::<[u32]>::new_aligned_slice(comptime!(warpgroups * plan.out_panels() * PANEL / 4), 1024usize);
    let shared_x = Shared::<[u32]>::new_aligned_slice(
        comptime!(usize::max(warpgroups * plan.extra_panels() * PANEL / 4, 32)),
        1024usize,
    );
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * plan.decays()), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages + 2));
    let tiles_q = generic_to_shared::<u32>(shared_q.as_ptr());
    let tiles_k = generic_to_shared::<u32>(shared_k.as_ptr());
    let tiles_v = generic_to_shared::<u32>(shared_v.as_ptr());
    let tiles_s = generic_to_shared::<u32>(shared_s.as_ptr());
    let tiles_o = generic_to_shared::<u32>(shared_o.as_ptr());
    // Factors where there are any, then what the output is multiplied with, then the products.
    let tiles_f = generic_to_shared::<u32>(shared_x.as_ptr());
    let tiles_x = tiles_f + comptime!((plan.factors() as usize * plan.warpgroups * PANEL) as u32);
    let tiles_p = tiles_x + comptime!((plan.warpgroups * PANEL) as u32);
    let barrier = generic_to_shared::<u64>(barriers.as_ptr());
    let ring = Ring::new(barrier, comptime!(stages as u32));
    let ring_x = Ring::new(barrier + comptime!(16 * stages as u32), 1u32);
    declare(state);
    declare(SCORES);
    // Outputs, or products where outputs share the registers of the scores.
    if comptime!(!plan.shares_registers() || (plan.factors() && plan.dots())) {
        declare(OUT);
    }
    declare_fragment(DECAYED);
    declare_fragment(VALUES);
    if UNIT_POS == 0 {
        // The copies' arrival, and that of each unit of the warp that sums decays.
        ring.init(33u32, comptime!(warpgroups as u32));
        ring_x.init(1u32, comptime!(warpgroups as u32));
        barrier_fence();
    }
    sync_cube();

    let work = items * (heads / comptime!(plan.heads as u32)) * comptime!(plan.slices() as u32);
    let warpgroup = warpgroup();
    let warp = (UNIT_POS % 128u32) / 32u32;
    let lane = UNIT_POS % 32u32;
    if warpgroup == comptime!(warpgroups as u32) {
        give_registers(40u32);
        if warp == 0u32 {
            if lane == 0u32 {
                let maps = (tensor_map_address(q), tensor_map_address(k), tensor_map_address(v));
                load_tensors(&ring, (tiles_q, tiles_k, tiles_v), maps, table, levels, work, heads, false, plan);
            }
        } else if warp == 1u32 {
            load_decays(&ring, &mut shared_g, g, gates, vectors, weights, table, levels, work, heads, lane, plan);
        } else if warp == 2u32 {
            if comptime!(plan.extra_panels() > 0) {
                if lane == 0u32 {
                    let maps = (tensor_map_address(factors), tensor_map_address(x));
                    let borders = address_of_mut(borders);
                    load_factors(&ring_x, (tiles_f, tiles_x), maps, borders, table, levels, work, heads, plan);
                }
            }
        }
    } else {
        take_registers(comptime!(plan.registers()));
        let map_o = tensor_map_address(o);
        let map_both = tensor_map_address(o_both);
        let elected = UNIT_POS % 128u32 == 0u32;
        let row = row_of(warp, lane, 0usize);
        let s0 = tiles_s + warpgroup * tile;
        let o0 = tiles_o + warpgroup * comptime!(PANEL as u32);
        let x0 = tiles_x + warpgroup * comptime!(PANEL as u32);
        let f0 = tiles_f + warpgroup * comptime!(PANEL as u32);
        let p0 = tiles_p + warpgroup * comptime!(PANEL as u32);
        let map_p = tensor_map_address(products);
        let id = warpgroup + 1u32;
        let mut step = 0u32;
        let mut index = CUBE_POS_X;
        while index < work {
            let beside = warpgroup / comptime!(plan.groups() as u32);
            let p = place_beside(index, beside, table, heads, plan);
            let panel = p.slice * comptime!(plan.groups() as u32) + warpgroup % comptime!(plan.groups() as u32);
            let channel = panel * 64u32;
            load_state(initial, between, &p, panel, heads, row, lane, in_factor, state, plan);
            for i in 0..p.chunks {
                let chunk = chunk_at(i, p.chunks, plan);
                let parts = parts_of(levels, &p, chunk, heads, plan);
                let spans = spans_of(&p, chunk, parts, plan);
                for n in 0..spans {
                    let span = span_at(&p, chunk, n, parts, spans, plan);
                    let count = span.count;
                    ring.wait_full(step);
                    let unit = unit_again() % 128u32;
                    let (warp, lane) = (unit / 32u32, unit % 32u32);
                    let row = row_of(warp, lane, 0usize);
                    let stage = ring.stage(step);
                    let q0 = tiles_q + stage * wide + beside * tile;
                    let k0 = tiles_k + stage * wide + beside * tile;
                    let v0 = tiles_v
                        + stage * narrow
                        + warpgroup * comptime!(plan.value_panel() as u32)
                        + comptime!(128 * plan.rows_before() as u32);
                    let mut g0 = (stage * comptime!(plan.decays() as u32)) as usize;
                    if comptime!(plan.heads > 1) {
                        g0 += beside as usize * comptime!(CHUNK);
                    }
                    // The scores, while the state goes to shared memory as an operand.
                    fence();
                    multiply(SCORES, q0, k0, panels);
                    commit();
                    if comptime!(plan.by_channel()) {
                        if comptime!(plan.roles.borders == Borders::Write) {
                            if n + 1u32 == spans {
                                write_border(borders, &p, chunk, panel, heads, unit, state, plan);
                            }
                        }
                        if comptime!(plan.roles.borders == Borders::Multiply) {
                            if n == 0u32 {
                                multiply_rows(
                                    borders,
                                    ends,
                                    &shared_g,
                                    g0,
                                    &p,
                                    chunk,
                                    panel,
                                    heads,
                                    row,
                                    lane,
                                    unit,
                                    last_factor,
                                    state,
                                    plan,
                                );
                            }
                        }
                        scale_state(&shared_g, g0, panel, row, lane, plan);
                    }
                    // Where registers are few, descriptors of the state's tile are made here, not before the loop.
                    let s0 = if comptime!(plan.shares_registers()) { next(s0 - 1u32) } else { s0 + 0u32 };
                    publish(s0, state, row, lane);
                    if elected {
                        wait_stores_read(0u32);
                    }
                    fence_shared();
                    sync_warpgroup(id, 128u32);
                    if comptime!(!plan.shares_registers()) {
                        fence();
                        multiply(out, q0, s0, panels);
                        commit();
                    }
                    if comptime!(!plan.by_channel()) {
                        if comptime!(plan.roles.borders == Borders::Write) {
                            write_border(borders, &p, chunk, panel, heads, unit, state, plan);
                        }
                        if comptime!(plan.roles.borders == Borders::Multiply) {
                            let decay = exp2(shared_g[g0 + 63]) * last_factor;
                            multiply_border(borders, ends, &p, chunk, panel, heads, unit, decay, state, plan);
                        }
                    }
                    if comptime!(!plan.shares_registers()) {
                        wait(1u32);
                    } else {
                        wait(0u32);
                    }
                    // Decayed scores, as the left operand of their product with the values.
                    let mut own = (f32::new(0.0), f32::new(0.0));
                    if comptime!(plan.by_channel()) {
                        let at = g0 + comptime!(2 * plan.decay_channels());
                        own = masked_scores(&shared_g, at, row, lane, count, out_scale, plan);
                    } else {
                        decayed_scores(DECAYED, &shared_g, g0, row, lane, count, out_scale, plan);
                    }
                    if comptime!(plan.shares_registers()) {
                        fence();
                        multiply(out, q0, s0, panels);
                        commit();
                    }
                    if comptime!(plan.by_channel()) {
                        plain_values(v0, count, warp, lane);
                        wait(0u32);
                        scale_rows(out, out_scale, out_scale);
                    } else {
                        let at = g0 + comptime!(plan.rows_at()) + row as usize;
                        let g_low = shared_g[at];
                        let g_high = shared_g[at + 8];
                        let g_last = shared_g[g0 + 63];
                        decayed_values(v0, &shared_g, g0, g_last, count, warp, lane, plan);
                        let decay = exp2(g_last);
                        scale_rows(state, decay, decay);
                        wait(0u32);
                        let row_low = if comptime!(plan.roles.against_time) { g_last - g_low } else { g_low + 0.0f32 };
                        let row_high =
                            if comptime!(plan.roles.against_time) { g_last - g_high } else { g_high + 0.0f32 };
                        let e_low = exp2(row_low) * out_scale;
                        let e_high = exp2(row_high) * out_scale;
                        scale_rows(out, e_low, e_high);
                    }
                    let unit = unit_again() % 128u32;
                    let (warp, lane) = (unit / 32u32, unit % 32u32);
                    let row = row_of(warp, lane, 0usize);
                    // Where the first row's output stands, and its products by channel.
                    let token = token_at(p.start + span.start, &p, plan.out_rows(), plan);
                    let prepared = token_at(p.start + span.start, &p, Rows::Prepared, plan);
                    let kept = kept_rows(&p, &span, plan);
                    if comptime!(plan.extra_panels() > 0) {
                        ring_x.wait_full(step);
                    }
                    if comptime!(!plan.by_channel() && plan.roles.borders == Borders::Multiply) {
                        // What the state alone contributes.
                        let later = comptime!(plan.outer_panels() as u32) + panel;
                        row_products(x0, dots, later * tokens + token, p.head, heads, row, lane, count, plan);
                    }
                    if comptime!(plan.by_channel() && plan.roles.borders == Borders::Multiply) {
                        if n == 0u32 {
                            sum_inter(ends, &p, chunk, panel, heads, x0, row, warp, lane, count, plan);
                        }
                    }
                    fence();
                    add_product(out, DECAYED, v0);
                    commit();
                    add_product(state, VALUES, k0);
                    commit();
                    wait(1u32);
                    if comptime!(!plan.by_channel() && plan.dots()) {
                        row_products(x0, dots, panel * tokens + token, p.head, heads, row, lane, count, plan);
                    }
                    if comptime!(plan.owns()) {
                        let at = g0 + comptime!(2 * plan.decay_channels());
                        add_beside(&shared_g, at, v0, row, lane, count, out_scale, plan);
                    }
                    if comptime!(plan.skip() != Skip::None && !plan.both) {
                        add_inputs(weights, p.head, channel, v0, row, lane, plan);
                    }
                    let mut products_scale = f32::new(1.0);
                    if comptime!(plan.factors() && plan.dots()) {
                        // One scale for each warp's tokens, at the first of them.
                        let first = span.start % comptime!(CHUNK as u32) + warp * 16u32;
                        if warp * 16u32 < count {
                            let to = border_at(&p, chunk, panel, heads, plan) * comptime!(CHUNK as u32) + first;
                            products_scale = products_of_span(product_scales, to, x0, row, lane, count, plan);
                        }
                        if comptime!(plan.roles.borders == Borders::Multiply) {
                            if n == 0u32 {
                                let scale = products_scale + 0.0f32;
                                sum_rounding(ends, &p, chunk, panel, heads, scale, row, warp, lane, count, plan);
                            }
                        }
                    }
                    let unit = unit_again() % 128u32;
                    let (warp, lane) = (unit / 32u32, unit % 32u32);
                    let row = row_of(warp, lane, 0usize);
                    if comptime!(plan.factors()) {
                        write_factored(o0, p0, products_scale, f0, v0, own, row, lane, plan);
                    } else {
                        publish(o0, out, row, lane);
                    }
                    fence_shared();
                    sync_warpgroup(id, 128u32);
                    if whole(kept, count) {
                        if elected {
                            store_3d(o0, map_o, channel, p.head, token);
                            if comptime!(plan.factors() && plan.dots()) {
                                store_3d(p0, map_p, channel, p.head, prepared);
                            }
                            commit_stores();
                        }
                    } else {
                        // What stands beside these rows belongs to others. They are read before the warpgroup meets again,
                        // which it does before it writes here.
                        copy_rows(o0, rows, token * heads + p.head, heads, channel, kept, unit, plan);
                        if comptime!(plan.factors() && plan.dots()) {
                            let all = (u32::new(0), count);
                            copy_rows(p0, product_rows, prepared * heads + p.head, heads, channel, all, unit, plan);
                        }
                    }
                    if comptime!(plan.both) {
                        wait(0u32);
                        let tiles = Tiles {
                            keys: x0 + 0u32,
                            queries: v0 + 0u32,
                            grads: k0 + 0u32,
                            state: s0 + 0u32,
                            out: o0 + comptime!((plan.warpgroups * PANEL) as u32),
                        };
                        let (first, end) = kept;
                        let target = Target { token: token + 0u32, first, end, count: count + 0u32 };
                        values_of_chunk(
                            &tiles, map_both, rows_both, &shared_g, g0, weights, &p, &target, heads, row, lane, unit,
                            out_scale, id, elected, plan,
                        );
                    }
                    if comptime!(plan.extra_panels() > 0) {
                        if elected {
                            ring_x.release(step);
                        }
                    }
                    wait(0u32);
                    if comptime!(plan.by_channel()) {
                        let unit = unit_again() % 128u32;
                        let row = row_of(unit / 32u32, unit % 32u32, 0usize);
                        let after = g0 + comptime!(plan.decay_channels());
                        scale_state(&shared_g, after, panel, row, unit % 32u32, plan);
                        // The factors are read by all.
                        sync_warpgroup(id, 128u32);
                    }
                    if elected {
                        ring.release(step);
                    }
                    step += 1u32;
                }
            }
            store_state(last, &p, panel, heads, row, lane, last_factor, state, plan);
            index += CUBE_COUNT_X;
        }
        if elected {
            wait_stores_read(0u32);
        }
    }
}
