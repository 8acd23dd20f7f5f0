//! Builds a token cache: reads, tokenises on all cores, writes shards and the index of documents.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::Encoder;
use super::build_folder::{BuildFolder, check};
use super::cache::{self, FileStamp, Manifest, VERSION};
use super::documents::{Document, Repairs, documents};
use super::encode::{encode_all, pieces};
use super::shards::{IndexWriter, ShardEntry, ShardWriter};
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

/// What a cache that is being built holds already, in the folder where it is built.
pub(super) struct Written<'a> {
    pub folder: &'a Path,
    pub width: usize,
    /// Shards that are full and that another follows.
    pub shards: &'a [ShardEntry],
    /// Documents whose end is in the index: all that end in these shards, and perhaps more.
    pub documents: u64,
}

/// What a cache is built of, and where to.
pub(super) struct Order<'a> {
    pub place: &'a Path,
    pub key: &'a str,
    pub sources: &'a [SourceSection],
    pub files: &'a [Vec<SourceFile>],
    pub stamps: &'a [FileStamp],
    pub part: cache::Part,
    pub encoder: &'a dyn Encoder,
    /// Tokens of a full shard.
    pub shard_tokens: u64,
    /// Set by whoever wants no more of it.
    pub cancelled: &'a AtomicBool,
}

/// Tokenises the sources into a temporary folder and renames it to the order's place. `written` is called whenever there is
/// a full shard more.
pub(super) fn build(
    order: &Order<'_>,
    usable: impl Fn(&Path) -> bool,
    written: &mut dyn FnMut(Written<'_>) -> Result<(), TrainError>,
    tell: &mut dyn FnMut(String),
) -> Result<(), TrainError> {
    let &Order { place, key, sources, files, stamps, part, encoder, shard_tokens, cancelled } = order;
    let parent = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(TrainError::io("create the folder", parent))?;
    remove_leftovers(parent, &format!(".building-{key}-"))?;
    // One process at a time builds a cache. Whoever waited for it finds it whole.
    let Some(folder) = BuildFolder::claim(parent, key, || usable(place), cancelled, tell)? else { return Ok(()) };
    let width = if encoder.vocab_size() <= 1 << 16 { 2 } else { 4 };
    let mut block = Block {
        encoder,
        folder: folder.path(),
        width,
        shards: ShardWriter::new(folder.path(), width, shard_tokens),
        index: IndexWriter::create(folder.path())?,
        written,
        shown: 0,
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
            check(cancelled)?;
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
        shard_tokens,
        index,
        files: stamps.to_vec(),
    };
    let path = folder.path().join("manifest.json");
    let text = serde_json::to_string_pretty(&manifest).expect("a manifest is plain JSON");
    write_synced(&path, text.as_bytes())?;
    sync_folder(folder.path())?;
    readable_by_all(folder.path())?;
    folder.publish(place)?;
    tell(format!(
        "tokenised {documents} documents, {:.1} MB, into {tokens} tokens: {}",
        bytes as f64 / 1e6,
        place.display()
    ));
    Ok(())
}

/// Removes the folders of builds that were killed, of versions before or where folders cannot be locked.
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
    folder: &'a Path,
    width: usize,
    shards: ShardWriter,
    index: IndexWriter,
    written: &'a mut dyn FnMut(Written<'_>) -> Result<(), TrainError>,
    /// Shards that `written` was told of.
    shown: usize,
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
        self.shards.write(tokens)?;
        if self.shards.followed().len() > self.shown {
            let (folder, width, documents) = (self.folder, self.width, self.index.flush()?);
            let shards = self.shards.followed();
            self.shown = shards.len();
            (self.written)(Written { folder, width, shards, documents })?;
        }
        Ok(())
    }
}
