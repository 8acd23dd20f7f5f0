//! Mamba, Mamba2 and Samba: how their parameters start, and what their configs may say.

use std::path::Path;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use burn_fla_nn::hub::{load_model, read_safetensors, write_safetensors};
use burn_fla_nn::layers::{Mamba, Mamba2, Mamba2Config, MambaConfig, MixerConfig, StepSizes};
use burn_fla_nn::{CausalLm, Compute, ModelConfig, NnError};
use burn_fla_tests::{assert_close, numbers, ratio, reference_device};

use crate::common::{config, golden, ids, model};

/// Configs that use the fields which the small ones leave alone.
pub fn variants() -> Vec<(&'static str, ModelConfig)> {
    vec![
        (
            "mamba, biases, narrow steps, no convolution bias, f32 stream",
            config(
                "mamba",
                r#", "state_size": 3, "expand": 1.5, "intermediate_size": 72, "dt_rank": 5, "conv_kernel": 3,
                    "use_bias": true, "use_conv_bias": false, "residual_in_fp32": true, "dt_init_scheme": "constant",
                    "rescale_prenorm_residual": true"#,
            ),
        ),
        (
            "mamba2, groups, norm first, D by channel, limited steps",
            config(
                "mamba2",
                r#", "head_dim": 12, "num_heads": 8, "n_groups": 2, "state_size": 6, "norm_before_gate": true,
                    "D_has_hdim": true, "dt_limit": [0.01, 0.08], "use_bias": true, "intermediate_size": null"#,
            ),
        ),
        (
            "mamba2, groups, gate first, narrow convolution without bias",
            config(
                "mamba2",
                r#", "head_dim": 12, "n_groups": 4, "state_size": 5, "conv_kernel": 2, "use_conv_bias": false,
                    "conv_init": 0.4, "rescale_prenorm_residual": false, "intermediate_size": null"#,
            ),
        ),
        (
            "mamba2, without norm, tied",
            config(
                "mamba2",
                r#", "head_dim": 24, "state_size": 5, "rmsnorm": false, "dt_limit": [0.0, Infinity],
                    "tie_word_embeddings": true, "intermediate_size": null"#,
            ),
        ),
        (
            "samba, selective layers alone",
            config("samba", r#", "attn": null, "intermediate_size": 96, "time_step_rank": 2, "use_bias": true"#),
        ),
        (
            "mixers with mamba and mamba2",
            config(
                "hybrid",
                r#", "num_heads": 2, "mixers": [{"model_type": "mamba", "expand": 1}, {"model_type": "mamba2",
                    "head_dim": 8, "n_groups": 3, "state_size": 4}]"#,
            ),
        ),
    ]
}

/// Panics where the numbers are not even draws from `low` to `high`: within the ends, near both, and with the mean and
/// the variance to five standard errors.
fn assert_even(what: &str, x: &[f64], low: f64, high: f64) {
    let (count, width) = (x.len() as f64, high - low);
    let mean = x.iter().sum::<f64>() / count;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    let (least, most) = x.iter().fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
    let rounding = 1e-5 * width;
    assert!(least >= low - rounding && most <= high + rounding, "{what}: from {least} to {most}, not {low} to {high}");
    // The chance that none of n draws falls into a share s at an end is e^(−n s).
    let end = 12.0 * width / count;
    assert!(least <= low + end && most >= high - end, "{what}: from {least} to {most}, not {low} to {high}");
    assert!((mean - (low + high) / 2.0).abs() < 5.0 * width / (12.0 * count).sqrt(), "{what}: mean {mean}");
    // The variance of a squared even deviate is w⁴/180.
    assert!((variance - width.powi(2) / 12.0).abs() < 5.0 * width.powi(2) / (180.0 * count).sqrt(), "{what}");
}

fn assert_normal(what: &str, x: &[f64], std: f64) {
    let count = x.len() as f64;
    let mean = x.iter().sum::<f64>() / count;
    let found = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt();
    assert!(mean.abs() < 5.0 * std / count.sqrt(), "{what}: mean {mean}");
    assert!((found / std - 1.0).abs() < 5.0 / (2.0 * count).sqrt(), "{what}: deviation {found}");
    // An even distribution of this deviation ends at √3 of it.
    assert!(x.iter().any(|x| x.abs() > 2.0 * std), "{what}: no tail");
}

fn values<const D: usize>(param: &Param<Tensor<D>>) -> Vec<f64> {
    numbers(param.val())
}

fn maybe(bias: &Option<Param<Tensor<1>>>) -> Vec<f64> {
    values(bias.as_ref().expect("a bias"))
}

/// The logarithms of the step sizes that follow from a bias.
fn log_steps(bias: &[f64]) -> Vec<f64> {
    bias.iter().map(|b| b.exp().ln_1p().ln()).collect()
}

fn mamba(config: MambaConfig, device: &Device) -> Mamba {
    config.init(5, device).expect("a layer")
}

fn mamba2(config: Mamba2Config, device: &Device) -> Mamba2 {
    config.init(5, device).expect("a layer")
}

#[test]
fn mamba_starts_as_it_should() {
    let device = reference_device();
    let (hidden, inner) = (320, 640);
    let layer = mamba(MambaConfig::new(hidden, inner), &device);
    assert_eq!(layer.dt_proj.weight.dims(), [inner, 20]);
    assert_even("taps", &values(&layer.conv1d.weight), -0.5, 0.5);
    assert_even("bias of the convolution", &maybe(&layer.conv1d.bias), -0.5, 0.5);
    let bound = 20f64.powf(-0.5);
    assert_even("dt_proj", &values(&layer.dt_proj.weight), -bound, bound);
    let (low, high) = (0.001f64.ln(), 0.1f64.ln());
    assert_even("step sizes", &log_steps(&maybe(&layer.dt_proj.bias)), low, high);
    let rows = (0..inner).flat_map(|_| (1..=16).map(|n| f64::from(n).ln())).collect::<Vec<_>>();
    assert_close("A_log", &values(&layer.A_log), &rows, 1e-7);
    assert_eq!(values(&layer.D), vec![1.0; inner]);
    for map in [&layer.in_proj, &layer.x_proj, &layer.out_proj] {
        assert_normal("a matrix", &values(&map.weight), 0.02);
        assert!(map.bias.is_none());
    }
    let sizes = StepSizes::new().with_min(0.01).with_max(1.0).with_floor(0.1);
    let other = MambaConfig::new(hidden, inner)
        .with_dt_rank(Some(4))
        .with_dt_scale(3.0)
        .with_dt_init_constant(true)
        .with_step_sizes(sizes)
        .with_conv_kernel(9)
        .with_rescale_layers(Some(6));
    let layer = mamba(other, &device);
    assert_eq!(values(&layer.dt_proj.weight), vec![1.5; inner * 4]);
    assert_even("nine taps", &values(&layer.conv1d.weight), -1.0 / 3.0, 1.0 / 3.0);
    let bound = ((inner * 6) as f64).powf(-0.5);
    assert_even("a rescaled out_proj", &values(&layer.out_proj.weight), -bound, bound);
    // Half of the draws lie below the floor, and none of the steps.
    let steps = log_steps(&maybe(&layer.dt_proj.bias));
    let (floor, above): (Vec<f64>, Vec<f64>) = steps.iter().partition(|step| **step < 0.1f64.ln() + 1e-5);
    assert!(floor.iter().all(|step| (step - 0.1f64.ln()).abs() < 1e-5));
    assert!((floor.len() as f64 / inner as f64 - 0.5).abs() < 5.0 * 0.5 / (inner as f64).sqrt());
    assert_even("steps above the floor", &above, 0.1f64.ln(), 0.0);
}

#[test]
fn mamba2_starts_as_it_should() {
    let device = reference_device();
    let (hidden, inner) = (256, 1024);
    let plain = Mamba2Config::new(hidden, inner).with_head_dim(2).with_state_size(16).with_n_groups(4);
    let layer = mamba2(plain.clone(), &device);
    assert_eq!(layer.in_proj.weight.dims(), [2 * inner + 2 * 4 * 16 + 512, hidden]);
    assert_normal("taps", &values(&layer.conv1d.weight), 0.02);
    assert_eq!(maybe(&layer.conv1d.bias), vec![0.0; inner + 2 * 4 * 16]);
    let a = |layer: &Mamba2| values(&layer.A_log).into_iter().map(f64::exp).collect::<Vec<_>>();
    assert_even("A", &a(&layer), 1.0, 16.0);
    assert_even("step sizes", &log_steps(&values(&layer.dt_bias)), 0.001f64.ln(), 0.1f64.ln());
    assert_eq!(values(&layer.D), vec![1.0; 512]);
    assert_eq!(values(&layer.norm.as_ref().expect("a norm").weight), vec![1.0; inner]);
    assert_normal("in_proj", &values(&layer.in_proj.weight), 0.02);
    assert_normal("out_proj", &values(&layer.out_proj.weight), 0.02);
    let other = plain
        .with_conv_init(Some(0.3))
        .with_a_init_range((2.0, 3.0))
        .with_d_has_hdim(true)
        .with_rescale_layers(Some(3))
        .with_rmsnorm(false);
    let layer = mamba2(other, &device);
    assert_even("taps", &values(&layer.conv1d.weight), -0.3, 0.3);
    assert_even("A", &a(&layer), 2.0, 3.0);
    assert_eq!(values(&layer.D), vec![1.0; inner]);
    let bound = ((inner * 3) as f64).powf(-0.5);
    assert_even("out_proj", &values(&layer.out_proj.weight), -bound, bound);
    assert!(layer.norm.is_none());
}

/// A range of one number leaves nothing of the bias of the step sizes.
#[test]
fn step_sizes_stay_within_their_limits() {
    let device = reference_device();
    let logits = |limit: &str, steps: &str| {
        let fields = format!(r#", "head_dim": 12, "state_size": 6, "intermediate_size": null{limit}{steps}"#);
        let model = model(&config("mamba2", &fields), &device);
        numbers(model.forward(ids(1, 20, &device), None, Compute::f32()).expect("logits"))
    };
    let (short, long) = (r#", "dt_min": 0.01, "dt_max": 0.01"#, r#", "dt_min": 0.9, "dt_max": 0.9"#);
    let point = r#", "dt_limit": [0.2, 0.2]"#;
    assert_eq!(logits(point, short), logits(point, long));
    assert!(ratio(&logits("", short), &logits("", long)) > 1e-3);
    // Each end by itself.
    let (most, least) = (r#", "dt_limit": [0.0, 0.2]"#, r#", "dt_limit": [0.3, Infinity]"#);
    assert!(ratio(&logits(most, long), &logits("", long)) > 1e-3);
    assert!(ratio(&logits(least, short), &logits("", short)) > 1e-3);
    assert_eq!(logits(r#", "dt_limit": [0.0, {"__float__": "Infinity"}]"#, long), logits("", long));
}

#[test]
fn parameters_have_the_names_of_the_format() {
    let names = |model_type: &str, fields: &str| -> Vec<String> {
        let model = model(&config(model_type, fields), &reference_device());
        model.named_parameters().into_iter().map(|p| p.name).collect()
    };
    let mut found = names("mamba", r#", "intermediate_size": 96, "num_hidden_layers": 1"#);
    found.sort();
    let layer = ["mixer.A_log", "mixer.D", "mixer.conv1d.bias", "mixer.conv1d.weight", "mixer.dt_proj.bias"];
    let rest =
        ["mixer.dt_proj.weight", "mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.x_proj.weight", "norm.weight"];
    let mut expected: Vec<String> = layer.iter().chain(&rest).map(|name| format!("backbone.layers.0.{name}")).collect();
    expected.extend(["backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"].map(String::from));
    expected.sort();
    assert_eq!(found, expected);
    let mamba2 = names("mamba2", r#", "head_dim": 16, "intermediate_size": null"#);
    for name in ["norm.weight", "mixer.norm.weight", "mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.conv1d.bias"] {
        assert!(mamba2.contains(&format!("backbone.layers.1.{name}")), "{name}: {mamba2:?}");
    }
    let attn = r#", "attn": {"layers": [0], "num_heads": 4}, "intermediate_size": 96"#;
    let samba = names("samba", attn);
    for name in ["0.mixer_norm.weight", "0.mixer.q_proj.weight", "0.mlp.gate_proj.weight", "1.mixer.x_proj.weight"] {
        assert!(samba.contains(&format!("backbone.layers.{name}")), "{name}: {samba:?}");
    }
}

#[test]
fn wrong_fields_are_named() {
    let error = |model_type: &str, fields: &str| {
        let json = format!(
            r#"{{"model_type": "{model_type}", "vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2{fields}}}"#
        );
        match ModelConfig::from_json(&json).expect_err(fields) {
            NnError::Config { field, .. } => field,
            other => panic!("{fields}: {other}"),
        }
    };
    for (fields, field) in [
        (r#", "intermediate_size": 64"#, "intermediate_size"),
        (r#", "expand": 0.001"#, "expand"),
        (r#", "hidden_act": "gelu""#, "hidden_act"),
        (r#", "dt_init_scheme": "normal""#, "dt_init_scheme"),
        (r#", "dt_rank": "full""#, "dt_rank"),
        (r#", "dt_max": 0.0001"#, "dt_max"),
        (r#", "conv_kernel": 17"#, "conv_kernel"),
        (r#", "attn": {"layers": [1], "num_heads": 4}"#, "attn"),
    ] {
        assert_eq!(error("mamba", fields), field);
    }
    for (fields, field) in [
        (r#", "head_dim": 13"#, "head_dim"),
        (r#", "head_dim": 16, "num_heads": 5"#, "num_heads"),
        (r#", "head_dim": 16, "n_groups": 4"#, "n_groups"),
        (r#", "head_dim": 16, "A_init_range": [0, 3]"#, "A_init_range"),
        (r#", "head_dim": 16, "A_init_range": [4, 3]"#, "A_init_range"),
        (r#", "head_dim": 16, "dt_limit": [-1.0, 3]"#, "dt_limit"),
        (r#", "head_dim": 16, "dt_limit": 3"#, "dt_limit"),
        (r#", "head_dim": 16, "conv_init": -0.1"#, "conv_init"),
    ] {
        assert_eq!(error("mamba2", fields), field);
    }
    assert_eq!(error("samba", r#", "attn": null, "time_step_min": 1"#), "time_step_max");
    assert_eq!(error("samba", r#", "attn": null, "intermediate_size": 64"#), "intermediate_size");
    assert_eq!(error("samba", r#", "attn": {"layers": [2], "num_heads": 4}"#), "attn.layers");
}

#[test]
fn samba_has_softmax_attention_in_every_second_layer() {
    let attention = |fields: &str| -> Vec<usize> {
        let json = format!(r#"{{"model_type": "samba"{fields}}}"#);
        let config = ModelConfig::from_json(&json).unwrap_or_else(|error| panic!("{fields}: {error}"));
        let is = |(layer, mixer): (usize, &MixerConfig)| match mixer {
            MixerConfig::Attention(attention) => {
                assert_eq!((attention.num_heads, attention.window_size), (18, Some(2048)));
                Some(layer)
            }
            _ => None,
        };
        config.layers().iter().map(|layer| &layer.mixer).enumerate().filter_map(is).collect()
    };
    assert_eq!(attention(""), [1, 3, 5, 7, 9, 11, 13, 15, 17]);
    assert_eq!(attention(r#", "num_hidden_layers": 6"#), [1, 3, 5]);
    assert!(attention(r#", "attn": null"#).is_empty());
    // As old writers left it, in a model of fewer layers.
    let written = r#", "num_hidden_layers": 4, "attn": {"layers": [1, 3, 5, 7, 9, 11, 13, 15, 17], "num_heads": 18,
        "num_kv_heads": 18, "qkv_bias": false, "window_size": 2048, "rope_theta": 10000.0}"#;
    assert_eq!(attention(written), [1, 3]);
    // Widths of the feed-forward networks follow from hidden_ratio alone.
    let json = r#"{"model_type": "samba", "hidden_size": 72, "attn": null, "intermediate_size": 144,
        "hidden_ratio": 6, "num_hidden_layers": 1, "vocab_size": 61}"#;
    let config = ModelConfig::from_json(json).expect("valid");
    let model = CausalLm::init(&config, 1, &reference_device()).expect("a model");
    let up = model.named_parameters().into_iter().find(|p| p.name == "backbone.layers.0.mlp.up_proj.weight");
    assert_eq!(up.expect("a network").shape, [512, 72]);
}

/// The first writers of Mamba called the embedding `embedding`.
#[test]
fn an_old_name_of_the_embedding_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = read_safetensors(golden("mamba")).expect("a store");
    let rename = |name: &str| name.replace("embeddings.", "embedding.");
    let tensors: Vec<_> = store.names().map(|name| (rename(name), store.data(name).expect("data"))).collect();
    assert!(tensors.iter().any(|(name, _)| name == "backbone.embedding.weight"));
    write_safetensors(folder.path().join("model.safetensors"), &tensors, &[]).expect("written");
    std::fs::copy(golden("mamba").join("config.json"), folder.path().join("config.json")).expect("a copy");
    let load = |folder: &Path| load_model(folder, &reference_device()).expect("a model");
    let weight = |model: CausalLm| numbers(model.model.embeddings.weight.val());
    assert_eq!(weight(load(folder.path())), weight(load(&golden("mamba"))));
}
