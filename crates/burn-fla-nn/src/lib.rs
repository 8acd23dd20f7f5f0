//! Modules, layers and models of the linear-attention family.

pub mod device;
