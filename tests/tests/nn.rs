//! Modules, layers, models, import and export, generation, verification.

#[path = "nn/common.rs"]
mod common;
#[path = "nn/cost.rs"]
mod cost;
#[path = "nn/files.rs"]
mod files;
#[path = "nn/forgetting.rs"]
mod forgetting;
#[path = "nn/generation.rs"]
mod generation;
#[path = "nn/golden.rs"]
mod golden;
#[path = "nn/lengths.rs"]
mod lengths;
#[path = "nn/mamba.rs"]
mod mamba;
#[path = "nn/models.rs"]
mod models;
#[path = "nn/norms.rs"]
mod norms;
#[path = "nn/parts.rs"]
mod parts;
#[path = "nn/rwkv.rs"]
mod rwkv;
#[path = "nn/slots.rs"]
mod slots;
