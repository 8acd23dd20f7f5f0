//! Pretraining from a TOML recipe, in the order in which data flows:
//!
//! - [`recipe`]: as typed → resolved, strict, hashed;
//! - [`data`]: documents → tokens, once → windows in a shuffled order with an integer cursor;
//! - [`schedule`], [`optim`]: learning rate, AdamW, clip and guard on the device;
//! - [`checkpoint`]: whole or not there, verified, exact to resume from;
//! - [`metrics`]: JSONL and the terminal.

pub mod checkpoint;
pub mod data;
mod error;
pub mod metrics;
pub mod optim;
pub mod recipe;
pub mod schedule;

pub use error::TrainError;
pub use recipe::Recipe;
