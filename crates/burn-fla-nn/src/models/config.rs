//! The model's config: a Hugging Face `config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::hybrid::{self, HybridAttention};
use super::json::with_named_floats;
use super::known_fields::KNOWN_FIELDS;
use super::names::Names;
use super::registry::{self, Architecture};
use crate::layers::MixerConfig;
use crate::modules::{FeedForwardConfig, NormKind};
use crate::{Init, NnError};

/// The config of a [`CausalLm`](crate::CausalLm), read from and written as a Hugging Face `config.json`.
///
/// Fields that this library does not know are kept as they are. A field it knows has to have a value it supports:
/// whatever would change the numbers of a model in a way that is not implemented is an error that names the field.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    raw: Map<String, Value>,
    common: CommonConfig,
    layers: Vec<LayerConfig>,
    attn: Vec<HybridAttention>,
}

/// What one layer is made of.
#[derive(Clone, Debug)]
pub struct LayerConfig {
    /// Its mixer.
    pub mixer: MixerConfig,
    /// Its feed-forward network; `None` for the architectures whose layers have none.
    pub feed_forward: Option<FeedForwardConfig>,
}

/// No model has more layers; a config that says so is damaged.
const MOST_LAYERS: usize = 10_000;

/// The fields that every architecture has.
#[derive(Clone, Debug, PartialEq)]
pub struct CommonConfig {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// The longest sequence the model is meant for. A note: nothing is cut off there.
    pub max_position_embeddings: usize,
    /// Whether the norm on a mixer's output has a weight.
    pub elementwise_affine: bool,
    /// ε of the norms.
    pub norm_eps: f64,
    /// Decides the name of the weight of the norm on a mixer's output.
    pub fuse_norm: bool,
    /// Whether the output map is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the loss draws the largest logit of each position towards zero: its gradient there is the logit times
    /// 1e-4 over the number of positions, its value unchanged.
    pub use_l2warp: bool,
    /// Whether the residual stream is f32 whatever the activations are.
    pub residual_in_fp32: bool,
    /// Whether the residual stream begins with a norm of the embedding.
    pub norm_first: bool,
    /// The norm around the mixers.
    pub norm: NormKind,
    /// How the embedding and the output map start.
    pub outer_init: OuterInit,
    /// What the parts of the model are called.
    pub names: &'static Names,
    /// Standard deviation of the weights at the start.
    pub initializer_range: f64,
    /// The id whose embedding never receives a gradient.
    pub pad_token_id: Option<u32>,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
    /// The id that ends a text.
    pub eos_token_id: Option<u32>,
}

/// How the embedding and the output map start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterInit {
    /// Both from N(0, `initializer_range`²).
    Normal,
    /// The embedding evenly from ±1e-4, so that the norm after it decides its scale from the first step on; the output map
    /// orthogonal, with a gain of ½ √(vocabulary / width) where the vocabulary is the larger, else ½ (RWKV7).
    Small,
}

impl OuterInit {
    /// Of the embedding.
    pub(crate) fn embedding(self) -> Init<'static> {
        match self {
            Self::Normal => Init::Normal,
            Self::Small => Init::Uniform(1e-4),
        }
    }

    /// Of the output map.
    pub(crate) fn output(self, vocabulary: usize, width: usize) -> Init<'static> {
        match self {
            Self::Normal => Init::Normal,
            Self::Small => Init::Orthogonal(0.5 * (vocabulary as f64 / width as f64).sqrt().max(1.0)),
        }
    }
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// An unreadable file, and all of [`from_json`](Self::from_json).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, NnError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(NnError::io("read", path))?;
        Self::from_json(&text).map_err(|error| match error {
            NnError::Json(message) => NnError::format(path, message),
            other => NnError::format(path, other.to_string()),
        })
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Text that is not a JSON object; an architecture that is not in the registry; a field with a value that is not
    /// supported or contradicts another.
    pub fn from_json(text: &str) -> Result<Self, NnError> {
        match serde_json::from_str(&with_named_floats(text)) {
            Ok(Value::Object(map)) => Self::from_map(map),
            Ok(other) => Err(NnError::Json(format!("found {other}"))),
            Err(error) => Err(NnError::Json(error.to_string())),
        }
    }

    /// Reads the fields of a `config.json`.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json).
    pub fn from_map(raw: Map<String, Value>) -> Result<Self, NnError> {
        let fields = Fields::new(&raw, "");
        let model_type = fields.optional_str("model_type")?.ok_or_else(|| fields.error("model_type", "is missing"))?;
        let architecture = registry::find(model_type)?;
        let common = common(&fields, architecture)?;
        let attn = if architecture.hybrid {
            hybrid::parse(&fields, &common, architecture)?
        } else if fields.get("attn").is_some() {
            return Err(fields.error("attn", format!("{model_type} has no hybrid form")));
        } else {
            Vec::new()
        };
        let feed_forward = (architecture.feed_forward)(&fields, &architecture.defaults, common.hidden_size)?;
        let layer = |index: usize| {
            let mixer = match attn.iter().find(|entry| entry.layers.contains(&index)) {
                Some(entry) => {
                    let layers = architecture.defaults.rescale_outputs.then_some(common.num_hidden_layers);
                    MixerConfig::Attention(entry.attention.clone().with_residual_layers(layers))
                }
                None => (architecture.mixer)(&fields, &common, index)?,
            };
            mixer.check()?;
            let feed_forward = feed_forward.as_ref().map(|config| config.in_layer(index, common.num_hidden_layers));
            Ok(LayerConfig { mixer, feed_forward })
        };
        let layers = (0..common.num_hidden_layers).map(layer).collect::<Result<_, NnError>>()?;
        warn_of_near_misses(&raw);
        Ok(Self { raw, common, layers, attn })
    }

    /// The same config with the fields of `overrides` in place of its own. With `mixers` among them the model becomes a
    /// [hybrid](registry::HYBRID) of these.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json).
    pub fn with_overrides(&self, overrides: &Map<String, Value>) -> Result<Self, NnError> {
        let mut raw = self.raw.clone();
        for (field, value) in overrides {
            raw.insert(field.clone(), value.clone());
        }
        if overrides.contains_key("mixers") && !overrides.contains_key("model_type") {
            raw.insert("model_type".into(), registry::HYBRID.into());
        }
        Self::from_map(raw)
    }

    /// The text of a `config.json`: every field as it was given, in its order.
    pub fn to_json(&self) -> String {
        // A map of JSON values is always JSON.
        let mut text = serde_json::to_string_pretty(&self.raw).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Every field as it was given.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// Name of the architecture in the registry.
    pub fn model_type(&self) -> &str {
        self.raw.get("model_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// The fields that every architecture has.
    pub fn common(&self) -> &CommonConfig {
        &self.common
    }

    /// Size of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.common.vocab_size
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.common.hidden_size
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.common.num_hidden_layers
    }

    /// The id that ends a text.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.common.eos_token_id
    }

    /// The softmax layers of a hybrid.
    pub fn hybrid(&self) -> &[HybridAttention] {
        &self.attn
    }

    /// What each layer is made of.
    pub fn layers(&self) -> &[LayerConfig] {
        &self.layers
    }
}

fn common(fields: &Fields<'_>, architecture: &Architecture) -> Result<CommonConfig, NnError> {
    let defaults = &architecture.defaults;
    refuse_unsupported(fields, defaults.hidden_act)?;
    let vocab_size = fields.usize("vocab_size", 32_000)?;
    let id = |field: &str, default: Option<u32>| {
        if fields.is_absent(field) { Ok(default) } else { fields.optional_id(field) }
    };
    let pad_token_id = id("pad_token_id", defaults.pad_token_id)?;
    if let Some(id) = pad_token_id
        && id as usize >= vocab_size
    {
        return Err(fields.error("pad_token_id", format!("{id} is not below vocab_size {vocab_size}")));
    }
    Ok(CommonConfig {
        vocab_size,
        hidden_size: fields.usize("hidden_size", defaults.hidden_size)?,
        num_hidden_layers: match fields.usize("num_hidden_layers", defaults.num_hidden_layers)? {
            count @ ..=MOST_LAYERS => count,
            count => return Err(fields.error("num_hidden_layers", format!("{count} is more than {MOST_LAYERS}"))),
        },
        max_position_embeddings: fields.usize("max_position_embeddings", 2048)?,
        elementwise_affine: fields.bool("elementwise_affine", true)?,
        norm_eps: fields.positive("norm_eps", defaults.norm_eps)?,
        fuse_norm: fields.bool("fuse_norm", true)?,
        tie_word_embeddings: fields.bool("tie_word_embeddings", false)?,
        use_l2warp: fields.bool("use_l2warp", defaults.use_l2warp)?,
        residual_in_fp32: fields.bool("residual_in_fp32", defaults.residual_in_fp32)?,
        norm_first: defaults.norm_first && fields.bool("norm_first", true)?,
        norm: match architecture.norm {
            NormKind::Layer { .. } => NormKind::Layer { bias: fields.bool("norm_bias", true)? },
            other => other,
        },
        outer_init: architecture.outer_init,
        names: architecture.names,
        initializer_range: fields.positive("initializer_range", 0.02)?,
        pad_token_id,
        bos_token_id: id("bos_token_id", Some(1))?,
        eos_token_id: id("eos_token_id", Some(2))?,
    })
}

/// Fields that change a model's numbers, at values that are not implemented.
fn refuse_unsupported(fields: &Fields<'_>, hidden_act: &[&str]) -> Result<(), NnError> {
    if let Some(found) = fields.optional_str("hidden_act")?
        && !hidden_act.contains(&found)
    {
        let supported = hidden_act.join(", ");
        return Err(fields.error("hidden_act", format!("`{found}` is not supported; supported: {supported}")));
    }
    for field in ["attnres_block_size", "rope_scaling"] {
        if let Some(value) = fields.get(field) {
            return Err(fields.error(field, format!("{value} is not supported; it must be null")));
        }
    }
    if fields.bool("fuse_cross_entropy", true)? && fields.bool("fuse_linear_cross_entropy", false)? {
        return Err(fields.error("fuse_linear_cross_entropy", "excludes fuse_cross_entropy, which is true"));
    }
    fields.bool("fuse_swiglu", true)?;
    Ok(())
}

/// A field nobody knows is kept, but one letter beside a known name it is most likely a mistake.
fn warn_of_near_misses(raw: &Map<String, Value>) {
    for field in raw.keys() {
        if KNOWN_FIELDS.contains(&field.as_str()) {
            continue;
        }
        if let Some(known) = KNOWN_FIELDS.iter().find(|known| strsim::damerau_levenshtein(known, field) <= 2) {
            tracing::warn!("model config: the unknown field `{field}` is kept and not used; did you mean `{known}`?");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::MlpActivation;

    fn gla(extra: &str) -> Result<ModelConfig, NnError> {
        ModelConfig::from_json(&format!(
            r#"{{"model_type": "gla", "hidden_size": 64, "num_heads": 2, "num_hidden_layers": 4{extra}}}"#
        ))
    }

    fn message(extra: &str) -> String {
        gla(extra).expect_err(extra).to_string()
    }

    fn gated(intermediate_size: usize) -> FeedForwardConfig {
        FeedForwardConfig::Gated { intermediate_size, activation: MlpActivation::Swish }
    }

    #[test]
    fn defaults_follow_the_format() {
        let config = gla("").expect("a valid config");
        let common = config.common();
        assert_eq!(config.layers()[0].feed_forward, Some(gated(256)));
        assert_eq!(common.eos_token_id, Some(2));
        assert_eq!(gla(r#", "eos_token_id": null"#).expect("valid").eos_token_id(), None);
        let retnet =
            ModelConfig::from_json(r#"{"model_type": "retnet", "num_hidden_layers": 2}"#).expect("a valid config");
        // int(2048 · 2 · 2 / 3) = 2730, rounded up to a multiple of 256.
        assert_eq!(retnet.layers()[1].feed_forward, Some(gated(2816)));
    }

    #[test]
    fn unknown_fields_are_kept() {
        let config = gla(r#", "transformers_version": "5", "mine": [1, {"a": null}]"#).expect("valid");
        let again = ModelConfig::from_json(&config.to_json()).expect("valid");
        assert_eq!(config.fields(), again.fields());
        assert_eq!(again.fields()["mine"].to_string(), r#"[1,{"a":null}]"#);
    }

    #[test]
    fn values_that_are_not_supported_are_named() {
        for (extra, words) in [
            (r#", "hidden_act": "powlu""#, ["hidden_act", "powlu"]),
            (r#", "attnres_block_size": 2"#, ["attnres_block_size", "null"]),
            (r#", "use_l2warp": 1"#, ["use_l2warp", "false"]),
            (r#", "num_heads": 3"#, ["expand_k", "num_heads"]),
            (r#", "num_kv_heads": 3"#, ["num_kv_heads", "multiple"]),
            (r#", "expand_k": 0.3"#, ["expand_k", "whole"]),
            (r#", "feature_map": "taylor""#, ["feature_map", "sqrelu"]),
            (r#", "vocab_size": "many""#, ["vocab_size", "many"]),
            (r#", "vocab_size": null"#, ["vocab_size", "null"]),
            (r#", "norm_eps": 0"#, ["norm_eps", "above 0"]),
            (r#", "pad_token_id": 32000"#, ["pad_token_id", "32000"]),
            (r#", "clamp_min": 0.5"#, ["clamp_min", "0.5"]),
            (r#", "use_short_conv": 1"#, ["use_short_conv", "true or false"]),
            (r#", "fuse_linear_cross_entropy": true"#, ["fuse_linear_cross_entropy", "excludes"]),
        ] {
            let message = message(extra);
            for word in words {
                assert!(message.contains(word), "{extra}: {message}");
            }
        }
        let unknown = ModelConfig::from_json(r#"{"model_type": "retnt"}"#).expect_err("unknown");
        assert!(unknown.to_string().contains("did you mean `retnet`"), "{unknown}");
        assert!(ModelConfig::from_json("[]").is_err());
        assert!(ModelConfig::from_json("{").is_err());
    }

    #[test]
    fn overrides_are_checked_too() {
        let config = gla("").expect("valid");
        let change = |text: &str| match serde_json::from_str(text) {
            Ok(Value::Object(map)) => config.with_overrides(&map),
            _ => panic!("{text}"),
        };
        assert_eq!(change(r#"{"vocab_size": 257}"#).expect("valid").vocab_size(), 257);
        assert!(change(r#"{"num_heads": 5}"#).is_err());
    }

    #[test]
    fn hybrids_are_checked() {
        let one = r#"{"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "window_size": 16, "mine": 1}"#;
        let config = gla(&format!(r#", "attn": {one}"#)).expect("valid");
        assert!(matches!(config.layers()[1].mixer, MixerConfig::Attention(_)));
        assert!(matches!(config.layers()[2].mixer, MixerConfig::Gla(_)));
        let two =
            gla(r#", "attn": [{"layers": [0], "num_heads": 2}, {"layers": [2], "num_heads": 4}]"#).expect("valid");
        assert_eq!(two.hybrid().len(), 2);
        for (attn, word) in [
            (r#"{"layers": [4], "num_heads": 4}"#, "attn.layers"),
            (r#"{"layers": [1, 1], "num_heads": 4}"#, "twice"),
            (r#"[{"layers": [1], "num_heads": 4}, {"layers": [1], "num_heads": 4}]"#, "attn[1].layers"),
            (r#"{"layers": [1]}"#, "attn.num_heads"),
            (r#"{"num_heads": 4}"#, "attn.layers"),
            (r#"{"layers": [1], "num_heads": 4, "window_size": 0}"#, "attn.window_size"),
            (r#"{"layers": [1], "num_heads": 5}"#, "num_heads"),
            (r#""all""#, "attn"),
        ] {
            let message = message(&format!(r#", "attn": {attn}"#));
            assert!(message.contains(word), "{attn}: {message}");
        }
    }

    #[test]
    fn patterns_of_mixers_are_checked() {
        let stack = |mixers: &str| {
            let overrides = serde_json::from_str(&format!(r#"{{"mixers": {mixers}}}"#)).expect("an object");
            gla("").expect("valid").with_overrides(&overrides)
        };
        let config = stack(r#"["gla", "retnet", {"model_type": "transformer", "num_heads": 4, "window_size": 8}]"#)
            .expect("valid");
        assert_eq!(config.model_type(), "hybrid");
        let kinds = config.layers().iter().map(|layer| match &layer.mixer {
            MixerConfig::Gla(_) => "gla",
            MixerConfig::Retention(_) => "retnet",
            MixerConfig::Attention(attention) if attention.window_size == Some(8) => "window of 8",
            other => panic!("{other:?}"),
        });
        assert_eq!(kinds.collect::<Vec<_>>(), ["gla", "retnet", "window of 8", "gla"]);
        for (mixers, words) in [
            ("[]", ["mixers", "list"]),
            ("3", ["mixers", "list"]),
            (r#"["glo"]"#, ["model_type", "did you mean `gla`"]),
            (r#"[{"num_heads": 4}]"#, ["mixers[0].model_type", "missing"]),
            (r#"["gla", {"model_type": "hybrid"}]"#, ["mixers[1].model_type", "pattern"]),
            (r#"["gla", {"model_type": "gla", "expand_k": "x"}]"#, ["mixers[1].expand_k", "number"]),
        ] {
            let message = stack(mixers).expect_err(mixers).to_string();
            for word in words {
                assert!(message.contains(word), "{mixers}: {message}");
            }
        }
        let bare = ModelConfig::from_json(r#"{"model_type": "hybrid"}"#).expect_err("no mixers");
        assert!(bare.to_string().contains("mixers"), "{bare}");
    }
}
