//! What the loader's warps do while the others walk: one for the tensors, one for the decay's gradient.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

use cubecl::prelude::*;

use super::borders::border_row;
use super::{ACROSS, KEY_SUMS, sums as numbers};
use crate::hopper_walk::gate::{Terms, sum_chunk};
use crate::hopper_walk::parts::{chunk_at, place, place_beside};
use crate::hopper_walk::plan::{ALL_TILES, CHUNK, PANEL, WalkPlan};
use crate::tile::hopper::{Ring, barrier_expect, load_3d};

/// The tiles of each chunk to those of a stage: q, k, v, do and the state before it. One unit.
#[cube]
pub(super) fn load_chunks(
    ring: &Ring,
    tiles: u32,
    maps: (u64, u64, u64, u64, u64),
    table: &[i32],
    work: u32,
    heads: u32,
    #[comptime] plan: WalkPlan,
) {
    let (map_q, map_k, map_v, map_grad, map_borders) = maps;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, plan);
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, plan);
            let token = p.start + chunk * comptime!(CHUNK as u32);
            ring.wait_room(step);
            let full = ring.full(step);
            barrier_expect(full, comptime!((plan.heads * ALL_TILES * PANEL) as u32));
            #[unroll]
            for beside in 0..comptime!(plan.heads as u32) {
                let p = place_beside(index, beside, table, heads, plan);
                let to = tiles
                    + (ring.stage(step) * comptime!(plan.heads as u32) + beside)
                        * comptime!((ALL_TILES * PANEL) as u32);
                load_3d(to, map_q, 0u32, p.outer_head, token, full);
                load_3d(to + comptime!(PANEL as u32), map_k, 0u32, p.outer_head, token, full);
                load_3d(to + comptime!(2 * PANEL as u32), map_v, 0u32, p.inner_head, token, full);
                load_3d(to + comptime!(3 * PANEL as u32), map_grad, 0u32, p.inner_head, token, full);
                let border = border_row(&p, chunk, heads);
                load_3d(to + comptime!(4 * PANEL as u32), map_borders, 0u32, 0u32, border, full);
            }
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}

/// The decay's gradient of each chunk, and with steps `k_t · dk_t`, from what its warpgroup has left in `sums`; one warp.
#[cube]
pub(super) fn sum_gates(
    ring: &Ring,
    sums: &[f32],
    dg: &mut [f32],
    key_sums: &mut [f32],
    table: &[i32],
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
            let first = chunk * comptime!(CHUNK as u32);
            let count = u32::min(p.length - first, comptime!(CHUNK as u32));
            ring.wait_full(step);
            #[unroll]
            for beside in 0..comptime!(plan.heads as u32) {
                let p = place_beside(index, beside, table, heads, plan);
                let at = comptime!(beside as usize * numbers(&plan));
                let mut across = f32::new(0.0);
                #[unroll]
                for warp in 0..4usize {
                    across += sums[comptime!(at + ACROSS + warp)];
                }
                let token = at + lane as usize;
                let low = Terms { after: sums[token], inter: sums[token + 64] };
                let high = Terms { after: sums[token + 32], inter: sums[token + 96] };
                let (low, high) = sum_chunk(&low, &high);
                let to = ((p.start + first + lane) * heads + p.head) as usize;
                if lane < count {
                    dg[to] = across + low;
                }
                if lane + 32u32 < count {
                    dg[to + 32 * heads as usize] = across + high;
                }
                if comptime!(plan.steps.is_some()) {
                    let token = token + KEY_SUMS;
                    if lane < count {
                        key_sums[to] = sums[token];
                    }
                    if lane + 32u32 < count {
                        key_sums[to + 32 * heads as usize] = sums[token + 32];
                    }
                }
            }
            sync_plane();
            if lane == 0u32 {
                ring.release(step);
            }
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}
