//! Warpgroups with roles of their own.

use cubecl::prelude::*;

/// The warpgroup of a unit, as the same number for all units of a warp, which the compiler must see: a branch on
/// `UNIT_POS / 128` counts as one inside of a warp, and products of a warpgroup in such a branch are waited for one by one
/// (ptxas says so: C7518). So it was in every walk but those with K = V = 128, whose `setmaxnreg` ptxas accepts; the others it
/// ignores, for want of the register count at entry (C7508), which a second argument of `__launch_bounds__` would give.
#[cube]
pub fn warpgroup() -> u32 {
    plane_broadcast(UNIT_POS / 128u32, 0u32)
}

/// Gives registers of this warpgroup away, down to `count` a unit. The role of a warpgroup must be one branch.
#[cube]
pub fn give_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.dec.sync.aligned.u32 {count};");
}

/// Takes registers that others gave away, up to `count` a unit.
#[cube]
pub fn take_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.inc.sync.aligned.u32 {count};");
}

/// Synchronises `units` units over the named barrier `id` (1 to 15; 0 is the cube's own).
#[cube]
pub fn sync_warpgroup(id: u32, #[comptime] units: u32) {
    gpu_asm!("bar.sync {id}, {units};", id = in(_) id + 0u32);
}

/// Arrives at the named barrier `id` for `units` units without waiting; whole warps call it.
#[cube]
pub fn arrive(id: u32, #[comptime] units: u32) {
    gpu_asm!("bar.arrive {id}, {units};", id = in(_) id + 0u32);
}
