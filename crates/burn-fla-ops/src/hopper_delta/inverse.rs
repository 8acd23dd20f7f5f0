//! The inverse of a unit lower triangular matrix of 64 × 64, in f32.

use cubecl::prelude::*;

use super::plan::CHUNK;
use crate::tile::hopper::{load_f32, load_f32_four, store_f32};

/// Numbers from one column of the matrix to the next: four banks more than a column has, so that what a product's registers
/// write spreads over all banks.
pub(super) const COLUMN: usize = CHUNK + 4;
/// Rows that are solved together.
const BLOCK: usize = 16;

/// One unit computes column `column` of `X = (I + A)⁻¹` by forward substitution, 16 rows at a time: what earlier rows
/// contribute to a block is summed up first, then its rows follow one after the other.
///
/// `a`: the address of A's columns in shared memory, [`COLUMN`] numbers each, zero on and above the diagonal. `x`: that of
/// X's rows, 64 numbers each; rows above the first of a warp's columns are not written.
#[cube]
pub(super) fn invert_column(a: u32, x: u32, column: u32) {
    let first = column / 32u32 * 2u32;
    for block in first..comptime!((CHUNK / BLOCK) as u32) {
        let rows = block * comptime!(BLOCK as u32);
        let mut sum = Array::<f32>::new(comptime!(BLOCK));
        #[unroll]
        for i in 0..comptime!(BLOCK) {
            sum[i] = f32::new(0.0);
        }
        for j in first * comptime!(BLOCK as u32)..rows {
            let known = load_f32(x + (j * comptime!(CHUNK as u32) + column) * 4u32);
            let from = a + (j * comptime!(COLUMN as u32) + rows) * 4u32;
            #[unroll]
            for part in 0..comptime!(BLOCK / 4) {
                let four = load_f32_four(from + comptime!(16 * part as u32));
                #[unroll]
                for e in 0..4usize {
                    sum[comptime!(4 * part + e)] += four.extract(e) * known;
                }
            }
        }
        #[unroll]
        for i in 0..comptime!(BLOCK) {
            let row = rows + comptime!(i as u32);
            let own = select(row == column, 1.0f32, 0.0f32) - sum[i];
            store_f32(x + (row * comptime!(CHUNK as u32) + column) * 4u32, own);
            let from = a + (row * comptime!(COLUMN as u32) + rows) * 4u32;
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
}
