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

/// A number as the sum of two of eleven bits, as [`multiply_split`] takes them.
#[cube]
pub fn split(x: f32) -> (u32, u32) {
    let high: u32;
    gpu_asm!("cvt.rna.tf32.f32 {d}, {x};", d = out(_) high, x = in(_) x * 1.0f32, options(nomem));
    let rest = x - f32::reinterpret(high + 0u32);
    let low: u32;
    gpu_asm!("cvt.rna.tf32.f32 {d}, {x};", d = out(_) low, x = in(_) rest * 1.0f32, options(nomem));
    (high + 0u32, low + 0u32)
}

/// Adds a product of f32 with 16 rows, 8 columns and a contraction of 8, to 2^-21 of the operands, to columns `8 · tile` to
/// `8 · tile + 7`.
///
/// With `g = lane / 4` and `t = lane % 4` a lane gives rows `g` and `g + 8` at `t` of the contraction, then both at `t + 4`;
/// and of the right operand column `g` at `t` and `t + 4`.
#[cube]
pub fn multiply_split(
    #[comptime] acc: Acc,
    #[comptime] tile: usize,
    a: ((u32, u32), (u32, u32), (u32, u32), (u32, u32)),
    b: ((u32, u32), (u32, u32)),
) {
    let ((h0, l0), (h1, l1), (h2, l2), (h3, l3)) = a;
    let ((m0, n0), (m1, n1)) = b;
    multiply_parts(acc, tile, l0, l1, l2, l3, m0, m1);
    multiply_parts(acc, tile, h0, h1, h2, h3, n0, n1);
    multiply_parts(acc, tile, h0, h1, h2, h3, m0, m1);
}

#[cube]
fn multiply_parts(#[comptime] acc: Acc, #[comptime] tile: usize, a0: u32, a1: u32, a2: u32, a3: u32, b0: u32, b1: u32) {
    let d = comptime!(acc.tile(tile));
    gpu_asm!(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{d}}}, {{{p}, {q}, {r}, {s}}}, {{{u}, {v}}}, {{{d}}};",
        p = in(_) a0 + 0u32, q = in(_) a1 + 0u32, r = in(_) a2 + 0u32, s = in(_) a3 + 0u32,
        u = in(_) b0 + 0u32, v = in(_) b1 + 0u32, options(nomem)
    );
}

/// Transposes an 8 × 8 block of bf16 that a warp holds, two numbers of a row a lane: lane `l` gives columns `2 (l % 4)`
/// and the next of row `l / 4`, and receives the same places of the transposed block.
#[cube]
pub fn transpose(word: u32) -> u32 {
    let out: u32;
    gpu_asm!("movmatrix.sync.aligned.m8n8.trans.b16 {d}, {w};", d = out(_) out, w = in(_) word + 0u32, options(nomem));
    out + 0u32
}
