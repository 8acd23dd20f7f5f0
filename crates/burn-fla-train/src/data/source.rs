//! From the patterns of a recipe to files in a fixed order.

use std::path::{Path, PathBuf};

use crate::TrainError;
use crate::recipe::SourceSection;

/// A file of a source.
#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    pub path: PathBuf,
    /// Its path under the source's root, with `/` on every system: the sort key.
    pub name: String,
}

/// Expands a leading `~` and every `$VAR` or `${VAR}`. `CARGO_HOME` has the default that cargo gives it.
pub(crate) fn expand(text: &str) -> Result<String, String> {
    let home = || std::env::var("HOME").or_else(|_| std::env::var("USERPROFILE"));
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    if let Some(after) = text.strip_prefix('~')
        && (after.is_empty() || after.starts_with('/'))
    {
        out.push_str(&home().map_err(|_| "`~` is used, but HOME is not set".to_string())?);
        rest = after;
    }
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, tail) = match after.strip_prefix('{') {
            Some(braced) => braced.split_once('}').ok_or("a `${` is not closed")?,
            None => {
                let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                after.split_at(after.find(|c| !word(c)).unwrap_or(after.len()))
            }
        };
        if name.is_empty() {
            return Err("a `$` is not followed by a name".to_string());
        }
        match std::env::var(name) {
            Ok(value) => out.push_str(&value),
            Err(_) if name == "CARGO_HOME" => {
                let home = home().map_err(|_| "neither CARGO_HOME nor HOME is set".to_string())?;
                out.push_str(&home);
                out.push_str("/.cargo");
            }
            Err(_) => return Err(format!("the environment variable {name} is not set")),
        }
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

/// The files of a source, in the order in which they are read. `name` is the source in error messages.
pub(super) fn files(source: &SourceSection, name: &str) -> Result<Vec<SourceFile>, TrainError> {
    let bad = |message: String| TrainError::BadValue { at: "recipe".to_string(), key: name.to_string(), message };
    let roots: Vec<Option<PathBuf>> = match &source.root {
        None => vec![None],
        Some(pattern) => {
            let pattern = expand(pattern).map_err(bad)?;
            let folders: Vec<_> = matches(&pattern, name)?.into_iter().filter(|path| path.is_dir()).map(Some).collect();
            if folders.is_empty() {
                return Err(no_files(name, pattern));
            }
            folders
        }
    };
    let mut found = Vec::new();
    for pattern in &source.paths {
        let pattern = expand(pattern).map_err(bad)?;
        let mut tried = String::new();
        let mut here = Vec::new();
        for root in &roots {
            let full = match root {
                None => pattern.clone(),
                Some(root) => {
                    let root = glob::Pattern::escape(&root.to_string_lossy());
                    format!("{root}/{pattern}")
                }
            };
            here = matches(&full, name)?
                .into_iter()
                .filter(|path| path.is_file())
                .map(|path| {
                    let base = root.as_deref().unwrap_or(Path::new(""));
                    let relative = path.strip_prefix(base).unwrap_or(&path);
                    let parts: Vec<_> = relative.components().map(|part| part.as_os_str().to_string_lossy()).collect();
                    SourceFile { name: parts.join("/"), path }
                })
                .collect();
            if !here.is_empty() {
                break;
            }
            tried = full;
        }
        if here.is_empty() {
            return Err(no_files(name, tried));
        }
        here.sort_by(|a, b| a.name.cmp(&b.name));
        found.append(&mut here);
    }
    Ok(found)
}

fn matches(pattern: &str, name: &str) -> Result<Vec<PathBuf>, TrainError> {
    let paths = glob::glob(pattern).map_err(|error| TrainError::BadValue {
        at: "recipe".to_string(),
        key: name.to_string(),
        message: format!("{pattern:?} is not a pattern: {error}"),
    })?;
    let mut found = Vec::new();
    for path in paths {
        found.push(path.map_err(|error| TrainError::Io {
            action: "list",
            path: error.path().to_path_buf(),
            source: error.into(),
        })?);
    }
    found.sort();
    Ok(found)
}

fn no_files(name: &str, pattern: String) -> TrainError {
    let remedy = if pattern.contains("registry/src") {
        "`cargo fetch` in the project's folder downloads the sources of its crates"
    } else {
        "check the path; relative paths start at the working directory"
    };
    TrainError::NoFiles { source_name: name.to_string(), pattern, remedy: remedy.to_string() }
}
