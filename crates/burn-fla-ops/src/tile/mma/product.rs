//! Products of a warp, `acc += A · B` with 16 rows, 8 columns and a contraction of 16, and the loads of their operands.

use cubecl::prelude::*;

use crate::tile::layout::swizzled;
use crate::tile::registers::{Acc, Frag};

/// A lane's address for [`load`]: of the four 8 × 8 blocks the second is below the first, the other two beside them.
#[cube]
pub fn down_first(tile: u32, lane: u32) -> u32 {
    swizzled(tile, (lane / 8u32) % 2u32 * 8u32 + lane % 8u32, (lane / 16u32) * 16u32)
}

/// A lane's address for [`load`]: of the four 8 × 8 blocks the second is beside the first, the other two below them.
#[cube]
pub fn across_first(tile: u32, lane: u32) -> u32 {
    swizzled(tile, (lane / 16u32) * 8u32 + lane % 8u32, (lane / 8u32) % 2u32 * 16u32)
}

/// Loads 16 × 16 numbers, `offset` bytes after the lanes' addresses, into step `step` of a fragment; every lane of the warp
/// takes part. `transposed`: blocks are transposed.
#[cube]
pub fn load(
    #[comptime] frag: Frag,
    #[comptime] step: usize,
    address: u32,
    #[comptime] offset: usize,
    #[comptime] transposed: bool,
) {
    let list = comptime!(frag.step(step));
    let how = comptime!(if transposed { ".trans" } else { "" });
    gpu_asm!(
        "ldmatrix.sync.aligned.m8n8.x4{how}.shared::cta.b16 {{{list}}}, [{a} + {offset}];",
        a = in(_) address + 0u32
    );
}

/// Adds the product of a left operand and half `half` of a right one to columns `8 · tile` to `8 · tile + 7`.
#[cube]
pub fn multiply(
    #[comptime] acc: Acc,
    #[comptime] tile: usize,
    #[comptime] left: Frag,
    #[comptime] left_step: usize,
    #[comptime] right: Frag,
    #[comptime] right_step: usize,
    #[comptime] half: usize,
) {
    let d = comptime!(acc.tile(tile));
    let a = comptime!(left.step(left_step));
    let b = comptime!(right.half(right_step, half));
    gpu_asm!("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};", options(nomem));
}

/// Transposes an 8 × 8 block of bf16 that a warp holds, two numbers of a row a lane: lane `l` gives columns `2 (l % 4)`
/// and the next of row `l / 4`, and receives the same places of the transposed block.
#[cube]
pub fn transpose(word: u32) -> u32 {
    let out: u32;
    gpu_asm!("movmatrix.sync.aligned.m8n8.trans.b16 {d}, {w};", d = out(_) out, w = in(_) word + 0u32, options(nomem));
    out + 0u32
}
