//! A cache that is not there yet.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::Encoder;
use super::build::{Order, Written, build};
use super::cache::{FileStamp, Part, TokenStore};
use super::source::SourceFile;
use crate::TrainError;
use crate::recipe::SourceSection;

/// What there is for some sources.
pub(super) enum Found {
    /// A cache.
    Cache(TokenStore),
    /// Files to be tokenised.
    Files(Unbuilt),
}

/// A cache that is to be built.
pub(super) struct Unbuilt {
    pub place: PathBuf,
    pub key: String,
    pub sources: Vec<SourceSection>,
    pub files: Vec<Vec<SourceFile>>,
    /// The files as they were when they were listed: one that changes while it is read is read again by the next run.
    pub stamps: Vec<FileStamp>,
    pub part: Part,
    /// Tokens of a full shard.
    pub shard_tokens: u64,
}

impl Unbuilt {
    /// Builds it: `show` receives what there is whenever there is a full shard more.
    pub(super) fn build(
        &self,
        encoder: &dyn Encoder,
        cancelled: &AtomicBool,
        show: &mut dyn FnMut(TokenStore),
        tell: &mut dyn FnMut(String),
    ) -> Result<TokenStore, TrainError> {
        let Unbuilt { place, key, sources, files, stamps, part, shard_tokens } = self;
        let order =
            Order { place, key, sources, files, stamps, part: *part, encoder, shard_tokens: *shard_tokens, cancelled };
        let usable = |place: &Path| TokenStore::open_cache(place, key).is_ok_and(|cache| cache.is_of(stamps));
        let mut maps = Vec::new();
        let mut written = |written: Written<'_>| {
            show(TokenStore::first_shards(&written, key, *shard_tokens, &mut maps)?);
            Ok(())
        };
        build(&order, usable, &mut written, tell)?;
        TokenStore::open_cache(place, key).map_err(|message| TrainError::BadDocument {
            path: place.clone(),
            line: None,
            message: format!("the token cache just written cannot be read back: {message}"),
        })
    }
}
