//! The engine of the linear recurrences for NVIDIA GPUs since Ampere (compute capability 8.0), in bf16, with a decay by
//! head, by token, or by token and key:
//!
//! ```text
//! S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t
//! ```
//!
//! The plan of the work is that of [`crate::hopper_walk`], whose table of segments, preparation, operator and gate kernels
//! it shares: one kernel ([`walk`]) walks a sequence from chunk to chunk, and is the backward pass too, in other roles.
//! Nothing is saved between forward and backward but the inputs: 0 bytes a token. What differs is a chunk's step: products
//! of single warps, with transposed outputs, and copies by all units.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod key;
mod launch;
mod loads;
mod outputs;
mod parts;
pub(crate) mod plan;
mod segments;
mod walk;
