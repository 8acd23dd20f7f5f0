//! Generated text.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use burn_fla_nn::generate::{SamplingConfig, generate, generate_batch};
use burn_fla_nn::{CausalLm, Compute, NnError, State};
use burn_fla_tests::{numbers, reference_device};

use crate::common::{VOCABULARY, config, configs, ids, model};

const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];

fn continue_with(model: &CausalLm, count: usize, sampling: &SamplingConfig, eos: Option<u32>) -> Vec<u32> {
    generate(model, &PROMPT, count, sampling, eos, Compute::f32(), |_| ControlFlow::Continue(())).expect("a text")
}

#[test]
fn greedy_text_is_the_most_likely_token_each_time() {
    let device = reference_device();
    for (name, config) in configs() {
        let model = model(&config, &device);
        let mut text = PROMPT.to_vec();
        for _ in 0..8 {
            let ids: Vec<i32> = text.iter().map(|id| *id as i32).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, text.len()]), &device);
            let logits = model.forward(ids, None, Compute::f32()).expect(name);
            let last = numbers(logits.narrow(1, text.len() - 1, 1));
            let best = (0..VOCABULARY).max_by(|a, b| last[*a].total_cmp(&last[*b])).expect("a token");
            text.push(best as u32);
        }
        // A model that is being trained generates without building a graph.
        let trained = crate::common::model(&config, &device.clone().autodiff());
        for model in [&model, &trained] {
            assert_eq!(continue_with(model, 8, &SamplingConfig::greedy(), None), text[5..], "{name}");
        }
    }
}

#[test]
fn text_stops_where_it_is_told_to() {
    let model = model(&config("gla", r#", "num_heads": 2"#), &reference_device());
    let sampling = SamplingConfig { seed: 5, ..Default::default() };
    let whole = continue_with(&model, 20, &sampling, None);
    assert_eq!(whole.len(), 20);
    assert_eq!(whole, continue_with(&model, 20, &sampling, None));
    assert_ne!(whole, continue_with(&model, 20, &SamplingConfig { seed: 6, ..sampling.clone() }, None));
    let first = whole.iter().position(|t| *t == whole[7]).expect("it is there");
    assert_eq!(continue_with(&model, 20, &sampling, Some(whole[7])), whole[..first]);
    assert_eq!(continue_with(&model, 0, &sampling, None), [0u32; 0]);
    let mut seen = Vec::new();
    let stopped = generate(&model, &PROMPT, 20, &sampling, None, Compute::f32(), |token| {
        seen.push(token);
        if seen.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(stopped.expect("a text"), whole[..3]);
    assert_eq!(seen, whole[..3]);
}

#[test]
fn prompts_together_have_the_texts_they_have_alone() {
    let device = reference_device();
    let prompts = [vec![3, 1, 4], vec![1, 5, 9, 2, 6, 5], vec![8], vec![3, 1, 4]];
    let sampling = SamplingConfig { seed: 5, ..Default::default() };
    for (name, config) in configs() {
        let model = model(&config, &device);
        let mut seen = vec![Vec::new(); prompts.len()];
        let texts = generate_batch(&model, &prompts, 9, &sampling, Some(7), Compute::f32(), |row, token| {
            seen[row].push(token);
            if row == 1 && seen[row].len() == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .expect(name);
        assert_eq!(texts, seen, "{name}");
        for (row, prompt) in prompts.iter().enumerate() {
            let sampling = SamplingConfig { seed: 5 + row as u64, ..sampling };
            let count = if row == 1 { 4 } else { 9 };
            let alone =
                generate(&model, prompt, count, &sampling, Some(7), Compute::f32(), |_| ControlFlow::Continue(()))
                    .expect(name);
            assert_eq!(texts[row], alone, "{name}, row {row}");
        }
    }
}

#[test]
fn wrong_prompts_are_errors() {
    let model = model(&config("gla", r#", "num_heads": 2"#), &reference_device());
    let run = |prompt: &[u32], sampling: &SamplingConfig| {
        generate(&model, prompt, 3, sampling, None, Compute::f32(), |_| ControlFlow::Continue(()))
    };
    let greedy = SamplingConfig::greedy();
    assert!(matches!(run(&[], &greedy), Err(NnError::Argument { argument: "prompt", .. })));
    let message = run(&[VOCABULARY as u32], &greedy).expect_err("not in the vocabulary").to_string();
    assert!(message.contains("61"), "{message}");
    assert!(run(&PROMPT, &SamplingConfig { temperature: -1.0, ..greedy }).is_err());
}

#[test]
fn memory_does_not_grow_with_the_text() {
    let device = reference_device();
    let elements = |state: &State| -> Vec<usize> { state.layers().iter().map(|layer| layer.elements()).collect() };
    for (name, config) in configs() {
        let model = model(&config, &device);
        let (_, mut state) = model.prefill(ids(1, 9, &device), Compute::f32()).expect(name);
        let before = elements(&state);
        for _ in 0..6 {
            (_, state) = model.step(Tensor::from_data([7], &device), state, Compute::f32()).expect(name);
        }
        let after = elements(&state);
        // Those that keep the keys of all tokens.
        let keys = ["transformer, norms, biases", "nsa", "forgetting_transformer", "mla, queries", "path_attn"];
        let unbounded = keys.iter().any(|keys| name.starts_with(keys));
        assert_eq!(before == after, !unbounded, "{name}: {before:?} {after:?}");
    }
}
