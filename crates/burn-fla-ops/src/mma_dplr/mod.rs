//! `rwkv7`, `dplr` and `kda` on the tensor cores of NVIDIA GPUs since Ampere (compute capability 8.0), in bf16.
//!
//! Equations, kernels, tensors between them, table and operator are those of [`crate::hopper_dplr`]: its preparation runs as
//! it is, with products of single warps in the place of a warpgroup's ([`crate::hopper_dplr::products`]: registers and tiles
//! are the same). The chain has every operand of a product where the one before leaves it, in the registers of a warp, as
//! that of [`crate::mma_delta`]. The gradients take the steps of the Hopper ones, with one chunk a cube: the tokens' vectors
//! take the places of what is needed no more, so that head sizes up to 64 fit into 99 KiB.
//!
//! Counted for K = V = 64: the same bytes as there, and the same products of 16 × 8 × 16. Segments of long sequences of few
//! heads are the Hopper engine's alone, and gradients of more than 64 key channels need 141 KiB a cube: without them
//! [`crate::delta_walk`] takes these sizes. It has not run on a GPU.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod chain;
mod gradients;
mod launch;
pub(crate) mod plan;
