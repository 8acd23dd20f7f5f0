//! The gradients of values and of keys in one walk against time, where a head has no more channels than a warpgroup walks.
//!
//! ```text
//! dk_i = scale (e^{G_last − G_i} v_i Zᵀ + Σ_{j ≥ i} e^{G_j − G_i} (v_i · do_j) q_j)
//! dv_i = scale (e^{G_last − G_i} Z k_i  + Σ_{j ≥ i} e^{G_j − G_i} (k_i · q_j) do_j)        Z: [K, V], the gradient of the state
//! ```
//!
//! Both go from the same states, with the same decays, over the same q, k, v and do: as two walks they read 7 tensors and carry
//! Z twice, here 4 are read once. The state in shared memory is an operand along its rows for one and along its columns for
//! the other. Counted with K = V = 64 and in tensors of `B·T·H·K` bf16, a backward pass is 10 in the place of 12. Where the decay
//! has a gradient, one walk makes them all: see [`super::all`].

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

use cubecl::prelude::*;

use super::parts::{Place, add_product, copy_rows, decayed_scores, multiply, publish};
use super::plan::{CHUNK, DECAYED, OUT, SCORES, WalkPlan};
use super::steps::add_inputs;
use crate::ssd::Skip;
use crate::tile::hopper::{
    commit, commit_stores, exp2, fence, fence_shared, k_major, mma_shared, mn_major, scale_rows, store_3d,
    sync_warpgroup, wait,
};

/// Tiles of one chunk: keys, queries, gradients of the outputs, the state, and where the gradient of the values goes.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) keys: u32,
    pub(super) queries: u32,
    pub(super) grads: u32,
    pub(super) state: u32,
    pub(super) out: u32,
}

/// Where the rows of a chunk go: from which token on, which of them, and how many there are.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Target {
    pub(super) token: u32,
    pub(super) first: u32,
    pub(super) end: u32,
    pub(super) count: u32,
}

/// The gradient of a chunk's values, by the warpgroup that has walked its keys. Nothing may be in flight.
#[cube]
pub(super) fn values_of_chunk(
    tiles: &Tiles,
    map: u64,
    rows: &mut [u32],
    g: &[f32],
    g0: usize,
    weights: &[f32],
    place: &Place,
    target: &Target,
    heads: u32,
    row: u32,
    lane: u32,
    unit: u32,
    out_scale: f32,
    id: u32,
    elected: bool,
    #[comptime] plan: WalkPlan,
) {
    fence();
    multiply(SCORES, tiles.keys, tiles.queries, 1usize);
    commit();
    #[unroll]
    for n in 0..4usize {
        let keep = comptime!(n as u32);
        mma_shared(OUT, k_major(tiles.keys, CHUNK, n), mn_major(tiles.state, 64usize, n), keep, false, true);
    }
    commit();
    wait(1u32);
    decayed_scores(DECAYED, g, g0, row, lane, target.count, out_scale, plan);
    let g_last = g[g0 + 63];
    let at = g0 + comptime!(plan.rows_at()) + row as usize;
    let e_low = exp2(g_last - g[at]) * out_scale;
    let e_high = exp2(g_last - g[at + 8]) * out_scale;
    wait(0u32);
    scale_rows(OUT, e_low, e_high);
    fence();
    add_product(OUT, DECAYED, tiles.grads);
    commit();
    wait(0u32);
    if comptime!(plan.skip() != Skip::None) {
        add_inputs(weights, place.head, 0u32, tiles.grads, row, lane, comptime!(plan.turned()));
    }
    publish(tiles.out, OUT, row, lane);
    fence_shared();
    sync_warpgroup(id, 128u32);
    if target.first == 0u32 && target.end == comptime!(CHUNK as u32) {
        if elected {
            store_3d(tiles.out, map, 0u32, place.head, target.token);
            commit_stores();
        }
    } else {
        let kept = (target.first + 0u32, target.end + 0u32);
        // They are read before the warpgroup meets again, which it does before it writes here.
        let first = target.token * heads + place.head;
        copy_rows(tiles.out, rows, first, heads, 0u32, kept, unit, comptime!(plan.turned()));
    }
}
