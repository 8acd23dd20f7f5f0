//! Text out of a model, one token at a time.

mod sampling;

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};

pub use sampling::{Sampler, SamplingConfig};

use crate::{CausalLm, Compute, NnError};

/// Goes on from `prompt` by at most `max_new` tokens, and returns these.
///
/// The prompt runs through the chunked form in one pass; each token after it is one step of the recurrent form, so that
/// the memory of a model without softmax attention does not grow. `on_token` sees each token as it comes and may stop.
/// The token `eos` ends the text and is not returned.
///
/// # Errors
/// An empty prompt; an id that is not in the vocabulary; a [`SamplingConfig`] out of range; a model that gives no
/// finite logits.
pub fn generate(
    model: &CausalLm,
    prompt: &[u32],
    max_new: usize,
    sampling: &SamplingConfig,
    eos: Option<u32>,
    compute: Compute,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, NnError> {
    let mut sampler = Sampler::new(sampling)?;
    let vocabulary = model.config().vocab_size();
    if prompt.is_empty() {
        return Err(NnError::argument("prompt", "it is empty, and a text goes on from one token at least"));
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocabulary) {
        return Err(NnError::argument(
            "prompt",
            format!("the id {id} is not in the model's vocabulary of {vocabulary}"),
        ));
    }
    let mut text = Vec::with_capacity(max_new.min(1 << 16));
    if max_new == 0 {
        return Ok(text);
    }
    // Without autodiff: a graph over all steps would grow with the text.
    let model = model.valid();
    let device = model.device();
    let ids: Vec<i32> = prompt.iter().map(|id| *id as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, prompt.len()]), &device);
    let (mut logits, mut state) = model.prefill(ids, compute)?;
    loop {
        let row: Vec<f32> = logits.try_into_vec_as().map_err(|error| NnError::Device(error.to_string()))?;
        let token = sampler.next(&row)?;
        if Some(token) == eos {
            break;
        }
        text.push(token);
        if on_token(token).is_break() || text.len() == max_new {
            break;
        }
        let id = Tensor::<1, Int>::from_data(TensorData::new(vec![token as i32], [1]), &device);
        (logits, state) = model.step(id, state, compute)?;
    }
    Ok(text)
}
