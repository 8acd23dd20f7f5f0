//! The engine of the linear recurrences for NVIDIA GPUs since Ampere (compute capability 8.0), in bf16, with a decay by
//! head, by token, or by token and key or value:
//!
//! ```text
//! S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t
//! ```
//!
//! The plan of the work is that of [`crate::hopper_walk`], whose table of segments, preparation, operator and gate kernels
//! it shares: one kernel ([`walk`]) walks a sequence from chunk to chunk, and is the backward pass too, in other roles.
//! Nothing is saved between forward and backward but the inputs: 0 bytes a token. What differs is a chunk's step: products
//! of single warps, with transposed outputs, and copies by all units.
//!
//! A decay by value, the two passes of a slot memory, and heads that share queries and keys are what they are there. Where
//! the state is read before the token ([`crate::hopper_walk::shift`]), a tile's rows that are none are loaded as zeros, and a
//! token's own value is added to its output in f32, from the tile of values read one row later, against time one row before:
//! one row beside the tile, and one `ldmatrix` for every 16 × 16 outputs more.
//!
//! Where few channels decay this engine is the faster one on Hopper too, and is chosen: [`crate::hopper_walk::Cores::suits`].
//!
//! Measured beside the engine for Hopper: `benches/results/69-mma-operators.json`. On its way, on one H200, in milliseconds at
//! 8 × 2048 × 32 × 128 × 128 with a decay by token, forward and with backward, where that engine took 0.17 and 0.92:
//! - 0.319 and 1.441 at first. 0.247 and 1.328 with the outputs of a chunk in two halves (the states of 32 channels are 128
//!   of a unit's 255 registers), all words of the scores before the first is stored, and stores without branches.
//! - 0.207 and 1.140 with the unit's number read anew in each phase: addresses that the compiler computed before the loop
//!   had been spilled, and warps waited for them longer than for anything else (37 % of samples in the walk for dq).
//! - 16 channels a warp and eight warps a cube: 0.289 and 1.663, where 32 and four took 0.258 and 1.328. Cubes of 64
//!   channels: 0.413 and 2.227 with two warps, 0.308 and 1.505 with four, where 0.319 and 1.441 was the best.
//! - One buffer for all tiles: 0.241 and 1.346, where two for queries, keys and values took 0.247 and 1.328. With two cubes
//!   on a processor one loads while the other computes; so a plan with room for two cubes comes first.
//!
//! What is known to be left:
//! - Scores above the diagonal are computed and selected away: 24 of a warp's 64 products for them.
//! - At K = V = 128 the walks against and with time spill 0 to 60 bytes a unit, by key 20 to 124.
//! - Segments load nothing ahead of the step at hand, and compute their states anew for each of the four walks.
//! - It has run on Hopper GPUs alone; its instructions assemble for compute capability 8.0, 8.6, 8.9 and 12.0.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

pub(crate) mod key;
mod launch;
pub(crate) mod loads;
pub(crate) mod outputs;
pub(crate) mod parts;
pub(crate) mod plan;
mod segments;
mod walk;
