//! Disks that take no more, and folders that take nothing: one line that says what to do, and nothing lost. These need no
//! rights: a limit on the size of files stands for a disk that is full, and where root is not refused anything, another
//! user is.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::{Place, files, text};

fn error_of(output: &Output) -> String {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("one line that begins with `error: `, not\n{message}") };
    error.to_string()
}

#[test]
fn a_disk_that_takes_no_more_loses_no_checkpoint() {
    let place = Place::new();
    let whole = ["train", "recipe.toml", "--set", "job.dump_folder=whole"];
    place.succeed(&whole);
    let weights = |run: &str| fs::read(place.path(run).join("checkpoints/step_00000020/model.safetensors"));
    let whole = weights("whole").expect("weights");
    for kind in ["checkpoint.async=true", "checkpoint.async=false"] {
        let run = if kind.ends_with("true") { "beside" } else { "between" };
        let folder = format!("job.dump_folder={run}");
        let train = ["train", "recipe.toml", "--set", &folder, "--set", kind];
        // As the run was after step 10.
        let copied = Command::new("cp").arg("-r").arg(place.path("whole")).arg(place.path(run)).status();
        assert!(copied.expect("cp").success());
        fs::remove_dir_all(place.path(run).join("checkpoints/step_00000020")).expect("a checkpoint");
        let before = files(&place.path(run).join("checkpoints"));

        // No file may be longer than 180 blocks of 512 bytes, and the weights are. A write past that fails as it does on a
        // full disk; the signal that comes with it is ignored.
        let mut limited = Command::new("sh");
        limited.args(["-c", "trap '' XFSZ; ulimit -f 180; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_burn-fla")]);
        let output = limited.args(train).current_dir(place.folder.path()).output().expect("a shell");
        let error = error_of(&output);
        for part in
            ["checkpoints/.saving-", "safetensors", "too large", "ulimit -f", "checkpoints already written are intact"]
        {
            assert!(error.contains(part), "`{part}` is not in\n{error}");
        }
        assert_eq!(files(&place.path(run).join("checkpoints")), before, "nothing is left behind, and nothing is lost");

        // With room again the run goes on from there, and ends as one that never met a limit.
        let output = place.run(&train);
        let said = text(&output.stderr);
        assert!(output.status.success() && said.contains("resuming after step 10"), "{said}");
        assert!(weights(run).expect("weights") == whole, "the weights differ");
    }
}

/// Runs the command as a user who may read the place and write nothing.
fn as_reader(place: &Place, arguments: &[&str]) -> Output {
    let folder = place.folder.path();
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions");
    // The tests' own binary may lie where only root looks.
    let binary = place.path("burn-fla");
    if !binary.exists() {
        fs::copy(env!("CARGO_BIN_EXE_burn-fla"), &binary).expect("the binary");
        set(&binary, 0o755);
    }
    set(folder, 0o555);
    let mut command = Command::new(&binary);
    command.args(arguments).current_dir(folder).env_remove("RUST_BACKTRACE");
    const NOBODY: u32 = 65_534;
    if fs::metadata(folder).expect("the folder").uid() == 0 {
        // Root is never refused.
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.output().expect("the binary");
    set(folder, 0o755);
    output
}

#[test]
fn a_folder_that_is_read_only_is_named() {
    let place = Place::new();
    let error = error_of(&as_reader(&place, &["train", "recipe.toml"]));
    for part in ["create the folder run", "denied", "choose a folder that can be written (job.dump_folder)"] {
        assert!(error.contains(part), "`{part}` is not in\n{error}");
    }
    place.assert_no_run();

    // A run that was made before and lies in a folder that has become read-only: it is said, and it stays as it was.
    place.succeed(&["train", "recipe.toml"]);
    let all = || -> Vec<_> {
        let read = |path: std::path::PathBuf| (fs::read(&path).expect("a file"), path);
        files(&place.path("run")).into_iter().map(read).collect()
    };
    let before = all();
    let more = ["train", "recipe.toml", "--set", "training.steps=30"];
    let error = error_of(&as_reader(&place, &more));
    for part in ["run/checkpoints", "denied", "job.dump_folder"] {
        assert!(error.contains(part), "`{part}` is not in\n{error}");
    }
    assert!(all() == before, "a file has changed");
    // Whoever may write goes on.
    let output = place.run(&more);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let place = Place::new();
    fs::create_dir(place.path("run")).expect("a folder");
    if fs::metadata(place.folder.path()).expect("the folder").uid() == 0 {
        chown(place.path("run"), Some(65_534), Some(65_534)).expect("another owner");
    }
    let error = error_of(&as_reader(&place, &["train", "recipe.toml", "--set", "data.cache_folder=shared/cache"]));
    for part in ["shared/cache", "denied"] {
        assert!(error.contains(part), "`{part}` is not in\n{error}");
    }
}

/// The tokens of a cache, and so the run, do not depend on how many cores tokenise.
#[test]
#[cfg(target_os = "linux")]
fn one_core_tokenises_as_many_do() {
    let place = Place::new();
    for name in ["many", "one"] {
        let folder = format!("job.dump_folder={name}");
        let train = ["train", "recipe.toml", "--set", &folder, "--set", "device.threads=2"];
        let output = match name {
            "many" => place.run(&train),
            _ => {
                let mut pinned = Command::new("taskset");
                pinned.args(["-c", "0", env!("CARGO_BIN_EXE_burn-fla")]).args(train);
                pinned.current_dir(place.folder.path()).output().expect("taskset")
            }
        };
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let read = |name: &str| -> Vec<_> {
        let in_run = files(&place.path(name)).into_iter().filter_map(|path| {
            let wanted = path.extension().is_some_and(|kind| kind == "bin" || kind == "safetensors");
            let content = fs::read(&path).expect("a file");
            wanted.then(|| (path.strip_prefix(place.path(name)).expect("in the run").to_path_buf(), content))
        });
        let mut found: Vec<_> = in_run.collect();
        found.sort();
        found
    };
    assert!(read("many").len() >= 6);
    assert!(read("many") == read("one"), "a file differs");
}

/// Data that have changed are tokenised again, and a run does not go on with others than it began with.
#[test]
fn a_source_that_changes_after_it_was_tokenised() {
    let place = Place::new();
    place.succeed(&["train", "recipe.toml"]);
    let good = fs::read_to_string(place.path("text.txt")).expect("the text");
    place.write("text.txt", &good.replace("let", "LET"));
    let more = ["train", "recipe.toml", "--set", "training.steps=25"];
    let output = place.run(&more);
    let said = text(&output.stderr);
    assert!(said.contains("the files of data.sources have changed: tokenising them again"), "{said}");
    let error = error_of(&output);
    for part in ["cannot resume from", "the training data", "job.dump_folder"] {
        assert!(error.contains(part), "`{part}` is not in\n{error}");
    }
    place.write("text.txt", &good);
    let output = place.run(&more);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("resuming after step 20"), "{said}");
}
