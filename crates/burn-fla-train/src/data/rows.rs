//! Rows for the model, and where they come from.

use std::fmt::Debug;
use std::time::Duration;

use super::permutation::Permutation;
use crate::TrainError;

/// The label of a position that asks for nothing.
pub(super) const NOT_ASKED: i32 = -100;

/// Rows for one call of the model: `ids[i]` is to be continued by `labels[i]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Number of rows.
    pub rows: usize,
    /// Tokens of a row.
    pub seq_len: usize,
    /// `rows × seq_len` inputs, row after row.
    pub ids: Vec<i32>,
    /// `rows × seq_len` next tokens; −100 where none is asked for.
    pub labels: Vec<i32>,
    /// Where sequences begin in `ids`, when rows hold several that must not see each other: the first of every row, and
    /// those inside. `None`: every row is one sequence.
    pub starts: Option<Vec<usize>>,
}

impl Rows {
    /// Rows `from..to` alone.
    pub fn part(&self, from: usize, to: usize) -> Rows {
        let (a, b) = (from * self.seq_len, to * self.seq_len);
        let inside = |starts: &Vec<usize>| starts.iter().filter(|at| (a..b).contains(at)).map(|at| at - a).collect();
        Rows {
            rows: to - from,
            seq_len: self.seq_len,
            ids: self.ids[a..b].to_vec(),
            labels: self.labels[a..b].to_vec(),
            starts: self.starts.as_ref().map(inside),
        }
    }

    /// Rows of one length and kind after each other.
    pub fn concat(parts: &[Rows]) -> Rows {
        let mut all = Rows {
            rows: 0,
            seq_len: parts.first().map_or(0, |part| part.seq_len),
            ids: Vec::new(),
            labels: Vec::new(),
            starts: parts.first().and_then(|part| part.starts.as_ref()).map(|_| Vec::new()),
        };
        for part in parts {
            let before = all.ids.len();
            if let (Some(starts), Some(more)) = (&mut all.starts, &part.starts) {
                starts.extend(more.iter().map(|at| at + before));
            }
            all.rows += part.rows;
            all.ids.extend(&part.ids);
            all.labels.extend(&part.labels);
        }
        all
    }

    /// The shape `[B, T]` of the ids on a device, and the offsets of their sequences where rows hold several: then all of
    /// them are one packed row.
    pub fn layout(&self) -> ([usize; 2], Option<Vec<usize>>) {
        let total = self.rows * self.seq_len;
        match &self.starts {
            None => ([self.rows, self.seq_len], None),
            Some(starts) => ([1, total], Some(starts.iter().copied().chain([total]).collect())),
        }
    }

    /// The labels that count in the loss.
    pub fn tokens(&self) -> u64 {
        self.labels.iter().filter(|label| **label >= 0).count() as u64
    }
}

/// Rows by their number: what a [`Loader`](super::Loader) draws from.
pub trait RowSource: Debug + Send + Sync {
    /// Rows of an epoch.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of a row.
    fn seq_len(&self) -> usize;

    /// The number of row `nth`, counted from 0 and below [`len`](Self::len): what [`draw`](Self::draw) gives numbers of.
    fn number(&self, nth: u64) -> u64 {
        nth
    }

    /// Appends row `index`, a number: `seq_len` ids, and as many labels.
    fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>);

    /// Where sequences begin inside row `index`, past its first token; `None` where a row is one sequence.
    fn starts(&self, index: u64) -> Option<Vec<usize>> {
        let _ = index;
        None
    }

    /// Waits, for at most `patience`, until the first `draws` rows can be drawn; says whether they can. Where all of the data
    /// are there they always can.
    ///
    /// # Errors
    /// What keeps the data from being read.
    fn wait(&self, draws: u64, patience: Duration) -> Result<bool, TrainError> {
        let _ = (draws, patience);
        Ok(true)
    }

    /// What there is to tell of the data since the last call.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// The row that is drawn as number `at`, counted from 0, under `seed`; [`wait`](Self::wait) has said that it can be.
    fn draw(&self, seed: u64, at: u64) -> u64 {
        let n = self.len();
        Permutation::new(n, seed).at(at / n, at % n)
    }

    /// Rows drawn from each named source before draw number `at`; empty where there is one source.
    fn ledger(&self, at: u64) -> Vec<(String, u64)> {
        let _ = at;
        Vec::new()
    }

    /// Changes whenever a row could change, the seed aside.
    fn fingerprint(&self) -> String;

    /// Changes whenever one of the first `draws` rows drawn could change, the seed aside; the same whether all of the data
    /// are there or not.
    fn fingerprint_of(&self, draws: u64) -> String {
        let _ = draws;
        self.fingerprint()
    }

    /// What there is to learn from, in a few words.
    fn describe(&self) -> String;
}
