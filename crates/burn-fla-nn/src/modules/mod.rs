//! The parts that layers and models are made of.
//!
//! Every module is built by a configuration's `init` or from a [`ParamScope`](crate::ParamScope); its fields carry the
//! Hugging Face names of the parameters. Parameters are f32 and are cast to the type of the input where they are used.

mod activation;
mod channel_mix;
mod embedding;
mod feed_forward;
mod forget_gate;
mod head_map;
mod heads;
mod layer_norm;
mod linear;
mod loss;
mod low_rank;
mod mlp;
mod norm;
mod rotary;
mod short_conv;

pub use activation::{FeatureMap, log_sigmoid, softplus};
pub(crate) use channel_mix::lerp;
pub use channel_mix::{LerpLinear, Rwkv6ChannelMix, Rwkv7ChannelMix};
pub use embedding::Embedding;
pub use feed_forward::{FeedForward, FeedForwardConfig};
pub(crate) use forget_gate::forget_gate;
pub use head_map::{HeadMap, LearnedMap, LinearMap, ProductMap};
pub use heads::{merge_heads, repeat_heads, split_heads};
pub use layer_norm::{GroupNorm, LayerNorm};
pub use linear::Linear;
pub(crate) use linear::{project, project_all};
pub use loss::{IGNORED_LABEL, LossOutput, cross_entropy};
pub use low_rank::{Between, LowRank, LowRankMaps};
pub use mlp::{GatedMlp, MlpActivation};
pub(crate) use norm::output_norm;
pub use norm::{Norm, NormKind, RmsNorm};
pub use rotary::{Rotary, RotaryTables};
pub use short_conv::ShortConv;
pub(crate) use short_conv::{check_conv, check_conv_of};
