//! What the trainer says to input that cannot work, and that it leaves nothing behind.

use super::runs::{Bench, CONFIG};

pub fn fails(bench: &Bench, overrides: &[&str], expected: &[&str]) {
    let error = bench.train(overrides).expect_err(&format!("{overrides:?}")).to_string();
    for part in expected {
        assert!(error.contains(part), "{overrides:?}: {error:?} does not say {part:?}");
    }
    assert!(!error.contains('\n'), "one line: {error}");
}

#[test]
fn errors_before_the_run_folder_leave_none() {
    let bench = Bench::new();
    let config = |text: &str| std::fs::write(bench.path("config.json"), text).unwrap();
    fails(&bench, &["training.batchsize=3"], &["training.batchsize", "`training.batch_size`"]);
    fails(&bench, &["model.config=/none.json"], &["/none.json"]);
    fails(&bench, &["model.tokenizer=/none/tokenizer.json"], &["/none/tokenizer.json"]);
    fails(&bench, &["model.overrides.vocab_size=200"], &["byte has 256 tokens", "vocab_size 200", "at least 256"]);
    fails(&bench, &["model.overrides.num_heads=5"], &["num_heads"]);
    config(&CONFIG.replace("\"gla\"", "\"glaa\""));
    fails(&bench, &[], &["config.json", "glaa"]);
    config("{");
    fails(&bench, &[], &["config.json"]);
    config(CONFIG);
    #[cfg(not(feature = "cuda"))]
    fails(&bench, &["device.backend=cuda"], &["cuda", "--features cuda"]);
    fails(&bench, &["device.index=7"], &["cpu", "7"]);
    assert!(!bench.path("run").exists(), "nothing was written");
}

#[test]
fn data_that_is_not_there() {
    let bench = Bench::new();
    let source = |text: &str| format!("data.sources=[{text}]");
    fails(&bench, &[&source("{ path = \"/none/*.txt\" }")], &["data.sources[0]", "/none/*.txt"]);
    std::fs::write(bench.path("short.txt"), "abc").unwrap();
    let short = source(&format!("{{ path = '{}' }}", bench.path("short.txt").display()));
    let no_holdout = "data.validation_fraction=0";
    fails(&bench, &[&short, no_holdout], &["training data holds 4 tokens", "33"]);
    std::fs::write(bench.path("short.txt"), "").unwrap();
    fails(&bench, &[&short, no_holdout], &["training data holds 0 tokens"]);
    std::fs::write(bench.path("a.jsonl"), "{\"text\": 1}\n").unwrap();
    let json = source(&format!("{{ path = '{}', format = \"jsonl\" }}", bench.path("a.jsonl").display()));
    fails(&bench, &[&json, no_holdout], &["a.jsonl:1", "not a string"]);
    let cache = std::fs::read_dir(bench.path("run/cache")).unwrap();
    let names: Vec<String> = cache.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| !name.starts_with('.')), "a half-built cache stays: {names:?}");
}

#[test]
fn folders_that_cannot_be_written() {
    let bench = Bench::new();
    let inside_a_file = bench.path("config.json").join("run");
    fails(&bench, &[&format!("job.dump_folder={}", inside_a_file.display())], &["config.json"]);
    let cache = bench.path("config.json").join("cache");
    fails(&bench, &[&format!("data.cache_folder={}", cache.display())], &["config.json"]);
}

#[test]
fn checkpoints_that_do_not_fit() {
    let bench = Bench::new();
    bench.train(&[]).unwrap();
    let last = bench.checkpoint("run", 20);
    fails(&bench, &["checkpoint.resume=never"], &["step 20", "job.dump_folder"]);
    fails(&bench, &["checkpoint.resume=/none/step_1"], &["/none/step_1"]);
    fails(&bench, &["training.seq_len=16"], &["training.seq_len was 32 and is now 16"]);
    fails(&bench, &["data.seed=1"], &["data.seed was 42 and is now 1"]);
    fails(&bench, &["data.validation_fraction=0.1"], &["training data"]);
    fails(&bench, &["model.overrides.intermediate_size=64"], &["intermediate_size"]);
    let bytes = std::fs::read(last.join("model.safetensors")).unwrap();
    std::fs::write(last.join("model.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    let from = format!("checkpoint.resume={}", last.display());
    fails(&bench, &[&from], &["model.safetensors", "damaged", "choose another"]);
    std::fs::remove_dir_all(bench.checkpoint("run", 10)).unwrap();
    fails(&bench, &[], &["model.safetensors", "no other checkpoint is whole"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_its_batch() {
    let bench = Bench::new();
    let diverge = ["optimizer.lr=1e30", "lr_scheduler.warmup_steps=0", "training.max_skipped=3"];
    fails(&bench, &diverge, &["3 optimiser steps in a row", "training.max_skipped = 3", "batch_"]);
    let dump = std::fs::read_dir(bench.path("run"))
        .unwrap()
        .find_map(|entry| {
            let path = entry.unwrap().path();
            path.file_name()?.to_str()?.starts_with("batch_").then_some(path)
        })
        .unwrap();
    let dump: serde_json::Value = serde_json::from_slice(&std::fs::read(dump).unwrap()).unwrap();
    assert_eq!(dump["ids"].as_array().unwrap().len(), 8);
    assert_eq!(dump["ids"][0].as_array().unwrap().len(), 32);
}
