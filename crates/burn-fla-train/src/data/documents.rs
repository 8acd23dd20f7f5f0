//! From files to documents: text, JSON lines, Parquet, and shards of tokens.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use super::source::SourceFile;
use super::{parquet, token_file};
use crate::TrainError;
use crate::recipe::{SourceFormat, SourceSection};

/// A document on its way into the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    /// To be tokenised.
    Text(String),
    /// Token ids as they are; the last piece of a file ends the document.
    Tokens {
        /// The ids.
        ids: Vec<u32>,
        /// Whether no more of the document follows.
        ends: bool,
    },
}

/// What was not as it should be, and was read all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Repairs {
    /// Documents with bytes that are not UTF-8; each such sequence became U+FFFD.
    pub not_utf8: u64,
    /// Documents without text, which are left out.
    pub empty: u64,
}

type Each<'a> = dyn FnMut(Document) -> Result<ControlFlow<()>, TrainError> + 'a;

/// Hands every document of a source to `each`, in order, within the source's bound of bytes. `vocab_size` is what the ids
/// of token files must be below.
pub(super) fn documents(
    source: &SourceSection,
    files: &[SourceFile],
    vocab_size: usize,
    repairs: &mut Repairs,
    each: &mut dyn FnMut(Document) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut left = source.max_bytes.unwrap_or(u64::MAX);
    let mut empty = 0;
    let mut bounded = |document: Document| -> Result<ControlFlow<()>, TrainError> {
        let bytes = match &document {
            Document::Text(text) => text.len(),
            Document::Tokens { ids, .. } => 4 * ids.len(),
        } as u64;
        if bytes > left {
            return Ok(ControlFlow::Break(()));
        }
        left -= bytes;
        match bytes == 0 && matches!(document, Document::Text(_)) {
            true => empty += 1,
            false => each(document)?,
        }
        Ok(ControlFlow::Continue(()))
    };
    for file in files {
        let flow = match source.format {
            SourceFormat::Text => {
                let bytes = std::fs::read(&file.path).map_err(TrainError::io("read", &file.path))?;
                bounded(Document::Text(utf8(bytes, repairs)))?
            }
            SourceFormat::Jsonl => json_lines(&file.path, &source.column, repairs, &mut bounded)?,
            SourceFormat::Parquet => parquet::documents(&file.path, &source.column, repairs, &mut bounded)?,
            SourceFormat::Bin => token_file::documents(&file.path, vocab_size, &mut bounded)?,
        };
        if flow.is_break() {
            break;
        }
    }
    repairs.empty += empty;
    Ok(())
}

/// The text of `bytes`, with U+FFFD for what is not UTF-8.
pub(super) fn utf8(bytes: Vec<u8>, repairs: &mut Repairs) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        repairs.not_utf8 += 1;
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    })
}

fn json_lines(
    path: &Path,
    column: &str,
    repairs: &mut Repairs,
    each: &mut Each<'_>,
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
        let text = utf8(std::mem::take(&mut line), repairs);
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| bad(format!("this line is not JSON: {error}")))?;
        let text = match value {
            serde_json::Value::Object(mut fields) => match fields.remove(column) {
                Some(serde_json::Value::String(text)) => text,
                Some(_) => return Err(bad(format!("the field {column:?} is not a string"))),
                None => return Err(bad(format!("there is no field {column:?}; set the source's column"))),
            },
            _ => return Err(bad("this line is not a JSON object".to_string())),
        };
        if each(Document::Text(text))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
