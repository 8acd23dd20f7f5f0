//! The walk: one cube takes one segment of one head and 64 or 128 outer channels from chunk to chunk; each of its warps has
//! 16 or 32 rows of the transposed state in registers.
//!
//! The equations are those of [`crate::hopper_walk::walk`]. All products are of transposed outputs: with `S` the
//! transposed state, `oᵀ = S (e^G q)ᵀ + vᵀ Pᵀ` and `S ← e^{G_last} S + (e^{G_last − G} v)ᵀ k`. So the state, rounded, is a
//! left operand as it is in the registers of a warp, for its own channels of the output, and never goes to shared memory;
//! only the scores `P` do, of which each warp computes a part for all.
//!
//! Queries and keys of the next step are loaded during a step; values too, or they are loaded while its scores are
//! computed.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::key::{add_own_values, finish_outputs, scale_states, scales_at, sum_of_state, write_products};
use super::loads::{load_early, load_late, source};
use super::outputs::{add_inputs, output_products, write_outputs};
use super::parts::{
    band_at, outputs_of_chunk, outputs_of_state, scale_outputs, update_state, write_scores, write_sums,
};
use super::plan::{LEFT, MmaPlan, RIGHT, SCORES};
use crate::hopper_walk::bonus::weight_of_row;
use crate::hopper_walk::key::factors_of_span;
use crate::hopper_walk::parts::{chunk_at, parts_of, place, span_at, spans_of};
use crate::hopper_walk::plan::{Borders, CHUNK};
use crate::hopper_walk::products::multiply_rows;
use crate::hopper_walk::shift::Rows;
use crate::hopper_walk::states::{load_state, multiply_border, store_state, write_border};
use crate::hopper_walk::steps::{Sums, decays_of_two};
use crate::ssd::Skip;
use crate::tile::mma::{address_of_mut, commit_copies, declare, declare_fragment, exp2, unit_again, wait_copies};

#[cube(launch_unchecked)]
pub(crate) fn walk(
    q: &[u32],
    k: &[u32],
    v: &[u32],
    x: &[u32],
    factors: &[u32],
    rows: &mut [u32],
    product_rows: &mut [u32],
    product_scales: &mut [f32],
    g: &[f32],
    gates: &[u32],
    vectors: &[f32],
    vector_words: &[u32],
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
    tokens: u32,
    out_scale: f32,
    in_factor: f32,
    last_factor: f32,
    #[comptime] plan: MmaPlan,
) {
    let shape = comptime!(plan.walk);
    let stages = comptime!(shape.stages as u32);
    let bands = comptime!(plan.bands);
    let wide = comptime!(plan.wide() as u32);
    let narrow = comptime!(plan.narrow() as u32);
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!(plan.tile_bytes() / 4), 1024usize);
    let mut decays = Shared::<[f32]>::new_aligned_slice(comptime!(2 * plan.decays()), 128usize);
    let mut own = Shared::<[f32]>::new_aligned_slice(64usize, 128usize);
    let tiles_q = generic_to_shared::<u32>(tiles.as_ptr());
    let tiles_k = tiles_q + comptime!(stages * wide);
    let tiles_v = tiles_k + comptime!(stages * wide);
    // Where the values of a step's own rows begin in its tile.
    let rows_v = tiles_v + comptime!(128 * shape.rows_before() as u32);
    let tile_x = tiles_v + comptime!((plan.value_stages * plan.values()) as u32);
    let tile_f = tile_x + comptime!(shape.dots() as u32 * narrow);
    let tile_p = tile_f + comptime!(shape.factors() as u32 * narrow);
    let shared_g = generic_to_shared::<f32>(decays.as_ptr());
    #[unroll]
    for band in 0..bands {
        declare(comptime!(plan.state(band)));
        declare(comptime!(plan.out(band)));
    }
    declare(SCORES);
    declare_fragment(LEFT);
    declare_fragment(RIGHT);

    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    let p = place(CUBE_POS_X, table, heads, shape);
    #[unroll]
    for band in 0..bands {
        let at = band_at(&p, warp, lane, band, plan);
        let state = comptime!(plan.state(band));
        load_state(initial, between, &p, at.panel, heads, at.row, lane, in_factor, state, shape);
    }
    // The step at hand: its chunk in the order of the walk, its span in it, of how many.
    let mut step = u32::new(0);
    let mut i = u32::new(0);
    let mut n = u32::new(0);
    let mut parts = u32::new(1);
    let mut spans = u32::new(1);
    if p.chunks > 0u32 {
        let chunk = chunk_at(0u32, p.chunks, shape);
        parts = parts_of(levels, &p, chunk, heads, shape);
        spans = spans_of(&p, chunk, parts, shape);
        let span = span_at(&p, chunk, 0u32, parts, spans, shape);
        if comptime!(!shape.by_channel()) {
            if warp == 0u32 {
                let (low, high) = decays_of_two(g, &p, chunk * comptime!(CHUNK as u32) + lane, heads, shape);
                write_sums(&mut decays, 0usize, &Sums::of(low, high, vectors, &p, shape), lane, out_scale, plan);
            }
        } else if parts > 1u32 {
            if warp == 0u32 {
                factors_of_span(vectors, gates, &mut decays, 0usize, &p, chunk, parts, &span, heads, lane, shape);
            }
        }
        if comptime!(shape.owns()) {
            if warp == 0u32 {
                #[unroll]
                for half in 0..2usize {
                    let row = lane + comptime!(32 * half as u32);
                    let weight = weight_of_row(weights, row, &p, &span, heads, shape);
                    decays[comptime!(2 * shape.decay_channels() + 32 * half) + lane as usize] = weight;
                }
            }
        }
        if comptime!(stages > 1) {
            load_early(
                tiles_q,
                tiles_k,
                rows_v,
                shared_g,
                q,
                k,
                v,
                vector_words,
                0u32,
                &p,
                chunk,
                parts,
                &span,
                heads,
                plan,
            );
            commit_copies();
        }
    }
    while i < p.chunks {
        let chunk = chunk_at(i + 0u32, p.chunks, shape);
        let span = span_at(&p, chunk, n + 0u32, parts + 0u32, spans + 0u32, shape);
        let token = p.start + span.start;
        let count = span.count;
        let stage = step % stages;
        let q0 = tiles_q + stage * wide;
        let k0 = tiles_k + stage * wide;
        let v0 = rows_v + (step % comptime!(plan.value_stages as u32)) * comptime!(plan.values() as u32);
        let g0 = ((step % 2u32) * comptime!(plan.decays() as u32)) as usize;
        let g1 = (((step + 1u32) % 2u32) * comptime!(plan.decays() as u32)) as usize;
        // The next step.
        let first_span = n == 0u32;
        let last_span = n + 1u32 == spans;
        let next_i = i + select(last_span, 1u32, 0u32);
        let next_n = select(last_span, 0u32, n + 1u32);
        let follows = next_i < p.chunks;
        let next_chunk = chunk_at(u32::min(next_i, p.chunks - 1u32), p.chunks, shape);
        let mut next_parts = parts + 0u32;
        let mut next_spans = spans + 0u32;
        if comptime!(shape.by_channel()) {
            if last_span && follows {
                next_parts = parts_of(levels, &p, next_chunk, heads, shape);
                next_spans = spans_of(&p, next_chunk, next_parts + 0u32, shape);
            }
        }
        let next_span = span_at(&p, next_chunk, next_n, next_parts + 0u32, next_spans + 0u32, shape);
        // Its log decays by token, which are summed up at the end of this step, or the weights of its tokens' own values.
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        let sums = comptime!(!shape.by_channel()) && warp == 0u32 && follows;
        let mut next_low = f32::new(0.0);
        let mut next_high = f32::new(0.0);
        if sums {
            let (low, high) = decays_of_two(g, &p, next_span.start + lane, heads, shape);
            next_low = low;
            next_high = high;
        }
        let weighs = comptime!(shape.owns()) && warp == 0u32 && follows;
        if weighs {
            next_low = weight_of_row(weights, lane, &p, &next_span, heads, shape);
            next_high = weight_of_row(weights, lane + 32u32, &p, &next_span, heads, shape);
        }
        if comptime!(stages > 1) {
            wait_copies(0u32);
            sync_cube();
            if comptime!(plan.loads_late()) {
                load_late(tile_x, tile_f, v0, v, x, factors, &p, &span, heads, plan);
                commit_copies();
            }
            if follows {
                load_early(
                    tiles_q,
                    tiles_k,
                    rows_v,
                    shared_g,
                    q,
                    k,
                    v,
                    vector_words,
                    step + 1u32,
                    &p,
                    next_chunk,
                    next_parts + 0u32,
                    &next_span,
                    heads,
                    plan,
                );
            }
            commit_copies();
        } else {
            sync_cube();
            load_early(
                tiles_q,
                tiles_k,
                rows_v,
                shared_g,
                q,
                k,
                v,
                vector_words,
                step + 0u32,
                &p,
                chunk,
                parts + 0u32,
                &span,
                heads,
                plan,
            );
            load_late(tile_x, tile_f, v0, v, x, factors, &p, &span, heads, plan);
            commit_copies();
            wait_copies(0u32);
            sync_cube();
        }
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        write_scores(tile_p, q0, k0, &decays, g0, &mut own, warp, lane, out_scale, plan);
        if comptime!(shape.by_channel()) {
            #[unroll]
            for band in 0..bands {
                let at = band_at(&p, warp, lane, band, plan);
                let state = comptime!(plan.state(band));
                if comptime!(shape.roles.borders == Borders::Write) {
                    if last_span {
                        write_border(borders, &p, chunk, at.panel, heads, at.unit, state, shape);
                    }
                }
                if comptime!(shape.roles.borders == Borders::Multiply) {
                    if first_span {
                        multiply_rows(
                            borders,
                            ends,
                            &decays,
                            g0,
                            &p,
                            chunk,
                            at.panel,
                            heads,
                            at.row,
                            lane,
                            at.unit,
                            last_factor,
                            state,
                            shape,
                        );
                    }
                }
            }
            scale_states(&decays, g0, &p, warp, lane, plan);
        }
        #[unroll]
        for half in 0..comptime!(plan.halves()) {
            let unit = unit_again();
            let (warp, lane) = (unit / 32u32, unit % 32u32);
            let group = p.slice * comptime!(plan.warps() as u32) + warp;
            outputs_of_state(q0, lane, half, plan);
            scale_outputs(&decays, g0, lane, out_scale, half, plan);
            if comptime!(half == 0) {
                if comptime!(!shape.by_channel()) {
                    #[unroll]
                    for band in 0..bands {
                        let at = band_at(&p, warp, lane, band, plan);
                        let state = comptime!(plan.state(band));
                        if comptime!(shape.roles.borders == Borders::Write) {
                            write_border(borders, &p, chunk, at.panel, heads, at.unit, state, shape);
                        }
                        if comptime!(shape.roles.borders == Borders::Multiply) {
                            let decay = exp2(decays[g0 + 63]) * last_factor;
                            multiply_border(borders, ends, &p, chunk, at.panel, heads, at.unit, decay, state, shape);
                        }
                    }
                }
                if comptime!(plan.loads_late()) {
                    wait_copies(1u32);
                }
                // Scores are there.
                sync_cube();
            }
            if comptime!(shape.roles.borders == Borders::Multiply) {
                // What the state alone contributes.
                if comptime!(shape.by_channel()) {
                    if first_span {
                        sum_of_state(ends, &p, chunk, heads, tile_x, warp, lane, half, plan);
                    }
                } else {
                    let later = (comptime!(plan.channel_groups() as u32) + group) * tokens + token;
                    output_products(tile_x, dots, later, &p, heads, warp, lane, count, half, plan);
                }
            }
            let unit = unit_again();
            let (warp, lane) = (unit / 32u32, unit % 32u32);
            outputs_of_chunk(tile_p, v0, warp, lane, half, plan);
            if comptime!(shape.dots()) {
                if comptime!(shape.by_channel()) {
                    let stride = heads * comptime!(shape.outer as u32 * 2);
                    let to = source(address_of_mut(product_rows), stride, &p, &span, Rows::Prepared, shape);
                    let at = scales_at(&p, chunk, warp, heads, plan) + span.start % comptime!(CHUNK as u32);
                    write_products(
                        &to,
                        product_scales,
                        at,
                        tile_x,
                        ends,
                        chunk,
                        first_span,
                        &p,
                        heads,
                        warp,
                        lane,
                        half,
                        plan,
                    );
                } else {
                    let at = group * tokens + token;
                    output_products(tile_x, dots, at, &p, heads, warp, lane, count, half, plan);
                }
            }
            if comptime!(shape.factors()) {
                finish_outputs(&own, v0, tile_f, warp, lane, half, plan);
            }
            if comptime!(shape.owns()) {
                let at = g0 + comptime!(2 * shape.decay_channels());
                add_own_values(&decays, at, v0, warp, lane, out_scale, half, plan);
            }
            if comptime!(shape.skip() != Skip::None) {
                add_inputs(weights, &p, v0, warp, lane, half, plan);
            }
            let unit = unit_again();
            let (warp, lane) = (unit / 32u32, unit % 32u32);
            let stride = heads * comptime!(shape.outer as u32 * 2);
            let to = source(address_of_mut(rows), stride, &p, &span, comptime!(shape.out_rows()), shape);
            write_outputs(&to, &p, heads, warp, lane, half, plan);
        }
        let unit = unit_again();
        let (warp, lane) = (unit / 32u32, unit % 32u32);
        update_state(k0, v0, &decays, g0, warp, lane, plan);
        if comptime!(shape.by_channel()) {
            scale_states(&decays, g0 + comptime!(shape.decay_channels()), &p, warp, lane, plan);
            if follows && next_parts > 1u32 && warp == 0u32 {
                factors_of_span(
                    vectors,
                    gates,
                    &mut decays,
                    g1,
                    &p,
                    next_chunk,
                    next_parts + 0u32,
                    &next_span,
                    heads,
                    lane,
                    shape,
                );
            }
        } else if sums {
            let sums = Sums::of(next_low + 0.0f32, next_high + 0.0f32, vectors, &p, shape);
            write_sums(&mut decays, g1, &sums, lane, out_scale, plan);
        }
        if weighs {
            let at = g1 + comptime!(2 * shape.decay_channels()) + lane as usize;
            decays[at] = next_low + 0.0f32;
            decays[at + 32] = next_high + 0.0f32;
        }
        i = next_i;
        n = next_n;
        parts = next_parts + 0u32;
        spans = next_spans + 0u32;
        step += 1u32;
    }
    let unit = unit_again();
    let (warp, lane) = (unit / 32u32, unit % 32u32);
    #[unroll]
    for band in 0..bands {
        let at = band_at(&p, warp, lane, band, plan);
        let state = comptime!(plan.state(band));
        store_state(last, &p, at.panel, heads, at.row, lane, last_factor, state, shape);
    }
}
