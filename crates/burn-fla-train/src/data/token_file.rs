//! Token shards in the format of llm.c: a header of 256 little-endian i32, then the ids.
//!
//! | word | content |
//! |---|---|
//! | 0 | 20240520 for ids of 16 bits, 20240801 for ids of 32 bits |
//! | 1 | version: 1 for 16 bits, 7 for 32 bits |
//! | 2 | number of ids |
//!
//! The format marks no documents, and none are guessed from the ids: a file is one document.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use super::documents::Document;
use crate::TrainError;

const HEADER_WORDS: usize = 256;
/// Ids handed on at once.
const PIECE: usize = 1 << 20;

/// The width of an id in bytes, and how many there are.
fn header(words: &[i32], length: u64) -> Result<(u64, u64), String> {
    let width = match (words[0], words[1]) {
        (20_240_520, 1) => 2,
        (20_240_801, 7) => 4,
        (magic, version) => {
            return Err(format!(
                "it begins with {magic}, {version}, not with 20240520, 1 (16-bit ids) or 20240801, 7 (32-bit ids)"
            ));
        }
    };
    let count = u64::try_from(words[2]).map_err(|_| format!("its header says {} ids", words[2]))?;
    let expected = 4 * HEADER_WORDS as u64 + width * count;
    if length != expected {
        return Err(format!(
            "its header says {count} ids, {expected} bytes, but it has {length}: it is cut short or damaged"
        ));
    }
    Ok((width, count))
}

pub(super) fn documents(
    path: &Path,
    vocab_size: usize,
    each: &mut dyn FnMut(Document) -> Result<ControlFlow<()>, TrainError>,
) -> Result<ControlFlow<()>, TrainError> {
    let bad = |message: String| TrainError::BadDocument { path: path.to_path_buf(), line: None, message };
    let read = || TrainError::io("read", path);
    let file = File::open(path).map_err(TrainError::io("open", path))?;
    let length = file.metadata().map_err(read())?.len();
    let mut bytes = [0; 4 * HEADER_WORDS];
    if length < bytes.len() as u64 {
        return Err(bad(format!("{length} bytes are no token shard of llm.c, whose header alone has {}", bytes.len())));
    }
    let mut reader = BufReader::with_capacity(1 << 20, file);
    reader.read_exact(&mut bytes).map_err(read())?;
    let words: Vec<i32> = bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let (width, count) =
        header(&words, length).map_err(|message| bad(format!("not a token shard of llm.c: {message}")))?;
    let mut left = count;
    while left > 0 {
        let take = left.min(PIECE as u64);
        let mut bytes = vec![0; (take * width) as usize];
        reader.read_exact(&mut bytes).map_err(read())?;
        let ids: Vec<u32> = match width {
            2 => bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect(),
            _ => bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        };
        if let Some(at) = ids.iter().position(|id| *id as usize >= vocab_size) {
            let (place, id) = (count - left + at as u64, ids[at]);
            return Err(bad(format!(
                "id {place} is {id}, but the vocabulary of model.tokenizer has {vocab_size}: the shard is of another tokenizer"
            )));
        }
        left -= take;
        if each(Document::Tokens { ids, ends: left == 0 })?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
