//! The rows of a token store.

use std::sync::Arc;
use std::time::Duration;

use super::cache::TokenStore;
use super::growing::GrowingStore;
use super::permutation::{Permutation, mix};
use super::rows::{NOT_ASKED, RowSource};
use crate::TrainError;

/// What a row of a token store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packing {
    /// Documents in a row do not see each other, and no label crosses from one to the next.
    pub varlen: bool,
    /// With `varlen`: a document is cut into sequences of at most this many tokens. The label at a cut stays, for it is
    /// the document's own next token.
    pub context_len: Option<usize>,
}

/// The windows of a token store: `seq_len + 1` tokens each, where one starts at the last token of the one before it, so
/// that an epoch reads every token once as a label. Documents are concatenated; [`Packing`] says whether they see each
/// other.
///
/// The first epoch goes through the shards in order and is shuffled within each: so it begins when the first shard is
/// tokenised, and its order is the same when all of them are. Every later epoch is shuffled as a whole.
#[derive(Debug)]
pub struct Windows {
    store: GrowingStore,
    seq_len: usize,
    packing: Packing,
}

impl Windows {
    /// Windows of `seq_len` inputs; the store holds more tokens than that.
    pub fn new(store: TokenStore, seq_len: usize, packing: Packing) -> Windows {
        Windows::growing(GrowingStore::whole(store), seq_len, packing)
    }

    /// The same of a store of which not all may be there yet.
    pub(super) fn growing(store: GrowingStore, seq_len: usize, packing: Packing) -> Windows {
        Windows { store, seq_len, packing }
    }

    /// The tokens that there are by now.
    fn now(&self) -> Arc<TokenStore> {
        self.store.now().expect("rows are read when the first shard is there")
    }

    /// Tokens of the store, as far as they are there.
    pub fn tokens(&self) -> u64 {
        self.store.now().map_or(0, |store| store.len())
    }

    /// The share of the labels that ask for nothing, because they would cross from one document to the next.
    pub fn waste(&self) -> f64 {
        let store = self.now();
        match self.packing.varlen {
            true => store.documents().saturating_sub(1) as f64 / store.len().saturating_sub(1).max(1) as f64,
            false => 0.0,
        }
    }

    /// The shard in which row `index` ends. Its last label is a token of that shard.
    fn shard_of(&self, store: &TokenStore, index: u64) -> u64 {
        index.saturating_add(1).saturating_mul(self.seq_len as u64) / store.shard_tokens()
    }

    fn rows(&self, tokens: u64) -> u64 {
        tokens.saturating_sub(1) / self.seq_len as u64
    }

    fn named(&self, fingerprint: String) -> String {
        match (self.packing.varlen, self.packing.context_len) {
            (false, _) => fingerprint,
            (true, None) => format!("{fingerprint}-varlen"),
            (true, Some(context)) => format!("{fingerprint}-varlen{context}"),
        }
    }
}

impl RowSource for Windows {
    /// Of a store that is not whole, as many as are there.
    fn len(&self) -> u64 {
        self.rows(self.tokens())
    }

    fn seq_len(&self) -> usize {
        self.seq_len
    }

    fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>) {
        let (store, start) = (self.now(), index * self.seq_len as u64);
        store.read(start, self.seq_len, ids);
        let first = labels.len();
        store.read(start + 1, self.seq_len, labels);
        if self.packing.varlen {
            // Label i is token start + 1 + i.
            for begin in store.document_starts(start, self.seq_len + 1) {
                labels[first + (begin - start - 1) as usize] = NOT_ASKED;
            }
        }
    }

    fn starts(&self, index: u64) -> Option<Vec<usize>> {
        if !self.packing.varlen {
            return None;
        }
        let (store, start) = (self.now(), index * self.seq_len as u64);
        let end = start + self.seq_len as u64;
        let mut starts = store.document_starts(start, self.seq_len);
        if let Some(context) = self.packing.context_len {
            // Cuts count from the document's own beginning, so that they do not depend on where rows begin.
            let mut begin = store.document_start(start);
            let documents: Vec<u64> = starts.iter().copied().chain([end]).collect();
            for next in documents {
                let cuts = (1..).map(|n| begin + n * context as u64).take_while(|cut| *cut < next);
                starts.extend(cuts.filter(|cut| *cut > start));
                begin = next;
            }
            starts.sort_unstable();
        }
        Some(starts.into_iter().map(|at| (at - start) as usize).collect())
    }

    fn wait(&self, draws: u64, patience: Duration) -> Result<bool, TrainError> {
        // Before there is a shard it is not known how long one is: then for any.
        let tokens = self.store.now().map_or(1, |store| {
            let shards = self.shard_of(&store, draws.max(1) - 1) + 1;
            shards.saturating_mul(store.shard_tokens())
        });
        if !self.store.wait(tokens, patience)? {
            return Ok(false);
        }
        let store = self.now();
        let shards = self.shard_of(&store, draws.max(1) - 1) + 1;
        Ok(store.is_whole() || store.len() >= shards.saturating_mul(store.shard_tokens()))
    }

    fn notes(&self) -> Vec<String> {
        self.store.notes()
    }

    fn draw(&self, seed: u64, at: u64) -> u64 {
        let store = self.now();
        let rows = self.rows(store.len());
        if at >= rows {
            // All of it is there, or this would not be asked.
            return Permutation::new(rows, seed).at(at / rows, at % rows);
        }
        let shard = self.shard_of(&store, at);
        let begin = self.rows(shard * store.shard_tokens());
        let end = self.rows((shard + 1) * store.shard_tokens()).min(rows);
        let seed = if shard == 0 { seed } else { mix(seed ^ mix(shard)) };
        begin + Permutation::new(end - begin, seed).at(0, at - begin)
    }

    fn fingerprint(&self) -> String {
        self.named(self.now().fingerprint())
    }

    fn fingerprint_of(&self, draws: u64) -> String {
        let store = self.now();
        if store.is_whole() && store.shards() <= 1 {
            return self.fingerprint();
        }
        let shards = self.shard_of(&store, draws.max(1) - 1).saturating_add(1).min(store.shards() as u64);
        self.named(store.fingerprint_of(shards as usize))
    }

    fn describe(&self) -> String {
        let store = self.now();
        if !store.is_whole() {
            return format!("{} training tokens so far, and more are being tokenised", store.len());
        }
        let waste = match self.packing.varlen {
            true => format!(", {:.2} % of the labels left out between documents", 100.0 * self.waste()),
            false => String::new(),
        };
        format!("{} training tokens{waste}", store.len())
    }
}
