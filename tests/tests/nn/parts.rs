//! Small modules and single layers.

use std::time::Instant;

use burn::module::Param;
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use burn_fla_nn::layers::{AttentionConfig, GlaConfig, RetentionConfig, SequenceContext};
use burn_fla_nn::models::registry::{ARCHITECTURES, HYBRID};
use burn_fla_nn::modules::{
    FeatureMap, GatedMlp, MlpActivation, RotaryTables, cross_entropy, log_sigmoid, repeat_heads, softplus,
};
use burn_fla_nn::{Compute, ModelConfig, ParamSource};
use burn_fla_ops::Engine;
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor, uniform};

#[test]
fn log_sigmoid_is_exact_far_from_zero() {
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    for (name, device) in devices {
        let x = [-1e4, -200.0, -88.0, -30.0, -5.0, -1e-3, 0.0, 1e-3, 2.0, 15.0, 90.0, 1e4];
        let input = tensor(&x, [x.len()], &device.autodiff(), DType::F32).require_grad();
        let y = log_sigmoid(input.clone());
        let gradient = numbers(input.grad(&y.clone().sum().backward()).expect("a gradient"));
        for ((x, y), dx) in x.iter().zip(numbers(y)).zip(gradient) {
            let x = f64::from(*x as f32);
            let expected = x.min(0.0) - (-x.abs()).exp().ln_1p();
            assert!((y - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{name}, {x}: {y}, {expected}");
            let slope = 1.0 / (1.0 + x.exp());
            // At 0 the slope of either side is a subgradient's.
            assert!(x == 0.0 || (dx - slope).abs() < 1e-6, "{name}, {x}: {dx}, {slope}");
        }
    }
}

/// `cargo test --release -p burn-fla-tests --test nn -- --ignored --nocapture log_sigmoid_time`
#[test]
#[ignore = "a measurement of time, to be read by a person: it asserts nothing"]
fn log_sigmoid_time() {
    let device = reference_device().autodiff();
    let x = tensor(&uniform(1, 1 << 18, (-4.0, 8.0)), [1 << 18], &device, DType::F32).require_grad();
    let time = |name: &str, f: &dyn Fn(Tensor<1>) -> Tensor<1>| {
        let run = |backward: bool| {
            let start = Instant::now();
            for _ in 0..50 {
                let y = f(x.clone());
                if backward {
                    y.sum().backward();
                }
            }
            start.elapsed().as_secs_f64() / 50.0 * 1e3
        };
        run(true);
        println!("{name}: forward {:.2} ms, with backward {:.2} ms", run(false), run(true));
    };
    time("min(x, 0) - log(1 + exp(-|x|))", &log_sigmoid);
    time("min(x, 0) - log1p(exp(-|x|))", &|x: Tensor<1>| {
        let tail = x.clone().abs().neg().exp().log1p();
        x.clamp_max(0.0) - tail
    });
    time("Burn's log_sigmoid", &activation::log_sigmoid);
    time("sigmoid(max(x, -30)).log()", &|x| activation::sigmoid(x.clamp_min(-30.0)).log());
}

#[test]
fn cross_entropy_is_exact() {
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    let (rows, vocabulary) = (50, 97);
    // Large logits: nothing may overflow, and nothing be lost beside the largest.
    let logits = uniform(4, rows * vocabulary, (-300.0, 300.0));
    let labels: Vec<i32> = (0..rows as i32).map(|i| if i % 7 == 0 { -100 } else { i * 13 % 97 }).collect();
    let mut sum = 0.0;
    let mut slope = vec![0.0; rows * vocabulary];
    for (i, label) in labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
        let row: Vec<f64> = logits[i * vocabulary..(i + 1) * vocabulary].iter().map(|z| f64::from(*z as f32)).collect();
        let max = row.iter().fold(f64::MIN, |a, z| a.max(*z));
        let total: f64 = row.iter().map(|z| (z - max).exp()).sum();
        sum += max + total.ln() - row[*label as usize];
        for (j, z) in row.iter().enumerate() {
            slope[i * vocabulary + j] = (z - max).exp() / total - f64::from(u8::from(j == *label as usize));
        }
    }
    for (name, device) in devices {
        let device = device.autodiff();
        let z = tensor(&logits, [rows, vocabulary], &device, DType::F32).require_grad();
        let labels = Tensor::<1, Int>::from_data(TensorData::new(labels.clone(), [rows]), &device);
        let loss = cross_entropy(z.clone(), labels);
        let found = numbers(loss.sum.clone())[0];
        assert!((found - sum).abs() < 1e-6 * sum, "{name}: {found}, {sum}");
        assert_eq!(numbers(loss.count)[0], 42.0);
        let gradient = z.grad(&loss.sum.backward()).expect("a gradient");
        assert_close(name, &numbers(gradient), &slope, 1e-5);
    }
}

#[test]
fn feature_maps_follow_their_formulas() {
    let x = uniform(2, 64, (-4.0, 4.0));
    let gelu = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh());
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (name, map) in FeatureMap::NAMES {
        let formula: &dyn Fn(f64) -> f64 = match name {
            "relu" => &|x| x.max(0.0),
            "sigmoid" => &sigmoid,
            "logsigmoid" => &|x| sigmoid(x).ln(),
            "silu" | "swish" => &|x| x * sigmoid(x),
            "sqrelu" => &|x| x.max(0.0).powi(2),
            "gelu" => &gelu,
            other => panic!("{other}"),
        };
        let y = map.apply(tensor(&x, [8, 8], &reference_device(), DType::F32));
        assert_close(name, &numbers(y), &x.iter().map(|x| formula(*x)).collect::<Vec<_>>(), 1e-6);
        let half = map.apply(tensor(&x, [8, 8], &reference_device(), DType::BF16));
        assert_eq!(half.dtype(), DType::BF16);
    }
}

#[test]
fn grouped_heads_serve_neighbours() {
    let x = tensor(&[1.0, 2.0], [1, 1, 2, 1], &reference_device(), DType::F32);
    assert_eq!(numbers(repeat_heads(x, 3)), [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
}

#[test]
fn softplus_keeps_its_digits_far_below_zero() {
    let x = [-80.0, -20.0, -6.9, -5.0, -1.0, 0.0, 0.5, 19.0, 21.0, 300.0f64];
    let device = reference_device().autodiff();
    let leaf: Tensor<1> = tensor(&x, [x.len()], &device, DType::F32).require_grad();
    let y = softplus(leaf.clone());
    let gradient = leaf.grad(&y.clone().sum().backward()).expect("a gradient");
    for ((x, y), slope) in x.iter().zip(numbers(y)).zip(numbers(gradient)) {
        let expected = if *x > 30.0 { *x } else { x.exp().ln_1p() };
        // An exponential is off by as much as its argument: |x| roundings of 6e-8.
        let bound = 1e-7 * x.abs().clamp(2.0, 20.0) + if *x < -30.0 { 1e-5 } else { 0.0 };
        assert!((y / expected - 1.0).abs() < bound, "{x}: {y}");
        let expected = 1.0 / (1.0 + (-x).exp());
        assert!((slope / expected - 1.0).abs() < bound, "{x}: slope {slope}");
    }
}

#[test]
fn rotary_tables_are_right_far_out() {
    let tables = RotaryTables::new(5000, 8, 10_000.0, &reference_device());
    let cos = numbers(tables.cos);
    for (p, i) in [(0, 0), (1, 1), (4999, 0), (4999, 3)] {
        let angle = f64::from(p as f32 * (1.0 / 10_000f64.powf(2.0 * f64::from(i) / 8.0)) as f32);
        assert!((cos[p as usize * 4 + i as usize] - angle.cos()).abs() < 1e-6);
    }
}

#[test]
fn a_layer_stands_alone() {
    let device: Device = reference_device().autodiff();
    let x = tensor(&uniform(3, 2 * 7 * 32, (-1.0, 1.0)), [2, 7, 32], &device, DType::F32).require_grad();
    let context = SequenceContext::new([2, 7], None, Compute::f32(), &device).expect("a context");
    let gla = GlaConfig::new(32, 2).with_use_short_conv(true).init(1, &device).expect("a layer");
    let retention = RetentionConfig::new(32, 2).init(1, &device).expect("a layer");
    let attention = AttentionConfig::new(32, 4).with_window_size(Some(3)).init(1, &device).expect("a layer");
    let (a, state) = gla.forward(x.clone(), None, &context).expect("an output");
    assert!(state.is_none());
    let (b, _) = retention.forward(x.clone(), None, &context).expect("an output");
    let (c, _) = attention.forward(x.clone(), None, &context).expect("an output");
    let sum = a + b + c;
    assert_eq!(sum.dims(), [2, 7, 32]);
    let gradient = x.grad(&sum.sum().backward()).expect("a gradient");
    assert!(numbers(gradient).iter().all(|x| x.is_finite()));
    let longer = SequenceContext::new([2, 8], None, Compute::f32(), &device).expect("a context");
    assert!(gla.forward(x, None, &longer).is_err());
}

#[test]
fn the_power_law_gate_follows_its_formula() {
    let device = reference_device().autodiff();
    let values = [-30.0, -2.0, -1e-3, 0.0, 1e-6, 0.3, 1.0, 4.0, 50.0];
    let gate = |x: f64| {
        let sigmoid = 1.0 / (1.0 + (-x).exp());
        sigmoid * if x > 0.0 { x.powf(3.0 / (x.sqrt() + 1.0)) } else { x }
    };
    // A network of one feature whose maps are the identity: y = act(x) x.
    let source = ParamSource::seeded(1, 0.02, &device);
    let mut network = GatedMlp::new(&source.root(), 1, 1, MlpActivation::PowLu);
    for map in [&mut network.gate_proj, &mut network.up_proj, &mut network.down_proj] {
        map.weight = Param::from_tensor(Tensor::ones([1, 1], &device));
    }
    let x: Tensor<3> = tensor(&values, [1, values.len(), 1], &device, DType::F32).require_grad();
    let y = network.forward(x.clone(), Engine::Auto).expect("an output");
    assert_close("powlu", &numbers(y.clone()), &values.map(|x| gate(x) * x), 1e-6);
    let slope = |x: f64| {
        let h = 1e-6 * x.abs().max(1e-3);
        (gate(x + h) * (x + h) - gate(x - h) * (x - h)) / (2.0 * h)
    };
    let gradient = numbers(x.grad(&y.sum().backward()).expect("a gradient"));
    assert_close("powlu, gradient", &gradient, &values.map(slope), 1e-5);
}

#[test]
fn every_architecture_builds_from_its_defaults() {
    for architecture in ARCHITECTURES {
        let name = architecture.model_type;
        let with = |fields: &str| {
            // A pattern of mixers is the one field that has no default.
            let mixers = if name == HYBRID { r#", "mixers": ["gla"]"# } else { "" };
            ModelConfig::from_json(&format!(r#"{{"model_type": "{name}"{mixers}{fields}}}"#))
        };
        let config = with("").expect(name);
        let expected = match name {
            "mamba" | "mamba2" => (2048, 48),
            "samba" => (2304, 18),
            "gated_deltanet" | "gated_deltaproduct" | "comba" => (2048, 21),
            _ => (2048, 24),
        };
        assert_eq!((config.hidden_size(), config.num_layers()), expected, "{name}");
        assert_eq!(config.vocab_size(), 32_000, "{name}");
        let hybrid = with(r#", "attn": {"layers": [0], "num_heads": 16}"#);
        assert_eq!(hybrid.is_ok(), architecture.hybrid, "{name}: {hybrid:?}");
    }
}
