//! The inverse of a unit lower triangular matrix of 64 × 64, in f32, by the 128 units of a cube.

use cubecl::prelude::*;

use super::roles::sync_warpgroup;
use crate::tile::layout::{load_f32, load_f32_four, store_f32};
use crate::tile::mma::{multiply_split, split};
use crate::tile::registers::{Acc, declare, read, zero};

/// Rows of the matrix.
const ROWS: usize = 64;
/// Numbers from one column of the matrix to the next: four banks more than a column has, so that what a product's registers
/// write spreads over all banks.
pub const TRIANGLE_COLUMN: usize = ROWS + 4;
/// Numbers from one row of the inverse to the next: eight banks more, for the loads of right operands.
pub const TRIANGLE_ROW: usize = ROWS + 8;
/// Rows of the blocks on the diagonal that are solved row by row.
const BLOCK: usize = 16;
/// 16 × 8 numbers, twice.
const PRODUCT: Acc = Acc::new("j", 16);

/// `X = (I + A)⁻¹` of a strictly lower triangular A: the four diagonal blocks of 16 by forward substitution, a warp each,
/// then twice blocks of the double size by `X₂₁ = −X₂₂ (A₂₁ X₁₁)`, on the tensor cores with operands in two parts each.
///
/// `a`: the address of A's columns in shared memory, [`TRIANGLE_COLUMN`] numbers each, zero on and above the diagonal. `x`: that
/// of X's rows, [`TRIANGLE_ROW`] numbers each; what it has above the diagonal is undefined. All 128 units of the cube call it,
/// outside of every branch, and X is there for all of them afterwards.
#[cube]
pub fn invert_triangle(a: u32, x: u32) {
    declare_triangle();
    invert_triangle_by(a, x, UNIT_POS, 0u32);
}

/// What [`invert_triangle_by`] needs: call it once a kernel, outside of every branch and loop.
#[cube]
pub fn declare_triangle() {
    declare(PRODUCT);
}

/// [`invert_triangle`] by four warps of a cube, which meet at the named barrier `id`; `unit` is one's number among them.
#[cube]
pub fn invert_triangle_by(a: u32, x: u32, unit: u32, id: u32) {
    let warp = unit / 32u32;
    let lane = unit % 32u32;
    if lane < comptime!(BLOCK as u32) {
        solve_block(a, x, warp * comptime!(BLOCK as u32), lane);
    }
    sync_warpgroup(id, 128u32);
    // Two pairs of blocks, two warps each.
    join(a, x, warp / 2u32 * 32u32, warp % 2u32 * 8u32, lane, id, 1usize);
    join(a, x, 0u32, warp * 8u32, lane, id, 2usize);
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
        store_f32(x + (row * comptime!(TRIANGLE_ROW as u32) + first + column) * 4u32, own);
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

/// The address of a number of A.
#[cube]
fn of_a(a: u32, row: u32, column: u32) -> u32 {
    a + (column * comptime!(TRIANGLE_COLUMN as u32) + row) * 4u32
}

/// The address of a number of X.
#[cube]
fn of_x(x: u32, row: u32, column: u32) -> u32 {
    x + (row * comptime!(TRIANGLE_ROW as u32) + column) * 4u32
}

/// A number of X where it is not above the diagonal.
#[cube]
fn inside(x: u32, row: u32, column: u32) -> f32 {
    select(column <= row, load_f32(of_x(x, row, column)), 0.0f32)
}

/// The lower left block of two neighbours of `16 · tiles` rows, from row `first` on: this warp computes eight columns, from
/// `column` on, first of `A₂₁ X₁₁`, which goes where X is zero, above the diagonal.
#[cube]
fn join(a: u32, x: u32, first: u32, column: u32, lane: u32, id: u32, #[comptime] tiles: usize) {
    let lower = first + comptime!(16 * tiles as u32);
    let (g, t) = (lane / 4u32, lane % 4u32);
    zero(PRODUCT);
    #[unroll]
    for step in 0..comptime!(2 * tiles) {
        let k = first + t + comptime!(8 * step as u32);
        let right = first + column + g;
        let b = (split(inside(x, k, right)), split(inside(x, k + 4u32, right)));
        #[unroll]
        for tile in 0..tiles {
            let row = lower + g + comptime!(16 * tile as u32);
            let low = (split(load_f32(of_a(a, row, k))), split(load_f32(of_a(a, row + 8u32, k))));
            let high = (split(load_f32(of_a(a, row, k + 4u32))), split(load_f32(of_a(a, row + 8u32, k + 4u32))));
            multiply_split(PRODUCT, tile, (low.0, low.1, high.0, high.1), b);
        }
    }
    #[unroll]
    for tile in 0..tiles {
        #[unroll]
        for i in 0..4usize {
            let row = first + g + comptime!((16 * tile + i / 2 * 8) as u32);
            let to = of_x(x, row, lower + column + 2u32 * t + comptime!((i % 2) as u32));
            store_f32(to, read(PRODUCT, comptime!(4 * tile + i)));
        }
    }
    sync_warpgroup(id, 128u32);
    zero(PRODUCT);
    #[unroll]
    for step in 0..comptime!(2 * tiles) {
        let k = t + comptime!(8 * step as u32);
        let right = lower + column + g;
        let above = (load_f32(of_x(x, first + k, right)), load_f32(of_x(x, first + k + 4u32, right)));
        let b = (split(above.0), split(above.1));
        #[unroll]
        for tile in 0..tiles {
            let row = lower + g + comptime!(16 * tile as u32);
            let low = (split(inside(x, row, lower + k)), split(inside(x, row + 8u32, lower + k)));
            let high = (split(inside(x, row, lower + k + 4u32)), split(inside(x, row + 8u32, lower + k + 4u32)));
            multiply_split(PRODUCT, tile, (low.0, low.1, high.0, high.1), b);
        }
    }
    #[unroll]
    for tile in 0..tiles {
        #[unroll]
        for i in 0..4usize {
            let row = lower + g + comptime!((16 * tile + i / 2 * 8) as u32);
            let to = of_x(x, row, first + column + 2u32 * t + comptime!((i % 2) as u32));
            store_f32(to, -read(PRODUCT, comptime!(4 * tile + i)));
        }
    }
    sync_warpgroup(id, 128u32);
}
