//! What the loader's warps do while the others walk: one for the tensors, one for the decays, one for what outputs are
//! multiplied with.

use cubecl::prelude::*;

use super::bonus::weights_of_span;
use super::key::factors_of_span;
use super::parts::{
    chunk_at, decays_of_chunk, load_panels, load_tile, parts_of, place, place_beside, span_at, spans_of,
};
use super::plan::{Borders, CHUNK, PANEL, WalkPlan};
use super::shift::{Rows, token_at};
use super::states::fetch_border;
use crate::tile::hopper::{Ring, barrier_arrive, barrier_expect, next};

/// Queries, keys and values of each span, to the tiles of a stage; `maps` are theirs. With `for_states`, keys and values
/// alone.
#[cube]
pub(super) fn load_tensors(
    ring: &Ring,
    tiles: (u32, u32, u32),
    maps: (u64, u64, u64),
    table: &[i32],
    levels: &[u32],
    work: u32,
    heads: u32,
    #[comptime] for_states: bool,
    #[comptime] plan: WalkPlan,
) {
    let panels = comptime!(plan.panels());
    let tile = comptime!((plan.panels() * PANEL) as u32);
    let wide = comptime!((plan.heads * plan.panels() * PANEL) as u32);
    let groups = comptime!(plan.groups());
    let value_panel = comptime!(if for_states { PANEL } else { plan.value_panel() });
    let before = comptime!(if for_states { 0 } else { plan.rows_before() as u32 });
    let narrow = comptime!((plan.warpgroups * value_panel) as u32);
    let bytes = comptime!(
        (if for_states { (plan.heads * plan.panels() + plan.warpgroups) * PANEL } else { plan.stage_bytes() }) as u32
    );
    let (tiles_q, tiles_k, tiles_v) = tiles;
    let (map_q, map_k, map_v) = maps;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, plan);
        let channel = p.slice * comptime!(64 * groups as u32);
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, plan);
            let parts = parts_of(levels, &p, chunk, heads, plan);
            let spans = spans_of(&p, chunk, parts, plan);
            // Counted so that it is not unrolled.
            let mut n = 0u32;
            while n < spans {
                let row = p.start + span_at(&p, chunk, n, parts, spans, plan).start;
                let query = token_at(row, &p, plan.query_rows(), plan);
                let key = token_at(row, &p, plan.key_rows(), plan);
                let value = token_at(row, &p, plan.value_rows(), plan) - before;
                ring.wait_room(step);
                let full = ring.full(step);
                let stage = ring.stage(step);
                barrier_expect(full, bytes);
                #[unroll]
                for beside in 0..comptime!(plan.heads as u32) {
                    let p = place_beside(index, beside, table, heads, plan);
                    let to = stage * wide + beside * tile;
                    if comptime!(!for_states) {
                        load_tile(tiles_q + to, map_q, 0u32, p.inner_head, query, full, panels);
                    }
                    load_tile(tiles_k + to, map_k, 0u32, p.inner_head, key, full, panels);
                    let to = tiles_v + stage * narrow + beside * comptime!((groups * value_panel) as u32);
                    load_panels(to, map_v, channel, p.outer_head, value, full, groups, value_panel);
                }
                step += 1u32;
                n = next(n);
            }
        }
        index += CUBE_COUNT_X;
    }
}

/// The decays of each span, or their factors, and the weights of its tokens' own values, to `to`: one warp.
#[cube]
pub(super) fn load_decays(
    ring: &Ring,
    to: &mut [f32],
    g: &[f32],
    gates: &[u32],
    vectors: &[f32],
    weights: &[f32],
    table: &[i32],
    levels: &[u32],
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
            let parts = parts_of(levels, &p, chunk, heads, plan);
            let spans = spans_of(&p, chunk, parts, plan);
            // Counted so that it is not unrolled.
            let mut n = 0u32;
            while n < spans {
                ring.wait_room(step);
                let at = (ring.stage(step) * comptime!(plan.decays() as u32)) as usize;
                if comptime!(plan.by_channel()) {
                    let span = span_at(&p, chunk, n, parts, spans, plan);
                    factors_of_span(vectors, gates, to, at, &p, chunk, parts, &span, heads, lane, plan);
                    if comptime!(plan.owns()) {
                        let at = at + comptime!(2 * plan.decay_channels());
                        weights_of_span(weights, to, at, &p, &span, heads, lane, plan);
                    }
                } else {
                    #[unroll]
                    for beside in 0..comptime!(plan.heads as u32) {
                        let p = place_beside(index, beside, table, heads, plan);
                        let at = at + comptime!(CHUNK * beside as usize);
                        decays_of_chunk(g, vectors, to, at, &p, chunk, heads, lane, plan);
                    }
                }
                barrier_arrive(ring.full(step));
                step += 1u32;
                n = next(n);
            }
        }
        index += CUBE_COUNT_X;
    }
}

/// The factors of each span's outputs, and what they are multiplied with, to the tiles of a ring of one stage. The states that
/// a chunk's are multiplied with are fetched while the chunk before is walked.
#[cube]
pub(super) fn load_factors(
    ring: &Ring,
    tiles: (u32, u32),
    maps: (u64, u64),
    borders: u64,
    table: &[i32],
    levels: &[u32],
    work: u32,
    heads: u32,
    #[comptime] plan: WalkPlan,
) {
    let groups = comptime!(plan.groups());
    let (tiles_f, tiles_x) = tiles;
    let (map_f, map_x) = maps;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, plan);
        let channel = p.slice * comptime!(64 * groups as u32);
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, plan);
            let parts = parts_of(levels, &p, chunk, heads, plan);
            let spans = spans_of(&p, chunk, parts, plan);
            if comptime!(plan.roles.borders == Borders::Multiply) {
                #[unroll]
                for beside in 0..comptime!(plan.heads as u32) {
                    let p = place_beside(index, beside, table, heads, plan);
                    fetch_border(borders, &p, chunk, heads, plan);
                }
            }
            // Counted so that it is not unrolled.
            let mut n = 0u32;
            while n < spans {
                let row = p.start + span_at(&p, chunk, n, parts, spans, plan).start;
                let token = token_at(row, &p, Rows::Prepared, plan);
                let full = ring.full(step);
                ring.wait_room(step);
                barrier_expect(full, comptime!(plan.extra_bytes() as u32));
                #[unroll]
                for beside in 0..comptime!(plan.heads as u32) {
                    let p = place_beside(index, beside, table, heads, plan);
                    let to = beside * comptime!((groups * PANEL) as u32);
                    if comptime!(plan.factors()) {
                        load_tile(tiles_f + to, map_f, channel, p.outer_head, token, full, groups);
                    }
                    if comptime!(plan.beside()) {
                        load_tile(tiles_x + to, map_x, channel, p.outer_head, token, full, groups);
                    }
                }
                step += 1u32;
                n = next(n);
            }
        }
        index += CUBE_COUNT_X;
    }
}
