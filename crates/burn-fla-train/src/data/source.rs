//! From the patterns of a recipe to files in a fixed order, and from files to documents.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::TrainError;
use crate::recipe::{SourceFormat, SourceSection};

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

/// Hands every document of a source to `each`, in order, within the source's bound of bytes.
/// Returns how many documents held bytes that are not UTF-8 (each such sequence is replaced by U+FFFD).
pub(super) fn documents(
    source: &SourceSection,
    files: &[SourceFile],
    each: &mut dyn FnMut(String) -> Result<(), TrainError>,
) -> Result<u64, TrainError> {
    let mut left = source.max_bytes.unwrap_or(u64::MAX);
    let mut repaired = 0;
    let mut bounded = |text: String| -> Result<ControlFlow<()>, TrainError> {
        if text.len() as u64 > left {
            return Ok(ControlFlow::Break(()));
        }
        left -= text.len() as u64;
        if !text.is_empty() {
            each(text)?;
        }
        Ok(ControlFlow::Continue(()))
    };
    for file in files {
        let read = TrainError::io("read", &file.path);
        let flow = match source.format {
            SourceFormat::Text => {
                let bytes = std::fs::read(&file.path).map_err(read)?;
                let text = String::from_utf8(bytes).unwrap_or_else(|error| {
                    repaired += 1;
                    String::from_utf8_lossy(error.as_bytes()).into_owned()
                });
                bounded(text)?
            }
            SourceFormat::Jsonl => json_lines(&file.path, &source.column, &mut bounded)?,
        };
        if flow.is_break() {
            break;
        }
    }
    Ok(repaired)
}

fn json_lines(
    path: &Path,
    column: &str,
    each: &mut dyn FnMut(String) -> Result<ControlFlow<()>, TrainError>,
) -> Result<ControlFlow<()>, TrainError> {
    let file = File::open(path).map_err(TrainError::io("open", path))?;
    let plain: Box<dyn Read> = match path.extension().and_then(|ext| ext.to_str()) {
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some("zst") => Box::new(zstd::stream::read::Decoder::new(file).map_err(TrainError::io("read", path))?),
        _ => Box::new(file),
    };
    let mut reader = BufReader::with_capacity(1 << 20, plain);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(TrainError::io("read", path))?;
        if read == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let bad = |message: String| TrainError::BadDocument { path: path.to_path_buf(), line: Some(number), message };
        let value: serde_json::Value =
            serde_json::from_slice(&line).map_err(|error| bad(format!("this line is not JSON: {error}")))?;
        let text = match value.get(column) {
            Some(serde_json::Value::String(text)) => text.clone(),
            Some(_) => return Err(bad(format!("the field {column:?} is not a string"))),
            None => {
                return Err(bad(format!("there is no field {column:?}; set the source's column")));
            }
        };
        if each(text)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
