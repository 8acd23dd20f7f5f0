//! The commands around a run: `plan`, `schema`, `runs`, `plot`, `branch`, `tokenizer train`.

use std::fs;

use serde_json::Value;

use crate::{Place, files, text};

#[test]
fn a_plan_says_what_a_run_will_be_and_writes_nothing() {
    let place = Place::new();
    let plan = place.succeed(&["plan", "recipe.toml"]);
    for part in ["gla with", "20 steps", "128 tokens a step", "text.txt", "no run in the run folder yet"] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
    place.assert_no_run();
    let json: Value = serde_json::from_str(&place.succeed(&["plan", "recipe.toml", "--json", "--tokens-per-s", "256"]))
        .expect("JSON");
    assert_eq!((json["seconds"].as_f64(), json["tokens"].as_u64()), (Some(10.0), Some(2560)));
    place.fail(&["plan", "recipe.toml", "--set", "training.stepz=1"], &["training.stepz", "training.steps"]);
    // After a run its rate is taken, and the tokens are counted.
    let said = text(&place.run(&["train", "recipe.toml"]).stderr);
    let last = said.lines().find(|line| line.starts_with("step 20/20 ")).expect("a line of the last step");
    assert!(last.contains("tokens/s") && (last.contains(" GiB") || !cfg!(target_os = "linux")), "{last}");
    let plan = place.succeed(&["plan", "recipe.toml"]);
    assert!(plan.contains("tokens/s") && !plan.contains("about 3"), "{plan}");
}

#[test]
fn the_schema_is_json_and_the_reference_a_recipe() {
    let place = Place::new();
    let schema: Value = serde_json::from_str(&place.succeed(&["schema"])).expect("JSON");
    assert!(schema["properties"]["training"]["properties"]["batch_size"]["description"].is_string());
    place.write("reference.toml", &place.succeed(&["schema", "--reference"]));
    place.fail(&["plan", "reference.toml"], &["configs/gla_quickstart.json"]);
}

#[test]
fn runs_are_listed_plotted_and_branched() {
    let place = Place::new();
    let stable = ["--set", "lr_scheduler.decay_ratio=0.2", "--set", "job.dump_folder=runs/stable"];
    place.succeed(&[&["train", "recipe.toml", "--set", "metrics.tensorboard=true"], &stable[..]].concat());
    assert!(files(&place.path("runs/stable/tensorboard")).len() == 1);
    let branch = ["branch", "runs/stable", "--from", "10", "--decay", "3", "--decay", "5"];
    let output = place.run(&[&branch[..], &["--dry-run"]].concat());
    assert!(
        output.status.success() && text(&output.stderr).contains("stable-from10-decay5"),
        "{}",
        text(&output.stderr)
    );
    assert!(!place.path("runs/stable-from10-decay3").exists());
    place.succeed(&branch);
    let listed = place.succeed(&["runs"]);
    let rows: Vec<Vec<&str>> = listed.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let steps: Vec<(&str, &str)> = rows.iter().map(|row| (row[0], row[1])).collect();
    let expected = [("runs/stable", "20"), ("runs/stable-from10-decay3", "13"), ("runs/stable-from10-decay5", "15")];
    assert_eq!(steps, expected, "{listed}");
    place.succeed(&["plot", "runs/stable", "runs/stable-from10-decay5", "-o", "both.svg"]);
    let svg = fs::read_to_string(place.path("both.svg")).expect("the plot");
    assert!(svg.contains("stable-from10-decay5") && svg.matches("<polyline").count() >= 4);
    place.succeed(&["plot", "runs/stable", "--out", "one.png"]);
    let png = fs::read(place.path("one.png")).expect("the plot");
    assert!(png.starts_with(b"\x89PNG\r\n\x1a\n") && png.len() > 5000, "{} bytes", png.len());
    place.fail(&["plot", "runs/stable", "-o", "one.gif"], &["one.gif", ".svg or .png"]);
    place.fail(&["plot", "runs/none"], &["runs/none/metrics.jsonl"]);
    place.fail(&["branch", "runs/stable", "--decay", "3"], &["step 20 is in the decay"]);
    place.fail(&["runs", "nowhere"], &["nowhere", "no such folder", "burn-fla train", "job.dump_folder"]);
}

/// Before the first run there is nothing to list, and that is no error.
#[test]
fn without_a_run_the_list_says_how_one_is_made() {
    let place = Place::new();
    for there in [false, true] {
        let said = place.succeed(&["runs"]);
        for part in ["no run in runs:", "burn-fla train", "job.dump_folder"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert_eq!(said.contains("no such folder"), !there, "{said}");
        fs::create_dir_all(place.path("runs")).expect("a folder");
    }
}

#[test]
fn a_tokenizer_is_trained_and_trained_with() {
    let place = Place::new();
    place.succeed(&["tokenizer", "train", "recipe.toml", "--vocab-size", "300", "-o", "tokenizer.json"]);
    let with = ["train", "recipe.toml", "--set", "model.tokenizer=tokenizer.json", "--set"];
    place.fail(&[&with[..], &["model.overrides={ eos_token_id = 0 }"]].concat(), &["tokenizer.json", "vocab_size"]);
    place.succeed(&[&with[..], &["model.overrides={ vocab_size = 300, eos_token_id = 0 }"]].concat());
    assert!(place.path("run/checkpoints/step_00000020/tokenizer.json").is_file());
    place.succeed(&["generate", "run", "--prompt", "let ", "--max-new-tokens", "4"]);
    place.fail(&["tokenizer", "train", "recipe.toml", "--vocab-size", "99"], &["99", "<|endoftext|>"]);
    // Where the recipe names the file it is written there, and what is there is kept.
    let named =
        ["tokenizer", "train", "recipe.toml", "--vocab-size", "300", "--set", "model.tokenizer=made/by_us.json"];
    place.succeed(&named);
    let made = fs::read(place.path("made/by_us.json")).expect("the file that the recipe names");
    assert_eq!(made, fs::read(place.path("tokenizer.json")).expect("the first one"));
    place.fail(&named, &["by_us.json", "--output"]);
    assert_eq!(fs::read(place.path("made/by_us.json")).expect("still there"), made);
}
