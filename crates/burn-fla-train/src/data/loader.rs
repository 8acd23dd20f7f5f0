//! Rows in a shuffled order, addressed by one integer.

use std::sync::Arc;
use std::time::Duration;

use super::rows::{RowSource, Rows};
use crate::TrainError;

/// Draws rows in an order that is shuffled anew in every epoch, addressed by one integer.
#[derive(Clone, Debug)]
pub struct Loader {
    source: Arc<dyn RowSource>,
    seed: u64,
    cursor: u64,
}

impl Loader {
    /// Shuffled by `seed`; `cursor` is the number of rows already drawn.
    pub fn shuffled(source: Arc<dyn RowSource>, seed: u64, cursor: u64) -> Loader {
        Loader { source, seed, cursor }
    }

    /// Rows drawn since the start of the run.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Tokens drawn from each source so far, where there are several.
    pub fn ledger(&self) -> Vec<(String, u64)> {
        let tokens = self.source.seq_len() as u64;
        self.source.ledger(self.cursor).into_iter().map(|(name, rows)| (name, rows * tokens)).collect()
    }

    /// Waits, for at most `patience`, until the next `count` rows are there; says whether they are.
    ///
    /// # Errors
    /// What keeps the data from being read.
    pub fn wait(&self, count: usize, patience: Duration) -> Result<bool, TrainError> {
        self.source.wait(self.cursor + count as u64, patience)
    }

    /// What there is to tell of the data since the last call.
    pub fn notes(&self) -> Vec<String> {
        self.source.notes()
    }

    /// Identifies the data that the rows drawn so far are of.
    pub fn fingerprint(&self) -> String {
        self.source.fingerprint_of(self.cursor)
    }

    /// The next `count` rows. Of data that are still being read [`wait`](Self::wait) must have said that they are there.
    pub fn next_rows(&mut self, count: usize) -> Rows {
        let numbers = (self.cursor..).take(count).map(|at| self.source.draw(self.seed, at));
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
    (0..count).map(|index| read(source, std::iter::once(source.number(at(index))))).collect()
}

/// These rows, one below the other.
pub(super) fn read(source: &dyn RowSource, numbers: impl Iterator<Item = u64>) -> Rows {
    let mut rows = Rows { rows: 0, seq_len: source.seq_len(), ids: Vec::new(), labels: Vec::new(), starts: None };
    for number in numbers {
        let first = rows.ids.len();
        if let Some(inside) = source.starts(number) {
            let starts = rows.starts.get_or_insert_default();
            starts.push(first);
            starts.extend(inside.into_iter().map(|at| first + at));
        }
        source.read(number, &mut rows.ids, &mut rows.labels);
        rows.rows += 1;
    }
    rows
}
