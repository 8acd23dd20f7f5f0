//! One sequence computed in every way a model can compute it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_fla_nn::modules::FeedForward;
use burn_fla_nn::{CausalLm, Compute, ModelConfig, ParamPath};
use burn_fla_ops::{CuSeqlens, Engine};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device};

use crate::common::{VOCABULARY, config, configs, ids, model, parameter_gradients};

const F32: Compute = Compute::f32();

#[test]
fn a_prompt_and_steps_give_what_the_whole_gives() {
    let device = reference_device();
    for (name, config) in configs() {
        let model = model(&config, &device);
        let ids = ids(2, 13, &device);
        let whole = model.forward(ids.clone(), None, F32).expect(name);
        assert_eq!(whole.dims(), [2, 13, VOCABULARY]);
        let expected = |t: usize| numbers(whole.clone().narrow(1, t, 1));
        let (mut logits, mut state) = model.prefill(ids.clone().narrow(1, 0, 6), F32).expect(name);
        for t in 6..13 {
            assert_eq!(state.seen(), [t, t]);
            assert_close(&format!("{name}, token {}", t - 1), &numbers(logits), &expected(t - 1), 1e-5);
            let token = ids.clone().narrow(1, t, 1).squeeze_dim::<1>(1);
            (logits, state) = model.step(token, state, F32).expect(name);
        }
        assert_close(name, &numbers(logits), &expected(12), 1e-5);
        // Several tokens at a time, and from nothing by steps alone.
        let (_, state) = model.prefill(ids.clone().narrow(1, 0, 1), F32).expect(name);
        let (_, state) = model.advance(ids.clone().narrow(1, 1, 7), Some(state), F32).expect(name);
        let (logits, _) = model.advance(ids.narrow(1, 8, 5), Some(state), F32).expect(name);
        assert_close(name, &numbers(logits), &expected(12), 1e-5);
    }
}

#[test]
fn prompts_of_different_lengths_run_together_as_alone() {
    let device = reference_device();
    let lengths = [4, 9, 1, 7];
    for (name, config) in configs() {
        let model = model(&config, &device);
        let rows = ids(4, 9, &device);
        let (mut logits, mut state) = model.prefill_padded(rows.clone(), &lengths, F32).expect(name);
        let next = ids(4, 12, &device);
        let mut alone: Vec<_> = (0..4)
            .map(|row| {
                let prompt = rows.clone().narrow(0, row, 1).narrow(1, 9 - lengths[row], lengths[row]);
                model.prefill(prompt, F32).expect(name)
            })
            .collect();
        // One token at a time, then several: past the windows of all layers.
        for (t, count) in [(0, 1), (1, 1), (2, 1), (3, 5), (8, 1)] {
            for (row, (expected, _)) in alone.iter().enumerate() {
                let found = numbers(logits.clone().narrow(0, row, 1));
                assert_close(&format!("{name}, row {row}, {t} tokens on"), &found, &numbers(expected.clone()), 1e-5);
            }
            let tokens = next.clone().narrow(1, t, count);
            (logits, state) = model.advance(tokens.clone(), Some(state), F32).expect(name);
            alone = alone
                .into_iter()
                .enumerate()
                .map(|(row, (_, state))| model.advance(tokens.clone().narrow(0, row, 1), Some(state), F32).expect(name))
                .collect();
        }
        assert_eq!(state.seen(), lengths.map(|length| length + 9));
        assert!(model.prefill_padded(rows.clone(), &[1, 2, 3], F32).is_err());
        assert!(model.prefill_padded(rows, &[1, 2, 3, 10], F32).is_err());
    }
}

#[test]
fn packed_sequences_give_what_they_give_alone() {
    let device = reference_device();
    let offsets = vec![0, 1, 8, 8, 21];
    let cu = CuSeqlens::new(offsets.clone()).expect("offsets");
    for (name, config) in configs() {
        let model = model(&config, &device);
        let row = ids(1, 21, &device);
        let packed = model.forward(row.clone(), Some(&cu), F32).expect(name);
        for pair in offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
            let (start, length) = (pair[0], pair[1] - pair[0]);
            let alone = model.forward(row.clone().narrow(1, start, length), None, F32).expect(name);
            let part = numbers(packed.clone().narrow(1, start, length));
            assert_close(&format!("{name} at {start}"), &part, &numbers(alone), 1e-5);
        }
    }
}

fn gradients(
    model: &CausalLm,
    ids: Tensor<2, Int>,
    cu: Option<&CuSeqlens>,
    compute: Compute,
) -> BTreeMap<String, Vec<f64>> {
    let loss = model.loss(ids.clone(), ids, cu, compute).expect("a loss").sum;
    parameter_gradients(model, loss.backward())
}

#[test]
fn packed_sequences_have_the_gradients_they_have_alone() {
    let device = reference_device().autodiff();
    let cu = CuSeqlens::new(vec![0, 9, 20]).expect("offsets");
    for (name, config) in configs() {
        let model = model(&config, &device);
        let row = ids(1, 20, &device);
        let packed = gradients(&model, row.clone(), Some(&cu), F32);
        let first = gradients(&model, row.clone().narrow(1, 0, 9), None, F32);
        let second = gradients(&model, row.narrow(1, 9, 11), None, F32);
        for (parameter, gradient) in packed {
            let sum: Vec<f64> = first[&parameter].iter().zip(&second[&parameter]).map(|(a, b)| a + b).collect();
            assert_close(&format!("{name}, {parameter}"), &gradient, &sum, 1e-4);
        }
    }
}

/// A third of them each: on a GPU most of the time is the compilation of kernels.
#[test]
fn kernels_give_what_the_reference_gives() {
    kernels_are_the_reference(0);
}

#[test]
fn kernels_give_what_the_reference_gives_in_more_models() {
    kernels_are_the_reference(1);
}

#[test]
fn kernels_give_what_the_reference_gives_in_yet_more_models() {
    kernels_are_the_reference(2);
}

fn kernels_are_the_reference(third: usize) {
    for (backend, device) in kernel_devices() {
        let expected_on = reference_device().autodiff();
        let device = device.autodiff();
        // Every architecture, and every variant of those over operators with kernels: a software device takes seconds each.
        let with_kernels = ["retnet", "gla", "linear_attn", "hgrn2", "lightnet", "mamba2"];
        let chosen = |name: &str, config: &ModelConfig| {
            name == config.model_type() || with_kernels.contains(&config.model_type())
        };
        let all = configs().into_iter().filter(|(name, config)| chosen(name, config));
        for (name, config) in all.skip(third).step_by(3) {
            let expected = model(&config, &expected_on);
            let found = model(&config, &device);
            let (a, b) = (ids(2, 70, &expected_on), ids(2, 70, &device));
            let logits = numbers(expected.forward(a.clone(), None, F32).expect(name));
            assert_close(
                &format!("{backend}, {name}, logits"),
                &numbers(found.forward(b.clone(), None, F32).expect(name)),
                &logits,
                1e-5,
            );
            let expected = gradients(&expected, a, None, F32);
            for (parameter, gradient) in gradients(&found, b, None, F32) {
                assert_close(&format!("{backend}, {name}, {parameter}"), &gradient, &expected[&parameter], 1e-4);
            }
        }
    }
}

#[test]
fn bf16_stays_near_f32() {
    let device = reference_device();
    for (name, config) in configs() {
        let model = model(&config, &device);
        let ids = ids(2, 20, &device);
        let exact = numbers(model.forward(ids.clone(), None, F32).expect(name));
        let logits = model.forward(ids.clone(), None, Compute::bf16()).expect(name);
        assert_eq!(logits.dtype(), DType::F32);
        assert_close(name, &numbers(logits), &exact, 6e-2);
        let (first, state) = model.prefill(ids.clone().narrow(1, 0, 19), Compute::bf16()).expect(name);
        assert_eq!(first.dtype(), DType::F32);
        let token = ids.narrow(1, 19, 1).squeeze_dim::<1>(1);
        let (last, _) = model.step(token, state, Compute::bf16()).expect(name);
        assert_close(
            name,
            &numbers(last),
            &exact.chunks(20 * VOCABULARY).flat_map(|row| row[19 * VOCABULARY..].to_vec()).collect::<Vec<_>>(),
            6e-2,
        );
    }
}

#[test]
fn weights_depend_on_the_seed_and_their_name_alone() {
    let device = reference_device();
    let weights = |layers: usize, seed: u64| {
        let mut overrides = serde_json::Map::new();
        overrides.insert("num_hidden_layers".into(), layers.into());
        let config = config("gla", r#", "num_heads": 2"#).with_overrides(&overrides).expect("valid");
        let model = CausalLm::init(&config, seed, &device).expect("a model");
        let Some(FeedForward::Gated(mlp)) = &model.model.layers[0].mlp else { panic!("a gated network") };
        numbers(mlp.up_proj.weight.val())
    };
    assert_eq!(weights(1, 3), weights(4, 3));
    assert_ne!(weights(1, 3), weights(1, 4));
}

#[test]
fn weights_start_as_they_should() {
    struct Statistics(ParamPath, Vec<(String, usize, f64, f64)>);
    impl ModuleVisitor for Statistics {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let x = numbers(param.val());
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
            self.1.push((self.0.name(), x.len(), mean, variance.sqrt()));
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.0.enter(name, container_type);
        }
        fn exit_module(&mut self, _: &str, container_type: &str) {
            self.0.exit(container_type);
        }
    }
    // RWKV starts otherwise: see its own tests.
    for (name, config) in configs().into_iter().filter(|(name, _)| !name.starts_with("rwkv")) {
        let model = model(&config, &reference_device());
        let mut statistics = Statistics(model.param_path(), Vec::new());
        model.visit(&mut statistics);
        for (parameter, count, mean, std) in statistics.1 {
            let what = format!("{name}, {parameter}: mean {mean}, std {std}");
            // Held to their own distributions in `mamba.rs`.
            if [".conv1d.", ".dt_proj.", ".out_proj."].iter().any(|part| parameter.contains(part)) {
                continue;
            }
            // Logarithms of draws up to 16 for A, from 0 or 1 on; inverses of softplus at steps from 0.001 to 0.1.
            if parameter.ends_with("A_log") {
                assert!(mean < 16f64.ln() && (mean > -3.0), "{what}");
            } else if parameter.ends_with("dt_bias") {
                assert!((-6.91..-2.25).contains(&mean), "{what}");
            } else if parameter.ends_with("lambda_params") {
                // λ = 1 with the lower bounds of the configs.
                let bound = if name.contains("without a lower bound") { 0.0 } else { 0.25 };
                assert!((mean.exp().ln_1p() + bound - 1.0).abs() < 1e-6 && std < 1e-6, "{what}");
            } else if parameter.ends_with(".D") || parameter.ends_with(".decay") {
                assert_eq!((mean, std), (1.0, 0.0), "{what}");
            } else if ["bias", "beta", "lower_bounds"].iter().any(|end| parameter.ends_with(end)) {
                assert_eq!((mean, std), (0.0, 0.0), "{what}");
            } else if ["norm", "gamma", ".q_proj.1.", ".kv_proj.1."].iter().any(|part| parameter.contains(part)) {
                assert_eq!((mean, std), (1.0, 0.0), "{what}");
            } else {
                // Five standard errors of the mean and of the standard deviation.
                let error = 5.0 / (count as f64).sqrt();
                assert!(mean.abs() < 0.15 * error, "{what}");
                assert!((std / 0.15 - 1.0).abs() < error, "{what}");
            }
        }
        let loss =
            model.loss(ids(1, 30, &reference_device()), ids(1, 30, &reference_device()), None, F32).expect("a loss");
        assert!(numbers(loss.mean())[0].is_finite());
    }
}

#[test]
fn parameters_have_the_names_of_the_format() {
    let names = |fields: &str| -> Vec<String> {
        let model = model(&config("gla", fields), &reference_device());
        model.named_parameters().into_iter().map(|p| p.name).collect()
    };
    let has = |names: &[String], suffix: &str| names.iter().any(|n| n == &format!("model.layers.1.attn.{suffix}"));
    let plain = names(r#", "num_heads": 2"#);
    assert!(has(&plain, "g_norm_swish_gate.weight") && has(&plain, "gk_proj.1.bias") && has(&plain, "g_proj.weight"));
    assert!(plain.contains(&"lm_head.weight".to_string()));
    let unfused = names(r#", "num_heads": 2, "fuse_norm": false"#);
    assert!(has(&unfused, "g_norm.weight") && !has(&unfused, "g_norm_swish_gate.weight"));
    let ungated = names(r#", "num_heads": 2, "use_output_gate": false, "use_short_conv": true"#);
    assert!(has(&ungated, "g_norm.weight") && !has(&ungated, "g_proj.weight") && has(&ungated, "k_conv1d.weight"));
    let tied = names(r#", "num_heads": 2, "tie_word_embeddings": true"#);
    assert!(!tied.contains(&"lm_head.weight".to_string()));
}

#[test]
fn the_row_of_the_padding_gets_no_gradient() {
    let device = reference_device().autodiff();
    let model = model(&config("gla", r#", "num_heads": 2"#), &device);
    let row = Tensor::<2, Int>::from_data(TensorData::new(vec![0i32, 3, 0, 4], [1, 4]), &device);
    let gradients = gradients(&model, row, None, F32);
    let embedding = &gradients["model.embeddings.weight"];
    let largest = |id: usize| embedding[id * 48..(id + 1) * 48].iter().fold(0f64, |a, x| a.max(x.abs()));
    assert_eq!(largest(0), 0.0);
    assert!(largest(3) > 0.0 && largest(4) > 0.0);
    assert_eq!(largest(5), 0.0);
}

#[test]
fn labels_of_minus_one_hundred_are_not_counted() {
    let device = reference_device();
    let model = model(&config("gla", r#", "num_heads": 2"#), &device);
    let row = ids(1, 6, &device);
    let labels = |labels: Vec<i32>| Tensor::<2, Int>::from_data(TensorData::new(labels, [1, 6]), &device);
    let loss = |l: Vec<i32>| model.loss(row.clone(), labels(l), None, F32).expect("a loss");
    let all = loss(vec![-100; 6]);
    assert_eq!((numbers(all.sum.clone())[0], numbers(all.count.clone())[0]), (0.0, 0.0));
    assert_eq!(numbers(all.mean())[0], 0.0);
    let (a, b) = (loss(vec![5, -100, 7, -100, -100, -100]), loss(vec![-100, -100, -100, -100, -100, 9]));
    let both = loss(vec![5, -100, 7, -100, -100, 9]);
    assert_eq!(numbers(both.count)[0], 3.0);
    let sum = numbers(a.sum)[0] + numbers(b.sum)[0];
    assert!((numbers(both.sum)[0] - sum).abs() < 1e-5);
    assert!(model.loss(row, labels(vec![1; 6]).narrow(1, 0, 5), None, F32).is_err());
}

#[test]
fn l2_warp_moves_the_gradient_of_the_largest_logits_alone() {
    let device = reference_device().autodiff();
    let fields = r#", "num_heads": 2, "tie_word_embeddings": false"#;
    let plain = config("gla", fields);
    let mut overrides = serde_json::Map::new();
    overrides.insert("use_l2warp".into(), true.into());
    let warped = model(&plain.with_overrides(&overrides).expect("valid"), &device);
    let plain = model(&plain, &device);
    let row = ids(1, 6, &device);
    let mean = |m: &CausalLm| m.loss(row.clone(), row.clone(), None, F32).expect("a loss").mean();
    assert_eq!(numbers(mean(&plain)), numbers(mean(&warped)));
    // By the definition: what is added to the gradient of the output map is 1e-4 / rows · max · h, in the row of the
    // largest logit.
    let logits = numbers(plain.forward(row.clone(), None, F32).expect("logits"));
    let gradient = |m: &CausalLm| {
        let head = m.lm_head.as_ref().expect("an output map").weight.val();
        numbers(head.grad(&mean(m).backward()).expect("a gradient"))
    };
    let (before, after) = (gradient(&plain), gradient(&warped));
    let mut touched: Vec<usize> = logits
        .chunks(VOCABULARY)
        .map(|row| (0..VOCABULARY).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("a logit"))
        .collect();
    touched.sort_unstable();
    touched.dedup();
    for token in 0..VOCABULARY {
        let part = token * 48..(token + 1) * 48;
        let same = before[part.clone()].iter().zip(&after[part]).all(|(a, b)| (a - b).abs() < 1e-9);
        assert_eq!(same, !touched.contains(&token), "token {token}");
    }
    // Σ over the touched rows of ⟨added gradient, W⟩ is 1e-4 / rows · Σ max², since logits are W h.
    let weight = numbers(plain.lm_head.as_ref().expect("an output map").weight.val());
    let added: f64 = before.iter().zip(&after).zip(&weight).map(|((a, b), w)| (b - a) * w).sum();
    let squares: f64 = logits.chunks(VOCABULARY).map(|row| row.iter().fold(f64::MIN, |a, b| a.max(*b)).powi(2)).sum();
    let expected = 1e-4 / 6.0 * squares;
    assert!((added / expected - 1.0).abs() < 1e-3, "{added} {expected}");
}

#[test]
fn wrong_arguments_are_errors() {
    let device = reference_device();
    let gla = model(&config("gla", r#", "num_heads": 2"#), &device);
    let transformer = model(&config("transformer", r#", "num_heads": 4"#), &device);
    let row = ids(1, 6, &device);
    let cu = CuSeqlens::new(vec![0, 5]).expect("offsets");
    let message = gla.forward(row.clone(), Some(&cu), F32).expect_err("too short").to_string();
    assert!(message.contains("5 tokens"), "{message}");
    let cu = CuSeqlens::new(vec![0, 6]).expect("offsets");
    assert!(gla.forward(ids(2, 6, &device), Some(&cu), F32).is_err());
    let half = Compute { dtype: DType::F16, engine: Engine::Auto };
    assert!(gla.forward(row.clone(), None, half).expect_err("f16").to_string().contains("F16"));
    let (_, state) = transformer.prefill(row.clone(), F32).expect("a state");
    let message = gla.advance(row, Some(state), F32).expect_err("another model").to_string();
    assert!(message.contains("Attention") && message.contains("Gla"), "{message}");
}

#[test]
fn a_replica_trains_like_its_original() {
    let device: Device = reference_device().autodiff();
    let model = model(&config("retnet", r#", "num_heads": 2"#), &device);
    let replica = model.clone().fork(&device);
    let row = ids(1, 12, &device);
    assert_eq!(gradients(&model, row.clone(), None, F32), gradients(&replica, row, None, F32));
}

/// `cargo test --release -p burn-fla-tests --test nn -- --ignored --nocapture step_time`
#[test]
#[ignore = "a measurement of time, to be read by a person: it asserts nothing"]
fn step_time() {
    use std::time::Instant;
    let device = reference_device().autodiff();
    let config = config("gla", r#", "num_heads": 4, "expand_k": 1.0"#);
    let mut overrides = config.fields().clone();
    for (field, value) in [("vocab_size", 256), ("hidden_size", 128), ("intermediate_size", 320)] {
        overrides.insert(field.into(), value.into());
    }
    let model = model(&config.with_overrides(&overrides).expect("valid"), &device);
    let row = ids(4, 256, &device);
    let mut times = [0.0; 2];
    for step in 0..12 {
        let start = Instant::now();
        let loss = model.loss(row.clone(), row.clone(), None, F32).expect("a loss").sum;
        let forward = start.elapsed().as_secs_f64();
        let gradients = loss.backward();
        let whole = start.elapsed().as_secs_f64();
        drop(gradients);
        if step > 1 {
            times[0] += forward * 100.0;
            times[1] += whole * 100.0;
        }
    }
    println!("gla 128 x 2, batch 4 of 256: forward {:.1} ms, with backward {:.1} ms", times[0], times[1]);
    println!("{:.0} tokens/s on one thread without the optimiser", 1024.0 / times[1] * 1e3);
}
