//! The list of architectures.
//!
//! One entry an architecture: how its part of `config.json` is read. Import, recipes, suites and documentation all read
//! this list, so an architecture that is in it is everywhere.

use serde_json::Value;

use super::config::{CommonConfig, ModelConfig, OuterInit};
use super::fields::Fields;
use super::names::Names;
use super::networks::{
    gated, gated_beside_inner_channels, none_but_heads, none_but_inner_channels, rwkv6_channel_mix, rwkv7_channel_mix,
};
use crate::NnError;
use crate::layers::{
    AbcConfig, AttentionConfig, BasedConfig, CombaConfig, DeltaNetConfig, ForgettingAttentionConfig,
    GatedDeltaNetConfig, GatedDeltaProductConfig, GlaConfig, GsaConfig, Hgrn2Config, HgrnConfig, KdaConfig,
    LatentAttentionConfig, LightNetConfig, LinearAttentionConfig, Mamba2Config, MambaConfig, MesaNetConfig,
    MixerConfig, NativeSparseAttentionConfig, PathAttentionConfig, RebasedConfig, RetentionConfig, Rwkv6Config,
    Rwkv7Config,
};
use crate::modules::{FeedForwardConfig, NormKind};
use crate::verify::Bounds;

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
    /// Fields of `attn` that models of it were trained without, whatever they say.
    pub(crate) ignored_in_attn: &'static [&'static str],
    /// The fields that make a small model of it, as JSON: what the suites run on, and what is checked before a release.
    pub(crate) tiny: &'static str,
    /// What its parts are called.
    pub(crate) names: &'static Names,
    /// The norm around its mixers.
    pub(crate) norm: NormKind,
    /// What fields are that are not given.
    pub(crate) defaults: Defaults,
    /// How its embedding and its output map start.
    pub(crate) outer_init: OuterInit,
    /// How far results in f32 may be from those that the format's own implementation gives.
    pub bounds: Bounds,
    /// Reads the fields of the feed-forward networks.
    pub(crate) feed_forward: fn(&Fields<'_>, &Defaults, usize) -> Result<Option<FeedForwardConfig>, NnError>,
    /// Reads the fields of the mixer of a layer, counted from 0.
    pub(crate) mixer: fn(&Fields<'_>, &CommonConfig, usize) -> Result<MixerConfig, NnError>,
}

/// What the fields that every architecture has are when they are not given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    pub hidden_size: usize,
    pub hidden_ratio: f64,
    pub num_hidden_layers: usize,
    pub norm_eps: f64,
    pub pad_token_id: Option<u32>,
    pub use_l2warp: bool,
    pub residual_in_fp32: bool,
    /// The first layer normalises the embedding.
    pub norm_first: bool,
    /// The output maps of a hybrid's attention layers start smaller the more layers there are.
    pub rescale_outputs: bool,
    /// The field `attn`, as JSON.
    pub attn: Option<&'static str>,
    /// The values of `hidden_act` that are supported; the first is the default.
    pub hidden_act: &'static [&'static str],
}

pub(super) const DEFAULTS: Defaults = Defaults {
    hidden_size: 2048,
    hidden_ratio: 4.0,
    num_hidden_layers: 24,
    norm_eps: 1e-6,
    pad_token_id: None,
    use_l2warp: false,
    residual_in_fp32: false,
    norm_first: false,
    rescale_outputs: false,
    attn: None,
    hidden_act: &["swish", "powlu"],
};

/// What most architectures have in common; an entry says the rest.
const COMMON: Architecture = Architecture {
    model_type: "",
    title: "",
    paper: "",
    hybrid: true,
    ignored_in_attn: &[],
    tiny: r#"{"num_heads": 2}"#,
    names: &Names::COMMON,
    norm: NormKind::Rms,
    outer_init: OuterInit::Normal,
    defaults: DEFAULTS,
    bounds: Bounds::F32,
    feed_forward: gated,
    mixer: |fields, _, _| Err(fields.error("model_type", "has no mixer")),
};

/// What the RWKV architectures have in common.
const RWKV: Architecture = Architecture {
    names: &Names::RWKV,
    norm: NormKind::Layer { bias: true },
    defaults: Defaults { norm_eps: 1e-5, norm_first: true, rescale_outputs: true, hidden_act: &["sqrelu"], ..DEFAULTS },
    ..COMMON
};

/// Every architecture.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "transformer",
        title: "Transformer",
        paper: "Attention Is All You Need, arXiv:1706.03762, with rotary positions, RMS norm and SwiGLU",
        hybrid: false,
        tiny: r#"{"num_heads": 4, "num_kv_heads": 2, "window_size": 7}"#,
        mixer: |fields, common, _| AttentionConfig::from_fields(fields, common.hidden_size).map(MixerConfig::Attention),
        ..COMMON
    },
    Architecture {
        model_type: "retnet",
        title: "RetNet",
        paper: "Retentive Network: A Successor to Transformer for Large Language Models, arXiv:2307.08621",
        // The output gate is `hidden_act` too, and has no other form.
        defaults: Defaults { hidden_ratio: 2.0, hidden_act: &["swish"], ..DEFAULTS },
        mixer: |fields, common, _| RetentionConfig::from_fields(fields, common).map(MixerConfig::Retention),
        ..COMMON
    },
    Architecture {
        model_type: "gla",
        title: "GLA",
        paper: "Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635",
        defaults: Defaults { hidden_act: &["swish"], ..DEFAULTS },
        mixer: |fields, common, _| GlaConfig::from_fields(fields, common).map(MixerConfig::Gla),
        ..COMMON
    },
    Architecture {
        model_type: "delta_net",
        title: "DeltaNet",
        paper: "Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484",
        mixer: |fields, common, _| DeltaNetConfig::from_fields(fields, common).map(MixerConfig::DeltaNet),
        ..COMMON
    },
    Architecture {
        model_type: "gated_deltanet",
        title: "Gated DeltaNet",
        paper: "Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464",
        defaults: Defaults { num_hidden_layers: 21, ..DEFAULTS },
        tiny: r#"{"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5}"#,
        mixer: |fields, common, _| GatedDeltaNetConfig::from_fields(fields, common).map(MixerConfig::GatedDeltaNet),
        ..COMMON
    },
    Architecture {
        model_type: "gated_deltaproduct",
        title: "Gated DeltaProduct",
        paper: "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products, arXiv:2502.10297",
        defaults: Defaults { num_hidden_layers: 21, ..DEFAULTS },
        tiny: r#"{"num_heads": 2, "head_dim": 8, "num_householder": 2, "use_forget_gate": true}"#,
        mixer: |fields, common, _| {
            GatedDeltaProductConfig::from_fields(fields, common).map(MixerConfig::GatedDeltaProduct)
        },
        ..COMMON
    },
    Architecture {
        model_type: "kda",
        title: "Kimi Delta Attention",
        paper: "Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692",
        tiny: r#"{"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5}"#,
        mixer: |fields, common, _| KdaConfig::from_fields(fields, common).map(MixerConfig::Kda),
        ..COMMON
    },
    Architecture {
        model_type: "comba",
        title: "Comba",
        paper: "Comba: Improving Bilinear RNNs with Closed-loop Control, arXiv:2506.02475",
        defaults: Defaults { num_hidden_layers: 21, ..DEFAULTS },
        tiny: r#"{"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5}"#,
        mixer: |fields, common, _| CombaConfig::from_fields(fields, common).map(MixerConfig::Comba),
        ..COMMON
    },
    Architecture {
        model_type: "mesa_net",
        title: "MesaNet",
        paper: "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training, arXiv:2506.05233",
        // Fewer steps than a model has: the suites run them one token at a time.
        tiny: r#"{"num_heads": 2, "head_dim": 12, "max_cg_step_training": 8, "max_cg_step_decoding": 8}"#,
        bounds: Bounds {
            logits: 5e-3,
            gradient: 2e-2,
            loss: 1e-2,
            curve: 1e-2,
            reason: Some(
                "the expected results were made with q, k, the solutions and all operands of their products rounded to \
                 fp16, whatever the dtype of the model, which is not done here",
            ),
        },
        mixer: |fields, common, _| MesaNetConfig::from_fields(fields, common).map(MixerConfig::MesaNet),
        ..COMMON
    },
    Architecture {
        model_type: "linear_attn",
        title: "Linear attention",
        paper: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv:2006.16236",
        mixer: |fields, common, _| LinearAttentionConfig::from_fields(fields, common).map(MixerConfig::LinearAttention),
        ..COMMON
    },
    Architecture {
        model_type: "based",
        title: "Based",
        paper: "Simple linear attention language models balance the recall-throughput tradeoff, arXiv:2402.18668",
        mixer: |fields, common, _| BasedConfig::from_fields(fields, common).map(MixerConfig::Based),
        ..COMMON
    },
    Architecture {
        model_type: "rebased",
        title: "ReBased",
        paper: "Linear Transformers with Learnable Kernel Functions are Better In-Context Models, arXiv:2402.10644",
        // With the ε of the format the first tokens, which may be orthogonal to every key, magnify any rounding a
        // thousandfold.
        tiny: r#"{"num_heads": 2, "eps": 0.1}"#,
        mixer: |fields, common, _| RebasedConfig::from_fields(fields, common).map(MixerConfig::Rebased),
        ..COMMON
    },
    Architecture {
        model_type: "nsa",
        title: "NSA",
        paper: "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, arXiv:2502.11089",
        hybrid: false,
        tiny: r#"{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 8, "block_counts": 4,
            "window_size": 7}"#,
        mixer: |fields, common, _| {
            NativeSparseAttentionConfig::from_fields(fields, common).map(MixerConfig::NativeSparseAttention)
        },
        ..COMMON
    },
    Architecture {
        model_type: "abc",
        title: "ABC",
        paper: "ABC: Attention with Bounded-memory Control, arXiv:2110.02488",
        tiny: r#"{"num_heads": 2, "num_slots": 10}"#,
        mixer: |fields, common, _| AbcConfig::from_fields(fields, common).map(MixerConfig::Abc),
        ..COMMON
    },
    Architecture {
        model_type: "gsa",
        title: "GSA",
        paper: "Gated Slot Attention for Efficient Linear-Time Sequence Modeling, arXiv:2409.07146",
        tiny: r#"{"num_heads": 2, "num_slots": 10}"#,
        mixer: |fields, common, _| GsaConfig::from_fields(fields, common).map(MixerConfig::Gsa),
        ..COMMON
    },
    Architecture {
        model_type: "hgrn",
        title: "HGRN",
        paper: "Hierarchically Gated Recurrent Neural Network for Sequence Modeling, arXiv:2311.04823",
        tiny: "{}",
        mixer: |fields, common, layer| HgrnConfig::from_fields(fields, common, layer).map(MixerConfig::Hgrn),
        ..COMMON
    },
    Architecture {
        model_type: "hgrn2",
        title: "HGRN2",
        paper: "HGRN2: Gated Linear RNNs with State Expansion, arXiv:2404.07904",
        tiny: r#"{"expand_ratio": 16}"#,
        mixer: |fields, common, layer| Hgrn2Config::from_fields(fields, common, layer).map(MixerConfig::Hgrn2),
        ..COMMON
    },
    Architecture {
        model_type: "lightnet",
        title: "LightNet",
        paper: "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet, arXiv:2405.21022",
        ignored_in_attn: &["rope_theta"],
        tiny: r#"{"expand_ratio": 16, "gate_low_rank_dim": 10}"#,
        mixer: |fields, common, _| LightNetConfig::from_fields(fields, common).map(MixerConfig::LightNet),
        ..COMMON
    },
    Architecture {
        model_type: "rwkv6",
        title: "RWKV6",
        paper: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, arXiv:2404.05892",
        tiny: r#"{"num_heads": 2, "proj_low_rank_dim": 8, "gate_low_rank_dim": 8}"#,
        feed_forward: rwkv6_channel_mix,
        mixer: |fields, common, _| Rwkv6Config::from_fields(fields, common).map(MixerConfig::Rwkv6),
        ..RWKV
    },
    Architecture {
        model_type: "rwkv7",
        title: "RWKV7",
        paper: "RWKV-7 \"Goose\" with Expressive Dynamic State Evolution, arXiv:2503.14456",
        tiny: r#"{"head_dim": 24, "decay_low_rank_dim": 8, "gate_low_rank_dim": 8, "a_low_rank_dim": 8,
            "v_low_rank_dim": 8}"#,
        defaults: Defaults { use_l2warp: true, ..RWKV.defaults },
        outer_init: OuterInit::Small,
        feed_forward: rwkv7_channel_mix,
        mixer: |fields, common, layer| Rwkv7Config::from_fields(fields, common, layer).map(MixerConfig::Rwkv7),
        ..RWKV
    },
    Architecture {
        model_type: "mamba",
        title: "Mamba",
        paper: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv:2312.00752",
        hybrid: false,
        tiny: r#"{"state_size": 5, "intermediate_size": 96}"#,
        names: &MAMBA_NAMES,
        defaults: MAMBA_DEFAULTS,
        feed_forward: none_but_inner_channels,
        mixer: |fields, common, _| MambaConfig::from_fields(fields, common).map(MixerConfig::Mamba),
        ..COMMON
    },
    Architecture {
        model_type: "mamba2",
        title: "Mamba2",
        paper: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space \
                Duality, arXiv:2405.21060",
        hybrid: false,
        tiny: r#"{"head_dim": 16, "state_size": 7, "intermediate_size": null}"#,
        names: &MAMBA_NAMES,
        defaults: Defaults { residual_in_fp32: true, ..MAMBA_DEFAULTS },
        feed_forward: none_but_heads,
        mixer: |fields, common, _| Mamba2Config::from_fields(fields, common).map(MixerConfig::Mamba2),
        ..COMMON
    },
    Architecture {
        model_type: "samba",
        title: "Samba",
        paper: "Samba: Simple Hybrid State Space Models for Efficient Unlimited Context Language Modeling, \
                arXiv:2406.07522",
        tiny: r#"{"state_size": 5, "intermediate_size": 96,
            "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}}"#,
        names: &Names { model: "backbone", attn_norm: "mixer_norm", attn: "mixer", norm: "norm_f", ..Names::COMMON },
        defaults: Defaults {
            hidden_size: 2304,
            num_hidden_layers: 18,
            norm_eps: 1e-5,
            pad_token_id: Some(0),
            attn: Some(
                r#"{"layers": [1, 3, 5, 7, 9, 11, 13, 15, 17], "num_heads": 18, "num_kv_heads": 18,
                    "qkv_bias": false, "window_size": 2048, "rope_theta": 10000.0}"#,
            ),
            ..DEFAULTS
        },
        feed_forward: gated_beside_inner_channels,
        mixer: |fields, common, _| MambaConfig::from_samba_fields(fields, common).map(MixerConfig::Mamba),
        ..COMMON
    },
    Architecture {
        model_type: "forgetting_transformer",
        title: "Forgetting Transformer",
        paper: "Forgetting Transformer: Softmax Attention with a Forget Gate, arXiv:2503.02130",
        hybrid: false,
        tiny: r#"{"num_heads": 4, "num_kv_heads": 2, "qk_norm": true, "use_output_gate": true}"#,
        mixer: |fields, common, _| {
            ForgettingAttentionConfig::from_fields(fields, common).map(MixerConfig::ForgettingAttention)
        },
        ..COMMON
    },
    Architecture {
        model_type: "mla",
        title: "MLA",
        paper: "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, arXiv:2405.04434",
        hybrid: false,
        tiny: r#"{"num_heads": 2, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_head_dim": 14, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 6, "v_head_dim": 10, "window_size": 7}"#,
        mixer: |fields, common, _| LatentAttentionConfig::from_fields(fields, common).map(MixerConfig::LatentAttention),
        ..COMMON
    },
    Architecture {
        model_type: "path_attn",
        title: "PaTH",
        paper: "PaTH Attention: Position Encoding via Accumulating Householder Transformations, arXiv:2505.16381",
        hybrid: false,
        tiny: r#"{"num_heads": 4, "num_kv_heads": 2, "use_forget_gate": true}"#,
        mixer: |fields, common, _| PathAttentionConfig::from_fields(fields, common).map(MixerConfig::PathAttention),
        ..COMMON
    },
    Architecture {
        model_type: HYBRID,
        title: "Hybrid of any mixers",
        paper: "the papers of its mixers",
        tiny: r#"{"num_heads": 2, "num_hidden_layers": 3, "mixers": ["retnet", {"model_type": "gla", "expand_k": 1.0},
            {"model_type": "transformer", "num_heads": 4, "window_size": 3}]}"#,
        mixer: mixer_of_pattern,
        ..COMMON
    },
];

/// The names of Mamba and Mamba2.
const MAMBA_NAMES: Names =
    Names { model: "backbone", attn_norm: "norm", attn: "mixer", norm: "norm_f", ..Names::COMMON };

const MAMBA_DEFAULTS: Defaults = Defaults {
    num_hidden_layers: 48,
    norm_eps: 1e-5,
    pad_token_id: Some(0),
    hidden_act: &["silu", "swish"],
    ..DEFAULTS
};

/// The `model_type` of a stack of any mixers, said by the field `mixers`.
pub const HYBRID: &str = "hybrid";

/// What small models have in common: the fields of [`Architecture::tiny`] stand before these.
const TINY: &str = r#"{"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "initializer_range": 0.15, "pad_token_id": 0}"#;

impl Architecture {
    /// The config of a model of a few thousand parameters.
    ///
    /// # Errors
    /// None for the entries of [`ARCHITECTURES`]: a test reads them all.
    pub fn tiny_config(&self) -> Result<ModelConfig, NnError> {
        let object = |text: &str| match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(map),
            _ => Err(NnError::Json(text.to_string())),
        };
        let mut fields = object(TINY)?;
        fields.insert("model_type".into(), self.model_type.into());
        fields.extend(object(self.tiny)?);
        ModelConfig::from_map(fields)
    }
}

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

/// The field `mixers`: a list of architectures, repeated over the layers. An entry is a `model_type`, or an object with
/// `model_type` and fields that stand before those of the model.
fn mixer_of_pattern(fields: &Fields<'_>, common: &CommonConfig, layer: usize) -> Result<MixerConfig, NnError> {
    let list = match fields.get("mixers") {
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(other) => return Err(fields.error("mixers", format!("expected a list of architectures, found {other}"))),
        None => return Err(fields.error("mixers", "is missing: a list of architectures, repeated over the layers")),
    };
    let index = layer % list.len();
    let name = format!("mixers[{index}]");
    let (model_type, own) = match &list[index] {
        Value::String(model_type) => (model_type.as_str(), None),
        Value::Object(own) => match own.get("model_type") {
            Some(Value::String(model_type)) => (model_type.as_str(), Some(own)),
            _ => return Err(fields.error(&format!("{name}.model_type"), "is missing")),
        },
        other => {
            return Err(fields.error(&name, format!("expected a model_type or an object with one, found {other}")));
        }
    };
    if model_type == HYBRID {
        return Err(fields.error(&format!("{name}.model_type"), "a pattern cannot have a pattern in it"));
    }
    let mut merged = fields.map().clone();
    for (field, value) in own.into_iter().flatten() {
        merged.insert(field.clone(), value.clone());
    }
    let merged = Fields::new(&merged, format!("{name}."));
    (find(model_type)?.mixer)(&merged, common, layer)
}
