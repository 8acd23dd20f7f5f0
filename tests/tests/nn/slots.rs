//! What is particular to ABC, GSA, HGRN, HGRN2 and LightNet: names, defaults, bounds between layers, wrong values.

use burn_fla_nn::layers::MixerConfig;
use burn_fla_nn::{Compute, ModelConfig};
use burn_fla_tests::{numbers, reference_device, tensor, uniform};

use crate::common::{config, ids, model};

/// The names of the parameters of layer 1's mixer.
fn names(model_type: &str, fields: &str) -> Vec<String> {
    let model = model(&config(model_type, fields), &reference_device());
    let inside = |name: String| name.strip_prefix("model.layers.1.attn.").map(String::from);
    model.named_parameters().into_iter().filter_map(|p| inside(p.name)).collect()
}

#[test]
fn parameters_have_the_names_of_the_format() {
    let weights = |list: &str| list.split(' ').map(|name| format!("{name}.weight")).collect::<Vec<_>>();
    let check = |model_type, fields, expected: &str| {
        let (mut found, mut expected) = (names(model_type, fields), weights(expected));
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "{model_type}{fields}");
    };
    check("abc", r#", "num_heads": 2"#, "q_proj k_proj v_proj g_proj s_proj g_norm o_proj");
    check(
        "gsa",
        r#", "num_heads": 2, "feature_map": "t2r", "use_short_conv": true"#,
        "q_proj k_proj v_proj f_proj q_conv1d k_conv1d v_conv1d feature_map.layer g_norm o_proj",
    );
    check("hgrn", r#", "use_short_conv": true"#, "i_proj f_proj g_proj i_conv1d f_conv1d g_norm o_proj");
    check("hgrn2", r#", "expand_ratio": 16"#, "q_proj f_proj i_proj g_norm o_proj");
    check("lightnet", r#", "expand_ratio": 16"#, "q_proj k_proj v_proj g_proj.0 g_proj.1 g_norm o_proj");
    for (fields, there) in [("", true), (r#", "use_lower_bound": false"#, false)] {
        let model = model(&config("hgrn", fields), &reference_device());
        assert_eq!(model.named_parameters().iter().any(|p| p.name == "model.lower_bounds"), there);
        let bounds = model.model.lower_bounds.as_ref().map(|bounds| bounds.val().dims());
        assert_eq!(bounds, there.then_some([2, 48]));
    }
}

#[test]
fn defaults_follow_the_format() {
    let of = |model_type: &str| {
        ModelConfig::from_json(&format!(r#"{{"model_type": "{model_type}"}}"#)).expect("a valid config")
    };
    let (abc, gsa, hgrn) = (of("abc"), of("gsa"), of("hgrn"));
    let MixerConfig::Abc(abc) = &abc.layers()[0].mixer else { panic!("abc") };
    assert_eq!((abc.num_heads, abc.num_slots, abc.expand_k, abc.expand_v), (4, Some(64), 0.5, 1.0));
    assert_eq!((abc.clamp_min, abc.clamp_max, abc.use_rope), (Some(-32.0), Some(32.0), true));
    let MixerConfig::Gsa(gsa) = &gsa.layers()[0].mixer else { panic!("gsa") };
    assert_eq!((gsa.num_heads, gsa.num_slots, gsa.expand_k, gsa.gate_logit_normalizer), (4, Some(64), 1.0, 8.0));
    let MixerConfig::Hgrn(hgrn) = &hgrn.layers()[3].mixer else { panic!("hgrn") };
    assert_eq!((hgrn.layer, hgrn.expand_ratio, hgrn.use_lower_bound), (3, 1.0, true));
    let (hgrn2, lightnet) = (of("hgrn2"), of("lightnet"));
    let MixerConfig::Hgrn2(hgrn2) = &hgrn2.layers()[0].mixer else { panic!("hgrn2") };
    assert_eq!((hgrn2.expand_ratio, hgrn2.num_heads), (Some(128), None));
    let MixerConfig::LightNet(lightnet) = &lightnet.layers()[0].mixer else { panic!("lightnet") };
    assert_eq!((lightnet.expand_ratio, lightnet.gate_low_rank_dim), (Some(128), 128));
}

/// The bound of the first layer is 0 whatever the parameter says, and no layer depends on the rows of later ones alone.
#[test]
fn bounds_reach_the_layers_after_the_first() {
    let device = reference_device();
    for model_type in ["hgrn", "hgrn2"] {
        let run = |layers: usize, bounds: bool| {
            let fields = format!(
                r#", "num_hidden_layers": {layers}, "expand_ratio": {}"#,
                if model_type == "hgrn" { 1 } else { 16 }
            );
            let mut model = model(&config(model_type, &fields), &device);
            if bounds {
                let values = uniform(5, layers * 48, (-2.0, 2.0));
                model.model.lower_bounds =
                    model.model.lower_bounds.map(|p| p.map(|p| tensor(&values, [layers, 48], &device, p.dtype())));
            }
            numbers(model.forward(ids(1, 9, &device), None, Compute::f32()).expect("logits"))
        };
        assert_eq!(run(1, false), run(1, true), "{model_type}: the first layer has no bound");
        assert_ne!(run(2, false), run(2, true), "{model_type}: the second has one");
    }
}

/// The softmax layers of a LightNet hybrid were trained with θ = 10000, whatever `rope_theta` says.
#[test]
fn rope_theta_is_not_read_in_lightnet() {
    let device = reference_device();
    let logits = |model_type: &str, theta: &str| {
        let fields = format!(
            r#", "expand_ratio": 16, "num_heads": 3, "attn": {{"layers": [1], "num_heads": 4, "rope_theta": {theta}}}"#
        );
        let model = model(&config(model_type, &fields), &device);
        numbers(model.forward(ids(1, 9, &device), None, Compute::f32()).expect("logits"))
    };
    assert_eq!(logits("lightnet", "10000.0"), logits("lightnet", "10.0"));
    assert_ne!(logits("hgrn2", "10000.0"), logits("hgrn2", "10.0"));
}

#[test]
fn wrong_values_are_named() {
    for (model_type, fields, words) in [
        ("abc", r#", "num_heads": 5"#, ["expand_k", "multiple"]),
        ("abc", r#", "clamp_min": 1, "clamp_max": 0"#, ["clamp_min", "clamp_max"]),
        ("abc", r#", "num_heads": 8, "expand_k": 0.5"#, ["num_heads", "use_rope"]),
        ("abc", r#", "num_slots": 0"#, ["num_slots", "from 1"]),
        ("gsa", r#", "feature_map": null"#, ["feature_map", "t2r"]),
        ("gsa", r#", "feature_map": "elu""#, ["feature_map", "elu"]),
        ("gsa", r#", "expand_v": 2"#, ["expand_v", "must be 1"]),
        ("gsa", r#", "gate_logit_normalizer": 0"#, ["gate_logit_normalizer", "above 0"]),
        ("gsa", r#", "use_short_conv": true, "conv_size": 40"#, ["conv_size", "16"]),
        ("hgrn", r#", "expand_ratio": 2"#, ["expand_ratio", "use_lower_bound"]),
        ("hgrn", r#", "expand_ratio": 0.001, "use_lower_bound": false"#, ["expand_ratio", "width"]),
        ("hgrn2", "", ["expand_ratio", "does not divide"]),
        ("hgrn2", r#", "expand_ratio": 10"#, ["expand_ratio", "use_lower_bound"]),
        ("hgrn2", r#", "expand_ratio": null"#, ["expand_ratio", "num_heads"]),
        ("hgrn2", r#", "expand_ratio": null, "num_heads": 5"#, ["num_heads", "does not divide"]),
        ("lightnet", r#", "expand_ratio": 16, "num_heads": 5"#, ["expand_ratio", "does not divide"]),
        ("lightnet", r#", "gate_low_rank_dim": 0"#, ["gate_low_rank_dim", "from 1"]),
    ] {
        let text = format!(r#"{{"model_type": "{model_type}", "hidden_size": 48, "num_hidden_layers": 2{fields}}}"#);
        let message = ModelConfig::from_json(&text).expect_err(fields).to_string();
        for word in words {
            assert!(message.contains(word), "{model_type}{fields}: {message}");
        }
    }
}
