//! The inverse of a unit lower triangular matrix of 64 × 64, in f32, by the 128 units of a cube.

use cubecl::prelude::*;

use crate::tile::layout::{load_f32, load_f32_four, store_f32};

/// Rows of the matrix.
const ROWS: usize = 64;
/// Numbers from one column of the matrix to the next: four banks more than a column has, so that what a product's registers
/// write spreads over all banks.
pub const TRIANGLE_COLUMN: usize = ROWS + 4;
/// Rows of the blocks on the diagonal that are solved token by token.
const BLOCK: usize = 16;

/// `X = (I + A)⁻¹` of a strictly lower triangular A: the four diagonal blocks of 16 by forward substitution, a warp each,
/// then twice blocks of the double size by `X₂₁ = −X₂₂ (A₂₁ X₁₁)`.
///
/// `a`: the address of A's columns in shared memory, [`TRIANGLE_COLUMN`] numbers each, zero on and above the diagonal. `x`: that of
/// X's rows, 64 numbers each; what it has above the diagonal is undefined. All 128 units of the cube call it, and X is there
/// for all of them afterwards.
#[cube]
pub fn invert_triangle(a: u32, x: u32) {
    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    if lane < comptime!(BLOCK as u32) {
        solve_block(a, x, warp * comptime!(BLOCK as u32), lane);
    }
    sync_cube();
    // Two pairs of blocks, 64 units each.
    let first = warp / 2u32 * 32u32;
    let unit = UNIT_POS % 64u32;
    join(a, x, first, 16u32, unit / 4u32, unit % 4u32 * 4u32, 1usize);
    join(a, x, 0u32, 32u32, UNIT_POS / 8u32 * 2u32, UNIT_POS % 8u32 * 4u32, 2usize);
}

/// One unit computes a column of a diagonal block's inverse.
#[cube]
fn solve_block(a: u32, x: u32, first: u32, column: u32) {
    let mut sum = Array::<f32>::new(comptime!(BLOCK));
    #[unroll]
    for i in 0..comptime!(BLOCK) {
        sum[i] = f32::new(0.0);
    }
    #[unroll]
    for i in 0..comptime!(BLOCK) {
        let row = first + comptime!(i as u32);
        let own = select(comptime!(i as u32) == column, 1.0f32, 0.0f32) - sum[i];
        store_f32(x + (row * comptime!(ROWS as u32) + first + column) * 4u32, own);
        let from = a + (row * comptime!(TRIANGLE_COLUMN as u32) + first) * 4u32;
        #[unroll]
        for part in comptime!((i + 1) / 4)..comptime!(BLOCK / 4) {
            let four = load_f32_four(from + comptime!(16 * part as u32));
            #[unroll]
            for e in 0..4usize {
                sum[comptime!(4 * part + e)] += four.extract(e) * own;
            }
        }
    }
}

/// The lower left block of two neighbours of `size` rows, from row `first` on: this unit computes four columns from `column`
/// on in `rows` rows from `row` on, first of `A₂₁ X₁₁`, which goes where X is zero, above the diagonal.
#[cube]
fn join(a: u32, x: u32, first: u32, size: u32, row: u32, column: u32, #[comptime] rows: usize) {
    let lower = first + size;
    let mut sum = Array::<f32>::new(comptime!(4 * rows));
    #[unroll]
    for i in 0..comptime!(4 * rows) {
        sum[i] = f32::new(0.0);
    }
    // A has columns one after the other.
    for k in 0..size {
        let left = a + ((first + k) * comptime!(TRIANGLE_COLUMN as u32) + lower + row) * 4u32;
        let right = load_f32_four(x + ((first + k) * comptime!(ROWS as u32) + first + column) * 4u32);
        #[unroll]
        for i in 0..rows {
            let factor = load_f32(left + comptime!(4 * i as u32));
            #[unroll]
            for e in 0..4usize {
                // X₁₁ is only there up to its diagonal.
                let own = select(column + comptime!(e as u32) <= k, right.extract(e), 0.0f32);
                sum[comptime!(4 * i + e)] += factor * own;
            }
        }
    }
    sync_cube();
    #[unroll]
    for i in 0..rows {
        let to = x + ((first + row + comptime!(i as u32)) * comptime!(ROWS as u32) + lower + column) * 4u32;
        #[unroll]
        for e in 0..4usize {
            store_f32(to + comptime!(4 * e as u32), sum[comptime!(4 * i + e)]);
            sum[comptime!(4 * i + e)] = f32::new(0.0);
        }
    }
    sync_cube();
    for k in 0..size {
        let left = x + ((lower + row) * comptime!(ROWS as u32) + lower + k) * 4u32;
        let right = load_f32_four(x + ((first + k) * comptime!(ROWS as u32) + lower + column) * 4u32);
        #[unroll]
        for i in 0..rows {
            let found = load_f32(left + comptime!((4 * ROWS * i) as u32));
            let factor = select(k <= row + comptime!(i as u32), found, 0.0f32);
            #[unroll]
            for e in 0..4usize {
                sum[comptime!(4 * i + e)] += factor * right.extract(e);
            }
        }
    }
    #[unroll]
    for i in 0..rows {
        let to = x + ((lower + row + comptime!(i as u32)) * comptime!(ROWS as u32) + first + column) * 4u32;
        #[unroll]
        for e in 0..4usize {
            store_f32(to + comptime!(4 * e as u32), -sum[comptime!(4 * i + e)]);
        }
    }
    sync_cube();
}
