//! The command, run as a process: what it prints, how it exits, what it leaves behind.

mod bad_input;
#[cfg(unix)]
mod faults;
mod generate;
mod resume;
mod tools;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const CONFIG: &str = r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1,
    "num_heads": 2, "expand_k": 1.0, "intermediate_size": 64}"#;

/// A folder with a recipe, a model and a text, and the command to run in it.
struct Place {
    folder: TempDir,
}

impl Place {
    /// A run of a second or so: 20 steps of a tiny model.
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        place.write("config.json", CONFIG);
        let text: String = (0..2000u32).map(|i| format!("let x{} = {} * y;\n", i % 7, i * i % 11)).collect();
        place.write("text.txt", &text);
        place.write(
            "recipe.toml",
            r#"
[job]
dump_folder = "run"

[model]
config = "config.json"

[optimizer]
lr = 3e-3

[training]
batch_size = 2
seq_len = 64
steps = 20

[data]
sources = [{ path = "text.txt" }]

[checkpoint]
interval = 10

[metrics]
log_freq = 1
"#,
        );
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a writable folder");
    }

    /// Replaces a part of the recipe.
    fn edit(&self, old: &str, new: &str) {
        let recipe = fs::read_to_string(self.path("recipe.toml")).expect("the recipe");
        assert!(recipe.contains(old), "{old}");
        self.write("recipe.toml", &recipe.replace(old, new));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burn-fla"));
        command.args(arguments).current_dir(self.folder.path()).env_remove("RUST_BACKTRACE").env_remove("RUST_LOG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary")
    }

    /// Runs a command that must succeed, and returns what it wrote to standard output.
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a command that must fail with the exit code 1 and one line that has all of `parts`.
    fn fail(&self, arguments: &[&str], parts: &[&str]) {
        let output = self.run(arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(!message.contains("panicked") && !message.contains("a bug"), "{message}");
        let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
        let [error] = errors[..] else { panic!("one line that begins with `error: `, not\n{message}") };
        // What follows it would be a message of more than one line.
        assert_eq!(message.lines().last(), Some(error), "{message}");
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in\n{error}");
        }
    }

    /// The folder holds no file of a run: neither a whole one nor a half.
    fn assert_no_run(&self) {
        let files = files(&self.path("run"));
        assert!(files.is_empty(), "{files:?}");
    }
}

/// Every file under `folder`, which need not be there.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("an entry").path();
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A golden case of the repository.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden").join(name)
}

#[test]
fn usage_errors_exit_with_two() {
    let place = Place::new();
    for arguments in [&["trian"][..], &["train"], &["train", "recipe.toml", "--ste", "a=b"], &["verify"], &[]] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    let unknown = text(&place.run(&["generate", "run", "--prompt", "x", "--device", "gpu"]).stderr);
    assert!(unknown.contains("cpu, cuda, wgpu"), "{unknown}");
}

#[test]
fn help_and_version_say_what_there_is() {
    let place = Place::new();
    let help = place.succeed(&["--help"]);
    for part in [
        "train",
        "plan",
        "branch",
        "runs",
        "plot",
        "tokenizer",
        "schema",
        "generate",
        "verify",
        "architectures",
        "recipes/quickstart.toml",
        "Exit codes",
    ] {
        assert!(help.contains(part), "{part}: {help}");
    }
    assert_eq!(place.succeed(&["--version"]), format!("burn-fla {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_architecture_has_its_row() {
    let place = Place::new();
    let table = place.succeed(&["architectures"]);
    for architecture in burn_fla::nn::models::registry::ARCHITECTURES {
        let name = format!("| `{}` |", architecture.model_type);
        let rows: Vec<&str> = table.lines().filter(|line| line.starts_with(&name)).collect();
        assert_eq!(rows.len(), 1, "{name}: {table}");
    }
    place.fail(&["architectures", "--golden", "nowhere"], &["nowhere", "read"]);
}
