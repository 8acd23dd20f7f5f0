//! What is particular to RWKV6 and RWKV7: how they start, their fields, and files of an older form.

use std::collections::BTreeMap;

use burn::tensor::{DType, TensorData};
use burn_fla_nn::hub::{load_model, save_model, write_safetensors};
use burn_fla_nn::layers::{MixerConfig, Rwkv7Config, SequenceContext};
use burn_fla_nn::modules::FeedForwardConfig;
use burn_fla_nn::{CausalLm, Compute, ModelConfig};
use burn_fla_tests::{numbers, reference_device, tensor, uniform};

use crate::common::{config, ids, model, parameter_values};

/// A new model's parameters.
struct Started(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Started {
    fn new(config: &ModelConfig) -> Self {
        let model = CausalLm::init(config, 3, &reference_device()).expect("a model");
        let values = |data: TensorData| {
            let shape = data.shape().to_vec();
            (shape, data.convert::<f64>().try_to_vec().expect("floats"))
        };
        Self(parameter_values(&model).into_iter().map(|(name, data)| (name, values(data))).collect())
    }

    fn get(&self, name: &str) -> (&[usize], &[f64]) {
        let (shape, values) = self.0.get(name).unwrap_or_else(|| panic!("{name} in {:?}", self.0.keys()));
        (shape, values)
    }

    fn is(&self, name: &str, expected: impl Fn(usize) -> f64) {
        for (i, x) in self.get(name).1.iter().enumerate() {
            assert!((x - expected(i)).abs() < 1e-6, "{name} at {i}: {x}, {}", expected(i));
        }
    }

    fn constant(&self, name: &str, value: f64) {
        self.is(name, |_| value);
    }

    /// Rows or columns, whichever are fewer, are orthogonal and of length `gain`.
    fn orthogonal(&self, name: &str, gain: f64) {
        let (shape, x) = self.get(name);
        let [rows, columns] = [shape[0], shape[1]];
        let short = rows.min(columns);
        for i in 0..short {
            for j in 0..short {
                let dot: f64 = match rows <= columns {
                    true => (0..columns).map(|k| x[i * columns + k] * x[j * columns + k]).sum(),
                    false => (0..rows).map(|k| x[k * columns + i] * x[k * columns + j]).sum(),
                };
                let expected = if i == j { gain * gain } else { 0.0 };
                assert!((dot - expected).abs() < 1e-5 * gain * gain, "{name}, {i} and {j}: {dot}, {expected}");
            }
        }
    }

    /// Evenly from ±`bound`: the bound is nearly reached and never passed, and mean and variance are those of even draws,
    /// to five standard errors.
    fn even(&self, name: &str, bound: f64) {
        let x = self.get(name).1;
        let count = x.len() as f64;
        let largest = x.iter().fold(0f64, |a, x| a.max(x.abs()));
        assert!(
            largest <= bound * (1.0 + 1e-6) && largest > bound * (1.0 - 20.0 / count),
            "{name}: {largest}, {bound}"
        );
        let mean = x.iter().sum::<f64>() / count;
        let variance = x.iter().map(|x| x * x).sum::<f64>() / count;
        assert!(mean.abs() < 5.0 * bound / (3.0 * count).sqrt(), "{name}: {mean}");
        // The variance of x² is 4/45 of the bound's fourth power.
        let error = 5.0 * (4.0 / 45.0 / count).sqrt();
        assert!((variance / (bound * bound) - 1.0 / 3.0).abs() < error, "{name}: {variance}");
    }

    /// N(0, σ²), to five standard errors.
    fn normal(&self, name: &str, std: f64) {
        let x = self.get(name).1;
        let count = x.len() as f64;
        let mean = x.iter().sum::<f64>() / count;
        let variance = x.iter().map(|x| x * x).sum::<f64>() / count;
        assert!(mean.abs() < 5.0 * std / count.sqrt(), "{name}: {mean}");
        assert!((variance / (std * std) - 1.0).abs() < 5.0 * (2.0 / count).sqrt(), "{name}: {variance}");
        // Even draws of this variance would end at √3 σ.
        assert!(x.iter().any(|x| x.abs() > 2.0 * std), "{name}");
    }

    fn low_rank(&self, name: &str) {
        self.constant(&format!("{name}.lora.0.weight"), 0.0);
        let second = format!("{name}.lora.2.weight");
        let shape = self.get(&second).0;
        self.orthogonal(&second, 0.1 * (shape[1] as f64 / shape[0] as f64).sqrt().max(1.0));
    }
}

#[test]
fn rwkv7_starts_as_its_formulas_say() {
    let (d, hd, layers) = (48, 24, 3);
    // Ranks on both sides of the widths, for both gains of the orthogonal maps.
    let config = config(
        "rwkv7",
        r#", "head_dim": 24, "num_hidden_layers": 3, "decay_low_rank_dim": 60, "gate_low_rank_dim": 8,
            "a_low_rank_dim": 8, "v_low_rank_dim": 8, "attn": {"layers": [2], "num_heads": 2}"#,
    );
    let started = Started::new(&config);
    started.even("model.embeddings.weight", 1e-4);
    // The vocabulary of 61 is larger than the width.
    started.orthogonal("lm_head.weight", 0.5 * (61f64 / 48.0).sqrt());
    started.constant("model.layers.0.pre_norm.weight", 1.0);
    for layer in 0..layers {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let rho = 1.0 - layer as f64 / layers as f64;
        let r1 = layer as f64 / (layers - 1) as f64;
        started.is(&at("ffn.x_k"), |n| 1.0 - (n as f64 / d as f64).powf(rho.powi(4)));
        started.orthogonal(&at("ffn.key.weight"), 1.0);
        started.constant(&at("ffn.value.weight"), 0.0);
        started.constant(&at("attn_norm.weight"), 1.0);
        started.constant(&at("ffn_norm.bias"), 0.0);
        if layer == 2 {
            started.normal(&at("attn.q_proj.weight"), 0.15);
            started.even(&at("attn.o_proj.weight"), (d as f64 * 2.0 * layers as f64).powf(-0.5));
            continue;
        }
        for (name, power) in [("x_r", 0.2), ("x_g", 0.2), ("x_w", 0.9), ("x_a", 0.9), ("x_k", 0.7), ("x_v", 0.7)] {
            let name = at(&format!("attn.{name}"));
            assert_eq!(started.get(&name).0, [1, 1, d]);
            started.is(&name, |n| 1.0 - (n as f64 / d as f64).powf(power * rho));
        }
        let lin = |n: usize| n as f64 / (d as f64 - 1.0) - 0.5;
        let zigzag = |n: usize| {
            let half = (hd as f64 - 1.0) / 2.0;
            let y = ((n % hd) as f64 - half) / half;
            y * y.abs()
        };
        started.is(&at("attn.k_k"), |n| 0.71 - 0.1 * lin(n));
        started.constant(&at("attn.k_a"), 1.02);
        started.constant(&at("attn.r_k"), -0.04);
        started.is(&at("attn.w_lora.lora.2.bias"), |n| {
            -6.0 + 6.0 * (n as f64 / (d as f64 - 1.0)).powf(1.0 + r1.powf(0.3)) + 0.5 + 2.5 * zigzag(n)
        });
        started.is(&at("attn.a_lora.lora.2.bias"), |n| -0.19 + 0.3 * zigzag(n) + 0.4 * lin(n));
        for name in ["w_lora", "a_lora", "g_lora"] {
            started.low_rank(&at(&format!("attn.{name}")));
        }
        assert!(!started.0.contains_key(&at("attn.g_lora.lora.2.bias")));
        assert_eq!(started.0.contains_key(&at("attn.v_lora.lora.0.weight")), layer > 0);
        if layer > 0 {
            started.low_rank(&at("attn.v_lora"));
            started.is(&at("attn.v_lora.lora.2.bias"), |n| 0.73 - 0.4 * lin(n));
        }
        started.orthogonal(&at("attn.r_proj.weight"), 1.0);
        started.orthogonal(&at("attn.k_proj.weight"), 0.1);
        started.orthogonal(&at("attn.v_proj.weight"), 1.0);
        started.constant(&at("attn.o_proj.weight"), 0.0);
        started.constant(&at("attn.g_norm.weight"), ((layer + 1) as f64 / layers as f64).powf(0.7));
        started.constant(&at("attn.g_norm.bias"), 0.0);
    }
    // A vocabulary that is the smaller.
    let narrow = r#"{"model_type": "rwkv7", "vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 2}"#;
    Started::new(&ModelConfig::from_json(narrow).expect("valid")).orthogonal("lm_head.weight", 0.5);
}

#[test]
fn rwkv6_starts_as_its_formulas_say() {
    let config =
        config("rwkv6", r#", "num_heads": 2, "num_hidden_layers": 3, "attn": {"layers": [1], "num_heads": 2}"#);
    let started = Started::new(&config);
    started.normal("model.embeddings.weight", 0.15);
    started.normal("lm_head.weight", 0.15);
    let xavier = |name: &str| {
        let shape = started.get(name).0;
        started.even(name, 2f64.powf(-2.5) * (6.0 / (shape[0] + shape[1]) as f64).sqrt());
    };
    for layer in 0..3 {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        started.normal(&at("ffn.key.linear.weight"), 0.15);
        started.normal(&at("ffn.value.weight"), 0.15);
        started.normal(&at("ffn.receptance.linear.weight"), 0.15);
        started.constant(&at("ffn.key.mu"), 0.0);
        started.constant(&at("ffn.receptance.mu"), 0.0);
        if layer == 1 {
            started.normal(&at("attn.k_proj.weight"), 0.15);
            started.even(&at("attn.o_proj.weight"), (48.0f64 * 6.0).powf(-0.5));
            continue;
        }
        for name in ["x_proj.0.linear", "x_proj.2", "r_proj.linear", "k_proj.linear", "v_proj.linear", "g_proj.linear"]
        {
            xavier(&at(&format!("attn.{name}.weight")));
        }
        xavier(&at("attn.o_proj.weight"));
        started.constant(&at("attn.x_proj.0.mu"), 0.0);
        started.constant(&at("attn.x_bias"), 0.0);
        started.constant(&at("attn.bonus"), 0.0);
        started.low_rank(&at("attn.w_proj.linear"));
        started.constant(&at("attn.w_proj.linear.lora.2.bias"), 0.0);
        started.constant(&at("attn.g_norm.weight"), 1.0);
    }
}

#[test]
fn mixes_that_older_files_hold_together_are_read() {
    let device = reference_device();
    let config = config("rwkv7", r#", "head_dim": 24"#);
    let model = model(&config, &device);
    let folder = tempfile::tempdir().expect("a folder");
    save_model(&model, folder.path(), DType::F32).expect("saved");
    let mut tensors = parameter_values(&model);
    for layer in 0..2 {
        let at = |name: &str| format!("model.layers.{layer}.attn.{name}");
        let mut stack = Vec::new();
        for name in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"] {
            let index = tensors.iter().position(|(known, _)| *known == at(name)).expect(name);
            stack.extend(tensors.remove(index).1.try_to_vec::<f32>().expect("floats"));
        }
        tensors.push((at("x_x"), TensorData::new(stack, [6, 48])));
    }
    write_safetensors(folder.path().join("model.safetensors"), &tensors, &[]).expect("written");
    let older = load_model(folder.path(), &device).expect("a model");
    let logits = |model: &CausalLm| numbers(model.forward(ids(1, 9, &device), None, Compute::f32()).expect("logits"));
    assert_eq!(logits(&older), logits(&model));
    // Of another shape, the older tensor is the one that is named.
    let last = tensors.len() - 1;
    tensors[last].1 = TensorData::zeros::<f32, _>([5, 48]);
    write_safetensors(folder.path().join("model.safetensors"), &tensors, &[]).expect("written");
    let error = load_model(folder.path(), &device).expect_err("misshapen").to_string();
    assert!(error.contains("model.layers.1.attn.x_x"), "{error}");
}

#[test]
fn widths_and_ranks_follow_the_fields() {
    let layers = |model_type: &str, fields: &str| {
        let text = format!(r#"{{"model_type": "{model_type}", "num_hidden_layers": 2{fields}}}"#);
        ModelConfig::from_json(&text).map(|config| config.layers().to_vec())
    };
    let size = |model_type: &str, fields: &str| match layers(model_type, fields).expect("valid")[1].feed_forward {
        Some(FeedForwardConfig::Rwkv6 { intermediate_size }) => intermediate_size,
        Some(FeedForwardConfig::Rwkv7 { intermediate_size, layer: [1, 2] }) => intermediate_size,
        ref other => panic!("{other:?}"),
    };
    assert_eq!(size("rwkv6", ""), 7168);
    assert_eq!(size("rwkv6", r#", "hidden_size": 112"#), 416);
    assert_eq!(size("rwkv6", r#", "hidden_size": 112, "hidden_ratio": null"#), 416);
    assert_eq!(size("rwkv7", r#", "hidden_size": 128, "hidden_ratio": null"#), 512);
    assert_eq!(size("rwkv7", r#", "hidden_size": 128, "hidden_ratio": 1.1"#), 160);
    assert_eq!(size("rwkv7", r#", "intermediate_size": 50"#), 50);

    let ranks = |hidden: usize, head: usize| {
        let layer = Rwkv7Config::new(hidden).with_head_dim(head).with_layer(1).with_num_layers(2);
        let layer = layer.init(1, &reference_device()).expect("a layer");
        let v = layer.v_lora.expect("not the first");
        [&layer.w_lora, &layer.a_lora, &v, &layer.g_lora].map(|lora| lora.lora._0.weight.dims()[0])
    };
    // 2.5 √256 = 40, 1.7 √256 = 27.2 and 5 √256 = 80: to the nearest multiple of 32, halves to the even one.
    assert_eq!(ranks(256, 64), [32, 32, 32, 64]);
    assert_eq!(ranks(256, 128), [64, 64, 64, 64]);

    let message = |model_type: &str, fields: &str| layers(model_type, fields).expect_err(fields).to_string();
    for (model_type, fields, words) in [
        ("rwkv7", r#", "head_dim": 60"#, ["head_dim", "2048"]),
        ("rwkv7", r#", "num_heads": 3"#, ["num_heads", "head_dim 64"]),
        ("rwkv7", r#", "value_dim": 3000"#, ["value_dim", "3000"]),
        ("rwkv7", r#", "value_dim": [2048]"#, ["value_dim", "1 entries"]),
        ("rwkv7", r#", "value_dim": [2048, 4096]"#, ["value_dim", "4096"]),
        ("rwkv7", r#", "v_low_rank_dim": 0"#, ["v_low_rank_dim", "0"]),
        ("rwkv7", r#", "hidden_act": "relu""#, ["hidden_act", "sqrelu"]),
        ("rwkv6", r#", "hidden_act": "swish""#, ["hidden_act", "sqrelu"]),
        ("rwkv6", r#", "norm_bias": 1"#, ["norm_bias", "true"]),
        ("rwkv6", r#", "num_heads": 3"#, ["num_heads", "3"]),
        ("rwkv6", r#", "proj_low_rank_dim": 0"#, ["proj_low_rank_dim", "0"]),
        ("rwkv6", r#", "hidden_ratio": -1"#, ["hidden_ratio", "above 0"]),
    ] {
        let message = message(model_type, fields);
        for word in words {
            assert!(message.contains(word), "{fields}: {message}");
        }
    }
    let MixerConfig::Rwkv7(config) =
        &layers("rwkv7", r#", "num_heads": 16, "head_dim": null"#).expect("valid")[0].mixer
    else {
        panic!("a layer of RWKV7")
    };
    assert_eq!(config.head_dim, 128);
    for config in
        [Rwkv7Config::new(0), Rwkv7Config::new(64).with_head_dim(0), Rwkv7Config::new(64).with_value_dim(Some(0))]
    {
        assert!(config.init(1, &reference_device()).is_err());
    }
}

/// Alone, a layer has no layer before it: its values are the first ones, and its map to them gives nothing.
#[test]
fn values_of_other_widths_are_an_error() {
    let device = reference_device();
    let layer = |layer: usize, values: usize| {
        let config = Rwkv7Config::new(32).with_head_dim(16).with_value_dim(Some(values)).with_num_layers(2);
        config.with_layer(layer).init(1, &device).expect("a layer")
    };
    let x = || tensor(&uniform(1, 5 * 32, (-1.0, 1.0)), [1, 5, 32], &device, DType::F32);
    let context = || SequenceContext::new([1, 5], None, Compute::f32(), &device).expect("a context");
    let together = context();
    layer(0, 32).forward(x(), None, &together).expect("an output");
    let error = layer(1, 64).forward(x(), None, &together).expect_err("another width").to_string();
    assert!(error.contains("value_dim"), "{error}");
    layer(1, 64).forward(x(), None, &context()).expect("an output");
}

/// Log decays that reach far below where nothing is left of a state.
#[test]
fn rwkv6_forgets_all_without_harm() {
    let device = reference_device().autodiff();
    let mut layer = burn_fla_nn::layers::Rwkv6Config::new(32, 2).init(1, &device).expect("a layer");
    let bias = layer.w_proj.linear.lora._2.bias.take().expect("a bias");
    let scattered = tensor(&uniform(2, 16, (-100.0, 120.0)), [16], &device, DType::F32);
    layer.w_proj.linear.lora._2.bias = Some(bias.map(|_| scattered.require_grad()));
    let x = tensor(&uniform(1, 80 * 32, (-1.0, 1.0)), [1, 80, 32], &device, DType::F32).require_grad();
    let context = SequenceContext::new([1, 80], None, Compute::f32(), &device).expect("a context");
    let (y, _) = layer.forward(x.clone(), None, &context).expect("an output");
    let gradients = y.clone().sum().backward();
    let finite = |x: Vec<f64>| x.iter().all(|x| x.is_finite());
    assert!(finite(numbers(y)) && finite(numbers(x.grad(&gradients).expect("a gradient"))));
    let bias = layer.w_proj.linear.lora._2.bias.expect("a bias");
    assert!(finite(numbers(bias.grad(&gradients).expect("a gradient"))));
}
