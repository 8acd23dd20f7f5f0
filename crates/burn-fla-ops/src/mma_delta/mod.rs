//! The engine of the delta rules for NVIDIA GPUs since Ampere (compute capability 8.0), in bf16: `delta_rule` and
//! `gated_delta_rule`.
//!
//! The equations, the plan of the work, the operator and what becomes of products are those of [`crate::hopper_delta`];
//! states, copies and outputs are those of [`crate::mma_walk`]. What differs:
//! - Products are of single warps. A warp has 16 or 32 value channels of the state, and computes everything that they read and
//!   write by itself: nothing between two states leaves its registers.
//! - The scores `P` between the tokens of a chunk do not depend on the state, so [`prepare`] computes them beside M, for all
//!   chunks at once: 128 bytes a token and head more, and no walk waits for them.
//! - What tokens write, rounded, is decayed to the chunk's end and rounded again: registers for both are not there.
//! - In [`gradients`] units of one cube read and write, with a barrier after each slice.
//!
//! A cube fits into 99 KiB of shared memory, so that it runs on GPUs of compute capability 8.6, 8.9 and 12.0; where there is
//! more, it loads ahead. While backward runs, workspaces hold `2 V + 256 + 4 K V / 64` bytes a token and head, W, M, P and the
//! states at the chunks' borders.
//!
//! Measured beside the engine for Hopper: `benches/results/69-mma-operators.json`. On its way, on one H200, in
//! milliseconds at 8 × 2048 × 32 × 128 × 128 with a gate, forward and with backward, where that engine took 0.425 and 1.465:
//! - 0.524 and 2.224 at first, of which (by ncu) M and P took 0.233 twice, the chain with time 0.278, that for W and S 0.269,
//!   against time 0.344, and the other gradients 0.747: eight warps a processor, and nothing is loaded while they multiply.
//! - 0.523 and 2.143 with outputs in quarters of a chunk beside a gate, where states of 32 channels are 128 registers.
//! - With M's triangles joined on the tensor cores, and gradients that leave out what no token reads, 0.487 and 2.324 on an H100,
//!   where the engine for Hopper took 0.394 and 1.680. Gradients by as many cubes as processors, each of which loads its next chunk
//!   ahead, were not built: the launch would ask for fewer cubes.
//!
//! What is known to be left:
//! - At K = V = 128 the chains with 32 channels a warp spill 48 to 280 bytes a unit, of the states: the compiler keeps their
//!   rounded halves in registers. The gradients spill 90 to 130.
//! - With few heads, where long sequences are cut into segments as on Hopper ([`crate::hopper_delta::segments`]), it takes 1.9 times
//!   that engine's time forward and 1.8 times both at 1 × 65536 × 16 × 128 × 128 with a gate, 1.4 times without, on an H200 (on an
//!   H100, of less bandwidth, 1.8, 1.6, 1.3 and 1.2). Eight segments of 16 heads are 128 cubes of 128 channels there, one a
//!   processor, and beside a gate their outputs come in quarters. Twice as many cubes of 64 channels were not tried.
//! - It has run on Hopper GPUs alone; its kernels assemble for compute capability 8.0, 8.6, 8.9 and 12.0.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod chain;
mod gradients;
mod launch;
pub(crate) mod parts;
pub(crate) mod plan;
mod prepare;
