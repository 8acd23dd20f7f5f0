//! Runs on multi-query associative recall: what they report, and that they resume to the last bit.

use burn_fla_nn::{Compute, hub};
use burn_fla_train::data::{Mqar, Split, spread};
use burn_fla_train::recipe::DataSection;
use burn_fla_train::{Recipe, RunSummary, Trainer};
use serde_json::Value;

use super::bad_input::fails;
use super::runs::Bench;

/// The bench of the other runs with recall in place of text.
fn bench() -> Bench {
    let bench = Bench::new();
    let recipe = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    let (before, after) = recipe.split_once("[data]").unwrap();
    let (_, after) = after.split_once("[checkpoint]").unwrap();
    let data = "[data]\nkind = \"mqar\"\nvocab_size = 24\nnum_pairs = 3\n";
    std::fs::write(bench.path("recipe.toml"), format!("{before}{data}[checkpoint]{after}")).unwrap();
    bench
}

fn evaluations(bench: &Bench, run: &str) -> Vec<Value> {
    bench.lines(run).into_iter().filter(|line| line.get("validation_loss").is_some()).collect()
}

/// Loss and accuracy on the held-out examples, from the logits alone.
fn measured(bench: &Bench, summary: &RunSummary) -> (f64, f64) {
    let recipe = Recipe::load(&bench.path("recipe.toml"), &[]).unwrap();
    let DataSection::Mqar(section) = &recipe.data else { panic!("{:?}", recipe.data) };
    let device = burn_fla_tests::reference_device();
    let model = hub::load_model(&summary.checkpoint, &device).unwrap();
    let count = recipe.validation.steps * recipe.training.batch_size as u64;
    let (mut nats, mut right, mut asked) = (0.0, 0, 0);
    for rows in spread(&Mqar::new(section, recipe.training.seq_len, Split::Validation), count) {
        let ids = burn::tensor::Tensor::<1, burn::tensor::Int>::from_data(&rows.ids[..], &device).unsqueeze::<2>();
        let logits = model.forward(ids, None, Compute::f32()).unwrap().try_into_vec_as::<f32>().unwrap();
        for (logits, label) in logits.chunks(model.config().vocab_size()).zip(&rows.labels) {
            let Ok(label) = usize::try_from(*label) else { continue };
            let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
            nats += sum.ln() - f64::from(logits[label]);
            asked += 1;
            right += i32::from(logits.iter().all(|z| *z <= logits[label]));
        }
    }
    assert_eq!(asked, 3 * 4 * 3);
    (nats / f64::from(asked), f64::from(right) / f64::from(asked))
}

#[test]
fn a_run_reports_the_share_of_right_answers() {
    let bench = bench();
    // Long enough to know a value from a key, so that some answers are right by luck.
    let summary = bench.train(&["training.steps=60", "validation.freq=20", "optimizer.lr=0.02"]).unwrap();
    assert_eq!((summary.step, summary.tokens), (60, 60 * 2 * 4 * 3), "only answers count");
    let first: f64 = bench.losses("run")[0].1.parse().unwrap();
    assert!((first - 256f64.ln()).abs() < 0.1, "{first}");
    let lines = evaluations(&bench, "run");
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|line| line.get("validation_bits_per_byte").is_none()), "{lines:?}");
    let last = lines.last().unwrap();
    let (loss, accuracy) = measured(&bench, &summary);
    assert!((last["validation_loss"].as_f64().unwrap() - loss).abs() < 1e-5, "{last}, not {loss}");
    assert_eq!(last["validation_accuracy"].as_f64().unwrap(), accuracy);
    assert_eq!((summary.accuracy, summary.bits_per_byte), (Some(accuracy), None));
    assert!(accuracy > 0.0, "the loss is {loss}, and not one of 36 answers in 12 is right");
    assert!(!bench.checkpoint("run", 60).join("tokenizer.json").exists());
}

#[test]
fn it_resumes_to_the_last_bit_without_a_file() {
    for examples in [&[][..], &["data.num_examples=50"]] {
        let bench = bench();
        let whole = bench.train(examples).unwrap();
        let from = format!("checkpoint.resume={}", bench.checkpoint("run", 10).display());
        let other = format!("job.dump_folder={}", bench.path("other").display());
        let resumed = bench.train(&[examples, &[&from, &other]].concat()).unwrap();
        assert_eq!(bench.losses("other"), bench.losses("run")[10..]);
        assert_eq!(resumed.accuracy, whole.accuracy);
        for name in ["model.safetensors", "optimizer.safetensors"] {
            let read = |run| std::fs::read(bench.checkpoint(run, 20).join(name)).unwrap();
            assert!(read("run") == read("other"), "{name} differs");
        }
        // The recipe in the run folder says all of it.
        let again = Recipe::load(&bench.path("run").join("recipe.toml"), &[]).unwrap();
        assert_eq!(Trainer::new(again).unwrap().run().unwrap().step, 20);
    }
}

#[test]
fn what_cannot_work_is_said() {
    let bench = bench();
    fails(&bench, &["data.kind=mqra"], &["--set data.kind=mqra", "`data.kind`", "did you mean \"mqar\""]);
    fails(&bench, &["data.sources=[]"], &["unknown key `data.sources`"]);
    fails(&bench, &["data.num_pair=2"], &["unknown key `data.num_pair`", "`data.num_pairs`"]);
    fails(&bench, &["data.num_pairs=9"], &["`data.num_pairs`", "need 36 tokens", "training.seq_len is 32"]);
    fails(&bench, &["data.vocab_size=6"], &["`data.num_pairs`", "data.vocab_size 6 has 2"]);
    fails(&bench, &["data.vocab_size=3"], &["`data.vocab_size`", "3 must be between 4"]);
    fails(&bench, &["data.vocab_size=300"], &["`data.vocab_size`", "300 is more than the vocab_size 256"]);
    fails(&bench, &["data.filler=ones"], &["`data.filler`", "\"random\", \"zero\""]);
    fails(&bench, &["data.power_a=2"], &["`data.power_a`", "between 0 and 1"]);
    fails(&bench, &["validation.samples=[\"fn\"]"], &["`validation.samples`", "remove the key"]);
    fails(&bench, &["model.tokenizer=tokenizer.json"], &["`model.tokenizer`", "no tokenizer"]);
    assert!(!bench.path("run").exists(), "nothing was written");
    bench.train(&[]).unwrap();
    fails(&bench, &["data.num_pairs=2"], &["cannot resume", "the training data"]);
    fails(&bench, &["data.seed=7"], &["cannot resume", "data.seed was 42 and is now 7"]);
}

#[test]
fn recall_is_learned() {
    let bench = bench();
    let summary = bench.train(&[
        "model.overrides={ vocab_size = 24, num_hidden_layers = 2, use_short_conv = true, initializer_range = 0.05 }",
        "data.num_pairs=2",
        "training.seq_len=12",
        "training.batch_size=32",
        "training.gradient_accumulation_steps=1",
        "training.steps=250",
        "checkpoint.interval=1000",
        "metrics.log_freq=50",
        "validation.freq=0",
    ]);
    let accuracy = summary.unwrap().accuracy.unwrap();
    // A model that only tells values from keys is right in one of 12, one that also sees which values were given in 1 of 2.
    assert!(accuracy > 0.8, "{accuracy}");
}
