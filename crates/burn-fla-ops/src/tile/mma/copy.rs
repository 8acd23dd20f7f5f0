//! Copies from device memory to shared memory, and plain stores to device memory.

use cubecl::prelude::*;

/// Starts a copy of 16 bytes to `offset` bytes after `to`; the first `bytes` of them come from `from`, the others are
/// zero. All addresses are multiples of 16.
#[cube]
pub fn copy_16(to: u32, #[comptime] offset: usize, from: u64, bytes: u32) {
    gpu_asm!(
        "cp.async.cg.shared.global.L2::128B [{d} + {offset}], [{s}], 16, {n};",
        d = in(_) to + 0u32, s = in(_) from + 0u64, n = in(_) bytes + 0u32
    );
}

/// Closes a group of this unit's copies.
#[cube]
pub fn commit_copies() {
    gpu_asm!("cp.async.commit_group;");
}

/// Waits until all but `pending` groups of this unit's copies have arrived; others see them after a synchronisation.
#[cube]
pub fn wait_copies(#[comptime] pending: u32) {
    gpu_asm!("cp.async.wait_group {pending};");
}

/// Stores two words to device memory, at a multiple of 8 bytes, if `there`.
#[cube]
pub fn store_global_pair(to: u64, first: u32, second: u32, there: bool) {
    gpu_asm!(
        "{{ .reg .pred p; setp.ne.b32 p, {w}, 0; @p st.global.v2.b32 [{d}], {{{x}, {y}}}; }}",
        d = in(_) to + 0u64, x = in(_) first + 0u32, y = in(_) second + 0u32, w = in(_) select(there, 1u32, 0u32)
    );
}
