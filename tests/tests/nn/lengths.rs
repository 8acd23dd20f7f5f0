//! Every architecture at lengths around the chunks of its operators, cut in pieces and token by token.

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor};
use burn_fla_nn::models::registry::ARCHITECTURES;
use burn_fla_nn::{CausalLm, Compute, State};
use burn_fla_ops::CuSeqlens;
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

use crate::common::{VOCABULARY, configs, ids, model, parameter_gradients};

const F32: Compute = Compute::f32();

/// The logits of the last token, run in pieces of these lengths.
fn in_pieces(model: &CausalLm, ids: &Tensor<2, Int>, pieces: &[usize]) -> Tensor<2> {
    let mut state: Option<State> = None;
    let mut logits = None;
    let mut start = 0;
    for length in pieces {
        let (last, next) = model.advance(ids.clone().narrow(1, start, *length), state, F32).expect("a piece");
        (logits, state) = (Some(last), Some(next));
        start += length;
    }
    assert_eq!(start, ids.dims()[1], "the pieces cover the sequence");
    logits.expect("a piece at least")
}

#[test]
fn pieces_and_single_tokens_give_what_the_whole_gives() {
    let device = reference_device();
    for architecture in ARCHITECTURES {
        let name = architecture.model_type;
        let model = model(&architecture.tiny_config().expect(name), &device);
        for (tokens, pieces) in
            [(1, vec![1]), (63, vec![62, 1]), (64, vec![1; 64]), (65, vec![64, 1]), (131, vec![1, 63, 64, 3])]
        {
            let ids = ids(1, tokens, &device);
            let whole = model.forward(ids.clone(), None, F32).expect(name).narrow(1, tokens - 1, 1);
            let found = numbers(in_pieces(&model, &ids, &pieces));
            assert_close(&format!("{name}, {tokens} tokens"), &found, &numbers(whole), 1e-5);
        }
    }
}

/// Every way a layer can be put together, past the chunks of its operators.
#[test]
fn single_tokens_give_what_the_whole_gives_in_every_variant() {
    let device = reference_device();
    for (name, config) in configs() {
        let model = model(&config, &device);
        let ids = ids(1, 70, &device);
        let whole = model.forward(ids.clone(), None, F32).expect(name).narrow(1, 69, 1);
        assert_close(name, &numbers(in_pieces(&model, &ids, &[1; 70])), &numbers(whole), 1e-5);
    }
}

/// The gradient of every parameter for a fixed sum of the last token's logits.
fn gradients(model: &CausalLm, logits: Tensor<2>) -> BTreeMap<String, Vec<f64>> {
    let weight: Tensor<2> =
        tensor(&uniform(3, VOCABULARY, (-1.0, 1.0)), [1, VOCABULARY], &logits.device(), logits.dtype());
    parameter_gradients(model, (logits * weight).sum().backward())
}

#[test]
fn gradients_pass_through_the_states() {
    let device = reference_device().autodiff();
    for architecture in ARCHITECTURES {
        let name = architecture.model_type;
        let model = model(&architecture.tiny_config().expect(name), &device);
        for (tokens, pieces) in [(9, vec![1; 9]), (67, vec![1, 31, 34, 1])] {
            let ids = ids(1, tokens, &device);
            let whole = model.forward(ids.clone(), None, F32).expect(name).narrow(1, tokens - 1, 1);
            let whole = gradients(&model, whole.squeeze_dim(1));
            for (parameter, found) in gradients(&model, in_pieces(&model, &ids, &pieces)) {
                let what = format!("{name}, {tokens} tokens, {parameter}");
                assert_close(&what, &found, &whole[&parameter], 1e-4);
            }
        }
    }
}

#[test]
fn long_packed_sequences_give_what_they_give_alone() {
    let device = reference_device();
    let offsets = vec![0, 1, 64, 64, 129, 260];
    let cu = CuSeqlens::new(offsets.clone()).expect("offsets");
    for architecture in ARCHITECTURES {
        let name = architecture.model_type;
        let model = model(&architecture.tiny_config().expect(name), &device);
        let row = ids(1, 260, &device);
        let packed = model.forward(row.clone(), Some(&cu), F32).expect(name);
        for pair in offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
            let (start, length) = (pair[0], pair[1] - pair[0]);
            let alone = model.forward(row.clone().narrow(1, start, length), None, F32).expect(name);
            let part = numbers(packed.clone().narrow(1, start, length));
            assert_close(&format!("{name} at {start}"), &part, &numbers(alone), 1e-5);
        }
    }
}
