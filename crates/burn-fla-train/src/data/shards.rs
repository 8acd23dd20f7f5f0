//! The files of a token cache: a header of 32 bytes, then u16 or u32 tokens, little-endian.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::TrainError;

const MAGIC: &[u8; 8] = b"BFLATOK\x01";
pub(super) const HEADER: usize = 32;
/// Tokens of a full shard unless the recipe says otherwise: 64 or 128 MiB a file.
pub(crate) const SHARD_TOKENS: u64 = 1 << 25;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ShardEntry {
    pub tokens: u64,
    pub crc32: u32,
}

pub(super) fn shard_name(index: usize) -> String {
    format!("shard_{index:05}.bin")
}

pub(super) fn header(width: usize, index: usize, entry: &ShardEntry) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&(width as u32).to_le_bytes());
    header[12..16].copy_from_slice(&entry.crc32.to_le_bytes());
    header[16..24].copy_from_slice(&entry.tokens.to_le_bytes());
    header[24..].copy_from_slice(&(index as u64).to_le_bytes());
    header
}

/// Where every document ends, as u64, little-endian: tokens from the start of the cache.
pub(super) const DOCUMENTS: &str = "documents.bin";

/// Writes [`DOCUMENTS`].
pub(super) struct IndexWriter {
    path: PathBuf,
    file: BufWriter<File>,
    crc: crc32fast::Hasher,
    count: u64,
}

impl IndexWriter {
    pub(super) fn create(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join(DOCUMENTS);
        let file = BufWriter::new(File::create(&path).map_err(TrainError::io("create", &path))?);
        Ok(IndexWriter { path, file, crc: crc32fast::Hasher::new(), count: 0 })
    }

    pub(super) fn push(&mut self, end: u64) -> Result<(), TrainError> {
        let bytes = end.to_le_bytes();
        self.crc.update(&bytes);
        self.count += 1;
        self.file.write_all(&bytes).map_err(TrainError::io("write", &self.path))
    }

    /// How many ends the file has now, all of them readable.
    pub(super) fn flush(&mut self) -> Result<u64, TrainError> {
        self.file.flush().map_err(TrainError::io("write", &self.path))?;
        Ok(self.count)
    }

    /// The checksum of all of it.
    pub(super) fn finish(self) -> Result<u32, TrainError> {
        let end = || -> std::io::Result<()> { self.file.into_inner().map_err(|error| error.into_error())?.sync_all() };
        end().map_err(TrainError::io("write", &self.path))?;
        Ok(self.crc.finalize())
    }
}

/// Writes tokens into shards of a fixed length.
pub(super) struct ShardWriter {
    folder: PathBuf,
    width: usize,
    /// Tokens of a full shard.
    length: u64,
    done: Vec<ShardEntry>,
    open: Option<OpenShard>,
}

struct OpenShard {
    path: PathBuf,
    file: BufWriter<File>,
    crc: crc32fast::Hasher,
    tokens: u64,
}

impl ShardWriter {
    pub(super) fn new(folder: &Path, width: usize, length: u64) -> Self {
        ShardWriter { folder: folder.to_path_buf(), width, length, done: Vec::new(), open: None }
    }

    /// The shards that are written and that another follows: whether a shard is the last is known by then.
    pub(super) fn followed(&self) -> &[ShardEntry] {
        let last = usize::from(self.open.is_none());
        &self.done[..self.done.len().saturating_sub(last)]
    }

    pub(super) fn write(&mut self, mut tokens: &[u32]) -> Result<(), TrainError> {
        while !tokens.is_empty() {
            if self.open.is_none() {
                let path = self.folder.join(shard_name(self.done.len()));
                let mut file =
                    BufWriter::with_capacity(1 << 20, File::create(&path).map_err(TrainError::io("create", &path))?);
                // The header is written last, when length and checksum are known.
                file.write_all(&[0; HEADER]).map_err(TrainError::io("write", &path))?;
                self.open = Some(OpenShard { path, file, crc: crc32fast::Hasher::new(), tokens: 0 });
            }
            let Some(shard) = &mut self.open else { continue };
            let take = tokens.len().min((self.length - shard.tokens) as usize);
            let bytes: Vec<u8> = match self.width {
                2 => tokens[..take].iter().flat_map(|&token| (token as u16).to_le_bytes()).collect(),
                _ => tokens[..take].iter().flat_map(|&token| token.to_le_bytes()).collect(),
            };
            shard.crc.update(&bytes);
            shard.file.write_all(&bytes).map_err(TrainError::io("write", &shard.path))?;
            shard.tokens += take as u64;
            tokens = &tokens[take..];
            if shard.tokens == self.length {
                self.close()?;
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), TrainError> {
        let Some(shard) = self.open.take() else { return Ok(()) };
        let entry = ShardEntry { tokens: shard.tokens, crc32: shard.crc.finalize() };
        let header = header(self.width, self.done.len(), &entry);
        let end = || -> std::io::Result<()> {
            let mut file = shard.file.into_inner().map_err(|error| error.into_error())?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.sync_all()
        };
        end().map_err(TrainError::io("write", &shard.path))?;
        self.done.push(entry);
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Vec<ShardEntry>, TrainError> {
        self.close()?;
        Ok(self.done)
    }
}
