//! Rows in a shuffled order, addressed by one integer.

use std::fmt::Debug;
use std::sync::Arc;

use super::cache::TokenStore;
use super::permutation::Permutation;

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
}

impl Rows {
    /// Rows `from..to` alone.
    pub fn part(&self, from: usize, to: usize) -> Rows {
        let (a, b) = (from * self.seq_len, to * self.seq_len);
        Rows {
            rows: to - from,
            seq_len: self.seq_len,
            ids: self.ids[a..b].to_vec(),
            labels: self.labels[a..b].to_vec(),
        }
    }

    /// Rows of one length after each other.
    pub fn concat(parts: &[Rows]) -> Rows {
        Rows {
            rows: parts.iter().map(|part| part.rows).sum(),
            seq_len: parts.first().map_or(0, |part| part.seq_len),
            ids: parts.iter().flat_map(|part| part.ids.iter().copied()).collect(),
            labels: parts.iter().flat_map(|part| part.labels.iter().copied()).collect(),
        }
    }

    /// The labels that count in the loss.
    pub fn tokens(&self) -> u64 {
        self.labels.iter().filter(|label| **label >= 0).count() as u64
    }
}

/// Rows by their number: what a [`Loader`] draws from.
pub trait RowSource: Debug + Send + Sync {
    /// Rows of an epoch.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of a row.
    fn seq_len(&self) -> usize;

    /// Appends row `index`, which is below [`len`](Self::len): `seq_len` ids, and as many labels.
    fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>);

    /// Changes whenever a row could change, the seed aside.
    fn fingerprint(&self) -> String;

    /// What there is to learn from, in a few words.
    fn describe(&self) -> String;
}

/// The windows of a token store: `seq_len + 1` tokens each, where one starts at the last token of the one before it, so
/// that an epoch reads every token once as a label. Documents are concatenated.
#[derive(Debug)]
pub struct Windows {
    store: TokenStore,
    seq_len: usize,
}

impl Windows {
    /// Windows of `seq_len` inputs; the store holds more tokens than that.
    pub fn new(store: TokenStore, seq_len: usize) -> Windows {
        Windows { store, seq_len }
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
        self.store.read(start + 1, self.seq_len, labels);
    }

    fn fingerprint(&self) -> String {
        self.store.fingerprint()
    }

    fn describe(&self) -> String {
        format!("{} training tokens", self.store.len())
    }
}

/// Draws rows in an order that is shuffled anew in every epoch, addressed by one integer.
#[derive(Clone, Debug)]
pub struct Loader {
    source: Arc<dyn RowSource>,
    order: Permutation,
    cursor: u64,
}

impl Loader {
    /// Shuffled by `seed`; `cursor` is the number of rows already drawn.
    pub fn shuffled(source: Arc<dyn RowSource>, seed: u64, cursor: u64) -> Loader {
        let order = Permutation::new(source.len(), seed);
        Loader { source, order, cursor }
    }

    /// Rows drawn since the start of the run.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// The next `count` rows.
    pub fn next_rows(&mut self, count: usize) -> Rows {
        let n = self.order.len();
        let numbers = (self.cursor..).take(count).map(|at| self.order.at(at / n, at % n));
        let rows = read(self.source.as_ref(), numbers);
        self.cursor += count as u64;
        rows
    }
}

/// At most `count` rows, spread evenly over the source, each alone.
pub fn spread(source: &dyn RowSource, count: u64) -> Vec<Rows> {
    let n = source.len();
    let count = count.min(n);
    let at = |index: u64| (u128::from(index) * u128::from(n) / u128::from(count)) as u64;
    (0..count).map(|index| read(source, std::iter::once(at(index)))).collect()
}

fn read(source: &dyn RowSource, numbers: impl Iterator<Item = u64>) -> Rows {
    let mut rows = Rows { rows: 0, seq_len: source.seq_len(), ids: Vec::new(), labels: Vec::new() };
    for number in numbers {
        source.read(number, &mut rows.ids, &mut rows.labels);
        rows.rows += 1;
    }
    rows
}
