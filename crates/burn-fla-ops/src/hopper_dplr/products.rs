//! Products of 64 rows by four warps, a step of 16 of the contraction each, on the cores that a kernel is made for: of a
//! warpgroup in flight, or of each warp for its own 16 rows at once. Registers and tiles are the same.

use cubecl::prelude::*;

use super::plan::{CHUNK, PANEL};
use crate::hopper_walk::Cores;
use crate::tile::hopper;
use crate::tile::mma::{Acc, Frag, across_first, declare_fragment, down_first, load, multiply, zero};

/// Operands of a warp's products.
const LEFT: Frag = Frag::new("ml", 16);
const RIGHT: Frag = Frag::new("mr", 64);

/// What products of this kernel need: call it once, outside of every branch and loop.
#[cube]
pub(crate) fn declare_operands(#[comptime] cores: Cores) {
    if comptime!(cores == Cores::Mma) {
        declare_fragment(LEFT);
        declare_fragment(RIGHT);
    }
}

/// Before a group of products: registers that they take were written.
#[cube]
pub(crate) fn begin(#[comptime] cores: Cores) {
    if comptime!(cores == Cores::Hopper) {
        hopper::fence();
    }
}

/// Closes a group of products.
#[cube]
pub(crate) fn commit(#[comptime] cores: Cores) {
    if comptime!(cores == Cores::Hopper) {
        hopper::commit();
    }
}

/// Waits until at most `pending` groups are in flight.
#[cube]
pub(crate) fn wait(#[comptime] pending: u32, #[comptime] cores: Cores) {
    if comptime!(cores == Cores::Hopper) {
        hopper::wait(pending);
    }
}

/// Shows what units stored in tiles to the products of others, after a synchronisation.
#[cube]
pub(crate) fn fence_shared(#[comptime] cores: Cores) {
    if comptime!(cores == Cores::Hopper) {
        hopper::fence_shared();
    }
}

/// Step `step` of `acc (+)= X · Y` of two tiles; it starts from zero where `keep` is 0.
///
/// `x_rows`, `y_rows`: the tile's rows are the contraction's, not its columns.
#[cube]
pub(crate) fn product(
    #[comptime] acc: Acc,
    x: u32,
    y: u32,
    #[comptime] step: usize,
    keep: u32,
    #[comptime] x_rows: bool,
    #[comptime] y_rows: bool,
    warp: u32,
    lane: u32,
    #[comptime] cores: Cores,
) {
    if comptime!(cores == Cores::Hopper) {
        let a = if comptime!(x_rows) { hopper::mn_major(x, CHUNK, step) } else { hopper::k_major(x, CHUNK, step) };
        let b = if comptime!(y_rows) { hopper::mn_major(y, CHUNK, step) } else { hopper::k_major(y, CHUNK, step) };
        hopper::mma_shared(acc, a, b, keep, x_rows, y_rows);
    } else {
        if comptime!(x_rows) {
            load(LEFT, 0usize, across_first(x, lane) ^ (warp * 32u32), comptime!(step * 2048), true);
        } else {
            let from = down_first(x, lane) + warp * 2048u32;
            load(LEFT, 0usize, from ^ comptime!((step % 4 * 32) as u32), comptime!(step / 4 * PANEL), false);
        }
        multiply_all(acc, LEFT, 0usize, y, step, keep, y_rows, lane);
    }
}

/// The same with the left operand in registers: step `step` of the fragment.
#[cube]
pub(crate) fn product_of(
    #[comptime] acc: Acc,
    #[comptime] frag: Frag,
    y: u32,
    #[comptime] step: usize,
    keep: u32,
    #[comptime] y_rows: bool,
    lane: u32,
    #[comptime] cores: Cores,
) {
    if comptime!(cores == Cores::Hopper) {
        let b = if comptime!(y_rows) { hopper::mn_major(y, CHUNK, step) } else { hopper::k_major(y, CHUNK, step) };
        hopper::mma_registers(acc, frag, step, b, keep, y_rows);
    } else {
        multiply_all(acc, frag, step, y, step, keep, y_rows, lane);
    }
}

/// A warp's product with all columns of the right operand.
#[cube]
fn multiply_all(
    #[comptime] acc: Acc,
    #[comptime] left: Frag,
    #[comptime] left_step: usize,
    y: u32,
    #[comptime] step: usize,
    keep: u32,
    #[comptime] y_rows: bool,
    lane: u32,
) {
    if comptime!(step == 0) {
        if keep == 0u32 {
            zero(acc);
        }
    }
    let right =
        if comptime!(y_rows) { down_first(y, lane) } else { across_first(y, lane) ^ comptime!((step % 4 * 32) as u32) };
    #[unroll]
    for c in 0..comptime!(acc.columns() / 16) {
        let slot = comptime!(c % 4);
        if comptime!(y_rows) {
            let address = right ^ comptime!((c % 4 * 32) as u32);
            load(RIGHT, slot, address, comptime!(c / 4 * PANEL + step * 2048), true);
        } else {
            load(RIGHT, slot, right, comptime!(step / 4 * PANEL + c * 2048), false);
        }
        multiply(acc, comptime!(2 * c), left, left_step, RIGHT, slot, 0usize);
        multiply(acc, comptime!(2 * c + 1), left, left_step, RIGHT, slot, 1usize);
    }
}
