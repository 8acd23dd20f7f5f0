//! Documents → tokens, once, into a memory-mapped cache → windows, or rows that are generated → a shuffled order with an
//! integer cursor.

mod cache;
mod loader;
mod mqar;
mod permutation;
mod shards;
mod source;

pub use cache::{Part, TokenStore};
pub use loader::{Loader, RowSource, Rows, Windows, spread};
pub use mqar::{Mqar, Split};
pub use permutation::Permutation;
pub(crate) use source::expand;

use std::sync::Arc;

use crate::TrainError;
use crate::recipe::{MqarSection, TextSection};

/// What the data pipeline needs of a tokenizer.
pub trait Encoder: Sync {
    /// Text to token ids, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError>;
    /// One more than the largest id.
    fn vocab_size(&self) -> usize;
    /// The token written after every document, if the tokenizer has one.
    fn separator(&self) -> Option<u32>;
    /// Changes whenever the ids of a text could change.
    fn fingerprint(&self) -> String;
}

/// The rows of a run: what it trains on and, if the recipe holds some out, what it is judged by.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Rows to learn from.
    pub train: Arc<dyn RowSource>,
    /// Held-out rows.
    pub validation: Option<Arc<dyn RowSource>>,
}

impl Corpus {
    /// Opens the caches of documents, tokenising what has none yet. `tell` receives one line for anything worth
    /// knowing.
    ///
    /// # Errors
    /// Patterns without files, documents that cannot be read, a corpus shorter than one sequence, a cache folder
    /// that cannot be written.
    pub fn text(
        section: &TextSection,
        seq_len: usize,
        encoder: &dyn Encoder,
        tell: &mut dyn FnMut(String),
    ) -> Result<Corpus, TrainError> {
        let TextSection { cache_folder, sources, validation, validation_fraction, .. } = section;
        let held_out = *validation_fraction;
        let mut open = |role: &str, name: &str, sources, part| -> Result<Arc<dyn RowSource>, TrainError> {
            let store = TokenStore::open(cache_folder, name, sources, part, encoder, tell)?;
            let needed = seq_len as u64 + 1;
            if store.len() < needed {
                let role = role.to_string();
                return Err(TrainError::EmptyCorpus { role, tokens: store.len(), needed });
            }
            Ok(Arc::new(Windows::new(store, seq_len)))
        };
        let train_part = if held_out > 0.0 { Part::Train(held_out) } else { Part::All };
        let train = open("training", "data.sources", sources, train_part)?;
        let validation = if !validation.is_empty() {
            Some(open("validation", "data.validation", validation, Part::All)?)
        } else if held_out > 0.0 {
            Some(open("validation", "data.sources", sources, Part::HeldOut(held_out))?)
        } else {
            None
        };
        Ok(Corpus { train, validation })
    }

    /// Multi-query associative recall in rows of `seq_len` tokens, with other examples to be judged by.
    pub fn mqar(section: &MqarSection, seq_len: usize) -> Corpus {
        let rows = |split| -> Arc<dyn RowSource> { Arc::new(Mqar::new(section, seq_len, split)) };
        Corpus { train: rows(Split::Train), validation: Some(rows(Split::Validation)) }
    }
}

#[cfg(test)]
mod tests;
