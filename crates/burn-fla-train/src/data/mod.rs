//! Documents → tokens, once, into a memory-mapped cache → windows in a shuffled order with an integer cursor.

mod cache;
mod loader;
mod permutation;
mod shards;
mod source;

pub use cache::{Part, TokenStore};
pub use loader::{Loader, Rows};
pub use permutation::Permutation;
pub(crate) use source::expand;

use crate::TrainError;
use crate::recipe::{DataSection, Recipe};

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

/// The tokens of a run: what it trains on and, if the recipe holds some out, what it is judged by.
#[derive(Debug)]
pub struct Corpus {
    /// Training tokens.
    pub train: TokenStore,
    /// Held-out tokens.
    pub validation: Option<TokenStore>,
}

impl Corpus {
    /// Opens the caches of a recipe, tokenising what has none yet. `tell` receives one line for anything worth knowing.
    ///
    /// # Errors
    /// Patterns without files, documents that cannot be read, a corpus shorter than one sequence, a cache folder
    /// that cannot be written.
    pub fn open(recipe: &Recipe, encoder: &dyn Encoder, tell: &mut dyn FnMut(String)) -> Result<Corpus, TrainError> {
        let DataSection { cache_folder, sources, validation, validation_fraction, .. } = &recipe.data;
        let held_out = *validation_fraction;
        let mut open = |role: &str, name: &str, sources, part| {
            let store = TokenStore::open(cache_folder, name, sources, part, encoder, tell)?;
            let needed = recipe.training.seq_len as u64 + 1;
            if store.len() < needed {
                let role = role.to_string();
                return Err(TrainError::EmptyCorpus { role, tokens: store.len(), needed });
            }
            Ok(store)
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
}

#[cfg(test)]
mod tests;
