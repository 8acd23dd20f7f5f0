//! A run that is killed or stopped goes on as if it had not been.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Place;

/// Step and loss of every training line, the loss as it is written: equal text is equal bits.
fn losses(run: &Path) -> Vec<(u64, String)> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    text.lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line of JSON"))
        .filter_map(|line| Some((line["step"].as_u64()?, line.get("loss")?.to_string())))
        .collect()
}

/// Starts a run of `steps` in `folder`, and waits until `file` is there.
fn start_and_wait_for(place: &Place, folder: &str, steps: u32, file: &str) -> Child {
    let mut child = place
        .command(&["train", "recipe.toml"])
        .args(["--set", &format!("job.dump_folder={folder}"), "--set", &format!("training.steps={steps}")])
        .args(["--set", "training.batch_size=1", "--set", "lr_scheduler.warmup_steps=2"])
        .args(["--set", "lr_scheduler.lr_min=1.0"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary");
    let start = Instant::now();
    while !place.path(folder).join(file).exists() {
        if let Some(status) = child.try_wait().expect("a child") {
            assert!(status.success(), "the run ended before {file} was there");
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(120), "{file} does not appear");
        sleep(Duration::from_millis(2));
    }
    child
}

#[test]
fn losses_after_kill_are_those_of_a_run_that_was_not_killed() {
    let place = Place::new();
    let steps = 60;
    start_and_wait_for(&place, "whole", steps, "never").wait().expect("its end");
    // SIGKILL, once the first checkpoint is there.
    let mut child = start_and_wait_for(&place, "killed", steps, "checkpoints/step_00000010/DONE");
    child.kill().expect("a running child");
    let status = child.wait().expect("its end");
    if status.success() {
        panic!("the run was over before it could be killed; give it more steps");
    }
    let before = losses(&place.path("killed")).len();
    assert!(before < steps as usize, "{before} steps were made before the kill");

    start_and_wait_for(&place, "killed", steps, "never").wait().expect("its end");
    let (whole, killed) = (losses(&place.path("whole")), losses(&place.path("killed")));
    assert_eq!(whole.len(), steps as usize);
    assert_eq!(whole, killed);
    let weights = |run| std::fs::read(place.path(run).join("checkpoints/step_00000060/model.safetensors"));
    assert!(weights("whole").expect("weights") == weights("killed").expect("weights"), "the last weights differ");
}

#[test]
#[cfg(unix)]
fn an_interrupt_saves_and_says_how_to_go_on() {
    let place = Place::new();
    let child = start_and_wait_for(&place, "run", 1_000_000, "checkpoints/step_00000010/DONE");
    let signalled = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(signalled.success());
    let output = child.wait_with_output().expect("its end");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(message.contains("continue with: burn-fla train run/recipe.toml"), "{message}");

    // The command it named goes on from the step it had reached.
    let reached = losses(&place.path("run")).last().expect("a step").0;
    let steps = reached + 3;
    place.succeed(&["train", "run/recipe.toml", "--set", &format!("training.steps={steps}")]);
    let after = losses(&place.path("run"));
    assert_eq!(after.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=steps).collect::<Vec<_>>());
}

/// The first asks for the end of the step, which here takes minutes; the second does not ask.
#[test]
#[cfg(unix)]
fn a_second_interrupt_ends_at_once() {
    let place = Place::new();
    place.succeed(&["train", "recipe.toml", "--set", "training.steps=10", "--set", "lr_scheduler.warmup_steps=1"]);
    let more = ["--set", "training.steps=20", "--set", "training.gradient_accumulation_steps=100000"];
    let mut child =
        place.command(&["train", "recipe.toml"]).args(more).stderr(Stdio::null()).spawn().expect("the binary");
    // Far enough into its first step: the handlers are there before it.
    sleep(Duration::from_millis(1500));
    let interrupt = || {
        let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
        assert!(sent.success());
    };
    interrupt();
    sleep(Duration::from_millis(500));
    interrupt();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if begun.elapsed() > Duration::from_secs(20) {
            child.kill().expect("a running child");
            panic!("it goes on after the second interrupt");
        }
        sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(130), "128 and the number of the signal");
    // What was saved before is whole, and the run goes on from it.
    assert_eq!(losses(&place.path("run")).last().expect("a step").0, 10);
    place.succeed(&["train", "recipe.toml"]);
    assert_eq!(losses(&place.path("run")).last().expect("a step").0, 20);
}

#[test]
fn never_refuses_to_go_on_over_checkpoints() {
    let place = Place::new();
    place.succeed(&["train", "recipe.toml"]);
    place.fail(&["train", "recipe.toml", "--resume", "never"], &["never", "step 20", "job.dump_folder"]);
    let from = ["--resume", "run/checkpoints/step_00000010", "--set", "job.dump_folder=other"];
    place.succeed(&[&["train", "recipe.toml"], &from[..]].concat());
    assert_eq!(losses(&place.path("other")), losses(&place.path("run"))[10..]);
}
