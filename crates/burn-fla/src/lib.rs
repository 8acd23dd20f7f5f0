//! Linear-attention training on [Burn](https://burn.dev): the storeys of the library under one name, and the command
//! `burn-fla`, which pretrains a model from a TOML recipe, generates text with it and verifies models against expected
//! results.
//!
//! - [`ops`]: differentiable sequence operators, with their kernels;
//! - [`nn`]: modules, layers, models; Hugging Face import and export; generation;
//! - [`train`]: recipe → data → loss → optimiser → checkpoint.
//!
//! A project that needs one storey alone depends on `burn-fla-ops`, `burn-fla-nn` or `burn-fla-train` itself.
//!
//! # Features
//! `flex` (default) runs on the CPU, `cuda` on NVIDIA GPUs, `wgpu` on Vulkan, Metal and DirectX 12. They add up: which
//! device computes is chosen at run time.

pub use burn_fla_nn as nn;
pub use burn_fla_ops as ops;
pub use burn_fla_train as train;

// Only for its symbols, which the linker looks for in a CUDA build without LLVM.
#[cfg(feature = "cuda")]
use burn_fla_llvm_stubs as _;

/// The examples of README.md, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
