//! Language models: the config, one block, one model for every architecture and hybrid, and the list of them.

mod block;
mod causal_lm;
mod config;
mod fields;
mod hybrid;
pub mod registry;
mod state;

pub use crate::modules::LossOutput;
pub use block::{Block, Mixer, MixerConfig};
pub use causal_lm::{Backbone, CausalLm};
pub use config::{CommonConfig, ModelConfig};
pub use hybrid::HybridAttention;
pub use state::State;
