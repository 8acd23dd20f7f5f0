//! The rows of a token store.

use super::cache::TokenStore;
use super::rows::{NOT_ASKED, RowSource};

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
#[derive(Debug)]
pub struct Windows {
    store: TokenStore,
    seq_len: usize,
    packing: Packing,
}

impl Windows {
    /// Windows of `seq_len` inputs; the store holds more tokens than that.
    pub fn new(store: TokenStore, seq_len: usize, packing: Packing) -> Windows {
        Windows { store, seq_len, packing }
    }

    /// Tokens of the store.
    pub fn tokens(&self) -> u64 {
        self.store.len()
    }

    /// The share of the labels that ask for nothing, because they would cross from one document to the next.
    pub fn waste(&self) -> f64 {
        match self.packing.varlen {
            true => self.store.documents().saturating_sub(1) as f64 / self.store.len().saturating_sub(1).max(1) as f64,
            false => 0.0,
        }
    }
}

impl RowSource for Windows {
    fn len(&self) -> u64 {
        (self.store.len() - 1) / self.seq_len as u64
    }

    fn seq_len(&self) -> usize {
        self.seq_len
    }

    fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>) {
        let start = index * self.seq_len as u64;
        self.store.read(start, self.seq_len, ids);
        let first = labels.len();
        self.store.read(start + 1, self.seq_len, labels);
        if self.packing.varlen {
            // Label i is token start + 1 + i.
            for begin in self.store.document_starts(start, self.seq_len + 1) {
                labels[first + (begin - start - 1) as usize] = NOT_ASKED;
            }
        }
    }

    fn starts(&self, index: u64) -> Option<Vec<usize>> {
        if !self.packing.varlen {
            return None;
        }
        let start = index * self.seq_len as u64;
        let end = start + self.seq_len as u64;
        let mut starts = self.store.document_starts(start, self.seq_len);
        if let Some(context) = self.packing.context_len {
            // Cuts count from the document's own beginning, so that they do not depend on where rows begin.
            let mut begin = self.store.document_start(start);
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

    fn fingerprint(&self) -> String {
        match (self.packing.varlen, self.packing.context_len) {
            (false, _) => self.store.fingerprint(),
            (true, None) => format!("{}-varlen", self.store.fingerprint()),
            (true, Some(context)) => format!("{}-varlen{context}", self.store.fingerprint()),
        }
    }

    fn describe(&self) -> String {
        let waste = match self.packing.varlen {
            true => format!(", {:.2} % of the labels left out between documents", 100.0 * self.waste()),
            false => String::new(),
        };
        format!("{} training tokens{waste}", self.store.len())
    }
}
