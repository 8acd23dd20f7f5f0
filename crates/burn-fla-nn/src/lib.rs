//! Modules, layers and language models of the linear-attention family for Burn.
//!
//! - [`modules`]: the small parts, from [`modules::Linear`] to [`modules::cross_entropy`];
//! - [`layers`]: one file per token mixer, each running a whole sequence or continuing from a state;
//! - [`models`]: the Hugging Face `config.json`, one [`models::Block`], one [`CausalLm`] for every architecture and
//!   hybrid, and the [`models::registry`];
//! - [`hub`]: import from and export to a Hugging Face folder;
//! - [`generate`](mod@generate), [`tokenizer`]: text out of a model;
//! - [`device`]: from the name of a backend to a device that answers;
//! - `learner`: burn-train's steps on a model (feature `learner`);
//! - [`verify`]: a folder of expected results, checked number by number.
//!
//! Parameters are always f32; [`Compute`] says in which type activations are kept and which operators run.
//!
//! # Example
//! ```no_run
//! use burn::tensor::{Device, Int, Tensor};
//! use burn_fla_nn::{CausalLm, Compute, ModelConfig};
//!
//! # fn example(device: Device, ids: Tensor<2, Int>) -> Result<(), burn_fla_nn::NnError> {
//! let config = ModelConfig::from_json(r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 128,
//!     "num_heads": 4, "num_hidden_layers": 2}"#)?;
//! let model = CausalLm::init(&config, 42, &device)?;
//! let logits = model.forward(ids, None, Compute::f32())?;
//! # Ok(())
//! # }
//! ```

mod compute;
pub mod device;
mod error;
pub mod generate;
pub mod hub;
mod init;
pub mod layers;
#[cfg(feature = "learner")]
pub mod learner;
pub mod models;
pub mod modules;
mod params;
mod per_device;
pub mod tokenizer;
pub mod verify;

pub use compute::Compute;
pub use error::NnError;
pub use init::{Draws, Init};
pub use models::{CausalLm, LossOutput, ModelConfig, State};
pub use params::{NamedParam, ParamPath, ParamScope, ParamSource, named_parameters};
