//! Bad input: one line that names the file, the key or the number and what to do, and nothing left behind.

use std::fs;

use crate::{CONFIG, Place, files, golden};

#[test]
fn a_recipe_that_is_missing_or_unreadable() {
    let place = Place::new();
    place.fail(&["train", "recipes/none.toml"], &["recipes/none.toml", "check the path"]);
    fs::create_dir(place.path("folder.toml")).expect("a folder");
    place.fail(&["train", "folder.toml"], &["folder.toml"]);
    fs::write(place.path("bytes.toml"), [0xff, 0xfe, 0x00]).expect("a file");
    place.fail(&["train", "bytes.toml"], &["bytes.toml"]);
    place.write("broken.toml", "[training\nsteps = 3\n");
    place.fail(&["train", "broken.toml"], &["broken.toml:1", "TOML"]);
    place.assert_no_run();
}

#[test]
fn an_unknown_key() {
    let place = Place::new();
    place.edit("seq_len = 64", "seq_lenn = 64");
    place.fail(&["train", "recipe.toml"], &["recipe.toml:13", "seq_lenn", "did you mean", "seq_len`"]);
    let place = Place::new();
    place.fail(&["train", "recipe.toml", "--set", "trainig.steps=3"], &["trainig", "training"]);
    place.fail(&["train", "recipe.toml", "--set", "training.steps"], &["training.steps", "section.key=value"]);
    place.assert_no_run();
}

#[test]
fn a_wrong_type() {
    let place = Place::new();
    place.edit("steps = 20", "steps = \"twenty\"");
    place.fail(&["train", "recipe.toml"], &["recipe.toml:14", "training.steps", "twenty"]);
    let place = Place::new();
    place.fail(&["train", "recipe.toml", "--set", "optimizer.lr=fast"], &["optimizer.lr", "fast"]);
    place.fail(&["train", "recipe.toml", "--set", "training.steps=-1"], &["training.steps", "-1"]);
    place.assert_no_run();
}

#[test]
fn a_config_that_the_model_does_not_accept() {
    let place = Place::new();
    let with = |old: &str, new: &str| {
        assert!(CONFIG.contains(old), "{old}");
        place.write("config.json", &CONFIG.replace(old, new));
    };
    with("\"gla\"", "\"glaa\"");
    place.fail(&["train", "recipe.toml"], &["model_type", "glaa", "did you mean `gla`"]);
    with("\"num_heads\": 2", "\"num_heads\": 3");
    place.fail(&["train", "recipe.toml"], &["32", "num_heads", "3"]);
    with("\"num_heads\": 2", "\"num_heads\": 2, \"hidden_act\": \"relu\"");
    place.fail(&["train", "recipe.toml"], &["hidden_act", "relu"]);
    place.write("config.json", "{\"model_type\": ");
    place.fail(&["train", "recipe.toml"], &["config.json"]);
    place.edit("config.json", "nowhere.json");
    place.fail(&["train", "recipe.toml"], &["nowhere.json"]);
    place.assert_no_run();
}

#[test]
fn a_tokenizer_larger_than_the_vocabulary() {
    let place = Place::new();
    place.fail(&["train", "recipe.toml", "--set", "model.overrides.vocab_size=100"], &["256", "100", "vocab_size"]);
    place.assert_no_run();
}

#[test]
fn an_empty_corpus() {
    let place = Place::new();
    place.fail(&["train", "recipe.toml", "--set", "data.sources=[{path=\"none/*.txt\"}]"], &["none/*.txt"]);
    place.write("lines.jsonl", "{\"text\": \"a\"}\nnot json\n");
    let lines = "data.sources=[{path=\"lines.jsonl\", format=\"jsonl\"}]";
    place.fail(&["train", "recipe.toml", "--set", lines], &["lines.jsonl:2", "not JSON"]);
    place.assert_no_run();

    // Here there is a text to tokenise, and its cache is a whole one; but nothing of a run.
    place.write("text.txt", "");
    place.fail(&["train", "recipe.toml"], &["training data", "0 tokens", "65"]);
    place.write("text.txt", "too short");
    place.fail(&["train", "recipe.toml"], &["training data", "65", "training.seq_len"]);
    let left = files(&place.path("run"));
    assert!(left.iter().all(|file| file.starts_with(place.path("run/cache"))), "{left:?}");
}

#[test]
fn a_damaged_or_truncated_checkpoint() {
    let place = Place::new();
    place.succeed(&["train", "recipe.toml"]);
    let step = |n: u32| place.path(&format!("run/checkpoints/step_{n:08}"));
    let cut = |n: u32| {
        let weights = step(n).join("model.safetensors");
        let bytes = fs::read(&weights).expect("weights");
        fs::write(&weights, &bytes[..bytes.len() / 2]).expect("a writable file");
    };
    cut(20);
    let last = "run/checkpoints/step_00000020";
    let more = ["--set", "training.steps=22"];
    let damaged = ["step_00000020", "model.safetensors", "bytes"];
    place.fail(&[&["train", "recipe.toml", "--resume", last], &more[..]].concat(), &damaged);
    place.fail(&["generate", last, "--prompt", "let"], &damaged);

    // A run falls back to the checkpoint before, and says so.
    let output = place.run(&["generate", "run", "--prompt", "let", "--max-new-tokens", "4"]);
    assert!(output.status.success());
    let warning = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(warning.starts_with("warning: ") && warning.contains("step_00000020"), "{warning}");

    cut(10);
    let whole = ["damaged", "no other checkpoint is whole"];
    place.fail(&[&["train", "recipe.toml"], &more[..]].concat(), &whole);
    place.fail(&["generate", "run", "--prompt", "let"], &whole);
    fs::remove_file(step(10).join("DONE")).expect("a marker");
    place.fail(&["train", "recipe.toml", "--resume", "run/checkpoints/step_00000010"], &["step_00000010", "DONE"]);
    place.fail(&["train", "recipe.toml", "--resume", "run/checkpoints/step_3"], &["step_3", "no"]);
}

#[test]
fn a_run_folder_that_cannot_be_written() {
    let place = Place::new();
    // A file stands where the folder should be: not even root can write there.
    place.write("occupied", "a file");
    place.fail(&["train", "recipe.toml", "--set", "job.dump_folder=occupied/run"], &["occupied/run"]);
    place.fail(&["train", "recipe.toml", "--set", "job.dump_folder=occupied"], &["occupied"]);
    let cache = "data.cache_folder=occupied/cache";
    place.fail(&["train", "recipe.toml", "--set", cache], &["occupied/cache"]);
    assert_eq!(fs::read_to_string(place.path("occupied")).expect("the file"), "a file");
    let left: Vec<_> = files(&place.path("run"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn cuda_in_a_build_without_it() {
    let place = Place::new();
    let parts = ["cuda", "cargo run --release --features cuda"];
    place.fail(&["train", "recipe.toml", "--set", "device.backend=cuda"], &parts);
    place.assert_no_run();
    let gla = golden("gla");
    place.fail(&["verify", &gla.to_string_lossy(), "--device", "cuda"], &parts);
}

#[test]
#[cfg(feature = "cuda")]
fn cuda_on_a_machine_without_such_a_gpu() {
    let place = Place::new();
    place.fail(&["train", "recipe.toml", "--set", "device.backend=cuda", "--set", "device.index=99"], &["cuda"]);
    place.assert_no_run();
}

#[test]
fn a_device_index_that_is_not_there() {
    let place = Place::new();
    place.fail(&["train", "recipe.toml", "--set", "device.index=3"], &["cpu device 3", "shows 1"]);
    place.assert_no_run();
}

#[test]
fn a_folder_that_is_no_model() {
    let place = Place::new();
    place.fail(&["generate", "none", "--prompt", "x"], &["none", "no such folder"]);
    fs::create_dir(place.path("empty")).expect("a folder");
    place.fail(&["generate", "empty", "--prompt", "x"], &["empty", "config.json"]);
    let gla = golden("gla");
    place.fail(&["generate", &gla.to_string_lossy(), "--prompt", "x"], &["tokenizer.json", "--tokenizer"]);
    place.fail(&["verify", "empty"], &["empty"]);
}

/// Where the system tells what is left, a batch that cannot fit is refused before anything is begun, with one that does.
#[test]
#[cfg(target_os = "linux")]
fn a_batch_that_memory_cannot_hold() {
    let place = Place::new();
    let set = ["train", "recipe.toml", "--set", "training.batch_size=100000000"];
    let output = place.run(&set);
    let error = crate::text(&output.stderr);
    place.fail(
        &set,
        &["out of memory", "training.batch_size = 100000000 needs about", "GiB, and the machine has", "fit"],
    );
    place.assert_no_run();
    let fits: Vec<u64> = error
        .match_indices("training.batch_size = ")
        .map(|(at, key)| {
            error[at + key.len()..].split(' ').next().and_then(|text| text.parse().ok()).expect("a number")
        })
        .collect();
    let [asked, fits] = fits[..] else { panic!("{error}") };
    assert!(1 < fits && fits < asked, "{error}");
    // With one layer there is nothing to be had by computing it again.
    assert!(!error.contains("activation_checkpoint"), "{error}");
}
