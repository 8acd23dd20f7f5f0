//! What kernels on matrix units are written with.
//!
//! [`hopper`] is for NVIDIA GPUs of compute capability 9.0. Nothing outside this folder contains PTX.

pub mod hopper;
