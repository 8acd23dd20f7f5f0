//! The window of attention that forgets: a prompt sees all of itself, the tokens after it see the window.

use burn_fla_nn::layers::{ForgettingAttentionConfig, SequenceContext};
use burn_fla_nn::modules::Linear;
use burn_fla_nn::{Compute, ModelConfig};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

use burn::tensor::{DType, Tensor};

use crate::common::{config, ids, model};

/// One map in plain arithmetic.
fn map(layer: &Linear, x: &[f64]) -> Vec<f64> {
    let weight = numbers(layer.weight.val());
    let bias = layer.bias.as_ref().map(|bias| numbers(bias.val()));
    let row = |(i, row): (usize, &[f64])| {
        row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias.as_ref().map_or(0.0, |bias| bias[i])
    };
    weight.chunks(x.len()).enumerate().map(row).collect()
}

#[test]
fn a_window_is_for_tokens_that_go_on() {
    const HIDDEN: usize = 12;
    const HEADS: usize = 4;
    const WIDTH: usize = HIDDEN / HEADS;
    const TOKENS: usize = 10;
    const PROMPT: usize = 5;
    let device = reference_device();
    let x = uniform(9, TOKENS * HIDDEN, (-2.0, 2.0));
    // A window below, one above what the prompt has, and the narrowest.
    for window in [3, 7, 1] {
        let source = burn_fla_nn::ParamSource::seeded(3, 0.5, &device);
        let layer = ForgettingAttentionConfig::new(HIDDEN)
            .with_num_heads(HEADS)
            .with_num_kv_heads(Some(2))
            .with_window_size(Some(window))
            .build(&source.root())
            .expect("a layer");

        // What the layer computes, token by token over lists of numbers.
        let token = |t: usize| &x[t * HIDDEN..(t + 1) * HIDDEN];
        let project = |layer: &Linear| -> Vec<Vec<f64>> { (0..TOKENS).map(|t| map(layer, token(t))).collect() };
        let (q, k, v) = (project(&layer.q_proj), project(&layer.k_proj), project(&layer.v_proj));
        let gates = project(&layer.f_proj);
        let log_forget = |t: usize, head: usize| -(-gates[t][head]).exp().ln_1p();
        let mut expected = Vec::new();
        for (t, query) in q.iter().enumerate() {
            let first = if t < PROMPT { 0 } else { (t + 1).saturating_sub(window) };
            let mut o = Vec::new();
            for head in 0..HEADS {
                let (own, shared) = (head * WIDTH, head / 2 * WIDTH);
                let score = |s: usize| {
                    let product: f64 = (0..WIDTH).map(|c| query[own + c] * k[s][shared + c]).sum();
                    product / (WIDTH as f64).sqrt() + (s + 1..=t).map(|l| log_forget(l, head)).sum::<f64>()
                };
                let weights: Vec<f64> = (first..=t).map(|s| score(s).exp()).collect();
                let sum: f64 = weights.iter().sum();
                o.extend((0..WIDTH).map(|c| {
                    weights.iter().zip(first..).map(|(weight, s)| weight * v[s][shared + c]).sum::<f64>() / sum
                }));
            }
            expected.extend(map(&layer.o_proj, &o));
        }

        // The prompt, a token, two tokens at once, and the rest one at a time.
        let mut state = None;
        let mut found = Vec::new();
        let mut start = 0;
        for length in [PROMPT, 1, 2, 1, 1] {
            let context = SequenceContext::new([1, length], None, Compute::f32(), &device).expect("a context");
            let context = context.continuing(&[start]).expect("a context");
            let part = &x[start * HIDDEN..(start + length) * HIDDEN];
            let part = tensor(part, [1, length, HIDDEN], &device, DType::F32);
            let (y, next) = layer.forward(part, state, &context).expect("an output");
            let kept = next.as_ref().map(|state| state.keys.k.dims()[1]);
            assert!(kept.is_some_and(|kept| kept < window.max(2)), "{window}: {kept:?} keys are kept");
            found.extend(numbers(y));
            state = next;
            start += length;
        }
        assert_close(&format!("window {window}"), &found, &expected, 1e-6);

        let whole = SequenceContext::new([1, TOKENS], None, Compute::f32(), &device).expect("a context");
        let all: Tensor<3> = tensor(&x, [1, TOKENS, HIDDEN], &device, DType::F32);
        let narrow = numbers(layer.forward(all.clone(), None, &whole).expect("an output").0);
        let wide = ForgettingAttentionConfig::new(HIDDEN).with_num_heads(HEADS).with_num_kv_heads(Some(2));
        let wide = wide.build(&burn_fla_nn::ParamSource::seeded(3, 0.5, &device).root()).expect("a layer");
        assert_eq!(narrow, numbers(wide.forward(all, None, &whole).expect("an output").0), "training sees no window");
    }
}

/// Prompts of different lengths: each row keeps its own window.
#[test]
fn padded_prompts_have_windows_of_their_own() {
    let device = reference_device();
    let config = config("forgetting_transformer", r#", "num_heads": 4, "num_kv_heads": 2, "window_size": 3"#);
    let model = model(&config, &device);
    let (rows, lengths) = (ids(3, 8, &device), [8, 2, 5]);
    let next = ids(3, 6, &device);
    let (_, mut state) = model.prefill_padded(rows.clone(), &lengths, Compute::f32()).expect("a state");
    let mut alone: Vec<_> = (0..3)
        .map(|row| {
            let prompt = rows.clone().narrow(0, row, 1).narrow(1, 8 - lengths[row], lengths[row]);
            model.prefill(prompt, Compute::f32()).expect("a state").1
        })
        .collect();
    for t in 0..6 {
        let tokens = next.clone().narrow(1, t, 1).squeeze_dim::<1>(1);
        let (logits, after) = model.step(tokens.clone(), state, Compute::f32()).expect("logits");
        state = after;
        alone = (alone.into_iter().enumerate())
            .map(|(row, state)| {
                let (expected, state) =
                    model.step(tokens.clone().narrow(0, row, 1), state, Compute::f32()).expect("logits");
                let found = numbers(logits.clone().narrow(0, row, 1));
                assert_close(&format!("row {row}, token {t}"), &found, &numbers(expected), 1e-5);
                state
            })
            .collect();
    }
}

#[test]
fn a_window_of_nothing_is_an_error() {
    let json = r#"{"model_type": "forgetting_transformer", "window_size": 0}"#;
    let message = ModelConfig::from_json(json).expect_err("no token").to_string();
    assert!(message.contains("window_size"), "{message}");
    let layer = ForgettingAttentionConfig::new(8).with_num_heads(2).with_window_size(Some(0));
    let message = layer.init(1, &reference_device()).expect_err("no token").to_string();
    assert!(message.contains("window_size") && message.contains("null"), "{message}");
}
