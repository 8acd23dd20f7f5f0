//! `rwkv7`, `dplr` and `kda` on the tensor cores of NVIDIA GPUs since Ampere (compute capability 8.0), in bf16.
//!
//! Equations, kernels, tensors between them, table and operator are those of [`crate::hopper_dplr`]: its gradients run as they
//! are, its preparation with products of single warps in the place of a warpgroup's ([`crate::hopper_dplr::products`]: registers
//! and tiles are the same). The chain has every operand of a product where the one before leaves it, in the registers of a warp,
//! as that of [`crate::mma_delta`].
//!
//! Counted for K = V = 64: the same bytes as there, and the same products of 16 × 8 × 16. Head sizes up to 64 fit into 99 KiB of
//! shared memory; gradients of more than 64 key channels need 141 KiB a cube: without them [`crate::delta_walk`] takes these
//! sizes. Long sequences of few heads are cut into the segments of [`crate::hopper_delta::segments`].
//!
//! On an H100, milliseconds of the chain for outputs, for the states, and against time, beside those of the Hopper one: 0.352,
//! 0.320, 0.602 and 0.412, 0.292, 0.580 at rwkv7 8 × 2048 × 32 × 128 × 128.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod chain;
mod launch;
pub(crate) mod plan;
