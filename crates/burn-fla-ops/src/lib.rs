//! Differentiable sequence operators for [Burn](https://burn.dev).
//!
//! Every operator is one folder that reads top to bottom: the recurrence in one equation and the public function
//! (`mod.rs`), two reference forms in plain tensor operations (`reference.rs`), and the CubeCL kernels with their
//! handwritten gradients. A device that CubeCL drives (CUDA, wgpu) runs the kernels; every other device runs the
//! chunked reference, differentiated by Burn. The device of the tensors decides, at run time.
//!
//! Shapes are sequence first: queries and keys `[B, T, H, K]`, values `[B, T, H, V]`, states `[N, H, K, V]`, where `N`
//! is the number of sequences: `B`, or as many as [`CuSeqlens`] packs into one row.

mod arguments;
mod chunked;
mod error;
mod key_decay;
mod options;
mod recurrence;
mod scan;
mod sequences;

pub mod abc;
pub mod adamw;
pub mod attention;
pub mod based;
pub mod bridge;
pub mod cases;
pub mod comba;
pub mod decay_gate;
pub mod delta;
pub mod delta_rule;
#[cfg(feature = "cube")]
mod delta_walk;
pub mod dplr;
pub mod gated_delta_product;
pub mod gated_delta_rule;
pub mod gated_rms_norm;
pub mod gla;
pub mod gsa;
pub mod hgrn;
#[cfg(feature = "cuda")]
mod hopper_delta;
#[cfg(feature = "cuda")]
mod hopper_dplr;
#[cfg(feature = "cuda")]
mod hopper_walk;
pub mod kda;
pub mod l2_norm;
pub mod linear_attn;
pub mod linear_cross_entropy;
#[cfg(feature = "cube")]
mod linear_walk;
pub mod log_gate;
pub mod logcumsumexp;
pub mod matmul;
pub mod mesa_net;
#[cfg(feature = "cuda")]
mod mma_delta;
#[cfg(feature = "cuda")]
mod mma_dplr;
#[cfg(feature = "cuda")]
mod mma_walk;
pub mod nsa;
#[cfg(feature = "cube")]
mod one_step;
pub mod path_attn;
mod polynomial;
pub mod rebased;
pub mod rms_norm;
pub mod rotary;
#[cfg(feature = "cube")]
mod rows;
pub mod running_softmax;
pub mod rwkv6;
pub mod rwkv7;
pub mod selective_scan;
pub mod short_conv;
pub mod simple_gla;
pub mod ssd;
pub mod swiglu;
#[cfg(feature = "cuda")]
pub mod tile;
pub mod token_shift;
pub mod triangular;

// Only for its symbols, which the linker looks for in a CUDA build without LLVM; a program has them from burn-fla.
#[cfg(all(test, feature = "cuda"))]
use burn_fla_llvm_stubs as _;

pub use abc::{AbcOptions, AbcState, abc};
pub use adamw::{AdamWOptions, AdamWSlot, AdamWStep, AdamWUpdated, adamw};
pub use attention::{AttentionOptions, attention};
pub use based::based;
pub use comba::comba;
pub use decay_gate::{DecayGate, decay_gate};
pub use delta::DeltaOptions;
pub use delta_rule::delta_rule;
pub use dplr::dplr;
pub use error::OpError;
pub use gated_delta_product::gated_delta_product;
pub use gated_delta_rule::gated_delta_rule;
pub use gated_rms_norm::{GateActivation, GroupedGatedNorm, gated_rms_norm, grouped_gated_rms_norm};
pub use gla::gla;
pub use gsa::{GsaOptions, GsaState, gsa};
pub use hgrn::hgrn;
pub use kda::kda;
pub use l2_norm::l2_norm;
pub use linear_attn::linear_attn;
pub use linear_cross_entropy::{CrossEntropyOptions, linear_cross_entropy};
pub use log_gate::log_gate;
pub use logcumsumexp::logcumsumexp;
pub use matmul::{Activation, Epilogue, linear, linear_with, linears, linears_with, matmul};
pub use mesa_net::{MesaOptions, MesaState, mesa_net};
pub use nsa::{NsaOptions, nsa};
pub use options::{Engine, ScanOptions, SequenceOptions};
pub use path_attn::{PathOptions, PathState, path_attn};
pub use rebased::rebased;
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rotary::rotary;
pub use running_softmax::running_softmax;
pub use rwkv6::rwkv6;
pub use rwkv7::rwkv7;
pub use selective_scan::{SelectiveScanOptions, selective_scan};
pub use sequences::CuSeqlens;
pub use short_conv::{ShortConvOptions, short_conv};
pub use simple_gla::{ScalarDecay, simple_gla};
pub use ssd::{HeadGroups, SsdOptions, ssd};
pub use swiglu::{swiglu, swiglu_linear};
pub use token_shift::{TokenShiftOptions, token_shift};
