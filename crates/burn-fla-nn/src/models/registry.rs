//! The list of architectures.
//!
//! One entry an architecture: how its part of `config.json` is read. Import, recipes, suites and documentation all read
//! this list, so an architecture that is in it is everywhere.

use super::block::MixerConfig;
use super::config::CommonConfig;
use super::fields::Fields;
use super::hybrid;
use crate::NnError;
use crate::layers::{GlaConfig, RetentionConfig};
use crate::modules::FeatureMap;

/// An architecture.
#[derive(Debug)]
pub struct Architecture {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// Its name in prose.
    pub title: &'static str,
    /// Where it was proposed.
    pub paper: &'static str,
    /// Whether `attn` may give some layers softmax attention.
    pub hybrid: bool,
    /// Default of `hidden_ratio`.
    pub(crate) hidden_ratio: f64,
    /// Reads the fields of the mixer.
    pub(crate) parse: fn(&Fields<'_>, &CommonConfig) -> Result<MixerConfig, NnError>,
}

/// Every architecture.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "transformer",
        title: "Transformer",
        paper: "Attention Is All You Need, arXiv:1706.03762, with rotary positions, RMS norm and SwiGLU",
        hybrid: false,
        hidden_ratio: 4.0,
        parse: transformer,
    },
    Architecture {
        model_type: "retnet",
        title: "RetNet",
        paper: "Retentive Network: A Successor to Transformer for Large Language Models, arXiv:2307.08621",
        hybrid: true,
        hidden_ratio: 2.0,
        parse: retnet,
    },
    Architecture {
        model_type: "gla",
        title: "GLA",
        paper: "Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635",
        hybrid: true,
        hidden_ratio: 4.0,
        parse: gla,
    },
];

/// The architecture called `model_type`.
///
/// # Errors
/// [`NnError::ModelType`] with the nearest name and the list.
pub fn find(model_type: &str) -> Result<&'static Architecture, NnError> {
    if let Some(found) = ARCHITECTURES.iter().find(|a| a.model_type == model_type) {
        return Ok(found);
    }
    let names = || ARCHITECTURES.iter().map(|a| a.model_type);
    let hint = names()
        .map(|name| (strsim::damerau_levenshtein(name, model_type), name))
        .min()
        .filter(|(distance, _)| *distance <= 2)
        .map(|(_, name)| format!(" (did you mean `{name}`?)"))
        .unwrap_or_default();
    Err(NnError::ModelType { found: model_type.to_string(), hint, supported: names().collect::<Vec<_>>().join(", ") })
}

fn transformer(fields: &Fields<'_>, common: &CommonConfig) -> Result<MixerConfig, NnError> {
    let heads = fields.usize("num_heads", 32)?;
    let config = hybrid::attention(fields, common.hidden_size, heads)?.with_qk_norm(fields.bool("qk_norm", false)?);
    Ok(MixerConfig::Attention(config))
}

fn retnet(fields: &Fields<'_>, common: &CommonConfig) -> Result<MixerConfig, NnError> {
    // use_short_conv is not read: the format has no place for the convolutions of this architecture.
    Ok(MixerConfig::Retention(
        RetentionConfig::new(common.hidden_size, fields.usize("num_heads", 8)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_expand_k(fields.positive("expand_k", 1.0)?)
            .with_expand_v(fields.positive("expand_v", 2.0)?)
            .with_feature_map(feature_map(fields)?)
            .with_use_output_gate(fields.bool("use_output_gate", true)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_fuse_norm(common.fuse_norm)
            .with_norm_eps(common.norm_eps),
    ))
}

fn gla(fields: &Fields<'_>, common: &CommonConfig) -> Result<MixerConfig, NnError> {
    Ok(MixerConfig::Gla(
        GlaConfig::new(common.hidden_size, fields.usize("num_heads", 4)?)
            .with_num_kv_heads(fields.optional_usize("num_kv_heads")?)
            .with_expand_k(fields.positive("expand_k", 0.5)?)
            .with_expand_v(fields.positive("expand_v", 1.0)?)
            .with_feature_map(feature_map(fields)?)
            .with_use_short_conv(fields.bool("use_short_conv", false)?)
            .with_conv_size(fields.usize("conv_size", 4)?)
            .with_use_output_gate(fields.bool("use_output_gate", true)?)
            .with_elementwise_affine(common.elementwise_affine)
            .with_fuse_norm(common.fuse_norm)
            .with_norm_eps(common.norm_eps)
            .with_clamp_min(fields.optional_f64("clamp_min")?),
    ))
}

fn feature_map(fields: &Fields<'_>) -> Result<Option<FeatureMap>, NnError> {
    let Some(name) = fields.optional_str("feature_map")? else {
        return Ok(None);
    };
    match FeatureMap::from_name(name) {
        Some(map) => Ok(Some(map)),
        None => {
            let names: Vec<_> = FeatureMap::NAMES.iter().map(|(name, _)| *name).collect();
            Err(fields.error(
                "feature_map",
                format!("`{name}` is not supported; supported are {} and null", names.join(", ")),
            ))
        }
    }
}

/// Fields that have a meaning for some architecture, or are common in files of this format.
pub(crate) const KNOWN_FIELDS: &[&str] = &[
    "architectures",
    "attn",
    "attn_mode",
    "attnres_block_size",
    "bos_token_id",
    "clamp_min",
    "conv_size",
    "dtype",
    "elementwise_affine",
    "eos_token_id",
    "expand_k",
    "expand_v",
    "feature_map",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "hidden_act",
    "hidden_ratio",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "norm_eps",
    "num_heads",
    "num_hidden_layers",
    "num_kv_heads",
    "pad_token_id",
    "qk_norm",
    "qkv_bias",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_gk",
    "use_gv",
    "use_l2warp",
    "use_output_gate",
    "use_short_conv",
    "vocab_size",
    "window_size",
];
