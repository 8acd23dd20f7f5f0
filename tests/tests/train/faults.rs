//! Faults: kills at any moment, disks that are full, files that are damaged. Nothing is lost, and what happened is said.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use burn_fla_train::checkpoint::verify;
use burn_fla_train::data::Corpus;
use burn_fla_train::{Recipe, Trainer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bad_input::fails;
use super::resume::{same_weights, spawn};
use super::runs::Bench;

/// A run of which a second holds every phase: tokenising, steps, and a checkpoint every third step.
fn short_run(bench: &Bench) {
    let recipe = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    let recipe = recipe
        .replace("steps = 20", "steps = 45")
        .replace("interval = 10", "interval = 3")
        .replace("keep_latest_k = 0", "keep_latest_k = 2")
        .replace("freq = 10", "freq = 20")
        // Ten megabytes in shards so small that the run goes through several of them, and begins before the last is there.
        .replace("seq_len = 32", "seq_len = 128")
        .replace("validation_fraction", "shard_tokens = 16384\nvalidation_fraction");
    let from = recipe.find("sources = ").unwrap();
    let to = from + recipe[from..].find('\n').unwrap();
    let source = format!("sources = [{{ path = '{}', format = 'jsonl' }}]", bench.path("text.jsonl").display());
    std::fs::write(bench.path("recipe.toml"), [&recipe[..from], &source, &recipe[to..]].concat()).unwrap();
    std::fs::write(bench.path("text.jsonl"), lines(10)).unwrap();
}

/// So many megabytes of text in lines of JSON, of which each is another.
pub fn lines(megabytes: usize) -> String {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut text = String::new();
    while text.len() < megabytes << 20 {
        let words: Vec<String> = (0..200).map(|_| format!("w{}", rng.random_range(0..1000))).collect();
        text += &format!("{{\"text\": \"{}\"}}\n", words.join(" "));
    }
    text
}

/// What a run is doing, from what lies in its folder.
fn phase(run: &Path) -> &'static str {
    let any = |folder: &str, prefix: &str| {
        let entries = std::fs::read_dir(run.join(folder)).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
    };
    let steps = run.join("metrics.jsonl").exists();
    match any("cache", ".building-") {
        _ if any("checkpoints", ".saving-") => "saving",
        true if steps => "stepping while the rest is tokenised",
        true => "tokenising",
        false if steps => "stepping",
        false => "starting",
    }
}

/// Kills a run `count` times at random moments and resumes it each time; it must end as one that was left alone. When it
/// ends before that, another is begun.
fn kills(count: usize, seed: u64) {
    let bench = Bench::new();
    short_run(&bench);
    bench.train(&[]).unwrap();
    let whole = bench.losses("run");
    assert_eq!(whole.len(), 45);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let recipe = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    let (mut done, mut phases, mut runs) = (0, BTreeMap::new(), 0);
    let mut length = Duration::from_millis(1500);
    while done < count {
        runs += 1;
        let name = format!("killed{runs}");
        let run = bench.path(&name);
        let here = format!("dump_folder = '{}'", run.display());
        let mut recipe = recipe.replace(&format!("dump_folder = '{}'", bench.path("run").display()), &here);
        // Every other run finds its data tokenised, so that what comes after is met too.
        if runs % 2 == 0 {
            let cache = format!("[data]\ncache_folder = '{}'", bench.path("run/cache").display());
            recipe = recipe.replace("[data]", &cache);
        }
        std::fs::write(bench.path("recipe.toml"), recipe).unwrap();
        let (mut reached, mut here) = (0, 0);
        // So many kills a run at most, so that several are met from their beginning to their end.
        let most = count.div_ceil(8);
        loop {
            let start = Instant::now();
            let mut child = spawn(&bench);
            let moment = length.mul_f64(rng.random_range(0.0..1.0));
            while here < most && done < count && start.elapsed() < moment && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_micros(200));
            }
            let over =
                if here < most && done < count { child.try_wait().unwrap() } else { Some(child.wait().unwrap()) };
            if let Some(status) = over {
                assert!(status.success(), "a resumed run failed");
                length = length.min(start.elapsed().max(Duration::from_millis(200)));
                break;
            }
            *phases.entry(phase(&run)).or_insert(0) += 1;
            child.kill().unwrap();
            child.wait().unwrap();
            (done, here) = (done + 1, here + 1);
            // Every checkpoint that is there is whole, and none before the last is ever lost.
            let mut newest = 0;
            for entry in std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if let Some(step) = name.strip_prefix("step_").and_then(|step| step.parse::<u64>().ok())
                    && entry.path().join("DONE").exists()
                {
                    verify(&entry.path()).unwrap();
                    newest = newest.max(step);
                }
            }
            assert!(newest >= reached, "the run was at step {reached} and is back at {newest}");
            reached = newest;
        }
        assert_eq!(bench.losses(&name), whole, "run {runs}");
        let weights = |run: &str| std::fs::read(bench.checkpoint(run, 45).join("model.safetensors")).unwrap();
        assert!(weights(&name) == weights("run"), "the weights of run {runs} differ");
        std::fs::remove_dir_all(&run).unwrap();
    }
    println!("{done} kills in {runs} runs: {phases:?}");
}

#[test]
fn ten_kills() {
    kills(10, 1);
}

/// `scripts/faults.sh`
#[test]
#[ignore = "minutes: scripts/faults.sh runs it"]
fn two_hundred_kills() {
    kills(200, std::process::id().into());
}

#[test]
fn damage_of_any_file_is_found() {
    let bench = Bench::new();
    bench.train(&[]).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let checkpoint = bench.checkpoint("run", 20);
    let files: Vec<_> = std::fs::read_dir(&checkpoint).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 6, "{files:?}");
    for file in files {
        let good = std::fs::read(&file).unwrap();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let mut flipped = good.clone();
        let at = rng.random_range(0..good.len());
        flipped[at] ^= 1 << rng.random_range(0..8);
        for (damage, bytes) in [("flipped", flipped), ("cut", good[..good.len() / 2].to_vec()), ("empty", Vec::new())] {
            std::fs::write(&file, bytes).unwrap();
            let found = verify(&checkpoint);
            // A flip in the manifest may hit a space: then it says what it said.
            assert!(found.is_err() || name == "DONE" && damage == "flipped", "{name} {damage}");
            if let Err(error) = found {
                let error = error.to_string();
                assert!(error.contains(&name) || name == "DONE", "{error}");
            }
        }
        std::fs::write(&file, good).unwrap();
    }
    verify(&checkpoint).unwrap();
}

#[cfg(unix)]
#[test]
fn a_full_disk_stops_the_run_and_leaves_what_was_saved() {
    // A file system of its own needs rights that a test may not have. Without them this is said past the capture of the
    // tests' output; the tests of the command (faults.rs there) have a disk that takes no more without any rights.
    let mount = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(mount.path())
        .stderr(std::process::Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        let text = "SKIPPED: no rights to mount a file system, so no disk of 2 MB was filled";
        let _ = writeln!(std::io::stderr(), "{text}");
        return;
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg(self.0).status();
        }
    }
    let _unmount = Unmount(mount.path());
    let bench = Bench::new();
    let folder = format!("checkpoint.folder={}", mount.path().join("checkpoints").display());
    let keep = ["checkpoint.interval=2", "checkpoint.keep_latest_k=0"];
    for background in ["checkpoint.async=true", "checkpoint.async=false"] {
        let _ = std::fs::remove_dir_all(mount.path().join("checkpoints"));
        let run = format!("job.dump_folder={}", bench.path(background.split('=').next_back().unwrap()).display());
        fails(&bench, &[&keep[..], &[&folder, &run, background]].concat(), &["checkpoints", "free space"]);
        let mut whole = 0;
        for entry in std::fs::read_dir(mount.path().join("checkpoints")).unwrap() {
            let path = entry.unwrap().path();
            assert!(!path.file_name().unwrap().to_string_lossy().starts_with('.'), "{path:?} is left behind");
            verify(&path).unwrap();
            whole += 1;
        }
        assert!(whole >= 1, "some checkpoints had room");
        // With room again, the run goes on from the last of them.
        let room = format!("checkpoint.folder={}", bench.path(&format!("room-{background}")).display());
        let from =
            std::fs::read_dir(mount.path().join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).max();
        let from = format!("checkpoint.resume={}", from.unwrap().display());
        assert_eq!(bench.train(&[&room, &run, &from]).unwrap().step, 20);
    }
}

/// A run that begins while its data are being tokenised is one that found them tokenised, and it ends when it is done.
#[test]
fn a_run_beside_its_tokenising_is_one_after_it() {
    let bench = Bench::new();
    short_run(&bench);
    let here = |name: &str| {
        [
            format!("job.dump_folder={}", bench.path(name).display()),
            format!("data.cache_folder={}", bench.path(&format!("cache-{name}")).display()),
        ]
    };
    let recipe = |name: &str, more: &[&str]| {
        let set: Vec<String> = here(name).into_iter().chain(more.iter().map(|text| text.to_string())).collect();
        Recipe::load(&bench.path("recipe.toml"), &set).unwrap()
    };
    // Everything is there before the first step.
    Corpus::open(&recipe("after", &[]), &mut |_| ()).unwrap();
    Trainer::new(recipe("after", &[])).unwrap().run().unwrap();
    let whole = bench.losses("after");
    assert_eq!(whole.len(), 45);
    // Nothing is.
    Trainer::new(recipe("beside", &[])).unwrap().run().unwrap();
    assert_eq!(bench.losses("beside"), whole);
    same_weights(&bench.checkpoint("after", 45), &bench.checkpoint("beside", 45));
    // A run of five steps does not wait for the rest, and leaves nothing half done; the next goes on from it.
    let five = ["training.steps=5", "validation.freq=0", "lr_scheduler.warmup_steps=0"];
    Trainer::new(recipe("short", &five)).unwrap().run().unwrap();
    let left: Vec<String> = std::fs::read_dir(bench.path("cache-short"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    let more = ["training.steps=45", "lr_scheduler.warmup_steps=0"];
    let summary = Trainer::new(recipe("short", &more)).unwrap().run().unwrap();
    assert_eq!(summary.step, 45);
}
