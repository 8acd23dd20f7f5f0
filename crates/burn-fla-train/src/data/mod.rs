//! Documents → tokens, once, into a memory-mapped cache → windows, or rows that are generated → a shuffled order with an
//! integer cursor.

mod build;
mod cache;
#[cfg(feature = "learner")]
mod dataset;
mod documents;
mod encode;
mod loader;
mod mixture;
mod mqar;
mod parquet;
mod permutation;
mod rows;
mod shards;
mod size;
mod source;
mod token_file;
mod vocabulary;
mod windows;

pub use cache::{Part, TokenStore};
#[cfg(feature = "learner")]
pub use dataset::{RowBatcher, RowDataset};
pub use loader::{Loader, spread};
pub use mixture::Mixture;
pub use mqar::{Mqar, Split};
pub use parquet::is_reading_parquet;
pub use permutation::Permutation;
pub use rows::{RowSource, Rows};
pub use size::{DataSize, data_size};
pub(crate) use source::expand;
pub use vocabulary::{VocabularyReport, train_tokenizer};
pub use windows::{Packing, Windows};

use std::cell::RefCell;
use std::sync::Arc;

use crate::TrainError;
use crate::recipe::{MqarSection, Recipe, SourceSection, TextSection, TrainingSection};
use crate::trainer::{Task, read_model_config};

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
    /// The rows of a recipe, tokenised if they are not yet: for programs that train with a loop of their own. `tell`
    /// receives one line for anything worth knowing.
    ///
    /// # Errors
    /// Those of [`Corpus::text`]; a model's config or a tokenizer that cannot be read, or that do not fit each other.
    pub fn open(recipe: &Recipe, tell: &mut dyn FnMut(String)) -> Result<Corpus, TrainError> {
        let (config, _) = read_model_config(recipe)?;
        Task::open(recipe, &config)?.corpus(&recipe.training, tell)
    }

    /// Opens the caches of documents, tokenising what has none yet. `tell` receives one line for anything worth
    /// knowing.
    ///
    /// # Errors
    /// Patterns without files, documents that cannot be read, a corpus shorter than one sequence, a cache folder
    /// that cannot be written.
    pub fn text(
        section: &TextSection,
        training: &TrainingSection,
        encoder: &dyn Encoder,
        tell: &mut dyn FnMut(String),
    ) -> Result<Corpus, TrainError> {
        let TextSection { cache_folder, sources, validation, validation_fraction, .. } = section;
        let (seq_len, held_out) = (training.seq_len, *validation_fraction);
        let packing = Packing { varlen: training.varlen, context_len: training.context_len };
        let tell = RefCell::new(tell);
        let open = |role: &str, name: &str, sources: &[SourceSection], part| -> Result<Windows, TrainError> {
            let tell = &mut **tell.borrow_mut();
            let store = TokenStore::open(cache_folder, name, sources, part, encoder, tell)?;
            let needed = seq_len as u64 + 1;
            if store.len() < needed {
                let role = role.to_string();
                return Err(TrainError::EmptyCorpus { role, tokens: store.len(), needed });
            }
            Ok(Windows::new(store, seq_len, packing))
        };
        let train_part = if held_out > 0.0 { Part::Train(held_out) } else { Part::All };
        let weighted = sources.iter().all(|source| source.weight.is_some());
        // With weights each source has a cache of its own, and its documents are held out by their numbers in it.
        let mixture = |role: &str, part| -> Result<Option<Arc<dyn RowSource>>, TrainError> {
            let mut members = Vec::new();
            for (index, source) in sources.iter().enumerate() {
                let name = format!("data.sources[{index}]");
                match open(&format!("{role} ({name})"), &name, std::slice::from_ref(source), part) {
                    Ok(rows) => members.push((source.name(), Arc::new(rows) as _, source.weight.unwrap_or(1.0))),
                    // Nothing to judge by in this source: the others are enough.
                    Err(TrainError::EmptyCorpus { .. }) if matches!(part, Part::HeldOut(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok((!members.is_empty()).then(|| Arc::new(Mixture::new(members)) as _))
        };
        let joint = |rows: Windows| -> Option<Arc<dyn RowSource>> { Some(Arc::new(rows)) };
        let rows = |role: &str, part| match weighted {
            true => mixture(role, part),
            false => open(role, "data.sources", sources, part).map(joint),
        };
        let train = rows("training", train_part)?;
        let held_out =
            if held_out > 0.0 && validation.is_empty() { rows("validation", Part::HeldOut(held_out))? } else { None };
        let validation = match validation.is_empty() {
            true => held_out,
            false => joint(open("validation", "data.validation", validation, Part::All)?),
        };
        let nothing =
            || TrainError::EmptyCorpus { role: "training".to_string(), tokens: 0, needed: seq_len as u64 + 1 };
        let train = train.ok_or_else(nothing)?;
        Ok(Corpus { train, validation })
    }

    /// Multi-query associative recall in rows of `seq_len` tokens, with other examples to be judged by.
    pub fn mqar(section: &MqarSection, seq_len: usize) -> Corpus {
        let rows = |split| -> Arc<dyn RowSource> { Arc::new(Mqar::new(section, seq_len, split)) };
        Corpus { train: rows(Split::Train), validation: Some(rows(Split::Validation)) }
    }
}

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod tests;
