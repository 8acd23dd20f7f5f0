//! Accumulators straight to rows of device memory.

use cubecl::prelude::*;

use super::copy::store_global_pair;
use crate::tile::registers::{Acc, pack_pair, read};

/// Where a unit's part of an accumulator goes: rows of device memory, one eight rows after the other.
#[derive(CubeType, Clone, Copy)]
pub struct RowPair {
    /// The address of column 0 of the first row.
    pub address: u64,
    /// Bytes from it to the second one.
    pub step: u64,
    /// How many columns the rows have from here on, a multiple of 8: none where a row is not there.
    pub first_columns: u32,
    pub second_columns: u32,
}

/// Writes the first columns of an accumulator, rounded to bf16. Every lane of the warp takes part.
///
/// Neighbours exchange words, so that each stores four columns, and four lanes 32 bytes.
#[cube]
pub fn store_rows(#[comptime] acc: Acc, to: &RowPair, lane: u32, #[comptime] columns: usize) {
    let odd = lane % 2u32 == 1u32;
    let column = (lane % 2u32) * 8u32 + (lane % 4u32 / 2u32) * 4u32;
    let own = to.address + u64::cast_from(column * 2u32);
    #[unroll]
    for half in 0..2usize {
        let there = if comptime!(half == 0) { to.first_columns } else { to.second_columns };
        let row = if comptime!(half == 0) { own + 0u64 } else { own + to.step };
        #[unroll]
        for j in 0..comptime!(columns / 16) {
            let low = pack_pair(acc, comptime!(8 * j + 2 * half));
            let high = pack_pair(acc, comptime!(8 * j + 4 + 2 * half));
            let kept = select(odd, high, low);
            let other = plane_shuffle_xor(select(odd, low, high), 1u32);
            let first = select(odd, other, kept);
            let second = select(odd, kept, other);
            let at = column + comptime!(16 * j as u32);
            store_global_pair(row + comptime!(32 * j as u64), first, second, at < there);
        }
    }
}

/// Writes the first columns of an accumulator as f32; with `add` they are added to what is there.
#[cube]
pub fn store_rows_f32(
    #[comptime] acc: Acc,
    to: &RowPair,
    lane: u32,
    #[comptime] columns: usize,
    #[comptime] add: bool,
) {
    let column = (lane % 4u32) * 2u32;
    let own = to.address + u64::cast_from(column * 4u32);
    #[unroll]
    for half in 0..2usize {
        let there = if comptime!(half == 0) { to.first_columns } else { to.second_columns };
        let row = if comptime!(half == 0) { own + 0u64 } else { own + to.step };
        #[unroll]
        for j in 0..comptime!(columns / 8) {
            let address = row + comptime!(32 * j as u64);
            let inside = column + comptime!(8 * j as u32) < there;
            let mut first = read(acc, comptime!(4 * j + 2 * half));
            let mut second = read(acc, comptime!(4 * j + 2 * half + 1));
            if comptime!(add) {
                let found = load_global_pair(address, inside);
                first += found.extract(0usize);
                second += found.extract(1usize);
            }
            store_global_pair(address, u32::reinterpret(first), u32::reinterpret(second), inside);
        }
    }
}

/// Loads two f32 from device memory, at a multiple of 8 bytes, if `there`; else they are any numbers.
#[cube]
fn load_global_pair(from: u64, there: bool) -> Vector<f32, Const<2>> {
    let out: Vector<f32, Const<2>>;
    gpu_asm!(
        "{{ .reg .pred p; setp.ne.b32 p, {w}, 0; @p ld.global.v2.f32 {d}, [{s}]; }}",
        d = out(_) out, s = in(_) from + 0u64, w = in(_) select(there, 1u32, 0u32)
    );
    out
}
