//! A model of this library and its data under burn-train's `Learner`, and what comes out beside this library's own loop.

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataset::Dataset;
use burn::optim::AdamWConfig;
use burn::tensor::Device;
use burn::train::metric::LossMetric;
use burn::train::{Learner, SupervisedTraining};
use burn_fla::nn::{CausalLm, Compute, ModelConfig};
use burn_fla::train::Recipe;
use burn_fla::train::data::{Corpus, RowBatcher, RowDataset, Rows};

const CONFIG: &str = r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1,
    "num_heads": 2, "expand_k": 1.0, "intermediate_size": 64}"#;

fn recipe(folder: &std::path::Path, varlen: bool) -> Recipe {
    std::fs::write(folder.join("config.json"), CONFIG).expect("a file");
    for index in 0..30u32 {
        let lines: String = (0..20).map(|i| format!("let x{} = {} * y;\n", i % 7, i * index % 11)).collect();
        std::fs::write(folder.join(format!("{index:02}.txt")), lines).expect("a file");
    }
    let text = format!(
        "[job]\ndump_folder = '{0}/run'\n[model]\nconfig = '{0}/config.json'\n[training]\nsteps = 1\nseq_len = 64\n\
         varlen = {varlen}\n[data]\nsources = [{{ path = '{0}/*.txt' }}]\nvalidation_fraction = 0.2\n",
        folder.display()
    );
    std::fs::write(folder.join("recipe.toml"), text).expect("a file");
    Recipe::load(&folder.join("recipe.toml"), &[]).expect("a recipe")
}

#[test]
fn the_learner_trains_a_model_on_the_token_store() {
    for varlen in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let corpus = Corpus::open(&recipe(folder.path(), varlen), &mut |_| ()).expect("data");
        let held_out = corpus.validation.expect("held-out documents");
        let device = Device::flex();
        let training = device.clone().autodiff();
        let batcher = RowBatcher { compute: Compute::f32() };
        let loader = |rows, device: &Device| {
            let builder = DataLoaderBuilder::new(batcher);
            builder.batch_size(8).shuffle(1).set_device(device.clone()).build(RowDataset::new(rows))
        };
        let model = CausalLm::init(&ModelConfig::from_json(CONFIG).expect("a config"), 1, &training).expect("a model");
        let rows = RowDataset::new(held_out.clone());
        let loss = |model: &CausalLm| -> f64 {
            let rows: Vec<Rows> = (0..rows.len()).map(|index| rows.get(index).expect("a row")).collect();
            let device = model.device();
            let batch = burn::data::dataloader::batcher::Batcher::batch(&batcher, rows, &device);
            let loss = model.loss(batch.ids, batch.labels, batch.cu.as_ref(), Compute::f32()).expect("a loss");
            f64::from(loss.mean().into_scalar::<f32>())
        };
        let before = loss(&model);
        let result = SupervisedTraining::new(
            folder.path().join("learner"),
            loader(corpus.train, &training),
            loader(held_out, &device),
        )
        .metrics((LossMetric::new(),))
        .num_epochs(6)
        .summary()
        .launch(Learner::new(model, AdamWConfig::new().init(), 1e-2));
        assert!(result.error.is_none());
        let after = loss(&result.model);
        assert!((before - 256f64.ln()).abs() < 0.1, "{before}");
        // The letters alone, whatever stands before them, have 3.3 nats of this text's alphabet of 28.
        assert!(after < 3.2, "{before} to {after}, varlen {varlen}");
    }
}

#[test]
fn a_dataset_has_the_rows_of_its_source() {
    let folder = tempfile::tempdir().expect("a folder");
    let corpus = Corpus::open(&recipe(folder.path(), true), &mut |_| ()).expect("data");
    let dataset = RowDataset::new(corpus.train.clone());
    assert_eq!(dataset.len() as u64, corpus.train.len());
    for index in [0, dataset.len() - 1] {
        let row = dataset.get(index).expect("a row");
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        corpus.train.read(index as u64, &mut ids, &mut labels);
        assert_eq!((row.ids, row.labels), (ids, labels));
        assert_eq!(row.starts.expect("documents")[1..], corpus.train.starts(index as u64).expect("documents"));
    }
}
