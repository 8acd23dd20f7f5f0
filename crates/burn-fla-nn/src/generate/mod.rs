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
    let texts = generate_batch(model, &[prompt.to_vec()], max_new, sampling, eos, compute, |_, token| on_token(token))?;
    Ok(texts.into_iter().flatten().collect())
}

/// [`generate`] for several prompts at once, of any lengths: every text is the one that its prompt would have alone. The
/// random numbers of row i begin at `seed` + i. `on_token` also gets the row, and stops that row.
///
/// # Errors
/// As [`generate`]; no prompt at all.
pub fn generate_batch(
    model: &CausalLm,
    prompts: &[Vec<u32>],
    max_new: usize,
    sampling: &SamplingConfig,
    eos: Option<u32>,
    compute: Compute,
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Vec<u32>>, NnError> {
    let rows = prompts.len();
    let sampler =
        |row: usize| Sampler::new(&SamplingConfig { seed: sampling.seed.wrapping_add(row as u64), ..*sampling });
    let mut samplers = (0..rows).map(sampler).collect::<Result<Vec<_>, _>>()?;
    let longest = check(prompts, model.config().vocab_size())?;
    let mut texts = vec![Vec::with_capacity(max_new.min(1 << 16)); rows];
    if max_new == 0 {
        return Ok(texts);
    }
    // Without autodiff: a graph over all steps would grow with the text.
    let model = model.valid();
    let device = model.device();
    let padded = prompts.iter().flat_map(|prompt| {
        let tokens = prompt.iter().map(|id| *id as i32);
        std::iter::repeat_n(0, longest - prompt.len()).chain(tokens)
    });
    let ids = Tensor::<2, Int>::from_data(TensorData::new(padded.collect::<Vec<_>>(), [rows, longest]), &device);
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let (mut logits, mut state) = if lengths.iter().all(|length| *length == longest) {
        model.prefill(ids, compute)?
    } else {
        model.prefill_padded(ids, &lengths, compute)?
    };
    let mut going = vec![true; rows];
    // A row that has ended runs along on its last token, unread.
    let mut last = vec![0i32; rows];
    loop {
        let values: Vec<f32> = logits.try_into_vec_as().map_err(|error| NnError::Device(error.to_string()))?;
        for (row, values) in values.chunks(values.len() / rows).enumerate() {
            if !going[row] {
                continue;
            }
            let token = samplers[row].next(values)?;
            if Some(token) == eos {
                going[row] = false;
                continue;
            }
            texts[row].push(token);
            last[row] = token as i32;
            going[row] = on_token(row, token).is_continue() && texts[row].len() < max_new;
        }
        if !going.contains(&true) {
            return Ok(texts);
        }
        let ids = Tensor::<1, Int>::from_data(TensorData::new(last.clone(), [rows]), &device);
        (logits, state) = model.step(ids, state, compute)?;
    }
}

/// The length of the longest prompt, or an error for prompts that no text goes on from.
fn check(prompts: &[Vec<u32>], vocabulary: usize) -> Result<usize, NnError> {
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(NnError::argument("prompt", "it is empty, and a text goes on from one token at least"));
    }
    if let Some(id) = prompts.iter().flatten().find(|id| **id as usize >= vocabulary) {
        return Err(NnError::argument(
            "prompt",
            format!("the id {id} is not in the model's vocabulary of {vocabulary}"),
        ));
    }
    Ok(prompts.iter().map(Vec::len).max().unwrap_or(0))
}
