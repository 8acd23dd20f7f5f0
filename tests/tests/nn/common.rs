//! Models small enough to run everywhere, one for each way a layer can be put together.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use burn_fla_nn::layers::MixerConfig;
use burn_fla_nn::models::registry::{ARCHITECTURES, Architecture};
use burn_fla_nn::{CausalLm, ModelConfig, ParamPath};
use burn_fla_tests::{numbers, tensor, uniform};

/// The folder of an expected case.
pub fn golden(case: &str) -> PathBuf {
    // Where the suite runs, which may be another machine than the one it was built on.
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(folder).join("fixtures/golden").join(case)
}

/// The folders of all expected cases.
pub const GOLDEN: [&str; 26] = [
    "retnet",
    "gla",
    "gla_hybrid",
    "transformer",
    "delta_net",
    "gated_deltanet",
    "gated_deltanet_varlen",
    "gated_deltaproduct",
    "kda",
    "comba",
    "mesa_net",
    "linear_attn",
    "nsa",
    "abc",
    "gsa",
    "hgrn",
    "hgrn2",
    "lightnet",
    "rwkv6",
    "rwkv7",
    "mamba",
    "mamba2",
    "samba",
    "forgetting_transformer",
    "mla",
    "path_attn",
];

/// The folders of expected cases of bare layers.
pub const GOLDEN_LAYERS: [&str; 2] = ["layer_based", "layer_rebased"];

/// Vocabulary of the small models.
pub const VOCABULARY: usize = 61;

/// Config of a small model: `fields` come on top of the common ones.
pub fn config(model_type: &str, fields: &str) -> ModelConfig {
    ModelConfig::from_json(&format!(
        r#"{{"model_type": "{model_type}", "vocab_size": {VOCABULARY}, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "initializer_range": 0.15, "pad_token_id": 0{fields}}}"#
    ))
    .expect("a valid config")
}

/// The small config of every architecture, and one for each other way a layer can be put together, with a name.
pub fn configs() -> Vec<(&'static str, ModelConfig)> {
    let tiny = |architecture: &'static Architecture| {
        let name = architecture.model_type;
        (name, architecture.tiny_config().unwrap_or_else(|error| panic!("{name}: {error}")))
    };
    ARCHITECTURES.iter().map(tiny).chain(variants()).chain(crate::mamba::variants()).collect()
}

/// Configs that use the fields which the small ones leave alone.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    vec![
        (
            "retnet, grouped, mapped, without gate",
            config(
                "retnet",
                r#", "num_heads": 4, "num_kv_heads": 2, "feature_map": "swish", "use_output_gate": false"#,
            ),
        ),
        (
            "gla, convolutions, grouped, mapped, clamped, tied",
            config(
                "gla",
                r#", "num_heads": 3, "num_kv_heads": 1, "expand_k": 0.5, "use_short_conv": true, "feature_map": "relu",
                    "clamp_min": -0.03, "tie_word_embeddings": true"#,
            ),
        ),
        (
            "gla, norm without weight",
            config("gla", r#", "num_heads": 2, "elementwise_affine": false, "fuse_norm": false"#),
        ),
        (
            "gla, one layer of windowed attention",
            config(
                "gla",
                r#", "num_heads": 2, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}"#,
            ),
        ),
        (
            "delta_net, gated, summed, elu, narrow keys",
            config(
                "delta_net",
                r#", "num_heads": 3, "expand_k": 0.5, "use_gate": true, "qk_norm": "sum", "qk_activation": "elu",
                    "use_beta": false"#,
            ),
        ),
        (
            "delta_net, relu",
            config("delta_net", r#", "num_heads": 2, "conv_size": 3, "qk_norm": "sum", "qk_activation": "relu""#),
        ),
        (
            "delta_net, without convolutions, doubled, one layer of attention",
            config(
                "delta_net",
                r#", "num_heads": 2, "use_short_conv": false, "allow_neg_eigval": true, "qk_activation": "identity",
                    "attn": {"layers": [0], "num_heads": 4, "window_size": 4}"#,
            ),
        ),
        (
            "delta_net, silu without convolutions, ones",
            config("delta_net", r#", "num_heads": 2, "use_short_conv": false, "use_beta": false"#),
        ),
        (
            "gated_deltanet, grouped, doubled, sigmoid gate",
            config(
                "gated_deltanet",
                r#", "num_heads": 2, "num_v_heads": 6, "head_dim": 8, "expand_v": 1.5, "allow_neg_eigval": true,
                    "output_gate_activation": "sigmoid""#,
            ),
        ),
        (
            "gated_deltanet, without gate and convolutions",
            config("gated_deltanet", r#", "num_heads": 2, "head_dim": 12, "use_gate": false, "use_short_conv": false"#),
        ),
        (
            "gated_deltaproduct, three steps, forgetting, doubled",
            config(
                "gated_deltaproduct",
                r#", "num_heads": 2, "head_dim": 8, "num_householder": 3, "use_forget_gate": true,
                    "allow_neg_eigval": true, "use_output_gate": false"#,
            ),
        ),
        (
            "kda, grouped, bounded, doubled",
            config(
                "kda",
                r#", "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5, "safe_gate": true,
                    "lower_bound": -5.0, "allow_neg_eigval": true"#,
            ),
        ),
        (
            "kda, bounded, without convolutions",
            config("kda", r#", "num_heads": 2, "head_dim": 12, "lower_bound": -7, "use_short_conv": false"#),
        ),
        (
            "comba, grouped, without gate and convolutions",
            config(
                "comba",
                r#", "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "use_output_gate": false,
                    "use_short_conv": false"#,
            ),
        ),
        (
            "mesa_net, gated, without a lower bound, all steps",
            config(
                "mesa_net",
                r#", "num_heads": 3, "head_dim": 10, "use_output_gate": true, "lambda_lower_bound": 0.0,
                    "conv_size": 3"#,
            ),
        ),
        (
            "mesa_net, one layer of windowed attention",
            config(
                "mesa_net",
                r#", "num_heads": 2, "head_dim": 8, "max_cg_step_training": 5, "max_cg_step_decoding": 5,
                    "attn": {"layers": [0], "num_heads": 4, "window_size": 4}"#,
            ),
        ),
        (
            "linear_attn, grouped, tied products, normalised",
            config(
                "linear_attn",
                r#", "num_heads": 4, "num_kv_heads": 2, "expand_v": 2.0, "tie_feature_map_qk": true,
                    "elementwise_affine": false"#,
            ),
        ),
        (
            "linear_attn, hedgehog, tied, normaliser",
            config(
                "linear_attn",
                r#", "num_heads": 2, "feature_map": "hedgehog", "tie_feature_map_qk": true, "norm_feature_map": true"#,
            ),
        ),
        (
            "linear_attn, t2r, sums of queries and keys",
            config("linear_attn", r#", "num_heads": 2, "feature_map": "t2r", "norm_q": true, "norm_k": true"#),
        ),
        ("linear_attn, dpfp", config("linear_attn", r#", "num_heads": 4, "feature_map": "dpfp", "norm_k": true"#)),
        (
            "linear_attn, elu, normaliser",
            config("linear_attn", r#", "num_heads": 2, "feature_map": "elu", "norm_feature_map": true"#),
        ),
        ("linear_attn, identity", config("linear_attn", r#", "num_heads": 2, "feature_map": "identity""#)),
        ("linear_attn, relu", config("linear_attn", r#", "num_heads": 2, "feature_map": "relu", "norm_q": true"#)),
        ("based, wide", config("based", r#", "num_heads": 3, "num_key_value_heads": 3, "feature_dim": 9"#)),
        (
            "rebased, without a norm",
            config("rebased", r#", "num_heads": 2, "normalize": false, "use_beta": false, "eps": 0.1"#),
        ),
        (
            "rebased, the norm alone",
            config(
                "rebased",
                r#", "num_heads": 2, "use_gamma": false, "use_beta": false,
                    "eps": 0.1"#,
            ),
        ),
        (
            "nsa, two blocks by ties, biases, no window",
            config(
                "nsa",
                r#", "num_heads": 4, "num_kv_heads": null, "head_dim": 6, "block_size": 4, "block_counts": 2,
                    "window_size": 0, "qkv_bias": true"#,
            ),
        ),
        (
            "rwkv6, wide keys, narrow values, norms without biases, no norm of the embedding",
            config(
                "rwkv6",
                r#", "num_heads": 3, "expand_k": 1.5, "expand_v": 0.5, "proj_low_rank_dim": 5, "gate_low_rank_dim": 7,
                    "norm_bias": false, "norm_first": false, "use_l2warp": true, "tie_word_embeddings": true"#,
            ),
        ),
        (
            "rwkv6, one layer of windowed attention",
            config(
                "rwkv6",
                r#", "num_heads": 2, "attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}"#,
            ),
        ),
        (
            "rwkv7, wide values, ranks of the widths, unfused norms",
            config(
                "rwkv7",
                r#", "head_dim": null, "num_heads": 4, "value_dim": 96, "decay_low_rank_dim": null, "fuse_norm": false,
                    "gate_low_rank_dim": null, "a_low_rank_dim": null, "v_low_rank_dim": null, "use_l2warp": false"#,
            ),
        ),
        (
            "rwkv6 and rwkv7 as mixers of a pattern",
            config(
                "hybrid",
                r#", "num_heads": 2, "num_hidden_layers": 4, "mixers": ["gla", {"model_type": "rwkv7", "head_dim": 24},
                    {"model_type": "rwkv6", "proj_low_rank_dim": 8}, {"model_type": "rwkv7", "head_dim": 24}]"#,
            ),
        ),
        (
            "rwkv7, layers of attention before and between",
            config(
                "rwkv7",
                r#", "head_dim": 16, "num_hidden_layers": 4, "norm_bias": false, "norm_first": false,
                    "value_dim": [48, 48, 48, 48],
                    "attn": [{"layers": [0], "num_heads": 2, "window_size": 4}, {"layers": [2], "num_heads": 4, "window_size": 3}]"#,
            ),
        ),
        // Without the norm the bias of keys shifts all scores of a query alike, and has no gradient but rounding.
        (
            "forgetting_transformer, biases, norms",
            config("forgetting_transformer", r#", "num_heads": 2, "qkv_bias": true, "qk_norm": true"#),
        ),
        (
            "mla, queries in one map, no window",
            config(
                "mla",
                r#", "num_heads": 3, "q_lora_rank": null, "kv_lora_rank": 20, "qk_head_dim": null,
                    "qk_nope_head_dim": 9, "qk_rope_head_dim": 4, "v_head_dim": 16"#,
            ),
        ),
        (
            "path_attn, whole map, no convolution",
            config("path_attn", r#", "num_heads": 2, "use_low_rank_w": false, "use_w_shortconv": false"#),
        ),
        (
            "transformer, norms, biases",
            config("transformer", r#", "num_heads": 4, "qk_norm": true, "qkv_bias": true, "hidden_act": "powlu""#),
        ),
        (
            "transformer, window of one",
            config("transformer", r#", "num_heads": 4, "num_kv_heads": 1, "window_size": 1"#),
        ),
        (
            "abc, convolutions, not rotated, clamped",
            config(
                "abc",
                r#", "num_heads": 3, "num_slots": null, "expand_k": 1.0, "use_short_conv": true, "use_rope": false,
                    "clamp_min": -0.2, "clamp_max": 0.3"#,
            ),
        ),
        (
            "abc, no bounds on the scores, norm without weight",
            config(
                "abc",
                r#", "num_heads": 2, "num_slots": 7, "exapnd_k": 1, "clamp_min": null, "clamp_max": null,
                    "elementwise_affine": false"#,
            ),
        ),
        (
            "gsa, convolutions, grouped, relu",
            config(
                "gsa",
                r#", "num_heads": 4, "num_kv_heads": 2, "num_slots": 7, "use_short_conv": true, "feature_map": "relu",
                    "gate_logit_normalizer": 4"#,
            ),
        ),
        (
            "gsa, learned map, norm without weight",
            config(
                "gsa",
                r#", "num_heads": 3, "num_slots": null, "expand_k": 0.5, "feature_map": "t2r",
                    "elementwise_affine": false"#,
            ),
        ),
        ("hgrn, convolutions, four layers", config("hgrn", r#", "use_short_conv": true, "num_hidden_layers": 4"#)),
        (
            "hgrn, wide, without bounds, norm without weight",
            config("hgrn", r#", "expand_ratio": 1.5, "use_lower_bound": false, "elementwise_affine": false"#),
        ),
        (
            "hgrn, one layer of attention",
            config("hgrn", r#", "num_hidden_layers": 3, "attn": {"layers": [0], "num_heads": 4, "window_size": 5}"#),
        ),
        (
            "hgrn2, convolutions, four layers, heads by number",
            config(
                "hgrn2",
                r#", "num_heads": 3, "expand_ratio": null, "use_short_conv": true, "num_hidden_layers": 4"#,
            ),
        ),
        (
            "hgrn2, heads that do not fill the width, without bounds",
            config("hgrn2", r#", "expand_ratio": 10, "use_lower_bound": false"#),
        ),
        (
            "lightnet, convolutions, wide keys",
            config(
                "lightnet",
                r#", "num_heads": 2, "expand_ratio": 31, "gate_low_rank_dim": 5, "use_short_conv": true"#,
            ),
        ),
        (
            "mixers of one kind with bounds and one without",
            config("hybrid", r#", "expand_ratio": 16, "mixers": ["lightnet", "hgrn2"]"#),
        ),
    ]
}

/// The model of a config, from a fixed seed. What RWKV starts at zero, the output maps among it, is moved off there: a
/// layer whose output is zero would agree with any other.
pub fn model(config: &ModelConfig, device: &Device) -> CausalLm {
    let model = CausalLm::init(config, 11, device).expect("a model");
    let rwkv = |mixer: &MixerConfig| matches!(mixer, MixerConfig::Rwkv6(_) | MixerConfig::Rwkv7(_));
    match config.layers().iter().any(|layer| rwkv(&layer.mixer)) {
        true => model.map(&mut Shake(0)),
        false => model,
    }
}

/// Adds a small number to every element of every parameter.
struct Shake(u64);

impl ModuleMapper for Shake {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        self.0 += 1;
        let shape = value.dims();
        let by = uniform(self.0, shape.iter().product(), (-0.2, 0.2));
        let moved = value.clone().detach() + tensor(&by, shape, &value.device(), value.dtype());
        Param::from_mapped_value(id, moved.detach().set_require_grad(value.is_require_grad()), mapper)
    }
}

/// `[rows, tokens]` of ids, the same on every device. None is the padding.
pub fn ids(rows: usize, tokens: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> =
        (0..rows * tokens).map(|i| 1 + (i * i * 7 + i * 13 + 5) as i32 % (VOCABULARY as i32 - 1)).collect();
    Tensor::from_data(TensorData::new(ids, [rows, tokens]), device)
}

/// The gradient of every parameter by its name; empty where the loss does not depend on it.
pub fn parameter_gradients(model: &CausalLm, gradients: Gradients) -> BTreeMap<String, Vec<f64>> {
    struct Collect(Gradients, ParamPath, BTreeMap<String, Vec<f64>>);
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = param.val().grad(&self.0).map(numbers).unwrap_or_default();
            self.2.insert(self.1.name(), gradient);
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.1.enter(name, container_type);
        }
        fn exit_module(&mut self, _: &str, container_type: &str) {
            self.1.exit(container_type);
        }
    }
    let mut collect = Collect(gradients, model.param_path(), BTreeMap::new());
    model.visit(&mut collect);
    collect.2
}

/// The numbers of every parameter by its name, in the order of the fields.
pub fn parameter_values(model: &CausalLm) -> Vec<(String, TensorData)> {
    struct Collect(ParamPath, Vec<(String, TensorData)>);
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push((self.0.name(), param.val().into_data()));
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.0.enter(name, container_type);
        }
        fn exit_module(&mut self, _: &str, container_type: &str) {
            self.0.exit(container_type);
        }
    }
    let mut collect = Collect(model.param_path(), Vec::new());
    model.visit(&mut collect);
    collect.1
}
