//! What a mixer is said to keep against what its state holds after a text.

use burn_fla_nn::layers::{LayerState, RecurrentState, ShiftState};
use burn_fla_nn::models::registry::ARCHITECTURES;
use burn_fla_nn::{CausalLm, Compute};
use burn_fla_tests::reference_device;
use serde_json::{Value, json};

use super::common::ids;

/// The numbers of a state, the histories of short convolutions and shifts aside.
fn remembered(state: &LayerState) -> usize {
    let recurrent = |state: &RecurrentState| state.state.shape().num_elements();
    let shifted = |state: &ShiftState| state.state.shape().num_elements();
    match state {
        LayerState::Mamba(state) => state.state.shape().num_elements(),
        LayerState::Mamba2(state) => recurrent(state),
        LayerState::Rwkv6(state) | LayerState::Rwkv7(state) => shifted(state),
        LayerState::MesaNet(state) => {
            state.memory.keys.shape().num_elements() + state.memory.values.shape().num_elements()
        }
        LayerState::PathAttention(state) => {
            state.seen.keys.shape().num_elements()
                + state.seen.values.shape().num_elements()
                + state.seen.log_forget.as_ref().map_or(0, |gates| gates.shape().num_elements())
        }
        // The others have no convolution here.
        other => other.elements(),
    }
}

#[test]
fn states_have_the_size_that_is_said() {
    let device = reference_device();
    let mut wrong = Vec::new();
    for architecture in ARCHITECTURES {
        let config = architecture.tiny_config().unwrap();
        let mut fields = config.fields().clone();
        fields.insert("use_short_conv".into(), Value::Bool(false));
        let maps: &[&str] = if architecture.model_type == "linear_attn" { &["elu", "hedgehog", "dpfp"] } else { &[""] };
        for map in maps {
            if !map.is_empty() {
                fields.insert("feature_map".into(), json!(map));
            }
            let config = config.with_overrides(&fields).unwrap();
            let model = CausalLm::init(&config, 1, &device).unwrap();
            for tokens in [5, 11] {
                let (_, state) = model.prefill(ids(1, tokens, &device), Compute::f32()).unwrap();
                for (layer, state) in config.layers().iter().zip(state.layers()) {
                    let state = &state.mixer;
                    let cost = layer.mixer.cost(tokens).unwrap();
                    // A window of w tokens keeps w − 1 of those before the next.
                    let kept = cost.window.map_or(tokens, |window| tokens.min(window - 1));
                    let said = cost.state + cost.cache * kept;
                    if said != remembered(state) {
                        let (name, found) = (architecture.model_type, remembered(state));
                        wrong.push(format!(
                            "{name} {map} {} at {tokens}: {said}, but it is {found}",
                            layer.mixer.kind()
                        ));
                    }
                    assert!(cost.flops > 0.0);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_outline_has_the_names_and_shapes_of_the_model() {
    let device = reference_device();
    for architecture in ARCHITECTURES {
        let config = architecture.tiny_config().unwrap();
        let list = |model: CausalLm| -> Vec<_> {
            model.named_parameters().into_iter().map(|param| (param.name, param.shape)).collect()
        };
        let outline = list(CausalLm::outline(&config, &device).unwrap());
        assert_eq!(outline, list(CausalLm::init(&config, 1, &device).unwrap()), "{}", architecture.model_type);
    }
}
