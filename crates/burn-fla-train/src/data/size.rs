//! How much there is to learn from, without reading it.

use std::fmt;

use serde::Serialize;

use super::Encoder;
use super::cache::{Part, TokenStore};
use super::source;
use crate::recipe::{SourceFormat, SourceSection, TextSection};

/// The size of a source.
#[derive(Clone, Debug, Serialize)]
pub struct DataSize {
    /// Its name.
    pub name: String,
    /// Its files.
    pub files: usize,
    /// Their bytes on disk, compressed where they are.
    pub bytes: u64,
    /// Tokens, counted where a cache is there.
    pub tokens: u64,
    /// Whether `tokens` is an estimate.
    pub estimated: bool,
    /// Its share of the draws; `None` where sources have no weights.
    pub share: Option<f64>,
}

/// The training sources of a section. A source that cannot be looked at is left out, and `tell` receives why.
pub fn data_size(section: &TextSection, encoder: &dyn Encoder, tell: &mut dyn FnMut(String)) -> Vec<DataSize> {
    let part = match section.validation_fraction {
        fraction if fraction > 0.0 => Part::Train(fraction),
        _ => Part::All,
    };
    let total: f64 = section.sources.iter().filter_map(|source| source.weight).sum();
    // Without weights all sources share one cache.
    let cached = |sources: &[SourceSection]| {
        TokenStore::summary(&section.cache_folder, sources, part, section.shard_tokens, encoder)
    };
    let together = match total > 0.0 {
        true => None,
        false => cached(&section.sources),
    };
    let mut sizes = Vec::new();
    for (index, source) in section.sources.iter().enumerate() {
        let files = match source::files(source, &format!("data.sources[{index}]")) {
            Ok(files) => files,
            Err(error) => {
                tell(error.to_string());
                continue;
            }
        };
        let on_disk = files.iter().filter_map(|file| std::fs::metadata(&file.path).ok()).map(|meta| meta.len());
        let bytes: u64 = on_disk.sum();
        let taken = bytes.min(source.max_bytes.unwrap_or(u64::MAX));
        let own = if total > 0.0 { cached(std::slice::from_ref(source)) } else { None };
        let estimate = match source.format {
            SourceFormat::Bin => bytes / 2,
            // Four bytes of English text a token of a vocabulary of tens of thousands, one of a byte.
            _ if encoder.vocab_size() <= 256 => taken,
            _ => taken / 4,
        };
        sizes.push(DataSize {
            name: source.name(),
            files: files.len(),
            bytes,
            tokens: own.as_ref().map_or(estimate, |manifest| manifest.tokens),
            estimated: own.is_none(),
            share: source.weight.map(|weight| weight / total),
        });
    }
    if let (Some(manifest), [only]) = (&together, &mut sizes[..]) {
        only.tokens = manifest.tokens;
        only.estimated = false;
    } else if let Some(manifest) = together {
        // One cache holds them all: each gets its part by its size.
        let estimates: u64 = sizes.iter().map(|size| size.tokens).sum();
        for size in &mut sizes {
            size.tokens = (u128::from(manifest.tokens) * u128::from(size.tokens) / u128::from(estimates.max(1))) as u64;
        }
    }
    sizes
}

impl fmt::Display for DataSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, files, bytes, tokens, estimated, share } = self;
        let about = if *estimated { "about " } else { "" };
        write!(f, "{name}: {files} files, {:.1} MB, {about}{tokens} tokens", *bytes as f64 / 1e6)?;
        match share {
            Some(share) => write!(f, ", {:.1} % of the draws", 100.0 * share),
            None => Ok(()),
        }
    }
}
