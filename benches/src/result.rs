//! One measured result, and the page of all.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Something measured, and all that is needed to measure it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchResult {
    /// What was measured.
    pub title: String,
    /// The processor or GPU.
    pub machine: String,
    /// The commit that was built.
    pub commit: String,
    /// The command, to be typed in the root of the repository.
    pub command: String,
    /// What is to be said about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// The numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<Table>,
    /// What the command printed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
}

/// Numbers in rows, already written as they are to be read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// The heads of the columns.
    pub columns: Vec<String>,
    /// The rows, each as long as `columns`.
    pub rows: Vec<Vec<String>>,
}

impl BenchResult {
    /// Writes the result as `folder/name.json`, whole or not at all.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save(&self, folder: &Path, name: &str) -> io::Result<PathBuf> {
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("{name}.json"));
        let new = folder.join(format!(".{name}.json.new"));
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        fs::write(&new, text + "\n")?;
        fs::rename(&new, &path)?;
        Ok(path)
    }
}

/// The results in a folder, in the order of their file names; a folder that is not there has none.
///
/// # Errors
/// A folder or file that cannot be read, or that holds something else; the message names it.
pub fn load(folder: &Path) -> io::Result<Vec<BenchResult>> {
    let named = |path: &Path, error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", path.display()));
    let mut paths = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(named(folder, &error)),
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = fs::read_to_string(path).map_err(|error| named(path, &error))?;
            serde_json::from_str(&text).map_err(|error| named(path, &error))
        })
        .collect()
}

/// The page of all results.
pub fn render(results: &[BenchResult]) -> String {
    let mut page = String::from(
        "# Results\n\nWritten by `cargo run --release -p burn-fla-benches --bin report -- write` from the files in \
         `benches/results/`; do not edit. Each result names the machine, the commit and the command.\n",
    );
    for result in results {
        let BenchResult { title, machine, commit, command, note, table, output } = result;
        let _ = write!(page, "\n## {title}\n\n{machine} · commit `{commit}`\n\n```\n$ {command}\n```\n");
        if !note.is_empty() {
            let _ = write!(page, "\n{note}\n");
        }
        if let Some(Table { columns, rows }) = table {
            let _ = write!(page, "\n| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
            for row in rows {
                let _ = writeln!(page, "| {} |", row.join(" | "));
            }
        }
        if !output.is_empty() {
            let _ = write!(page, "\n```\n{}\n```\n", output.trim_end());
        }
    }
    page
}

/// This machine: its processor and how many threads it runs at once.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    match model {
        Some((_, name)) => format!("{}, {cores} cores", name.trim()),
        None => format!("{}, {cores} cores", std::env::consts::ARCH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> BenchResult {
        BenchResult {
            title: "Sorting".to_string(),
            machine: "an abacus".to_string(),
            commit: "0123abc".to_string(),
            command: "sort beads".to_string(),
            note: String::new(),
            table: Some(Table {
                columns: vec!["beads".to_string(), "ms".to_string()],
                rows: vec![vec!["10".to_string(), "3.2".to_string()]],
            }),
            output: "done\n".to_string(),
        }
    }

    #[test]
    fn a_result_survives_its_file() {
        let folder = std::env::temp_dir().join(format!("burn-fla-results-{}", std::process::id()));
        result().save(&folder, "10-sorting").expect("a writable folder");
        assert_eq!(load(&folder).expect("what was written"), [result()]);
        fs::write(folder.join("20-broken.json"), "{}").expect("a writable folder");
        let message = load(&folder).expect_err("a file without fields").to_string();
        assert!(message.contains("20-broken.json"), "{message}");
        fs::remove_dir_all(&folder).expect("ours");
    }

    #[test]
    fn the_page_shows_machine_commit_command_and_numbers() {
        let page = render(&[result()]);
        for part in ["## Sorting", "an abacus · commit `0123abc`", "$ sort beads", "| 10 | 3.2 |", "```\ndone\n```"] {
            assert!(page.contains(part), "{part} is not in\n{page}");
        }
    }

    #[test]
    fn the_committed_page_is_that_of_the_committed_results() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = fs::read_to_string(here.join("RESULTS.md")).expect("benches/RESULTS.md");
        assert!(page == render(&load(&here.join("results")).expect("results")), "run the bin `report` with `write`");
    }
}
