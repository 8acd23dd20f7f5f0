//! A language model of burn-fla trained by burn-train's `Learner`, from a Burn `DataLoader`.
//!
//! ```sh
//! cargo run --release --example learner             # on the sources of this crate
//! cargo run --release --example learner -- my.txt   # on your own text
//! ```
//!
//! Progress is shown by burn-train: as lines here, as a dashboard with Burn's feature `tui`.

use std::error::Error;

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn::train::metric::LossMetric;
use burn::train::{InferenceStep, Learner, SequenceOutput, SupervisedTraining, TrainOutput, TrainStep};
use burn_fla::nn::generate::{SamplingConfig, generate};
use burn_fla::nn::{CausalLm, Compute, ModelConfig};

/// Bytes a training sequence.
const TOKENS: usize = 128;

/// What burn-train trains: a model, and how its loss is made.
#[derive(Module, Debug)]
struct ByteModel {
    lm: CausalLm,
}

/// Sequences of one byte more than the model sees: the last is a label only.
#[derive(Clone, Debug)]
struct Sequences(Tensor<2, Int>);

/// Puts sequences below each other.
struct ByteBatcher;

impl Batcher<Vec<u8>, Sequences> for ByteBatcher {
    fn batch(&self, items: Vec<Vec<u8>>, device: &Device) -> Sequences {
        let rows = items.len();
        let bytes: Vec<i32> = items.into_iter().flatten().map(i32::from).collect();
        Sequences(Tensor::from_data(TensorData::new(bytes, [rows, TOKENS + 1]), device))
    }
}

impl ByteModel {
    fn run(&self, Sequences(bytes): Sequences) -> SequenceOutput {
        let ids = bytes.clone().narrow(1, 0, TOKENS);
        let labels = bytes.narrow(1, 1, TOKENS);
        // The steps of burn-train have no way to return an error; shapes that the batcher makes always fit.
        let logits = self.lm.forward(ids, None, Compute::f32()).expect("logits");
        let [rows, _, vocabulary] = logits.dims();
        let flat = (logits.clone().reshape([rows * TOKENS, vocabulary]), labels.clone().reshape([rows * TOKENS]));
        let loss = burn_fla::nn::modules::cross_entropy(flat.0, flat.1).mean();
        SequenceOutput::new(loss, logits, None, labels)
    }
}

impl TrainStep for ByteModel {
    type Input = Sequences;
    type Output = SequenceOutput;

    fn step(&self, item: Sequences) -> TrainOutput<SequenceOutput> {
        let output = self.run(item);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for ByteModel {
    type Input = Sequences;
    type Output = SequenceOutput;

    fn step(&self, item: Sequences) -> SequenceOutput {
        self.run(item)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let text = match std::env::args().nth(1) {
        Some(path) => std::fs::read(path)?,
        None => [include_bytes!("learner.rs").as_slice(), include_bytes!("layer.rs")].concat(),
    };
    let sequences: Vec<Vec<u8>> = text.windows(TOKENS + 1).step_by(TOKENS / 2).map(<[u8]>::to_vec).collect();
    if sequences.len() < 20 {
        return Err(format!("the text has {} bytes; give {} at least", text.len(), 20 * TOKENS).into());
    }
    let held_out = sequences.len() / 10;
    let (valid, train) = sequences.split_at(held_out);

    let device = Device::flex();
    let training = device.clone().autodiff();
    let config = ModelConfig::from_json(
        r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128,
            "num_hidden_layers": 2, "initializer_range": 0.1}"#,
    )?;
    let model = ByteModel { lm: CausalLm::init(&config, 1, &training)? };

    let loader = |items: &[Vec<u8>], device: &Device| {
        DataLoaderBuilder::new(ByteBatcher)
            .batch_size(8)
            .shuffle(1)
            .set_device(device.clone())
            .build(InMemDataset::new(items.to_vec()))
    };
    let folder = std::env::temp_dir().join("burn-fla-learner");
    let result = SupervisedTraining::new(folder, loader(train, &training), loader(valid, &device))
        .metrics((LossMetric::new(),))
        .num_epochs(3)
        .summary()
        .launch(Learner::new(model, AdamWConfig::new().init(), 3e-3));
    if let Some(error) = result.error {
        return Err(error.to_string().into());
    }

    let prompt: Vec<u32> = b"fn ".iter().map(|byte| u32::from(*byte)).collect();
    let sampling = SamplingConfig { temperature: 0.7, ..SamplingConfig::default() };
    let tokens = generate(&result.model.lm, &prompt, 80, &sampling, None, Compute::f32(), |_| {
        std::ops::ControlFlow::Continue(())
    })?;
    let bytes: Vec<u8> = tokens.into_iter().map(|token| token as u8).collect();
    println!("fn {}", String::from_utf8_lossy(&bytes));
    Ok(())
}
