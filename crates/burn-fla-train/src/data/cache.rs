//! The token cache: every document tokenised once, kept as memory-mapped shards.
//!
//! A cache lies in `<cache_folder>/<key>/`, where the key is a hash of the data section and the tokenizer: shards of
//! u16 or u32 tokens behind a header, and `manifest.json`, which lists the source files and every shard's length and
//! checksum. It is built in a temporary folder and renamed, so that a cache is whole or not there.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Encoder;
use super::permutation::mix;
use super::shards::{HEADER, SHARD_TOKENS, ShardEntry, ShardWriter, header, shard_name};
use super::source::{self, SourceFile};
use crate::TrainError;
use crate::checkpoint::{readable_by_all, sync_folder};
use crate::recipe::{SourceSection, hex};

/// Text that is tokenised at once, by all cores.
const BLOCK_BYTES: usize = 8 << 20;

/// Which documents of the sources a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub enum Part {
    /// All of them.
    All,
    /// All but the held-out fraction.
    Train(f64),
    /// The held-out fraction.
    HeldOut(f64),
}

impl Part {
    /// Decided by the document's number alone, so that the two parts never share one.
    fn takes(self, document: u64) -> bool {
        let below = |fraction: f64| (mix(document) as f64) < fraction * u64::MAX as f64;
        match self {
            Part::All => true,
            Part::Train(fraction) => !below(fraction),
            Part::HeldOut(fraction) => below(fraction),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FileStamp {
    name: String,
    size: u64,
    modified_ns: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    key: String,
    width: usize,
    documents: u64,
    bytes: u64,
    tokens: u64,
    shards: Vec<ShardEntry>,
    files: Vec<FileStamp>,
}

const VERSION: u32 = 1;

/// Tokens on disk, read through memory maps.
#[derive(Debug)]
pub struct TokenStore {
    manifest: Manifest,
    maps: Vec<Mmap>,
}

impl TokenStore {
    /// Opens the cache of `sources`, building it if there is none, if it is damaged or if the files have changed.
    /// When the files are not there but a whole cache is, the cache is used: it can be carried to another machine.
    ///
    /// # Errors
    /// See [`super::Corpus::open`].
    pub fn open(
        folder: &Path,
        name: &str,
        sources: &[SourceSection],
        part: Part,
        encoder: &dyn Encoder,
        tell: &mut dyn FnMut(String),
    ) -> Result<TokenStore, TrainError> {
        let key = cache_key(sources, part, encoder);
        let place = folder.join(&key);
        let listed: Result<Vec<_>, _> = sources
            .iter()
            .enumerate()
            .map(|(index, source)| source::files(source, &format!("{name}[{index}]")))
            .collect();
        let opened = if place.exists() { Some(TokenStore::open_cache(&place, &key)) } else { None };
        match (opened, &listed) {
            (Some(Ok(store)), Err(missing)) => {
                tell(format!("{missing}; using the token cache {}", place.display()));
                return Ok(store);
            }
            (Some(Ok(store)), Ok(files)) if stamps(files)? == store.manifest.files => return Ok(store),
            (Some(Ok(_)), Ok(_)) => {
                tell(format!("the files of {name} have changed: tokenising them again"));
            }
            (Some(Err(damage)), _) => {
                tell(format!("the token cache {} is damaged ({damage}): building it again", place.display()));
            }
            (None, _) => {}
        }
        build(&place, &key, sources, &listed?, part, encoder, tell)?;
        TokenStore::open_cache(&place, &key).map_err(|message| TrainError::BadDocument {
            path: place,
            line: None,
            message: format!("the token cache just written cannot be read back: {message}"),
        })
    }

    /// Opens and verifies a cache folder; the error says what is wrong with it.
    fn open_cache(place: &Path, key: &str) -> Result<TokenStore, String> {
        let text =
            fs::read_to_string(place.join("manifest.json")).map_err(|error| format!("manifest.json: {error}"))?;
        let manifest: Manifest = serde_json::from_str(&text).map_err(|error| format!("manifest.json: {error}"))?;
        if manifest.version != VERSION || manifest.key != key || ![2, 4].contains(&manifest.width) {
            return Err("manifest.json: written by another version".to_string());
        }
        let mut maps = Vec::new();
        for (index, entry) in manifest.shards.iter().enumerate() {
            let name = shard_name(index);
            let file = File::open(place.join(&name)).map_err(|error| format!("{name}: {error}"))?;
            // SAFETY: the file is private to this cache and never written after its rename; another process that
            // truncates it while we read is outside of what a cache can guard against.
            let map = unsafe { Mmap::map(&file) }.map_err(|error| format!("{name}: {error}"))?;
            if map.len() as u64 != HEADER as u64 + entry.tokens * manifest.width as u64 {
                return Err(format!("{name}: {} bytes", map.len()));
            }
            let header = header(manifest.width, index, entry);
            if map[..HEADER] != header || crc32fast::hash(&map[HEADER..]) != entry.crc32 {
                return Err(format!("{name}: the checksum differs"));
            }
            maps.push(map);
        }
        let whole = manifest.shards.iter().rev().skip(1).all(|shard| shard.tokens == SHARD_TOKENS);
        if !whole || manifest.tokens != manifest.shards.iter().map(|shard| shard.tokens).sum::<u64>() {
            return Err("manifest.json: the shards do not add up".to_string());
        }
        Ok(TokenStore { manifest, maps })
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.manifest.tokens
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.manifest.tokens == 0
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.manifest.documents
    }

    /// Bytes of their text.
    pub fn bytes(&self) -> u64 {
        self.manifest.bytes
    }

    /// Identifies data and tokenizer: a hash of the cache's key and of every token.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.manifest.key);
        for shard in &self.manifest.shards {
            hash.update(shard.tokens.to_le_bytes());
            hash.update(shard.crc32.to_le_bytes());
        }
        hex(&hash.finalize()[..8])
    }

    /// Appends tokens `start..start + count` to `out`.
    ///
    /// # Panics
    /// If the range passes [`TokenStore::len`].
    pub fn read(&self, start: u64, count: usize, out: &mut Vec<i32>) {
        assert!(start + count as u64 <= self.len(), "tokens {start} + {count} of {}", self.len());
        let (mut at, mut left) = (start, count);
        while left > 0 {
            let map = &self.maps[(at / SHARD_TOKENS) as usize];
            let width = self.manifest.width;
            let inside = (at % SHARD_TOKENS) as usize;
            let take = left.min((SHARD_TOKENS as usize) - inside);
            let bytes = &map[HEADER + inside * width..HEADER + (inside + take) * width];
            match width {
                2 => out.extend(bytes.chunks_exact(2).map(|b| i32::from(u16::from_le_bytes([b[0], b[1]])))),
                _ => out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as i32)),
            }
            at += take as u64;
            left -= take;
        }
    }
}

fn cache_key(sources: &[SourceSection], part: Part, encoder: &dyn Encoder) -> String {
    let key = serde_json::json!({
        "version": VERSION,
        "sources": sources,
        "part": part,
        "tokenizer": encoder.fingerprint(),
        "separator": encoder.separator(),
    });
    hex(&Sha256::digest(key.to_string().as_bytes())[..8])
}

fn stamps(files: &[Vec<SourceFile>]) -> Result<Vec<FileStamp>, TrainError> {
    let stamp = |file: &SourceFile| {
        let meta = fs::metadata(&file.path).map_err(TrainError::io("read", &file.path))?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |since| since.as_nanos() as u64);
        Ok(FileStamp { name: file.name.clone(), size: meta.len(), modified_ns })
    };
    files.iter().flatten().map(stamp).collect()
}

/// Tokenises the sources into a temporary folder and renames it to `place`.
fn build(
    place: &Path,
    key: &str,
    sources: &[SourceSection],
    files: &[Vec<SourceFile>],
    part: Part,
    encoder: &dyn Encoder,
    tell: &mut dyn FnMut(String),
) -> Result<(), TrainError> {
    let parent = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(TrainError::io("create the folder", parent))?;
    let temporary = tempfile::Builder::new()
        .prefix(".building-")
        .tempdir_in(parent)
        .map_err(TrainError::io("create a folder in", parent))?;
    let width = if encoder.vocab_size() <= 1 << 16 { 2 } else { 4 };
    let mut writer = ShardWriter::new(temporary.path(), width);
    let (mut documents, mut bytes, mut seen, mut repaired) = (0, 0, 0, 0);
    let mut block = Block::default();
    for (source, files) in sources.iter().zip(files) {
        repaired += source::documents(source, files, &mut |text| {
            let number = seen;
            seen += 1;
            if !part.takes(number) {
                return Ok(());
            }
            documents += 1;
            bytes += text.len() as u64;
            block.push(text);
            if block.bytes >= BLOCK_BYTES { block.drain_into(encoder, &mut writer) } else { Ok(()) }
        })?;
    }
    block.drain_into(encoder, &mut writer)?;
    if repaired > 0 {
        tell(format!("{repaired} documents were not UTF-8; what could not be read became U+FFFD"));
    }
    let shards = writer.finish()?;
    let tokens = shards.iter().map(|shard| shard.tokens).sum();
    let manifest = Manifest {
        version: VERSION,
        key: key.to_string(),
        width,
        documents,
        bytes,
        tokens,
        shards,
        files: stamps(files)?,
    };
    let path = temporary.path().join("manifest.json");
    let text = serde_json::to_string_pretty(&manifest).expect("a manifest is plain JSON");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(TrainError::io("write", &path))?;
    sync_folder(temporary.path())?;
    readable_by_all(temporary.path())?;
    if place.exists() {
        fs::remove_dir_all(place).map_err(TrainError::io("remove", place))?;
    }
    fs::rename(temporary.path(), place).map_err(TrainError::io("create", place))?;
    sync_folder(parent)?;
    tell(format!(
        "tokenised {documents} documents, {:.1} MB, into {tokens} tokens: {}",
        bytes as f64 / 1e6,
        place.display()
    ));
    Ok(())
}

/// Documents waiting to be tokenised together.
#[derive(Default)]
struct Block {
    texts: Vec<String>,
    bytes: usize,
}

impl Block {
    fn push(&mut self, text: String) {
        self.bytes += text.len();
        self.texts.push(text);
    }

    /// Tokenises on all cores; the order is that of the documents.
    fn drain_into(&mut self, encoder: &dyn Encoder, writer: &mut ShardWriter) -> Result<(), TrainError> {
        let texts = std::mem::take(&mut self.texts);
        self.bytes = 0;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let share = texts.len().div_ceil(cores).max(1);
        let encoded: Vec<Result<Vec<Vec<u32>>, TrainError>> = std::thread::scope(|scope| {
            let workers: Vec<_> = texts
                .chunks(share)
                .map(|part| scope.spawn(move || part.iter().map(|text| encoder.encode(text)).collect()))
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        for part in encoded {
            for tokens in part? {
                writer.write(&tokens)?;
                if let Some(separator) = encoder.separator() {
                    writer.write(&[separator])?;
                }
            }
        }
        Ok(())
    }
}
