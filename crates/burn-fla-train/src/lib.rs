//! Pretraining from a TOML recipe, in the order in which data flows:
//!
//! - [`recipe`]: as typed → resolved, strict, hashed;
//! - [`data`]: documents → tokens, once → windows in a shuffled order with an integer cursor;
//! - [`schedule`], [`optim`]: learning rate, AdamW, clip and guard on the device;
//! - [`checkpoint`]: whole or not there, verified, exact to resume from;
//! - [`branch`]: decay runs out of a stable one;
//! - [`plan`]: what a recipe asks for, before anything runs;
//! - [`metrics`]: JSONL and the terminal;
//! - [`trainer`]: the loop.
//!
//! # Example
//! ```no_run
//! use burn_fla_train::{Recipe, Trainer};
//!
//! # fn main() -> Result<(), burn_fla_train::TrainError> {
//! let recipe = Recipe::load("recipes/quickstart.toml".as_ref(), &["training.steps=100".to_string()])?;
//! let summary = Trainer::new(recipe)?.run()?;
//! println!("{} steps, validation {:?} bits per byte", summary.step, summary.bits_per_byte);
//! # Ok(())
//! # }
//! ```

pub mod branch;
pub mod checkpoint;
pub mod data;
mod error;
pub mod metrics;
pub mod optim;
pub mod plan;
pub mod recipe;
pub mod schedule;
pub mod trainer;

pub use error::TrainError;
pub use recipe::Recipe;
pub use trainer::{RunSummary, Trainer};
