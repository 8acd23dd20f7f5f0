//! A layer of burn-fla inside a module of one's own, trained with Burn's optimiser, then run one token at a time.
//!
//! ```sh
//! cargo run --release --example layer
//! ```
//!
//! The task: say at every place of a random sequence which symbol stood there `DISTANCE` tokens before.

use std::error::Error;

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use burn_fla::nn::Compute;
use burn_fla::nn::NnError;
use burn_fla::nn::layers::{Gla, GlaConfig, RecurrentState, SequenceContext};
use burn_fla::nn::modules::cross_entropy;

const SYMBOLS: usize = 12;
const DISTANCE: usize = 3;
const BATCH: usize = 16;
const TOKENS: usize = 48;

/// Burn's embedding and linear map around one layer of gated linear attention.
#[derive(Module, Debug)]
struct Tagger {
    embedding: Embedding,
    mixer: Gla,
    output: Linear,
}

impl Tagger {
    fn new(device: &Device) -> Result<Self, NnError> {
        let width = 64;
        Ok(Self {
            embedding: EmbeddingConfig::new(SYMBOLS, width).init(device),
            // The short convolution looks three tokens back; the recurrence carries what it saw.
            mixer: GlaConfig::new(width, 2).with_use_short_conv(true).init(1, device)?,
            output: LinearConfig::new(width, SYMBOLS).init(device),
        })
    }

    /// Logits `[batch, tokens, symbols]`, and what to go on from when the context keeps states.
    fn forward(
        &self,
        symbols: Tensor<2, Int>,
        past: Option<RecurrentState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<RecurrentState>), NnError> {
        let x = self.embedding.forward(symbols);
        let (mixed, state) = self.mixer.forward(x.clone(), past, context)?;
        Ok((self.output.forward(x + mixed), state))
    }
}

/// Random symbols, and those that stood `DISTANCE` before; −100, which the loss does not count, where there is none.
fn batch(device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let symbols = Tensor::<2>::random([BATCH, TOKENS], Distribution::Uniform(0.0, SYMBOLS as f64), device).int();
    let none = Tensor::full([BATCH, DISTANCE], -100, device);
    let labels = Tensor::cat(vec![none, symbols.clone().narrow(1, 0, TOKENS - DISTANCE)], 1);
    (symbols, labels)
}

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::flex();
    device.seed(7);
    let training = device.clone().autodiff();
    let mut tagger = Tagger::new(&training)?;
    let mut optimizer = AdamWConfig::new().init();
    let mut last = f32::NAN;
    for step in 0..=200 {
        let (symbols, labels) = batch(&training);
        let context = SequenceContext::new([BATCH, TOKENS], None, Compute::f32(), &training)?;
        let (logits, _) = tagger.forward(symbols, None, &context)?;
        let loss = cross_entropy(logits.reshape([BATCH * TOKENS, SYMBOLS]), labels.reshape([BATCH * TOKENS])).mean();
        last = loss.clone().into_scalar::<f32>();
        if step % 40 == 0 {
            println!("step {step:3}  loss {last:.3}  (chance {:.3})", (SYMBOLS as f32).ln());
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &tagger);
        tagger = optimizer.step(5e-3, tagger, gradients);
    }
    if last.is_nan() || last > 0.5 {
        return Err(format!("the loss is {last} after 200 steps; it should be well under 0.5").into());
    }

    // The same layer one token at a time, from the state of the tokens before.
    let tagger = tagger.valid();
    let (symbols, labels) = batch(&device);
    let mut state = None;
    let mut right = 0;
    for t in 0..TOKENS {
        let context = SequenceContext::new([BATCH, 1], None, Compute::f32(), &device)?.continuing(&[t; BATCH])?;
        let (logits, next) = tagger.forward(symbols.clone().narrow(1, t, 1), state, &context)?;
        state = next;
        let expected = labels.clone().narrow(1, t, 1);
        let equal = logits.argmax(2).reshape([BATCH, 1]).equal(expected).float().cast(DType::F32).sum();
        right += equal.into_scalar::<f32>() as usize;
    }
    println!("one token at a time: {right} of {} right", BATCH * (TOKENS - DISTANCE));
    Ok(())
}
