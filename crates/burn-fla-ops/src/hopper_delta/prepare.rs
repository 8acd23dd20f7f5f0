//! What a chunk's tokens read from each other, solved ahead of the walks.
//!
//! ```text
//! A_ij = β_i e^{G_i − G_j} (k_i · k_j) for j < i, else 0           M = (I + A)⁻¹ diag(β)
//! ```
//!
//! With it the values that the tokens of a chunk write are `M (v − e^G ∘ K S)`. M does not depend on the state, so all chunks
//! are solved at once.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::parts::{Decays, strength};
use super::plan::{CHUNK, PANEL, SCORES};
use crate::hopper_walk::parts::load_tile;
use crate::hopper_walk::table::CHUNK_WORDS;
use crate::tile::hopper::{
    TRIANGLE_COLUMN, TRIANGLE_ROW, barrier_expect, barrier_fence, barrier_init, barrier_wait, column_of, commit,
    declare, exp2, fence, invert_triangle, k_major, load_f32, mma_shared, pack_word, read, row_of, store_f32, wait,
};

/// Writes M in bf16, `[tokens, HV, 64]`: a row for each token, over the tokens of its chunk. One cube a chunk and head.
#[cube(launch_unchecked)]
pub(super) fn prepare(
    k: &TensorMap<bf16, Tiled>,
    g: &[f32],
    beta: &[f32],
    table: &[i32],
    inverse: &mut [u32],
    heads: u32,
    groups: u32,
    table_at: u32,
    #[comptime] panels: usize,
    #[comptime] gated: bool,
) {
    // The keys, and once their products are taken the inverse.
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(CHUNK * TRIANGLE_ROW), 1024usize);
    let shared_a = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK * TRIANGLE_COLUMN), 128usize);
    let mut decays = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK), 128usize);
    let mut strengths = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK), 128usize);
    let barriers = Shared::<[u64]>::new_slice(1usize);
    let k0 = generic_to_shared::<u32>(shared_k.as_ptr());
    let a = generic_to_shared::<f32>(shared_a.as_ptr());
    let x = k0 + 0u32;
    let barrier = generic_to_shared::<u64>(barriers.as_ptr());
    declare(SCORES);

    let head = CUBE_POS_X % heads;
    let at = (table_at + CUBE_POS_X / heads * comptime!(CHUNK_WORDS as u32)) as usize;
    let start = table[at] as u32;
    let length = table[at + 1] as u32;
    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    if UNIT_POS == 0 {
        barrier_init(barrier, 1u32);
        barrier_fence();
        barrier_expect(barrier, comptime!((panels * PANEL) as u32));
        load_tile(k0, tensor_map_address(k), 0u32, head / groups, start, barrier, panels);
    }
    if warp == 1u32 {
        let sums = Decays::of(g, start, length, head, heads, lane, gated);
        decays[lane as usize] = sums.low;
        decays[lane as usize + 32] = sums.high;
    }
    if warp == 2u32 {
        strengths[lane as usize] = strength(beta, start, length, lane, head, heads);
        strengths[lane as usize + 32] = strength(beta, start, length, lane + 32u32, head, heads);
    }
    sync_cube();
    barrier_wait(barrier, 0u32);
    fence();
    #[unroll]
    for n in 0..comptime!(4 * panels) {
        let keep = comptime!(n as u32);
        mma_shared(SCORES, k_major(k0, CHUNK, n), k_major(k0, CHUNK, n), keep, false, false);
    }
    commit();
    wait(0u32);
    solve_chunk(a, x, &decays, &strengths, inverse, start, length, head, heads, warp, lane, gated);
}

/// From the products of a chunk's keys, in [`SCORES`], to its rows of M. `a` and `x` are as in [`invert_triangle`]; the keys
/// may stand where `x` is. All 128 units of the cube call it.
#[cube]
pub(crate) fn solve_chunk(
    a: u32,
    x: u32,
    decays: &[f32],
    strengths: &[f32],
    inverse: &mut [u32],
    start: u32,
    length: u32,
    head: u32,
    heads: u32,
    warp: u32,
    lane: u32,
    #[comptime] gated: bool,
) {
    // All loads before the first store: whatever waits for the one would wait for the other.
    let mut values = Array::<f32>::new(32usize);
    let row = row_of(warp, lane, 0usize);
    let own = (decays[row as usize], decays[row as usize + 8]);
    let write = (strengths[row as usize], strengths[row as usize + 8]);
    #[unroll]
    for j in 0..8usize {
        #[unroll]
        for e in 0..2usize {
            let source = column_of(lane, comptime!(4 * j + e));
            let n = comptime!(4 * j + e);
            let mut low = write.0 * read(SCORES, n);
            let mut high = write.1 * read(SCORES, comptime!(n + 2));
            if comptime!(gated) {
                let of_source = decays[source as usize];
                low *= exp2(own.0 - of_source);
                high *= exp2(own.1 - of_source);
            }
            values[n] = select(source < row && row < length, low, 0.0f32);
            values[comptime!(n + 2)] = select(source < row + 8u32 && row + 8u32 < length, high, 0.0f32);
        }
    }
    #[unroll]
    for n in 0..32usize {
        let to = column_of(lane, n) * comptime!(TRIANGLE_COLUMN as u32) + row_of(warp, lane, n);
        store_f32(a + to * 4u32, values[n]);
    }
    sync_cube();
    invert_triangle(a, x);
    let column = 2u32 * lane;
    let first = strengths[column as usize];
    let second = strengths[column as usize + 1];
    #[unroll]
    for n in 0..16usize {
        let row = warp + comptime!(4 * n as u32);
        let from = x + (row * comptime!(TRIANGLE_ROW as u32) + column) * 4u32;
        // Above the diagonal nothing was written.
        let low = select(column <= row, load_f32(from) * first, 0.0f32);
        let high = select(column < row, load_f32(from + 4u32) * second, 0.0f32);
        if row < length {
            let to = ((start + row) * heads + head) * comptime!(CHUNK as u32 / 2) + lane;
            inverse[to as usize] = pack_word(low, high);
        }
    }
}
