//! What a chunk's tokens read from each other, ahead of the walks: M, as [`crate::hopper_delta::prepare`] has it, and the
//! scores `P_ij = scale e^{G_i − G_j} (q_i · k_j)` for `j ≤ i`, which no walk then waits for.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::parts::token_rows;
use super::plan::PREPARE_UNITS;
use crate::hopper_delta::parts::{Decays, strength};
use crate::hopper_delta::plan::SCORES;
use crate::hopper_delta::prepare::solve_chunk;
use crate::hopper_walk::plan::{CHUNK, PANEL};
use crate::hopper_walk::table::CHUNK_WORDS;
use crate::mma_walk::loads::load_tile;
use crate::mma_walk::plan::{LEFT, RIGHT};
use crate::tile::hopper::{TRIANGLE_COLUMN, TRIANGLE_ROW};
use crate::tile::mma::{
    Acc, across_first, address_of, address_of_mut, column_of, commit_copies, declare, declare_fragment, down_first,
    exp2, load, multiply, read, row_of, store_rows, wait_copies, write, zero,
};

/// Products of queries and keys.
const OF_QUERIES: Acc = Acc::new("p", 64);

/// Writes M and P in bf16, `[tokens, HV, 64]` each: a row for each token, over the tokens of its chunk. One cube a chunk and
/// head.
#[cube(launch_unchecked)]
pub(super) fn prepare(
    q: &[u32],
    k: &[u32],
    g: &[f32],
    beta: &[f32],
    table: &[i32],
    inverse: &mut [u32],
    scores: &mut [u32],
    heads: u32,
    groups: u32,
    table_at: u32,
    out_scale: f32,
    #[comptime] keys: usize,
    #[comptime] gated: bool,
) {
    let panels = comptime!(keys.div_ceil(64));
    let units = comptime!(PREPARE_UNITS);
    // The queries; the keys, and once their products are taken the inverse.
    let shared_q = Shared::<[u32]>::new_aligned_slice(comptime!(panels * PANEL / 4), 1024usize);
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(CHUNK * TRIANGLE_ROW), 1024usize);
    let shared_a = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK * TRIANGLE_COLUMN), 128usize);
    let mut decays = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK), 128usize);
    let mut strengths = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK), 128usize);
    let q0 = generic_to_shared::<u32>(shared_q.as_ptr());
    let k0 = generic_to_shared::<u32>(shared_k.as_ptr());
    let a = generic_to_shared::<f32>(shared_a.as_ptr());
    declare(SCORES);
    declare(OF_QUERIES);
    declare_fragment(LEFT);
    declare_fragment(RIGHT);

    let head = CUBE_POS_X % heads;
    let at = (table_at + CUBE_POS_X / heads * comptime!(CHUNK_WORDS as u32)) as usize;
    let start = table[at] as u32;
    let length = table[at + 1] as u32;
    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    load_tile(k0, address_of(k), 0u32, start, head / groups, heads / groups, length, keys, panels, units);
    load_tile(q0, address_of(q), 0u32, start, head / groups, heads / groups, length, keys, panels, units);
    commit_copies();
    if warp == 1u32 {
        let sums = Decays::of(g, start, length, head, heads, lane, gated);
        decays[lane as usize] = sums.low;
        decays[lane as usize + 32] = sums.high;
    }
    if warp == 2u32 {
        strengths[lane as usize] = strength(beta, start, length, lane, head, heads);
        strengths[lane as usize + 32] = strength(beta, start, length, lane + 32u32, head, heads);
    }
    wait_copies(0u32);
    sync_cube();
    zero(SCORES);
    zero(OF_QUERIES);
    let of_keys = down_first(k0, lane) + warp * 2048u32;
    let of_queries = down_first(q0, lane) + warp * 2048u32;
    let right = across_first(k0, lane);
    #[unroll]
    for step in 0..comptime!(keys / 16) {
        let piece = comptime!((step % 4 * 32) as u32);
        let panel = comptime!(step / 4 * PANEL);
        load(LEFT, 0usize, of_keys ^ piece, panel, false);
        load(LEFT, 1usize, of_queries ^ piece, panel, false);
        #[unroll]
        for c in 0..4usize {
            load(RIGHT, c, right ^ piece, comptime!(panel + c * 2048), false);
            #[unroll]
            for half in 0..2usize {
                multiply(SCORES, comptime!(2 * c + half), LEFT, 0usize, RIGHT, c, half);
                multiply(OF_QUERIES, comptime!(2 * c + half), LEFT, 1usize, RIGHT, c, half);
            }
        }
    }
    let row = row_of(warp, lane, 0usize);
    #[unroll]
    for n in 0..32usize {
        let row = row_of(warp, lane, n);
        let column = column_of(lane, n);
        let mut factor = out_scale * 1.0f32;
        if comptime!(gated) {
            factor *= exp2(decays[row as usize] - decays[column as usize]);
        }
        write(OF_QUERIES, n, select(column <= row, read(OF_QUERIES, n) * factor, 0.0f32));
    }
    let rows = token_rows(address_of_mut(scores), start, length, head, heads, row, CHUNK);
    store_rows(OF_QUERIES, &rows, lane, CHUNK);
    solve_chunk(a, k0, &decays, &strengths, inverse, start, length, head, heads, warp, lane, gated);
}
