//! Plain accesses to device memory, at a distance from an address that the instruction itself holds, and who one is.

use cubecl::prelude::*;

/// The address of a tensor's first number.
#[cube]
pub fn address_of(x: &[u32]) -> u64 {
    let pointer = x.as_ptr();
    let out: u64;
    gpu_asm!("cvta.to.global.u64 {d}, {p};", d = out(_) out, p = in(_) pointer, options(nomem));
    out + 0u64
}

/// The address of a tensor's first number, computed anew in each call: it is not kept in registers from one to the next.
#[cube]
pub fn address_again<T: CubePrimitive>(x: *const T) -> u64 {
    let out: u64;
    gpu_asm!("cvta.to.global.u64 {d}, {p};", d = out(_) out, p = in(_) x);
    out + 0u64
}

/// The address of the first number of a tensor that is written.
#[cube]
pub fn address_of_mut(x: &mut [u32]) -> u64 {
    let pointer = x.as_mut_ptr();
    let out: u64;
    gpu_asm!("cvta.to.global.u64 {d}, {p};", d = out(_) out, p = in(_) pointer, options(nomem));
    out + 0u64
}

/// Stores a word `offset` bytes after an address.
#[cube]
pub fn store_global(to: u64, #[comptime] offset: usize, word: u32) {
    gpu_asm!("st.global.b32 [{d} + {offset}], {x};", d = in(_) to + 0u64, x = in(_) word + 0u32);
}

/// Loads a word `offset` bytes after an address, which nothing in the kernel writes.
#[cube]
pub fn load_global(from: u64, #[comptime] offset: usize) -> u32 {
    let out: u32;
    gpu_asm!("ld.global.nc.b32 {d}, [{s} + {offset}];", d = out(_) out, s = in(_) from + 0u64, options(nomem));
    out + 0u32
}

/// Loads two words at a multiple of 8 bytes, which nothing in the kernel writes.
#[cube]
pub fn load_global_pair(from: u64) -> Vector<u32, Const<2>> {
    let out: Vector<u32, Const<2>>;
    gpu_asm!("ld.global.nc.v2.b32 {d}, [{s}];", d = out(_) out, s = in(_) from + 0u64, options(nomem));
    out
}

/// Loads four words from device memory, at a multiple of 16 bytes. Nobody may write them while the kernel runs.
#[cube]
pub fn load_global_four(from: u64) -> Vector<u32, Const<4>> {
    let out: Vector<u32, Const<4>>;
    gpu_asm!("ld.global.nc.v4.b32 {d}, [{s}];", d = out(_) out, s = in(_) from + 0u64);
    out
}

/// Asks for the line at an address of device memory to be brought nearer: what loads it soon waits less.
#[cube]
pub fn prefetch(from: u64) {
    gpu_asm!("prefetch.global.L2 [{s}];", s = in(_) from + 0u64);
}

/// Stores four words to device memory, at a multiple of 16 bytes, `offset` bytes after `to`.
#[cube]
pub fn store_global_four(to: u64, #[comptime] offset: usize, first: u32, second: u32, third: u32, fourth: u32) {
    gpu_asm!(
        "st.global.v4.b32 [{d} + {offset}], {{{w}, {x}, {y}, {z}}};",
        d = in(_) to + 0u64, w = in(_) first + 0u32, x = in(_) second + 0u32, y = in(_) third + 0u32, z = in(_) fourth + 0u32
    );
}

/// The unit's number in a cube of one dimension, read anew: what is computed from it is not kept in registers from one call
/// to the next, where a kernel needs them for other things.
#[cube]
pub fn unit_again() -> u32 {
    let out: u32;
    gpu_asm!("mov.u32 {d}, %%tid.x;", d = out(_) out);
    out + 0u32
}
