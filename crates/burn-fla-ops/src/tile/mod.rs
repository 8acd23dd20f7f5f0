//! What kernels on matrix units are written with.
//!
//! [`hopper`] is for NVIDIA GPUs of compute capability 9.0, [`mma`] for those of 8.0 and later. Both keep accumulators and
//! operands in the same registers and tiles. Nothing outside this folder contains PTX.

// For each public function `#[cube]` makes a public module, which cannot be given a comment.
#![allow(missing_docs)]
// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod global;
pub mod hopper;
mod layout;
pub mod mma;
mod registers;
