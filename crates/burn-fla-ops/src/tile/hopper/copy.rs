//! Tensor memory copies: a tensor map describes a tensor in device memory, one unit starts the copy of a box of it.
//!
//! What a box has outside of the tensor is read as zero and not written, so edges need no masks of their own.

use burn::tensor::DType;
use cubecl::prelude::*;
use cubecl::zspace::{Shape, Strides};

use crate::bridge::{CubeTensor, contiguous, storage};

/// A map of `tensor`, seen with this shape and these strides (in elements, the last one 1), whose boxes are of `boxed`
/// elements. The last dimension of a box is 128 bytes: the width of the swizzle.
///
/// Strides but the last must be multiples of 16 bytes, and so must the tensor's address.
pub fn panel_map<const D: usize>(
    tensor: &CubeTensor,
    shape: [usize; D],
    strides: [usize; D],
    boxed: [usize; D],
) -> TensorMapArg<Tiled> {
    let width = if tensor.dtype == DType::F32 { 32 } else { 64 };
    debug_assert_eq!(boxed[D - 1], width, "a panel is 128 bytes wide");
    // SAFETY: the callers take shape and strides from the tensor's own.
    let arg = unsafe { TensorArg::from_raw_parts(tensor.handle.clone(), Strides::new(&strides), Shape::from(shape)) };
    TensorMapArg::new(TiledArgs { tile_size: Shape::from(boxed) }, arg, storage(tensor.dtype))
        .with_swizzle(TensorMapSwizzle::B128)
        .with_prefetch(TensorMapPrefetch::B256)
}

/// A tensor of bf16, two a word, or of 32-bit numbers.
pub fn words(x: &CubeTensor) -> BufferArg {
    let count = x.meta.shape().num_elements();
    // SAFETY: as many words as the tensor's numbers are.
    unsafe { BufferArg::from_raw_parts(x.handle.clone(), if x.dtype.size() == 2 { count / 2 } else { count }) }
}

/// A tensor with its rows one after the other, at an address that a tensor map takes.
pub fn readable(x: CubeTensor) -> CubeTensor {
    let x = contiguous(x);
    let aligned = x.handle.offset_start.unwrap_or(0).is_multiple_of(16);
    if aligned { x } else { x.copy() }
}

/// Starts a load of the box at column `x`, row `y` to `to`; it arrives at `barrier`.
#[cube]
pub fn load_2d(to: u32, map: u64, x: u32, y: u32, barrier: u32) {
    gpu_asm!(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], [{m}, {{{x}, {y}}}], [{b}];",
        d = in(_) to + 0u32, m = in(_) map + 0u64, x = in(_) x + 0u32, y = in(_) y + 0u32, b = in(_) barrier + 0u32
    );
}

/// Starts a load of the box at `x`, `y`, `z` (`x` along the last dimension) to `to`; it arrives at `barrier`.
#[cube]
pub fn load_3d(to: u32, map: u64, x: u32, y: u32, z: u32, barrier: u32) {
    gpu_asm!(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], [{m}, {{{x}, {y}, {z}}}], [{b}];",
        d = in(_) to + 0u32, m = in(_) map + 0u64, x = in(_) x + 0u32, y = in(_) y + 0u32, z = in(_) z + 0u32, b = in(_) barrier + 0u32
    );
}

/// Starts bringing `bytes` bytes, a multiple of 16 at such an address, to the L2 cache: plain loads find them there later.
#[cube]
pub fn fetch(from: u64, #[comptime] bytes: usize) {
    gpu_asm!(
        "cp.async.bulk.prefetch.L2.global [{s}], {n};",
        s = in(_) from + 0u64, n = in(_) u32::new(comptime!(bytes as i64))
    );
}

/// Starts a store of the box at `from`. What units wrote there must have been made visible by [`fence_shared`] and a
/// synchronisation of them.
#[cube]
pub fn store_3d(from: u32, map: u64, x: u32, y: u32, z: u32) {
    gpu_asm!(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [{m}, {{{x}, {y}, {z}}}], [{s}];",
        m = in(_) map + 0u64, x = in(_) x + 0u32, y = in(_) y + 0u32, z = in(_) z + 0u32, s = in(_) from + 0u32
    );
}

/// Starts adding the box at `from` to what is there; otherwise [`store_3d`]. Additions of different boxes to the same
/// elements come in no order: where a run is to repeat to the last bit, there may be one alone.
#[cube]
pub fn add_3d(from: u32, map: u64, x: u32, y: u32, z: u32) {
    gpu_asm!(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [{m}, {{{x}, {y}, {z}}}], [{s}];",
        m = in(_) map + 0u64, x = in(_) x + 0u32, y = in(_) y + 0u32, z = in(_) z + 0u32, s = in(_) from + 0u32
    );
}

/// Closes a group of this unit's stores.
#[cube]
pub fn commit_stores() {
    gpu_asm!("cp.async.bulk.commit_group;");
}

/// Waits until all but `pending` groups of this unit's stores have read their shared memory.
#[cube]
pub fn wait_stores_read(#[comptime] pending: u32) {
    gpu_asm!("cp.async.bulk.wait_group.read {pending};");
}

/// Waits until all but `pending` groups of this unit's stores are done.
#[cube]
pub fn wait_stores(#[comptime] pending: u32) {
    gpu_asm!("cp.async.bulk.wait_group {pending};");
}

/// Makes this unit's stores to shared memory visible to copies and products; a synchronisation must follow.
#[cube]
pub fn fence_shared() {
    gpu_asm!("fence.proxy.async.shared::cta;");
}
