//! Products of bf16 matrices on the tensor cores of NVIDIA GPUs since Ampere (compute capability 8.0), with f32
//! accumulation.
//!
//! The operators, the items of work, split contractions and epilogues are those of [`super::hopper`]; only the kernel is
//! another one. Each warp multiplies 64 × 64 results by `mma.sync` from stages of 64 that all units of a cube fill by
//! asynchronous copies, and writes them straight from its registers.
//!
//! Measured on an H200 over 8192 tokens (`benches/results/69-mma-linear.json`): 337 to 412 TFLOP/s, 1.6 to 1.7 times the time
//! of the kernel for Hopper, where Burn's own product after its autotuning reaches 30 to 114. Tiles of 128 columns, two cubes on
//! a processor, take 0.9 to 1.1 times as long as those of 256 with one. It has run on Hopper GPUs alone; it assembles for
//! compute capability 8.0, 8.6, 8.9 and 12.0.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod kernel;
pub(super) mod plan;

use cubecl::prelude::{CubeCount, CubeDim, SequenceArg, TensorArg};
use cubecl::zspace::{Shape, Strides};

use super::hopper::kernel::SizesLaunch;
use super::hopper::plan::Plan;
use crate::bridge::CubeTensor;
use kernel::ShapesLaunch;
use plan::MmaPlan;

/// What a launch reads and writes beside sizes: see [`kernel::product`].
pub(super) struct Buffers<'a> {
    pub(super) a: Vec<&'a CubeTensor>,
    pub(super) b: Vec<&'a CubeTensor>,
    pub(super) c: Vec<&'a CubeTensor>,
    pub(super) kept: Vec<&'a CubeTensor>,
    pub(super) biases: Vec<&'a CubeTensor>,
    pub(super) residuals: Vec<&'a CubeTensor>,
}

/// Shared memory that a cube may use where `x` is.
pub(super) fn shared(x: &CubeTensor) -> usize {
    x.client.properties().hardware.max_shared_memory_size
}

/// Launches the kernel over `items` items. `depths`: the contraction of each pair of operands; `sizes`: rows and columns of
/// each result.
pub(super) fn launch(
    buffers: Buffers<'_>,
    depths: &[usize],
    sizes: &[[usize; 2]],
    tiles: SizesLaunch,
    items: usize,
    plan: Plan,
) {
    let first = buffers.a[0];
    let plan = MmaPlan::new(plan, shared(first));
    // The kernel asks for the address alone.
    let words = |tensor: &&CubeTensor| -> TensorArg {
        // SAFETY: no more words than the tensor has.
        unsafe { TensorArg::from_raw_parts(tensor.handle.clone(), Strides::new(&[1]), Shape::from([4])) }
    };
    let argument = |tensor: &&CubeTensor| (*tensor).clone().into_tensor_arg();
    let numbers = |numbers: Vec<usize>| -> SequenceArg<u32> { numbers.into_iter().map(|n| n as u32).collect() };
    let stride = |tensor: &&CubeTensor| {
        let [rows, columns] = tensor.meta.shape().dims::<2>();
        if rows == 1 { columns } else { tensor.meta.strides()[0] }
    };
    let shapes = ShapesLaunch::new(
        numbers(depths.to_vec()),
        numbers(buffers.a.iter().map(stride).collect()),
        numbers(buffers.b.iter().map(stride).collect()),
        numbers(sizes.iter().map(|[rows, _]| *rows).collect()),
        numbers(sizes.iter().map(|[_, columns]| *columns).collect()),
    );
    // SAFETY: the kernel holds every access inside of the matrices, whose sizes the callers took from the tensors.
    unsafe {
        kernel::product::launch_unchecked(
            &first.client,
            CubeCount::new_1d(items as u32),
            CubeDim::new_1d(plan.units() as u32),
            buffers.a.iter().map(words).collect(),
            buffers.b.iter().map(words).collect(),
            buffers.c.iter().map(words).collect(),
            buffers.kept.iter().map(words).collect(),
            buffers.biases.iter().map(argument).collect(),
            buffers.residuals.iter().map(argument).collect(),
            tiles,
            shapes,
            plan,
        );
    }
}
