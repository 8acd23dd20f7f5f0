//! Language models: the config, one block, one model for every architecture and hybrid, and the list of them.

mod block;
mod by_block;
mod causal_lm;
mod config;
mod fields;
mod hybrid;
mod json;
mod known_fields;
mod names;
mod networks;
pub mod registry;
mod state;

pub use crate::modules::LossOutput;
pub use block::{Block, BlockState};
pub use causal_lm::{Backbone, CausalLm};
pub use config::{CommonConfig, LayerConfig, ModelConfig, OuterInit};
pub(crate) use fields::Fields;
pub use hybrid::HybridAttention;
pub use names::Names;
pub use state::State;
