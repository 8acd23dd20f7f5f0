//! Windows of the token store in shuffled order, addressed by one integer.

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
    /// `rows × seq_len` next tokens.
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

/// Draws windows of `seq_len + 1` tokens. Documents are concatenated; a window starts where the one before it in the
/// store ends, so an epoch reads every token once as a label.
#[derive(Clone, Debug)]
pub struct Loader {
    store: Arc<TokenStore>,
    seq_len: usize,
    order: Option<Permutation>,
    cursor: u64,
}

impl Loader {
    /// Shuffled by a permutation that is new in every epoch; `cursor` is the number of windows already drawn.
    pub fn shuffled(store: Arc<TokenStore>, seq_len: usize, seed: u64, cursor: u64) -> Loader {
        let order = Some(Permutation::new(windows(&store, seq_len), seed));
        Loader { store, seq_len, order, cursor }
    }

    /// The windows `index · n / count` for `index < count`: a fixed sample spread over the whole store.
    pub fn spread(store: Arc<TokenStore>, seq_len: usize, count: u64) -> Vec<Rows> {
        let n = windows(&store, seq_len);
        let count = count.min(n);
        let mut loader = Loader { store, seq_len, order: None, cursor: 0 };
        (0..count)
            .map(|index| {
                loader.cursor = (u128::from(index) * u128::from(n) / u128::from(count)) as u64;
                loader.next_rows(1)
            })
            .collect()
    }

    /// Windows drawn since the start of the run.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Windows of one epoch.
    pub fn windows(&self) -> u64 {
        windows(&self.store, self.seq_len)
    }

    /// The next `rows` windows.
    pub fn next_rows(&mut self, rows: usize) -> Rows {
        let mut out = Rows {
            rows,
            seq_len: self.seq_len,
            ids: Vec::with_capacity(rows * self.seq_len),
            labels: Vec::with_capacity(rows * self.seq_len),
        };
        let n = self.windows();
        let mut window = Vec::with_capacity(self.seq_len + 1);
        for _ in 0..rows {
            let (epoch, index) = (self.cursor / n, self.cursor % n);
            let index = self.order.map_or(index, |order| order.at(epoch, index));
            window.clear();
            self.store.read(index * self.seq_len as u64, self.seq_len + 1, &mut window);
            out.ids.extend_from_slice(&window[..self.seq_len]);
            out.labels.extend_from_slice(&window[1..]);
            self.cursor += 1;
        }
        out
    }
}

fn windows(store: &TokenStore, seq_len: usize) -> u64 {
    (store.len() - 1) / seq_len as u64
}
