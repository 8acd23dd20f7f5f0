//! The token cache: every document tokenised once, kept as memory-mapped shards.
//!
//! A cache lies in `<cache_folder>/<key>/`, where the key is a hash of the data section and the tokenizer: shards of
//! u16 or u32 tokens behind a header, and `manifest.json`, which lists the source files and every shard's length and
//! checksum, and `documents.bin`, where every document ends. It is built in a temporary folder and renamed, so that a
//! cache is whole or not there.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use memmap2::{Mmap, MmapOptions};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Encoder;
use super::build::Written;
use super::permutation::mix;
use super::shards::{DOCUMENTS, HEADER, SHARD_TOKENS, ShardEntry, header, shard_name};
use super::source::{self, SourceFile};
use super::unbuilt::{Found, Unbuilt};
use crate::TrainError;
use crate::recipe::{SourceSection, hex};

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
    pub(super) fn takes(self, document: u64) -> bool {
        let below = |fraction: f64| (mix(document) as f64) < fraction * u64::MAX as f64;
        match self {
            Part::All => true,
            Part::Train(fraction) => !below(fraction),
            Part::HeldOut(fraction) => below(fraction),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FileStamp {
    name: String,
    size: u64,
    modified_ns: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub version: u32,
    pub key: String,
    pub width: usize,
    pub documents: u64,
    pub bytes: u64,
    pub tokens: u64,
    pub shards: Vec<ShardEntry>,
    /// Tokens of a full shard.
    #[serde(default = "usual_shard")]
    pub shard_tokens: u64,
    /// CRC-32 of `documents.bin`.
    pub index: u32,
    pub files: Vec<FileStamp>,
}

pub(super) const VERSION: u32 = 2;

fn usual_shard() -> u64 {
    SHARD_TOKENS
}

/// Tokens on disk, read through memory maps: a whole cache, or the first shards of one that is being built.
#[derive(Debug)]
pub struct TokenStore {
    manifest: Manifest,
    maps: Vec<Arc<Mmap>>,
    /// Where each document ends, as u64; absent where there is none.
    ends: Option<Mmap>,
    whole: bool,
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
        match TokenStore::find(folder, name, sources, part, SHARD_TOKENS, encoder, tell)? {
            Found::Cache(store) => Ok(store),
            Found::Files(files) => files.build(encoder, &AtomicBool::new(false), &mut |_| (), tell),
        }
    }

    /// The cache of `sources`, or what it is to be built of.
    pub(super) fn find(
        folder: &Path,
        name: &str,
        sources: &[SourceSection],
        part: Part,
        shard_tokens: u64,
        encoder: &dyn Encoder,
        tell: &mut dyn FnMut(String),
    ) -> Result<Found, TrainError> {
        let key = cache_key(sources, part, shard_tokens, encoder);
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
                return Ok(Found::Cache(store));
            }
            (Some(Ok(store)), Ok(files)) if store.is_of(&stamps(files)?) => return Ok(Found::Cache(store)),
            (Some(Ok(_)), Ok(_)) => {
                tell(format!("the files of {name} have changed: tokenising them again"));
            }
            (Some(Err(damage)), _) => {
                tell(format!("the token cache {} is damaged ({damage}): building it again", place.display()));
            }
            (None, _) => {}
        }
        let files = listed?;
        let stamps = stamps(&files)?;
        Ok(Found::Files(Unbuilt { place, key, sources: sources.to_vec(), files, stamps, part, shard_tokens }))
    }

    /// The first shards of a cache that is being built. `maps` keeps those of the shards before.
    pub(super) fn first_shards(
        written: &Written<'_>,
        key: &str,
        shard_tokens: u64,
        maps: &mut Vec<Arc<Mmap>>,
    ) -> Result<TokenStore, TrainError> {
        for index in maps.len()..written.shards.len() {
            let path = written.folder.join(shard_name(index));
            let file = File::open(&path).map_err(TrainError::io("open", &path))?;
            // SAFETY: the shard is full, and nobody writes to it any more; the lock of the folder keeps others away.
            maps.push(Arc::new(unsafe { Mmap::map(&file) }.map_err(TrainError::io("map", &path))?));
        }
        let path = written.folder.join(DOCUMENTS);
        let ends = match written.documents {
            0 => None,
            count => {
                let file = File::open(&path).map_err(TrainError::io("open", &path))?;
                // SAFETY: the file only grows, behind what is mapped.
                let map = unsafe { MmapOptions::new().len(8 * count as usize).map(&file) };
                Some(map.map_err(TrainError::io("map", &path))?)
            }
        };
        let manifest = Manifest {
            version: VERSION,
            key: key.to_string(),
            width: written.width,
            documents: written.documents,
            bytes: 0,
            tokens: written.shards.iter().map(|shard| shard.tokens).sum(),
            shards: written.shards.to_vec(),
            shard_tokens,
            index: 0,
            files: Vec::new(),
        };
        Ok(TokenStore { manifest, maps: maps.clone(), ends, whole: false })
    }

    /// Opens and verifies a cache folder; the error says what is wrong with it.
    pub(super) fn open_cache(place: &Path, key: &str) -> Result<TokenStore, String> {
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
            maps.push(Arc::new(map));
        }
        let full = manifest.shards.iter().rev().skip(1).all(|shard| shard.tokens == manifest.shard_tokens);
        let last = manifest.shards.last().is_none_or(|shard| shard.tokens <= manifest.shard_tokens);
        if !full
            || !last
            || manifest.shard_tokens == 0
            || manifest.tokens != manifest.shards.iter().map(|shard| shard.tokens).sum::<u64>()
        {
            return Err("manifest.json: the shards do not add up".to_string());
        }
        let ends = open_index(place, &manifest)?;
        Ok(TokenStore { manifest, maps, ends, whole: true })
    }

    /// Whether it was made of these files.
    pub(super) fn is_of(&self, files: &[FileStamp]) -> bool {
        self.manifest.files == files
    }

    /// What a cache says of itself, if there is one for these sources; its shards are not looked at.
    pub(super) fn summary(
        folder: &Path,
        sources: &[SourceSection],
        part: Part,
        shard_tokens: u64,
        encoder: &dyn Encoder,
    ) -> Option<Manifest> {
        let place = folder.join(cache_key(sources, part, shard_tokens, encoder));
        let text = fs::read_to_string(place.join("manifest.json")).ok()?;
        serde_json::from_str(&text).ok().filter(|manifest: &Manifest| manifest.version == VERSION)
    }

    /// Whether these are all tokens of the sources; the first shards of a cache that is being built are not.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Tokens of a full shard.
    pub(super) fn shard_tokens(&self) -> u64 {
        self.manifest.shard_tokens
    }

    /// Identifies the first `shards` shards, whether more follow or not.
    pub(super) fn fingerprint_of(&self, shards: usize) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.manifest.key);
        for shard in self.manifest.shards.iter().take(shards) {
            hash.update(shard.crc32.to_le_bytes());
        }
        format!("{}-{shards}", hex(&hash.finalize()[..8]))
    }

    /// Number of shards.
    pub(super) fn shards(&self) -> usize {
        self.manifest.shards.len()
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

    /// Where document `index` ends: one past its last token, the separator included.
    fn end(&self, index: usize) -> u64 {
        let bytes = self.ends.as_deref().and_then(|ends| ends.get(8 * index..8 * index + 8));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(self.len(), u64::from_le_bytes)
    }

    /// The first document that ends after token `at`.
    fn document_at(&self, at: u64) -> usize {
        let (mut low, mut high) = (0, self.manifest.documents as usize);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.end(middle) <= at { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// The places strictly between `start` and `start + count` where a document begins, in order.
    pub fn document_starts(&self, start: u64, count: usize) -> Vec<u64> {
        let first = self.document_at(start);
        let ends = (first..self.manifest.documents as usize).map(|index| self.end(index));
        ends.take_while(|end| *end < start + count as u64).collect()
    }

    /// Where the document that has token `at` begins.
    pub fn document_start(&self, at: u64) -> u64 {
        self.document_at(at).checked_sub(1).map_or(0, |before| self.end(before))
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
            let (width, length) = (self.manifest.width, self.manifest.shard_tokens);
            let map = &self.maps[(at / length) as usize];
            let inside = (at % length) as usize;
            let take = left.min((length as usize) - inside);
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

fn open_index(place: &Path, manifest: &Manifest) -> Result<Option<Mmap>, String> {
    let of = |message: String| format!("{DOCUMENTS}: {message}");
    let file = File::open(place.join(DOCUMENTS)).map_err(|error| of(error.to_string()))?;
    let length = file.metadata().map_err(|error| of(error.to_string()))?.len();
    if length != 8 * manifest.documents {
        return Err(of(format!("{length} bytes")));
    }
    if length == 0 {
        return Ok(None);
    }
    // SAFETY: as for the shards.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| of(error.to_string()))?;
    match crc32fast::hash(&map) == manifest.index {
        true => Ok(Some(map)),
        false => Err(of("the checksum differs".to_string())),
    }
}

fn cache_key(sources: &[SourceSection], part: Part, shard_tokens: u64, encoder: &dyn Encoder) -> String {
    // A weight decides how often a source is drawn from, not what its tokens are.
    let sources: Vec<_> = sources.iter().map(|source| SourceSection { weight: None, ..source.clone() }).collect();
    let mut key = serde_json::json!({
        "version": VERSION,
        "sources": sources,
        "part": part,
        "tokenizer": encoder.fingerprint(),
        "separator": encoder.separator(),
    });
    if shard_tokens != SHARD_TOKENS {
        key["shard_tokens"] = shard_tokens.into();
    }
    hex(&Sha256::digest(key.to_string().as_bytes())[..8])
}

pub(super) fn stamps(files: &[Vec<SourceFile>]) -> Result<Vec<FileStamp>, TrainError> {
    let stamp = |file: &SourceFile| {
        let meta = fs::metadata(&file.path).map_err(TrainError::io("read", &file.path))?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |since| since.as_nanos() as u64);
        Ok(FileStamp { name: file.name.clone(), size: meta.len(), modified_ns })
    };
    files.iter().flatten().map(stamp).collect()
}
