//! Exact resume: 20 steps are the same to the last bit as 10, an end of any kind, and 10 more.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::runs::Bench;

/// Not a test of its own: the process that is killed. It trains the recipe that the variable names.
#[test]
fn child_process() {
    if let Ok(recipe) = std::env::var("BURN_FLA_TEST_RECIPE") {
        let recipe = burn_fla_train::Recipe::load(Path::new(&recipe), &[]).unwrap();
        burn_fla_train::Trainer::new(recipe).unwrap().run().unwrap();
    }
}

pub fn spawn(bench: &Bench) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "resume::child_process", "--test-threads=1"])
        .env("BURN_FLA_TEST_RECIPE", bench.path("recipe.toml"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(120), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn same_weights(a: &Path, b: &Path) {
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert!(read(a) == read(b), "{name} differs");
    }
}

/// The recipe of the bench with another run folder and a slower pace, so that a signal finds it under way.
fn other_run(bench: &Bench, steps: &str) {
    let recipe = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    let run = |name: &str| format!("dump_folder = '{}'", bench.path(name).display());
    let recipe = recipe.replace(&run("run"), &run("other")).replace("steps = 20", steps);
    std::fs::write(bench.path("recipe.toml"), recipe).unwrap();
}

#[test]
fn after_kill_9() {
    let bench = Bench::new();
    bench.train(&[]).unwrap();
    let whole = bench.losses("run");
    assert_eq!(whole.len(), 20);

    other_run(&bench, "steps = 20");
    let mut child = spawn(&bench);
    // Killed as soon as the checkpoint of step 10 is there: in the middle of a later step, or of a save.
    wait_for("the checkpoint of step 10", || bench.checkpoint("other", 10).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    // A fast machine may have finished: what counts is a resume from step 10.
    let _ = std::fs::remove_dir_all(bench.checkpoint("other", 20));
    bench.train(&[]).unwrap();
    assert_eq!(bench.losses("other"), whole);
    same_weights(&bench.checkpoint("run", 20), &bench.checkpoint("other", 20));
}

#[cfg(unix)]
#[test]
fn after_sigterm() {
    let bench = Bench::new();
    other_run(&bench, "steps = 2000");
    let mut child = spawn(&bench);
    wait_for("the checkpoint of step 10", || bench.checkpoint("other", 10).exists());
    let term = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(term.success());
    assert!(child.wait().unwrap().success(), "a run that was asked to stop ends well");
    let stopped = bench.losses("other").last().unwrap().0;
    assert!((10..2000).contains(&stopped), "{stopped}");
    assert!(bench.checkpoint("other", stopped).join("DONE").exists(), "its last step was saved");
    // It goes on from the step it stopped at, and what it reported stays.
    let steps = format!("training.steps={}", stopped + 3);
    let before = bench.losses("other");
    let summary = bench.train(&[&steps, "lr_scheduler.warmup_steps=0"]).unwrap();
    assert_eq!(summary.step, stopped + 3);
    assert_eq!(bench.losses("other")[..before.len()], before);
}

#[test]
fn between_log_lines_and_from_a_damaged_checkpoint() {
    // Losses between two log lines are part of the checkpoint; 7 divides neither 10 nor 20.
    let bench = Bench::new();
    let seven = ["metrics.log_freq=7", "checkpoint.interval=5"];
    bench.train(&seven).unwrap();
    let whole = bench.losses("run");
    assert_eq!(whole.iter().map(|line| line.0).collect::<Vec<_>>(), [7, 14, 20]);
    let reference = bench.path("reference");
    std::fs::rename(bench.checkpoint("run", 20), &reference).unwrap();
    // The newest is damaged in its weights, the one before is cut short: the run falls back to step 5.
    let weights = bench.checkpoint("run", 15).join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let moments = bench.checkpoint("run", 10).join("optimizer.safetensors");
    let bytes = std::fs::read(&moments).unwrap();
    std::fs::write(&moments, &bytes[..bytes.len() / 2]).unwrap();
    let summary = bench.train(&seven).unwrap();
    assert_eq!(summary.step, 20);
    assert_eq!(bench.losses("run"), whole);
    same_weights(&reference, &bench.checkpoint("run", 20));
}

#[test]
fn on_another_number_of_threads_and_from_a_path() {
    let bench = Bench::new();
    bench.train(&[]).unwrap();
    let whole = bench.losses("run");
    let from = format!("checkpoint.resume={}", bench.checkpoint("run", 10).display());
    let other = format!("job.dump_folder={}", bench.path("other").display());
    bench.train(&[&from, &other, "device.threads=1"]).unwrap();
    let other = bench.losses("other");
    assert_eq!(other.first().unwrap().0, 11, "the same stream goes on");
    for (a, b) in whole[10..].iter().zip(&other) {
        let (a, b): (f64, f64) = (a.1.parse().unwrap(), b.1.parse().unwrap());
        assert!((a - b).abs() < 1e-3, "{a} and {b}: only the order of the sums differs");
    }
}
