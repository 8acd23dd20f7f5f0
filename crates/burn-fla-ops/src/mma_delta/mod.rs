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
//! - A cube of [`gradients`] has one chunk; the table of kernels is else the same.
//!
//! A cube takes at most 99 KiB of shared memory, so that it runs on GPUs of compute capability 8.6, 8.9 and 12.0.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod chain;
mod gradients;
mod launch;
pub(crate) mod parts;
pub(crate) mod plan;
mod prepare;
