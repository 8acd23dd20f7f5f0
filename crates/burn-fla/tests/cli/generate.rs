//! `burn-fla generate`.

use std::io::Read;
use std::process::Stdio;

use crate::Place;

#[test]
fn the_same_seed_gives_the_same_text() {
    let place = Place::new();
    place.succeed(&["train", "recipe.toml"]);
    let sample = |folder: &str, seed: &str| {
        place.succeed(&["generate", folder, "--prompt", "let ", "--max-new-tokens", "24", "--seed", seed])
    };
    let run = sample("run", "1");
    assert!(run.starts_with("let ") && run.ends_with('\n'), "{run}");
    assert_eq!(run, sample("run", "1"));
    assert_eq!(run, sample("run/checkpoints/step_00000020", "1"));
    assert_ne!(run, sample("run", "2"));

    // Several prompts, of any lengths: the first text is the one it has alone.
    let both = place.succeed(&[
        "generate",
        "run",
        "--prompt",
        "let ",
        "--prompt",
        "let x1 = ",
        "--max-new-tokens",
        "24",
        "--seed",
        "1",
    ]);
    assert!(both.starts_with(&format!("{run}\nlet x1 = ")), "{run} {both}");

    // An empty prompt is the start of a document; sampling options out of range are errors.
    place.succeed(&["generate", "run", "--prompt", "", "--max-new-tokens", "4"]);
    place.fail(&["generate", "run", "--prompt", "x", "--temperature=-1"], &["temperature", "-1"]);
    place.fail(&["generate", "run", "--prompt", "x", "--top-p", "2"], &["top_p", "2"]);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let place = Place::new();
    place.succeed(&["train", "recipe.toml", "--set", "training.steps=1"]);
    let mut child = place
        .command(&["generate", "run", "--prompt", "let ", "--max-new-tokens", "100000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary");
    // Text arrives while it is generated; then the pipe closes.
    let mut first = [0; 4];
    child.stdout.take().expect("a pipe").read_exact(&mut first).expect("the prompt");
    assert_eq!(&first, b"let ");
    let output = child.wait_with_output().expect("its end");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
