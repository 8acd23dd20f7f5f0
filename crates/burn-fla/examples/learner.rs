//! A language model of burn-fla trained by burn-train's `Learner`, from a Burn `DataLoader` over the token store.
//!
//! ```sh
//! cargo run --release --example learner             # on the sources of this crate
//! cargo run --release --example learner -- my.txt   # on your own text
//! ```
//!
//! Progress is shown by burn-train: as lines here, as a dashboard with Burn's feature `tui`.

use std::error::Error;
use std::path::Path;

use burn::data::dataloader::DataLoaderBuilder;
use burn::optim::AdamWConfig;
use burn::tensor::Device;
use burn::train::metric::LossMetric;
use burn::train::{Learner, SupervisedTraining};
use burn_fla::nn::generate::{SamplingConfig, generate};
use burn_fla::nn::{CausalLm, Compute, ModelConfig};
use burn_fla::train::Recipe;
use burn_fla::train::data::{Corpus, RowBatcher, RowDataset};

const CONFIG: &str = r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 64, "num_heads": 2,
    "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}"#;

fn main() -> Result<(), Box<dyn Error>> {
    // A recipe's data: tokenised once, cached, in rows of 128 bytes, of several documents one in ten held out.
    let (text, held_out) = match std::env::args().nth(1) {
        Some(path) => (std::fs::canonicalize(path)?.display().to_string(), 0.0),
        None => (format!("{}/*/**/*.rs", Path::new(env!("CARGO_MANIFEST_DIR")).display()), 0.1),
    };
    let folder = std::env::temp_dir().join("burn-fla-learner");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("config.json"), CONFIG)?;
    let recipe = format!(
        "[job]\ndump_folder = '{0}'\n[model]\nconfig = '{0}/config.json'\n[training]\nsteps = 1\nseq_len = 128\n\
         [data]\nsources = [{{ path = '{text}', max_bytes = 60_000 }}]\nvalidation_fraction = {held_out:?}\n",
        folder.display()
    );
    std::fs::write(folder.join("recipe.toml"), recipe)?;
    let recipe = Recipe::load(&folder.join("recipe.toml"), &[])?;
    let corpus = Corpus::open(&recipe, &mut |note| eprintln!("{note}"))?;
    // A single document is not held out: then what is learned is also what is judged.
    let held_out = corpus.validation.unwrap_or_else(|| corpus.train.clone());

    let device = Device::flex();
    let training = device.clone().autodiff();
    let model = CausalLm::init(&ModelConfig::from_json(CONFIG)?, 1, &training)?;
    let loader = |rows, device: &Device| {
        DataLoaderBuilder::new(RowBatcher { compute: Compute::f32() })
            .batch_size(8)
            .shuffle(1)
            .set_device(device.clone())
            .build(RowDataset::new(rows))
    };
    let result = SupervisedTraining::new(folder, loader(corpus.train, &training), loader(held_out, &device))
        .metrics((LossMetric::new(),))
        .num_epochs(3)
        .summary()
        .launch(Learner::new(model, AdamWConfig::new().init(), 3e-3));
    if let Some(error) = result.error {
        return Err(error.to_string().into());
    }

    let prompt: Vec<u32> = b"fn ".iter().map(|byte| u32::from(*byte)).collect();
    let sampling = SamplingConfig { temperature: 0.7, ..SamplingConfig::default() };
    let tokens =
        generate(&result.model, &prompt, 80, &sampling, None, Compute::f32(), |_| std::ops::ControlFlow::Continue(()))?;
    let bytes: Vec<u8> = tokens.into_iter().map(|token| token as u8).collect();
    println!("fn {}", String::from_utf8_lossy(&bytes));
    Ok(())
}
