//! Builds a token cache: reads, tokenises on all cores, writes shards and the index of documents.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use super::Encoder;
use super::cache::{self, Manifest, VERSION, stamps};
use super::documents::{Document, Repairs, documents};
use super::encode::{encode_all, pieces};
use super::shards::{IndexWriter, ShardWriter};
use super::source::SourceFile;
use crate::TrainError;
use crate::checkpoint::{readable_by_all, sync_folder, write_synced};
use crate::recipe::SourceSection;

/// Text that is tokenised at once, by all cores.
const BLOCK_BYTES: usize = 8 << 20;
/// How often a long build says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// A piece of a document.
enum Part<'a> {
    Text(&'a str),
    Tokens(&'a [u32]),
}

impl<'a> Part<'a> {
    fn text(&self) -> Option<&'a str> {
        match self {
            Part::Text(text) => Some(text),
            Part::Tokens(_) => None,
        }
    }
}

/// Tokenises the sources into a temporary folder and renames it to `place`.
pub(super) fn build(
    place: &Path,
    key: &str,
    sources: &[SourceSection],
    files: &[Vec<SourceFile>],
    part: cache::Part,
    encoder: &dyn Encoder,
    usable: impl Fn(&Path) -> bool,
    tell: &mut dyn FnMut(String),
) -> Result<(), TrainError> {
    let parent = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(TrainError::io("create the folder", parent))?;
    // One process at a time builds a cache. Whoever waited for it finds it whole; what lies about is of one that died.
    let lock = lock(parent)?;
    if usable(place) {
        return Ok(());
    }
    let prefix = format!(".building-{key}-");
    remove_leftovers(parent, &prefix)?;
    let temporary = tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir_in(parent)
        .map_err(TrainError::io("create a folder in", parent))?;
    let width = if encoder.vocab_size() <= 1 << 16 { 2 } else { 4 };
    let mut block = Block {
        encoder,
        shards: ShardWriter::new(temporary.path(), width),
        index: IndexWriter::create(temporary.path())?,
        waiting: Vec::new(),
        bytes: 0,
        tokens: 0,
        ended: 0,
    };
    let (mut count, mut bytes, mut seen) = (0, 0u64, 0);
    let (begun, mut told) = (Instant::now(), Instant::now());
    let mut repairs = Repairs::default();
    for (source, files) in sources.iter().zip(files) {
        documents(source, files, encoder.vocab_size(), &mut repairs, &mut |document| {
            let (text_bytes, ends) = match &document {
                Document::Text(text) => (text.len() as u64, true),
                Document::Tokens { ends, .. } => (0, *ends),
            };
            let taken = part.takes(seen);
            seen += u64::from(ends);
            if taken {
                bytes += text_bytes;
                count += u64::from(ends);
                block.push(document)?;
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    let (done, rate) = (bytes as f64 / 1e6, bytes as f64 / 1e6 / begun.elapsed().as_secs_f64());
                    tell(format!("tokenising: {count} documents, {done:.0} MB so far, {rate:.1} MB/s"));
                }
            }
            Ok(())
        })?;
        count += u64::from(block.close()?);
    }
    if repairs.not_utf8 > 0 {
        tell(format!("{} documents were not UTF-8; what could not be read became U+FFFD", repairs.not_utf8));
    }
    if repairs.empty > 0 {
        tell(format!("{} documents are empty and were left out", repairs.empty));
    }
    let documents = count;
    let index = block.index.finish()?;
    let shards = block.shards.finish()?;
    let tokens = shards.iter().map(|shard| shard.tokens).sum();
    let manifest = Manifest {
        version: VERSION,
        key: key.to_string(),
        width,
        documents,
        bytes,
        tokens,
        shards,
        index,
        files: stamps(files)?,
    };
    let path = temporary.path().join("manifest.json");
    let text = serde_json::to_string_pretty(&manifest).expect("a manifest is plain JSON");
    write_synced(&path, text.as_bytes())?;
    sync_folder(temporary.path())?;
    readable_by_all(temporary.path())?;
    if place.exists() {
        fs::remove_dir_all(place).map_err(TrainError::io("remove", place))?;
    }
    fs::rename(temporary.path(), place).map_err(TrainError::io("create", place))?;
    sync_folder(parent)?;
    drop(lock);
    tell(format!(
        "tokenised {documents} documents, {:.1} MB, into {tokens} tokens: {}",
        bytes as f64 / 1e6,
        place.display()
    ));
    Ok(())
}

/// Keeps other processes from building in a folder while the handle lives; it ends with the process, however that ends.
fn lock(folder: &Path) -> Result<Option<File>, TrainError> {
    if !cfg!(unix) {
        // Where folders cannot be locked, two processes may both build; the first to end decides.
        return Ok(None);
    }
    let handle = File::open(folder).map_err(TrainError::io("open", folder))?;
    handle.lock().map_err(TrainError::io("lock", folder))?;
    Ok(Some(handle))
}

/// Removes the folders of builds that were killed.
fn remove_leftovers(parent: &Path, prefix: &str) -> Result<(), TrainError> {
    for entry in fs::read_dir(parent).map_err(TrainError::io("list", parent))? {
        let entry = entry.map_err(TrainError::io("list", parent))?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_dir_all(entry.path()).map_err(TrainError::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Documents waiting to be tokenised together, and where their tokens go.
struct Block<'a> {
    encoder: &'a dyn Encoder,
    shards: ShardWriter,
    index: IndexWriter,
    waiting: Vec<Document>,
    bytes: usize,
    /// Written so far.
    tokens: u64,
    /// Where the last document ended.
    ended: u64,
}

impl Block<'_> {
    fn push(&mut self, document: Document) -> Result<(), TrainError> {
        self.bytes += match &document {
            Document::Text(text) => text.len(),
            Document::Tokens { ids, .. } => 4 * ids.len(),
        };
        self.waiting.push(document);
        if self.bytes >= BLOCK_BYTES { self.drain() } else { Ok(()) }
    }

    /// Tokenises on all cores; the order is that of the documents.
    fn drain(&mut self) -> Result<(), TrainError> {
        self.bytes = 0;
        let waiting = std::mem::take(&mut self.waiting);
        let mut parts = Vec::new();
        for document in &waiting {
            match document {
                Document::Text(text) => {
                    let pieces = pieces(text);
                    let last = pieces.len() - 1;
                    parts.extend(pieces.into_iter().enumerate().map(|(at, text)| (Part::Text(text), at == last)));
                }
                Document::Tokens { ids, ends } => parts.push((Part::Tokens(ids), *ends)),
            }
        }
        // A document may be longer than memory has room for its tokens.
        let mut rest = &parts[..];
        while !rest.is_empty() {
            let sizes = rest.iter().scan(0, |bytes, (part, _)| {
                *bytes += part.text().map_or(0, str::len);
                Some(*bytes)
            });
            let (parts, after) = rest.split_at(sizes.take_while(|bytes| *bytes <= 2 * BLOCK_BYTES).count().max(1));
            rest = after;
            let texts: Vec<&str> = parts.iter().filter_map(|(part, _)| part.text()).collect();
            let mut encoded = encode_all(self.encoder, &texts)?.into_iter();
            for (part, ends) in parts {
                match part {
                    Part::Tokens(ids) => self.write(ids)?,
                    Part::Text(_) => {
                        self.write(&encoded.next().unwrap_or_default())?;
                        if *ends {
                            self.write(self.encoder.separator().as_slice())?;
                        }
                    }
                }
                if *ends {
                    self.end_document()?;
                }
            }
        }
        Ok(())
    }

    fn end_document(&mut self) -> Result<(), TrainError> {
        self.ended = self.tokens;
        self.index.push(self.tokens)
    }

    /// Writes what waits, and ends a document that a source's bound of bytes has cut; says whether there was one.
    fn close(&mut self) -> Result<bool, TrainError> {
        self.drain()?;
        let cut = self.ended < self.tokens;
        if cut {
            self.end_document()?;
        }
        Ok(cut)
    }

    fn write(&mut self, tokens: &[u32]) -> Result<(), TrainError> {
        self.tokens += tokens.len() as u64;
        self.shards.write(tokens)
    }
}
