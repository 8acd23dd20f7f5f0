//! Token mixers, one file each.
//!
//! A mixer maps `[batch, tokens, width]` to the same shape. Its `forward` takes a whole sequence, or, given the
//! state of the tokens before, goes on from there; one token at a time it runs the recurrent form of its
//! operator, at constant memory for the recurrent mixers.
//!
//! Shape letters: B batch, T tokens, H heads, G key and value heads (H a multiple of G), K width of a key head,
//! V width of a value head.

mod abc;
mod attention;
mod based;
mod comba;
mod context;
mod cost;
mod delta;
mod delta_net;
mod forgetting;
mod gated_deltanet;
mod gated_deltaproduct;
mod gla;
mod gsa;
mod hgrn;
mod hgrn2;
mod kda;
mod lightnet;
mod linear_attn;
mod mamba;
mod mamba2;
mod mesa_net;
mod mixer;
mod mla;
mod nsa;
mod path;
mod rebased;
mod retention;
mod rwkv6;
mod rwkv7;
mod state;
mod step_size;

pub use abc::{Abc, AbcConfig, AbcLayerState};
pub use attention::{Attention, AttentionConfig};
pub use based::{Based, BasedConfig};
pub use comba::{Comba, CombaConfig};
pub use context::SequenceContext;
pub use cost::MixerCost;
pub use delta_net::{DeltaNet, DeltaNetConfig, QkActivation, QkNorm};
pub use forgetting::{ForgettingAttention, ForgettingAttentionConfig};
pub use gated_deltanet::{GatedDeltaNet, GatedDeltaNetConfig};
pub use gated_deltaproduct::{GatedDeltaProduct, GatedDeltaProductConfig};
pub use gla::{Gla, GlaConfig};
pub use gsa::{Gsa, GsaConfig, GsaFeatureMap, GsaLayerState};
pub use hgrn::{Hgrn, HgrnConfig, HgrnState};
pub use hgrn2::{Hgrn2, Hgrn2Config};
pub use kda::{Kda, KdaConfig};
pub use lightnet::{LightNet, LightNetConfig, LightNetState};
pub use linear_attn::{LinearAttention, LinearAttentionConfig};
pub(crate) use mamba::inner_size;
pub use mamba::{Mamba, MambaConfig, MambaState};
pub use mamba2::{Mamba2, Mamba2Config};
pub use mesa_net::{MesaLayerState, MesaNet, MesaNetConfig};
pub use mixer::{LayerState, Mixer, MixerConfig};
pub use mla::{LatentAttention, LatentAttentionConfig, LatentPart, QueryMap};
pub use nsa::{NativeSparseAttention, NativeSparseAttentionConfig};
pub use path::{PathAttention, PathAttentionConfig, PathAttentionState, ReflectionMap};
pub use rebased::{QuadraticMap, Rebased, RebasedConfig};
pub use retention::{Retention, RetentionConfig};
pub use rwkv6::{Rwkv6, Rwkv6Config};
pub use rwkv7::{Rwkv7, Rwkv7Config};
pub(crate) use state::Convs;
pub use state::{ForgettingState, KeyValueState, MixerState, RecurrentState, ShiftState};
pub use step_size::StepSizes;

use crate::NnError;

/// The widths that a linear-attention mixer derives from its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MixerDims {
    pub heads: usize,
    pub groups: usize,
    /// H · K
    pub keys: usize,
    /// H · V
    pub values: usize,
}

impl MixerDims {
    pub(crate) fn new(
        hidden: usize,
        heads: usize,
        groups: Option<usize>,
        expand_k: f64,
        expand_v: f64,
    ) -> Result<Self, NnError> {
        let groups = check_groups(heads, groups)?;
        let width = |field: &str, factor: f64| {
            let width = hidden as f64 * factor;
            if !width.is_finite() || width < 1.0 || width.fract() != 0.0 {
                return Err(NnError::config(
                    field,
                    format!("hidden_size {hidden} times {factor} is not a whole number of features"),
                ));
            }
            let width = width as usize;
            if !width.is_multiple_of(heads) {
                return Err(NnError::config(
                    field,
                    format!("hidden_size {hidden} times {factor} is {width}, not a multiple of num_heads {heads}"),
                ));
            }
            Ok(width)
        };
        Ok(Self { heads, groups, keys: width("expand_k", expand_k)?, values: width("expand_v", expand_v)? })
    }

    /// How many heads share a key and value head.
    pub(crate) fn repeat(&self) -> usize {
        self.heads / self.groups
    }

    /// K
    pub(crate) fn key_width(&self) -> usize {
        self.keys / self.heads
    }

    /// V
    pub(crate) fn value_width(&self) -> usize {
        self.values / self.heads
    }
}

/// The heads of a mixer whose values are as wide as the input, given by their number or by the width of their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadsByRatio {
    pub heads: usize,
    /// K
    pub key_width: usize,
}

impl HeadsByRatio {
    /// What is not given is the width over the other, rounded down as the format does.
    pub(crate) fn new(hidden: usize, heads: Option<usize>, ratio: Option<usize>) -> Result<Self, NnError> {
        let (heads, key_width) = match (heads, ratio) {
            (Some(heads), Some(ratio)) => (heads, ratio),
            (None, Some(ratio)) => (hidden.checked_div(ratio).unwrap_or(0), ratio),
            (Some(heads), None) => (heads, hidden.checked_div(heads).unwrap_or(0)),
            (None, None) => return Err(NnError::config("expand_ratio", "or num_heads is to be given")),
        };
        if heads == 0 || key_width == 0 || !hidden.is_multiple_of(heads) {
            let field = if ratio.is_some() { "expand_ratio" } else { "num_heads" };
            return Err(NnError::config(
                field,
                format!("hidden_size {hidden} does not divide into {heads} heads with keys of width {key_width}"),
            ));
        }
        Ok(Self { heads, key_width })
    }

    /// H · K
    pub(crate) fn keys(&self) -> usize {
        self.heads * self.key_width
    }
}

/// The number of key and value heads.
pub(crate) fn check_groups(heads: usize, groups: Option<usize>) -> Result<usize, NnError> {
    if heads == 0 {
        return Err(NnError::config("num_heads", "must be at least 1"));
    }
    let groups = groups.unwrap_or(heads);
    if groups == 0 || !heads.is_multiple_of(groups) {
        return Err(NnError::config(
            "num_kv_heads",
            format!("num_heads {heads} must be a multiple of it, and it is {groups}"),
        ));
    }
    Ok(groups)
}
