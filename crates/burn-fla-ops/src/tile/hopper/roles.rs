//! Warpgroups with roles of their own.

use cubecl::prelude::*;

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
