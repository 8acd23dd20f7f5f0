//! Products of a warpgroup: `acc (+)= A · B` with A of 64 rows and a contraction of 16 a step.

use cubecl::prelude::*;

use crate::tile::registers::{Acc, Frag};

/// A matrix descriptor: 128-byte swizzle, groups of 8 rows 1024 bytes apart, panels of 64 columns `lead` bytes apart.
#[cube]
fn descriptor(address: u32, #[comptime] lead: u64) -> u64 {
    let start = u64::cast_from((address & 0x3FFFFu32) >> 4u32);
    let fixed = comptime!(((lead >> 4) << 16) | (64u64 << 32) | (1u64 << 62));
    start | fixed
}

/// An operand of a step whose tile is stored with the contraction along its columns: step `step` of 16 columns.
///
/// `rows` is that of the tile's panels. The operand begins at `tile`, a multiple of 1024: a later 64-row block begins
/// `64 · 128` bytes on.
#[cube]
pub fn k_major(tile: u32, #[comptime] rows: usize, #[comptime] step: usize) -> u64 {
    descriptor(tile + comptime!((step / 4 * rows * 128 + step % 4 * 32) as u32), 16u64)
}

/// An operand of a step whose tile is stored with the contraction along its rows: step `step` of 16 rows.
///
/// `rows` is that of the tile's panels: columns from 64 on are in the next panel.
#[cube]
pub fn mn_major(tile: u32, #[comptime] rows: usize, #[comptime] step: usize) -> u64 {
    descriptor(tile + comptime!((step * 2048) as u32), comptime!((rows * 128) as u64))
}

/// Orders what came before (registers written, shared memory fenced) before the products that follow.
#[cube]
pub fn fence() {
    gpu_asm!("wgmma.fence.sync.aligned;");
}

/// Closes a group of products.
#[cube]
pub fn commit() {
    gpu_asm!("wgmma.commit_group.sync.aligned;");
}

/// Waits until at most `pending` groups are in flight.
#[cube]
pub fn wait(#[comptime] pending: u32) {
    gpu_asm!("wgmma.wait_group.sync.aligned {pending};");
}

/// One step with both operands in shared memory; it starts from zero where `keep` is 0.
///
/// `a_rows`, `b_rows`: the operand comes from [`mn_major`], not [`k_major`].
#[cube]
pub fn mma_shared(#[comptime] acc: Acc, a: u64, b: u64, keep: u32, #[comptime] a_rows: bool, #[comptime] b_rows: bool) {
    let list = comptime!(acc.list());
    let n = comptime!(acc.columns());
    let ta = comptime!(a_rows as u32);
    let tb = comptime!(b_rows as u32);
    gpu_asm!(
        "{{ .reg .pred p; setp.ne.b32 p, {s}, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{list}}}, {a}, {b}, p, 1, 1, {ta}, {tb}; }}",
        a = in(_) a + 0u64, b = in(_) b + 0u64, s = in(_) keep + 0u32
    );
}

/// One step with the left operand in registers: step `step` of the fragment.
#[cube]
pub fn mma_registers(
    #[comptime] acc: Acc,
    #[comptime] frag: Frag,
    #[comptime] step: usize,
    b: u64,
    keep: u32,
    #[comptime] b_rows: bool,
) {
    let list = comptime!(acc.list());
    let n = comptime!(acc.columns());
    let left = comptime!(frag.step(step));
    let tb = comptime!(b_rows as u32);
    gpu_asm!(
        "{{ .reg .pred p; setp.ne.b32 p, {s}, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{list}}}, {{{left}}}, {b}, p, 1, 1, {tb}; }}",
        b = in(_) b + 0u64, s = in(_) keep + 0u32
    );
}
