//! The states of segments, each from zero: what [`crate::hopper_walk::segments`] does first where a sequence is cut.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::key::scale_states;
use super::loads::{load_inner, load_values};
use super::parts::{band_at, update_state, write_sums};
use super::plan::{LEFT, MmaPlan, RIGHT};
use crate::hopper_walk::key::factors_of_span;
use crate::hopper_walk::parts::{chunk_at, parts_of, place, span_at, spans_of};
use crate::hopper_walk::plan::WalkPlan;
use crate::hopper_walk::states::{load_state, store_end};
use crate::hopper_walk::steps::{Sums, decays_of_two};
use crate::tile::mma::{address_of, commit_copies, declare, declare_fragment, wait_copies};

/// The state at the end of each segment, from the initial one where the walk enters its sequence, from zero elsewhere; and
/// the total decay of each, as a power of two.
#[cube(launch_unchecked)]
pub(crate) fn segment_states(
    k: &[u32],
    v: &[u32],
    g: &[f32],
    gates: &[u32],
    vectors: &[f32],
    levels: &[u32],
    table: &[i32],
    initial: &[f32],
    ends: &mut [f32],
    totals: &mut [f32],
    heads: u32,
    in_factor: f32,
    #[comptime] plan: MmaPlan,
) {
    let shape = comptime!(plan.walk);
    let stages = comptime!(shape.stages as u32);
    let bands = comptime!(plan.bands);
    let wide = comptime!(plan.wide() as u32);
    let narrow = comptime!(plan.values() as u32);
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!((stages * (wide + narrow)) as usize / 4), 1024usize);
    let mut decays = Shared::<[f32]>::new_aligned_slice(comptime!(2 * plan.decays()), 128usize);
    let tiles_k = generic_to_shared::<u32>(tiles.as_ptr());
    let tiles_v = tiles_k + comptime!(stages * wide + 128 * shape.rows_before() as u32);
    #[unroll]
    for band in 0..bands {
        declare(comptime!(plan.state(band)));
    }
    declare_fragment(LEFT);
    declare_fragment(RIGHT);

    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    let p = place(CUBE_POS_X, table, heads, shape);
    #[unroll]
    for band in 0..bands {
        let at = band_at(&p, warp, lane, band, plan);
        // No state of another segment is there yet.
        load_state(
            initial,
            initial,
            &p,
            at.panel,
            heads,
            at.row,
            lane,
            in_factor,
            comptime!(plan.state(band)),
            comptime!(WalkPlan { segmented: false, ..shape }),
        );
    }
    let mut total = f32::new(0.0);
    // By key, of the channels of a lane of the first warp.
    let mut products = Array::<f32>::new(comptime!(shape.decay_channels() / 32));
    #[unroll]
    for c in 0..comptime!(shape.decay_channels() / 32) {
        products[c] = f32::new(1.0);
    }
    let mut step = u32::new(0);
    for i in 0..p.chunks {
        let chunk = chunk_at(i, p.chunks, shape);
        let parts = parts_of(levels, &p, chunk, heads, shape);
        let spans = spans_of(&p, chunk, parts, shape);
        for n in 0..spans {
            let span = span_at(&p, chunk, n, parts, spans, shape);
            let stage = step % stages;
            let tile_k = tiles_k + stage * wide;
            let tile_v = tiles_v + stage * narrow;
            let g0 = (stage * comptime!(plan.decays() as u32)) as usize;
            // What two steps ago read, all have read before the last synchronisation.
            if comptime!(stages == 1) {
                sync_cube();
            }
            load_inner(tile_k, address_of(k), &p, &span, heads, comptime!(shape.key_rows()), plan);
            load_values(tile_v, address_of(v), &p, &span, heads, plan);
            commit_copies();
            if warp == 0u32 {
                if comptime!(shape.by_channel()) {
                    factors_of_span(vectors, gates, &mut decays, g0, &p, chunk, parts, &span, heads, lane, shape);
                    #[unroll]
                    for c in 0..comptime!(shape.decay_channels() / 32) {
                        let at = g0 + lane as usize + comptime!(32 * c);
                        products[c] *= decays[at] * decays[at + comptime!(shape.decay_channels())];
                    }
                } else {
                    let (low, high) = decays_of_two(g, &p, span.start + lane, heads, shape);
                    write_sums(&mut decays, g0, &Sums::of(low, high, vectors, &p, shape), lane, 1.0f32, plan);
                }
            }
            wait_copies(0u32);
            sync_cube();
            if comptime!(shape.by_channel()) {
                scale_states(&decays, g0, &p, warp, lane, plan);
            } else {
                total += decays[g0 + 63];
            }
            update_state(tile_k, tile_v, &decays, g0, warp, lane, plan);
            if comptime!(shape.by_channel()) {
                scale_states(&decays, g0 + comptime!(shape.decay_channels()), &p, warp, lane, plan);
            }
            step += 1u32;
        }
    }
    if p.slice == 0u32 {
        if comptime!(shape.by_channel()) {
            if warp == 0u32 {
                let to = (p.item * heads + p.head) * comptime!(shape.decay_channels() as u32) + lane;
                #[unroll]
                for c in 0..comptime!(shape.decay_channels() / 32) {
                    totals[(to + comptime!(32 * c as u32)) as usize] = products[c];
                }
            }
        } else if UNIT_POS == 0 {
            totals[(p.item * heads + p.head) as usize] = total;
        }
    }
    #[unroll]
    for band in 0..bands {
        let at = band_at(&p, warp, lane, band, plan);
        let state = comptime!(plan.state(band));
        store_end(ends, &p, at.panel, heads, at.row, lane, state, shape);
    }
}
