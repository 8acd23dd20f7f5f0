//! Several sources in fixed shares.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::permutation::{Permutation, mix};
use super::rows::RowSource;
use crate::TrainError;
use crate::recipe::hex;

/// Rows after which the shares are exact.
const BLOCK: u64 = 4096;

/// Rows of several sources, each in its share of the tokens: of every 4096 rows, a source of share s has 4096 s, rounded,
/// at places that are the same in every 4096. Each source goes through epochs of its own, in an order of its own.
///
/// Which row is drawn as number n is a function of n, so a run resumes from its cursor alone.
#[derive(Debug)]
pub struct Mixture {
    sources: Vec<Member>,
    /// Of each place in a block: its source, and how many places of that source are before it.
    places: Vec<(usize, u64)>,
}

#[derive(Debug)]
struct Member {
    name: String,
    rows: Arc<dyn RowSource>,
    /// Rows of every block.
    quota: u64,
}

/// Of a row's number, the bits that are its number in its source; those above are the number of the source. So the numbers
/// do not depend on how many rows a source has, which may not be known yet.
const ROW_BITS: u32 = 48;

impl Mixture {
    /// Sources with names and weights, which need not add up to 1. There is at least one; each has rows of one length.
    pub fn new(sources: Vec<(String, Arc<dyn RowSource>, f64)>) -> Mixture {
        let total: f64 = sources.iter().map(|(_, _, weight)| weight).sum();
        let quotas = quotas(&sources.iter().map(|(_, _, weight)| weight / total).collect::<Vec<_>>());
        let member = |((name, rows, _), quota)| Member { name, rows, quota };
        let members: Vec<Member> = sources.into_iter().zip(quotas).map(member).collect();
        // The sources' places side by side, then shuffled: the same for every seed, so that a change of the seed changes
        // which rows are drawn and not the rhythm of the sources.
        let order = Permutation::new(BLOCK, 0);
        let bounds: Vec<u64> = members
            .iter()
            .scan(0, |end, member| {
                *end += member.quota;
                Some(*end)
            })
            .collect();
        let mut before = vec![0; members.len()];
        let place = |at| {
            let slot = order.at(0, at);
            let source = bounds.iter().position(|end| slot < *end).unwrap_or(0);
            before[source] += 1;
            (source, before[source] - 1)
        };
        let places = (0..BLOCK).map(place).collect();
        Mixture { sources: members, places }
    }
}

/// Whole places of a block for shares that add up to 1: rounded down, at least one each, what is left to the largest
/// remainders.
fn quotas(shares: &[f64]) -> Vec<u64> {
    let exact: Vec<f64> = shares.iter().map(|share| share * BLOCK as f64).collect();
    let mut quotas: Vec<u64> = exact.iter().map(|places| (*places as u64).max(1)).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
    for at in order.iter().cycle().take(BLOCK as usize) {
        if quotas.iter().sum::<u64>() >= BLOCK {
            break;
        }
        quotas[*at] += 1;
    }
    // Sources that got a place though their share is smaller take it from the largest.
    while quotas.iter().sum::<u64>() > BLOCK {
        if let Some(largest) = quotas.iter_mut().max() {
            *largest -= 1;
        }
    }
    quotas
}

impl RowSource for Mixture {
    fn len(&self) -> u64 {
        self.sources.iter().map(|source| source.rows.len()).sum()
    }

    fn seq_len(&self) -> usize {
        self.sources[0].rows.seq_len()
    }

    fn number(&self, nth: u64) -> u64 {
        let mut before = 0;
        for (at, source) in self.sources.iter().enumerate() {
            let rows = source.rows.len();
            if nth < before + rows {
                return numbered(at, source.rows.number(nth - before));
            }
            before += rows;
        }
        unreachable!("row {nth} of {before}")
    }

    fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>) {
        let (source, row) = self.member(index);
        source.rows.read(row, ids, labels);
    }

    fn starts(&self, index: u64) -> Option<Vec<usize>> {
        let (source, row) = self.member(index);
        source.rows.starts(row)
    }

    fn wait(&self, draws: u64, patience: Duration) -> Result<bool, TrainError> {
        let begun = Instant::now();
        for (source, draws) in self.sources.iter().zip(self.counts(draws)) {
            // Of every source the first shard is waited for, drawn from or not: who has no data at all is to know at once.
            if !source.rows.wait(draws, patience.saturating_sub(begun.elapsed()))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn notes(&self) -> Vec<String> {
        self.sources.iter().flat_map(|source| source.rows.notes()).collect()
    }

    fn draw(&self, seed: u64, at: u64) -> u64 {
        let (source, before) = self.places[(at % BLOCK) as usize];
        let member = &self.sources[source];
        let nth = at / BLOCK * member.quota + before;
        numbered(source, member.rows.draw(mix(seed ^ mix(source as u64)), nth))
    }

    fn ledger(&self, at: u64) -> Vec<(String, u64)> {
        self.sources.iter().map(|source| source.name.clone()).zip(self.counts(at)).collect()
    }

    fn fingerprint(&self) -> String {
        self.hashed(self.sources.iter().map(|source| source.rows.fingerprint()))
    }

    fn fingerprint_of(&self, draws: u64) -> String {
        let drawn = self.sources.iter().zip(self.counts(draws));
        self.hashed(drawn.map(|(source, draws)| source.rows.fingerprint_of(draws)))
    }

    fn describe(&self) -> String {
        let share = |source: &Member| {
            let percent = 100.0 * source.quota as f64 / BLOCK as f64;
            format!("{} ({percent:.1} %): {}", source.name, source.rows.describe())
        };
        self.sources.iter().map(share).collect::<Vec<_>>().join("; ")
    }
}

fn numbered(source: usize, row: u64) -> u64 {
    (source as u64) << ROW_BITS | row
}

impl Mixture {
    /// The source of a row, and the row's number in it.
    fn member(&self, index: u64) -> (&Member, u64) {
        (&self.sources[(index >> ROW_BITS) as usize], index & ((1 << ROW_BITS) - 1))
    }

    /// How many of the first `draws` rows are of each source.
    fn counts(&self, draws: u64) -> Vec<u64> {
        let mut counts: Vec<u64> = self.sources.iter().map(|source| draws / BLOCK * source.quota).collect();
        for (source, _) in &self.places[..(draws % BLOCK) as usize] {
            counts[*source] += 1;
        }
        counts
    }

    fn hashed(&self, fingerprints: impl Iterator<Item = String>) -> String {
        let mut hash = Sha256::new();
        for (source, fingerprint) in self.sources.iter().zip(fingerprints) {
            hash.update(fingerprint);
            hash.update(source.quota.to_le_bytes());
        }
        hex(&hash.finalize()[..8])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_add_up() {
        assert_eq!(quotas(&[0.5, 0.25, 0.25]), [2048, 1024, 1024]);
        assert_eq!(quotas(&[1.0]), [4096]);
        let thirds = quotas(&[1.0 / 3.0; 3]);
        assert_eq!(thirds.iter().sum::<u64>(), BLOCK);
        assert!(thirds.iter().all(|quota| (1365..=1366).contains(quota)));
        assert_eq!(quotas(&[1e-9, 1.0 - 1e-9]), [1, 4095]);
    }

    #[derive(Debug)]
    struct Numbers(u64);

    impl RowSource for Numbers {
        fn len(&self) -> u64 {
            self.0
        }
        fn seq_len(&self) -> usize {
            1
        }
        fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>) {
            ids.push(index as i32);
            labels.push(self.0 as i32);
        }
        fn fingerprint(&self) -> String {
            self.0.to_string()
        }
        fn describe(&self) -> String {
            String::new()
        }
    }

    #[test]
    fn draws_keep_the_shares_and_every_source_its_epochs() {
        let source = |n| -> Arc<dyn RowSource> { Arc::new(Numbers(n)) };
        let mixture = Mixture::new(vec![("a".into(), source(10), 3.0), ("b".into(), source(500), 1.0)]);
        let mut drawn = [Vec::new(), Vec::new()];
        let total = 2 * BLOCK + 100;
        for at in 0..total {
            let (mut ids, mut labels) = (Vec::new(), Vec::new());
            mixture.read(mixture.draw(7, at), &mut ids, &mut labels);
            drawn[usize::from(labels[0] == 500)].push(ids[0]);
            let ledger: Vec<u64> = mixture.ledger(at + 1).into_iter().map(|(_, rows)| rows).collect();
            assert_eq!(ledger, [drawn[0].len() as u64, drawn[1].len() as u64]);
        }
        let share = drawn[0].len() as f64 / total as f64;
        assert!((share - 0.75).abs() < 0.005, "{share}");
        // In any window of a hundred draws the shares are near, too: the sources are not one after the other.
        for (source, n) in [(0, 10), (1, 500)] {
            for epoch in drawn[source].chunks_exact(n) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..n as i32).collect::<Vec<_>>(), "an epoch of a source has each row once");
            }
        }
        let first: Vec<u64> = (0..100).map(|at| mixture.draw(7, at)).collect();
        assert!((60..90).contains(&first.iter().filter(|row| **row < 10).count()), "{first:?}");
        assert_ne!(mixture.draw(8, 0), mixture.draw(7, 0));
        // The rows one after the other, as an evaluation takes them.
        let row = |nth| {
            let (mut ids, mut labels) = (Vec::new(), Vec::new());
            mixture.read(mixture.number(nth), &mut ids, &mut labels);
            (labels[0], ids[0])
        };
        assert_eq!([row(0), row(9), row(10), row(509)], [(10, 0), (10, 9), (500, 0), (500, 499)]);
    }
}
