//! Documents → tokens, once, into a memory-mapped cache → windows, or rows that are generated → a shuffled order with an
//! integer cursor.

mod build;
mod build_folder;
mod cache;
#[cfg(feature = "learner")]
mod dataset;
mod documents;
mod encode;
mod growing;
mod held_out;
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
mod unbuilt;
mod vocabulary;
mod windows;

pub use cache::{Part, TokenStore};
#[cfg(feature = "learner")]
pub use dataset::{RowBatcher, RowDataset};
pub(crate) use held_out::HeldOutRows;
pub use loader::{Loader, spread};
pub use mixture::Mixture;
pub use mqar::{Mqar, Split};
pub use parquet::is_reading_parquet;
pub use permutation::Permutation;
pub use rows::{RowSource, Rows};
pub(crate) use shards::SHARD_TOKENS;
pub use size::{DataSize, data_size};
pub(crate) use source::expand;
pub use vocabulary::{VocabularyReport, train_tokenizer};
pub use windows::{Packing, Windows};

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::TrainError;
use crate::recipe::{MqarSection, Recipe, SourceSection, TextSection, TrainingSection};
use crate::trainer::{Task, read_model_config};
use growing::GrowingStore;

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
        let (train, held_out) = Task::open(recipe, &config)?.corpus(&recipe.training, tell)?;
        while !train.wait(u64::MAX, PATIENCE)? {
            train.notes().into_iter().for_each(&mut *tell);
        }
        train.notes().into_iter().for_each(&mut *tell);
        Ok(Corpus { train, validation: held_out.wait()? })
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
        let open = Opening::of(section, training);
        let train = open.rows("training", open.train_part(), &mut |name, sources, part| {
            open.store(name, sources, part, encoder, &AtomicBool::new(false), tell).map(GrowingStore::whole)
        })?;
        let train = train.ok_or_else(|| open.empty("training", 0))?;
        Ok(Corpus { train, validation: open.held_out(encoder, &AtomicBool::new(false), tell)? })
    }

    /// The same for a run: it goes on when of each source the first shard is there, and the rest is tokenised beside it.
    pub(crate) fn begin(
        section: &TextSection,
        training: &TrainingSection,
        encoder: &Arc<impl Encoder + Send + 'static>,
        tell: &mut dyn FnMut(String),
    ) -> Result<(Arc<dyn RowSource>, HeldOutRows), TrainError> {
        let open = Opening::of(section, training);
        let train = open.rows("training", open.train_part(), &mut |name, sources, part| {
            let found = open.find(name, sources, part, encoder.as_ref(), tell)?;
            let store = GrowingStore::start(found, encoder.clone())?;
            // Folders whose files are in use cannot be renamed everywhere: there all of it is waited for.
            let tokens = if cfg!(unix) { 1 } else { u64::MAX };
            while !store.wait(tokens, PATIENCE)? {
                store.notes().into_iter().for_each(&mut *tell);
            }
            store.notes().into_iter().for_each(&mut *tell);
            Ok(store)
        })?;
        let train = train.ok_or_else(|| open.empty("training", 0))?;
        // Where all of it is there, so is what is held out, or it is soon: errors in it come before the first step.
        let held_out = match train.wait(u64::MAX, Duration::ZERO)? || !section.validation.is_empty() {
            true => HeldOutRows::There(open.held_out(encoder.as_ref(), &AtomicBool::new(false), tell)?),
            false => HeldOutRows::later(open, encoder.clone())?,
        };
        Ok((train, held_out))
    }

    /// Multi-query associative recall in rows of `seq_len` tokens, with other examples to be judged by.
    pub fn mqar(section: &MqarSection, seq_len: usize) -> Corpus {
        let rows = |split| -> Arc<dyn RowSource> { Arc::new(Mqar::new(section, seq_len, split)) };
        Corpus { train: rows(Split::Train), validation: Some(rows(Split::Validation)) }
    }
}

/// How long a wait for data goes on before whoever waits looks around.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

/// What the rows of documents are opened with.
#[derive(Clone, Debug)]
struct Opening {
    section: TextSection,
    seq_len: usize,
    packing: Packing,
}

/// Opens the store of one cache.
type OpenStore<'a> = dyn FnMut(&str, &[SourceSection], Part) -> Result<GrowingStore, TrainError> + 'a;

impl Opening {
    fn of(section: &TextSection, training: &TrainingSection) -> Opening {
        let packing = Packing { varlen: training.varlen, context_len: training.context_len };
        Opening { section: section.clone(), seq_len: training.seq_len, packing }
    }

    fn train_part(&self) -> Part {
        match self.section.validation_fraction {
            fraction if fraction > 0.0 => Part::Train(fraction),
            _ => Part::All,
        }
    }

    fn empty(&self, role: &str, tokens: u64) -> TrainError {
        TrainError::EmptyCorpus { role: role.to_string(), tokens, needed: self.seq_len as u64 + 1 }
    }

    fn find(
        &self,
        name: &str,
        sources: &[SourceSection],
        part: Part,
        encoder: &dyn Encoder,
        tell: &mut dyn FnMut(String),
    ) -> Result<unbuilt::Found, TrainError> {
        let TextSection { cache_folder, shard_tokens, .. } = &self.section;
        TokenStore::find(cache_folder, name, sources, part, *shard_tokens, encoder, tell)
    }

    /// A whole store.
    fn store(
        &self,
        name: &str,
        sources: &[SourceSection],
        part: Part,
        encoder: &dyn Encoder,
        cancelled: &AtomicBool,
        tell: &mut dyn FnMut(String),
    ) -> Result<TokenStore, TrainError> {
        match self.find(name, sources, part, encoder, tell)? {
            unbuilt::Found::Cache(store) => Ok(store),
            unbuilt::Found::Files(files) => files.build(encoder, cancelled, &mut |_| (), tell),
        }
    }

    /// The rows of a part of the sources. With weights each source has a cache of its own, and its documents are held out
    /// by their numbers in it. `None` where a held-out part has no row.
    fn rows(&self, role: &str, part: Part, open: &mut OpenStore<'_>) -> Result<Option<Arc<dyn RowSource>>, TrainError> {
        let sources = &self.section.sources;
        if !sources.iter().all(|source| source.weight.is_some()) {
            let store = open("data.sources", sources, part)?;
            return Ok(Some(Arc::new(self.windows(role, store)?)));
        }
        let mut members = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            let name = format!("data.sources[{index}]");
            let store = open(&name, std::slice::from_ref(source), part)?;
            match self.windows(&format!("{role} ({name})"), store) {
                Ok(rows) => members.push((source.name(), Arc::new(rows) as _, source.weight.unwrap_or(1.0))),
                // Nothing to judge by in this source: the others are enough.
                Err(TrainError::EmptyCorpus { .. }) if matches!(part, Part::HeldOut(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok((!members.is_empty()).then(|| Arc::new(Mixture::new(members)) as _))
    }

    fn windows(&self, role: &str, store: GrowingStore) -> Result<Windows, TrainError> {
        let rows = Windows::growing(store, self.seq_len, self.packing);
        // The first shard of several has a row in any case.
        match rows.is_empty() {
            true => Err(self.empty(role, rows.tokens())),
            false => Ok(rows),
        }
    }

    /// What the run is judged by, whole.
    fn held_out(
        &self,
        encoder: &dyn Encoder,
        cancelled: &AtomicBool,
        tell: &mut dyn FnMut(String),
    ) -> Result<Option<Arc<dyn RowSource>>, TrainError> {
        let TextSection { validation, validation_fraction, .. } = &self.section;
        if !validation.is_empty() {
            let store = self.store("data.validation", validation, Part::All, encoder, cancelled, tell)?;
            return Ok(Some(Arc::new(self.windows("validation", GrowingStore::whole(store))?)));
        }
        if *validation_fraction == 0.0 {
            return Ok(None);
        }
        self.rows("validation", Part::HeldOut(*validation_fraction), &mut |name, sources, part| {
            self.store(name, sources, part, encoder, cancelled, tell).map(GrowingStore::whole)
        })
    }
}

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod growing_tests;
#[cfg(test)]
mod tests;
