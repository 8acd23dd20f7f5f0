//! The warp that stores: what others have written to shared memory goes to memory, while they go on.

use cubecl::prelude::*;

use super::chain::{Area, release_warp};
use super::parts::copy_rows;
use super::place::{chunk_at, place};
use super::plan::{CHUNK, ChainPlan, PANEL};
use crate::tile::hopper::{commit_stores, store_3d, wait_stores_read};

/// Takes the same steps as the walk.
#[cube]
pub(super) fn run(
    area: &Area,
    table: &[i32],
    rows: &mut [u32],
    maps: (u64, u64),
    work: u32,
    heads: u32,
    lane: u32,
    #[comptime] plan: ChainPlan,
) {
    let (map_o, map_s) = maps;
    let stride = heads * comptime!(plan.values as u32 / 2);
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, comptime!(plan.slices()));
        for i in 0..p.chunks {
            let chunk = chunk_at(i, p.chunks, comptime!(plan.against_time()));
            let token = p.start + chunk * comptime!(CHUNK as u32);
            let count = u32::min(p.length - chunk * comptime!(CHUNK as u32), comptime!(CHUNK as u32));
            let whole = count == comptime!(CHUNK as u32);
            area.stores.wait_full(step);
            #[unroll]
            for warpgroup in 0..comptime!(plan.warpgroups) {
                let t = area.at(step, comptime!(warpgroup as u32), plan);
                let panel = p.slice * comptime!(plan.warpgroups as u32) + comptime!(warpgroup as u32);
                let channel = panel * 64u32;
                if lane == 0u32 {
                    if whole {
                        store_3d(t.o, map_o, channel, p.head, token);
                    }
                    if comptime!(plan.with_borders()) {
                        let border = (p.border + chunk) * heads + p.head;
                        #[unroll]
                        for n in 0..comptime!(plan.panels()) {
                            let from = t.s + comptime!((n * PANEL) as u32);
                            store_3d(from, map_s, comptime!(64 * n as u32), channel, border);
                        }
                    }
                }
                if !whole {
                    // What follows the last token belongs to others.
                    let first = (token * heads + p.head) * comptime!(plan.values as u32 / 2);
                    for part in 0..4u32 {
                        let unit = 32u32 * part + lane;
                        copy_rows(t.o, rows, first, stride, channel, comptime!(plan.values as u32), count, unit);
                    }
                }
            }
            if lane == 0u32 {
                commit_stores();
                wait_stores_read(0u32);
            }
            release_warp(&area.stores, step, lane);
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}
