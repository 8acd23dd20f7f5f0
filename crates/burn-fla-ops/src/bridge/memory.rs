//! Buffers of kernel launches.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::MemoryScope;
use cubecl::ir::ElemType;

static POISON: AtomicBool = AtomicBool::new(false);

/// Fills every output buffer with NaN before its kernel runs, so that a test sees an element that no unit wrote.
#[doc(hidden)]
pub fn poison_outputs(on: bool) {
    POISON.store(on, Ordering::SeqCst);
}

static WATCHED: AtomicBool = AtomicBool::new(false);
static MOST: AtomicU64 = AtomicU64::new(0);

/// The most bytes that buffers held while `run` ran, as the device's pools count them after each buffer that a kernel of
/// ours was given and at the end of each operator. It waits for the queue of launches every time, so nothing should be
/// timed meanwhile; one caller at a time.
#[doc(hidden)]
pub fn most_bytes(run: impl FnOnce()) -> u64 {
    MOST.store(0, Ordering::SeqCst);
    WATCHED.store(true, Ordering::SeqCst);
    run();
    WATCHED.store(false, Ordering::SeqCst);
    MOST.load(Ordering::SeqCst)
}

/// Counts what buffers hold now, where somebody asked.
pub(super) fn count_bytes(like: &CubeTensor) {
    if WATCHED.load(Ordering::Relaxed) {
        MOST.fetch_max(like.client.memory_report(MemoryScope::Device).usage().bytes_in_use, Ordering::SeqCst);
    }
}

/// A contiguous buffer for an output, on the device of `like`. Its contents are undefined.
pub fn alloc<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    let shape = Shape::from(shape);
    if POISON.load(Ordering::Relaxed) {
        // A number of integers would be an index or a count: one that cannot be right.
        let filled = match dtype.is_float() {
            true => CubeBackend::float_full(shape, f32::NAN.into(), &like.device, float(dtype)),
            false => CubeBackend::int_full(shape, i32::MAX.into(), &like.device, dtype.into()),
        };
        return into_contiguous(filled);
    }
    let buffer = empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype);
    count_bytes(like);
    buffer
}

/// A contiguous buffer of zeros, on the device of `like`.
pub fn zeros<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    // Burn pads the rows of what it allocates on CUDA; kernels read no strides.
    into_contiguous(CubeBackend::float_zeros(Shape::from(shape), &like.device, float(dtype)))
}

/// The tensor with its rows one after the other; kernels read no strides.
pub fn contiguous(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// The tensor, contiguous, itself where nobody else holds it, else a copy: kernels may write into it.
pub fn owned(tensor: CubeTensor) -> CubeTensor {
    let tensor = contiguous(tensor);
    if tensor.can_mut() { tensor } else { contiguous(tensor.copy()) }
}

/// CubeCL's name for a dtype.
pub fn storage(dtype: DType) -> ElemType {
    burn::backend::cubecl::dtype_to_storage_type(dtype)
}

fn float(dtype: DType) -> burn::tensor::FloatDType {
    dtype.into()
}
