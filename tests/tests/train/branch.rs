//! Decay runs out of a stable one, mixing, packed rows and other formats, in whole runs.

use burn_fla_train::branch::Branch;
use burn_fla_train::recipe::DecayKind;
use burn_fla_train::{RunSummary, TrainError, Trainer};

use super::runs::Bench;

const STABLE: [&str; 3] = ["lr_scheduler.decay_ratio=0.1", "lr_scheduler.decay_type=linear", "training.steps=20"];

fn branch(bench: &Bench, from: Option<u64>, decay_steps: u64) -> Branch {
    Branch { run: bench.path("run"), from, decay_steps, decay_type: None, folder: None }
}

fn train(branch: &Branch) -> Result<RunSummary, TrainError> {
    Trainer::new(branch.recipe()?)?.run()
}

/// The learning rates of a run by step.
fn rates(bench: &Bench, run: &str) -> Vec<(u64, f64)> {
    let lines = bench.lines(run);
    lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line.get("lr")?.as_f64()?))).collect()
}

#[test]
fn decay_runs_go_on_from_the_stable_rate_and_data() {
    let bench = Bench::new();
    bench.train(&STABLE).unwrap();
    for decay in [4, 8] {
        let summary = train(&branch(&bench, Some(10), decay)).unwrap();
        let run = format!("run-from10-decay{decay}");
        assert_eq!(summary.step, 10 + decay);
        let rates = rates(&bench, &run);
        let steps: Vec<u64> = (11..=10 + decay).collect();
        assert_eq!(rates.iter().map(|(step, _)| *step).collect::<Vec<_>>(), steps);
        // The step that is counted as n was made at the rate of n − 1: the decay begins with the first of the branch.
        for (step, rate) in rates {
            let x = (step - 1 - 10) as f64 / decay as f64;
            let expected = 0.01 * (0.1 + 0.9 * (1.0 - x));
            assert!((rate / expected - 1.0).abs() < 1e-9, "step {step}: {rate}, not {expected}");
        }
        // The first step sees the rows that the stable run saw next.
        assert_eq!(bench.losses(&run)[0].1, bench.losses("run")[10].1);
        // Again: it is over, and nothing is trained twice.
        let again = burn_fla_train::Recipe::load(&bench.path(&run).join("recipe.toml"), &[]).unwrap();
        assert_eq!(Trainer::new(again).unwrap().run().unwrap().step, 10 + decay);
    }
    let sqrt =
        Branch { decay_type: Some(DecayKind::Sqrt), folder: Some(bench.path("sqrt")), ..branch(&bench, Some(10), 4) };
    train(&sqrt).unwrap();
    let second = rates(&bench, "sqrt")[1].1;
    assert!((second / (0.01 * (0.1 + 0.9 * 0.5)) - 1.0).abs() < 1e-9, "{second}");
}

#[test]
fn what_cannot_be_branched_is_said() {
    let bench = Bench::new();
    bench.train(&STABLE).unwrap();
    let message = |branch: Branch| branch.recipe().unwrap_err().to_string();
    let missing = message(branch(&bench, Some(7), 4));
    assert!(missing.contains("checkpoints of the steps 10, 20"), "{missing}");
    let late = message(branch(&bench, None, 4));
    assert!(late.contains("step 20 is in the decay of its run, which began at step 18 of 20"), "{late}");
    let nowhere = message(Branch { run: bench.path("none"), ..branch(&bench, None, 4) });
    assert!(nowhere.contains("none/recipe.toml"), "{nowhere}");
    let weights = bench.checkpoint("run", 10).join("model.safetensors");
    std::fs::write(weights, "x").unwrap();
    assert!(message(branch(&bench, Some(10), 4)).contains("damaged"));
    let warm = Bench::new();
    warm.train(&["lr_scheduler.warmup_steps=15"]).unwrap();
    assert!(message(branch(&warm, Some(10), 4)).contains("warm-up, which ends at step 15"));
}

/// Two sources of one letter each, in the shares 3 : 1.
#[test]
fn a_mixture_is_drawn_in_its_shares_and_resumes_to_the_last_bit() {
    let bench = Bench::new();
    for (name, letter) in [("a.txt", "a"), ("b.txt", "b")] {
        std::fs::write(bench.path(name), letter.repeat(3000)).unwrap();
    }
    let source = |name: &str, weight: u32| format!("{{ path = '{}', weight = {weight} }}", bench.path(name).display());
    let sources = format!("data.sources=[{}, {}]", source("a.txt", 3), source("b.txt", 1));
    let set = [sources.as_str(), "data.validation_fraction=0"];
    bench.train(&set).unwrap();
    let lines = bench.lines("run");
    let last = lines.iter().rfind(|line| line.get("sources").is_some()).unwrap();
    let tokens = |name: &str| last["sources"][bench.path(name).display().to_string()].as_f64().unwrap();
    let total = (20 * 2 * 4 * 32) as f64;
    assert_eq!(tokens("a.txt") + tokens("b.txt"), total);
    assert!((tokens("a.txt") / total - 0.75).abs() < 0.1, "{last}");
    let from = format!("checkpoint.resume={}", bench.checkpoint("run", 10).display());
    let other = format!("job.dump_folder={}", bench.path("other").display());
    bench.train(&[&set[..], &[&from, &other]].concat()).unwrap();
    assert_eq!(bench.losses("other"), bench.losses("run")[10..]);
    // Other weights are another stream of data.
    let changed = sources.replace("weight = 3", "weight = 2");
    super::bad_input::fails(&bench, &[&changed, set[1]], &["cannot resume", "training data"]);
}

/// With documents that do not see each other, what is held out of a row is the same as each document by itself.
#[test]
fn packed_rows_train_as_documents_alone() {
    let bench = Bench::new();
    let documents = ["the first document of the row", "and", "a third one, which is the longest of them all"];
    for (index, text) in documents.iter().enumerate() {
        std::fs::write(bench.path(&format!("{index}.txt")), text).unwrap();
    }
    // One row holds them all, so one step sees each label once.
    let total: usize = documents.iter().map(|text| text.len() + 1).sum();
    let list: Vec<String> = (0..3).map(|index| format!("'{index}.txt'")).collect();
    let one_row = [
        format!("data.sources=[{{ root = '{}', paths = [{}] }}]", bench.path("").display(), list.join(", ")),
        format!("training.seq_len={}", total - 1),
    ];
    let base = ["training.batch_size=1", "training.gradient_accumulation_steps=1", "training.steps=1"];
    let base = [&base[..], &["data.validation_fraction=0", "lr_scheduler.warmup_steps=0", "device.threads=1"]].concat();
    let row: Vec<&str> = one_row.iter().map(String::as_str).collect();
    let packed = bench.train(&[&base[..], &row, &["training.varlen=true"]].concat()).unwrap();
    // Two labels cross from one document to the next.
    assert_eq!(packed.tokens as usize, total - 1 - 2);
    let packed: f64 = bench.losses("run")[0].1.parse().unwrap();

    let (mut sum, mut count) = (0.0, 0.0);
    for (index, text) in documents.iter().enumerate() {
        let alone = [
            format!("data.sources=[{{ path = '{}' }}]", bench.path(&format!("{index}.txt")).display()),
            format!("training.seq_len={}", text.len()),
            format!("job.dump_folder={}", bench.path(&format!("alone{index}")).display()),
        ];
        let alone: Vec<&str> = alone.iter().map(String::as_str).collect();
        bench.train(&[&base[..], &alone].concat()).unwrap();
        let loss: f64 = bench.losses(&format!("alone{index}"))[0].1.parse().unwrap();
        sum += loss * text.len() as f64;
        count += text.len() as f64;
    }
    assert!((packed - sum / count).abs() < 1e-5, "{packed} packed, {} alone", sum / count);
}
