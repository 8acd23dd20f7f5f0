//! Multi-query associative recall: rows that are a function of (seed, number), without a file.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::RowSource;
use super::rows::NOT_ASKED;
use crate::recipe::{Filler, MqarSection, hex};

/// Changes when the same section would give other rows.
const VERSION: u32 = 1;

/// Which examples of a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Those to learn from.
    Train,
    /// Those to be judged by; none of them is one to learn from.
    Validation,
}

/// Multi-query associative recall (Zoology, arXiv:2312.04927; Based, arXiv:2402.18668).
///
/// With vocabulary V, n pairs and T tokens, an example is
///
/// ```text
/// input  k₁ v₁ k₂ v₂ … kₙ vₙ │ · · k₂ · · · kₙ · k₁ · …
/// label  −  −  −  −  … −  −  │ − − v₂ − − − vₙ − v₁ − …
/// ```
///
/// - the keys are n different tokens of 1..V/2, the values n different tokens of V/2..V, and both are drawn anew, so
///   that nothing is to be learned but to look up;
/// - of the S = ⌊(T − 2n)/2⌋ places that follow, every second position, n are drawn one after the other without
///   replacement, place i = 1..S with a probability ∝ i^(a−1), and hold the keys as queries;
/// - at a query the value of its key is the label; no other position has one;
/// - every other position holds a filler, a random token of the whole vocabulary or token 0. A random one may be a key:
///   it asks for nothing, and what stands behind it is no value.
#[derive(Clone, Debug)]
pub struct Mqar {
    section: MqarSection,
    seq_len: usize,
    split: Split,
    /// The places of a row: −ln of a uniform draw over these is the time at which each is taken.
    weights: Vec<f64>,
}

impl Mqar {
    /// The examples of a section that has been resolved: 4n ≤ `seq_len` and n < V/2.
    pub fn new(section: &MqarSection, seq_len: usize, split: Split) -> Mqar {
        let places = seq_len.saturating_sub(2 * section.num_pairs) / 2;
        let weights = (1..=places).map(|place| (place as f64).powf(section.power_a - 1.0)).collect();
        Mqar { section: section.clone(), seq_len, split, weights }
    }

    /// Each example has a stream of random numbers of its own.
    fn stream(&self, index: u64) -> Draws {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.section.seed.to_le_bytes());
        key[8..16].copy_from_slice(&index.to_le_bytes());
        key[16] = match self.split {
            Split::Train => 0,
            Split::Validation => 1,
        };
        Draws(ChaCha8Rng::from_seed(key))
    }

    /// `num_pairs` places, in the order in which they were drawn.
    ///
    /// Drawing without replacement in proportion to weights is a race of exponential clocks: the i-th rings at
    /// Exp(1)/wᵢ, and the order of the rings is that of the draws.
    fn places(&self, draws: &mut Draws) -> Vec<usize> {
        let mut rings: Vec<(f64, usize)> =
            self.weights.iter().enumerate().map(|(place, weight)| (-draws.uniform().ln() / weight, place)).collect();
        rings.sort_by(|a, b| a.0.total_cmp(&b.0));
        rings.into_iter().take(self.section.num_pairs).map(|(_, place)| place).collect()
    }
}

impl RowSource for Mqar {
    fn len(&self) -> u64 {
        match (self.split, self.section.num_examples) {
            (Split::Train, Some(examples)) => examples,
            _ => u64::MAX,
        }
    }

    fn seq_len(&self) -> usize {
        self.seq_len
    }

    fn read(&self, index: u64, ids: &mut Vec<i32>, labels: &mut Vec<i32>) {
        let (pairs, vocabulary) = (self.section.num_pairs, self.section.vocab_size);
        let mut draws = self.stream(index);
        let keys = draws.distinct(1, vocabulary / 2, pairs);
        let values = draws.distinct(vocabulary / 2, vocabulary, pairs);
        let places = self.places(&mut draws);
        let (start, base) = (ids.len(), 2 * pairs);
        ids.extend(keys.iter().zip(&values).flat_map(|(key, value)| [*key, *value]));
        match self.section.filler {
            Filler::Zero => ids.resize(start + self.seq_len, 0),
            Filler::Random => ids.extend((base..self.seq_len).map(|_| draws.below(vocabulary) as i32)),
        }
        labels.resize(start + self.seq_len, NOT_ASKED);
        for ((key, value), place) in keys.iter().zip(&values).zip(places) {
            let at = start + base + 2 * place;
            ids[at] = *key;
            labels[at] = *value;
        }
    }

    fn fingerprint(&self) -> String {
        let MqarSection { seed: _, vocab_size, num_pairs, power_a, filler, num_examples } = &self.section;
        let rows = format!("mqar {VERSION} {vocab_size} {num_pairs} {power_a} {filler:?} {num_examples:?}");
        hex(&Sha256::digest(rows)[..8])
    }

    fn describe(&self) -> String {
        let MqarSection { vocab_size, num_pairs, num_examples, .. } = &self.section;
        let examples = num_examples.map_or("new ones in every step".to_string(), |n| format!("{n} of them"));
        let tokens = self.seq_len;
        format!("recall of {num_pairs} pairs in {tokens} tokens over a vocabulary of {vocab_size}, {examples}")
    }
}

/// A stream of random numbers.
struct Draws(ChaCha8Rng);

impl Draws {
    /// Uniform on 0..n (to 2⁻³², for n is below 2³²).
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform on (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// `count` different tokens of `from..to`, every sequence of them equally likely.
    fn distinct(&mut self, from: usize, to: usize, count: usize) -> Vec<i32> {
        let mut pool: Vec<i32> = (from as i32..to as i32).collect();
        for i in 0..count {
            let j = i + self.below(pool.len() - i);
            pool.swap(i, j);
        }
        pool.truncate(count);
        pool
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::data::{Loader, Rows, spread};

    fn section(filler: Filler) -> MqarSection {
        MqarSection { seed: 3, vocab_size: 64, num_pairs: 5, power_a: 0.01, filler, num_examples: None }
    }

    fn examples(mqar: &Mqar, count: u64) -> Vec<Rows> {
        let row = |index| {
            let mut rows = Rows { rows: 1, seq_len: mqar.seq_len(), ids: Vec::new(), labels: Vec::new(), starts: None };
            mqar.read(index, &mut rows.ids, &mut rows.labels);
            rows
        };
        (0..count).map(row).collect()
    }

    #[test]
    fn pairs_then_queries_each_with_its_answer() {
        for (filler, seq_len) in [(Filler::Random, 41), (Filler::Zero, 40), (Filler::Random, 20)] {
            let mqar = Mqar::new(&section(filler), seq_len, Split::Train);
            for row in examples(&mqar, 200) {
                assert_eq!((row.ids.len(), row.labels.len()), (seq_len, seq_len));
                assert!(row.ids.iter().all(|id| (0..64).contains(id)));
                let (pairs, rest) = row.ids.split_at(10);
                let keys: Vec<i32> = pairs.iter().step_by(2).copied().collect();
                let values: Vec<i32> = pairs.iter().skip(1).step_by(2).copied().collect();
                assert!(keys.iter().all(|key| (1..32).contains(key)), "{keys:?}");
                assert!(values.iter().all(|value| (32..64).contains(value)), "{values:?}");
                assert_eq!(keys.iter().collect::<HashSet<_>>().len(), 5);
                assert_eq!(values.iter().collect::<HashSet<_>>().len(), 5);
                assert!(row.labels[..10].iter().all(|label| *label == -100));
                let mut asked = Vec::new();
                for (at, (id, label)) in rest.iter().zip(&row.labels[10..]).enumerate() {
                    if *label == -100 {
                        assert!(filler == Filler::Random || *id == 0);
                        continue;
                    }
                    assert_eq!(at % 2, 0, "a query at every second position");
                    let pair = keys.iter().position(|key| key == id).expect("a key that was given");
                    assert_eq!(*label, values[pair]);
                    asked.push(*id);
                }
                assert_eq!(asked.len(), 5);
                assert_eq!(asked.iter().collect::<HashSet<_>>().len(), 5, "each key once");
            }
        }
    }

    #[test]
    fn keys_values_and_fillers_are_uniform() {
        let mqar = Mqar::new(&section(Filler::Random), 40, Split::Train);
        let (mut first_key, mut first_value, mut filler) = ([0u32; 64], [0u32; 64], [0u32; 64]);
        for row in examples(&mqar, 31_000) {
            first_key[row.ids[0] as usize] += 1;
            first_value[row.ids[1] as usize] += 1;
            filler[row.ids[11] as usize] += 1;
        }
        // Expected about 1000, 969 and 484 a token; five standard deviations.
        assert!(first_key[1..32].iter().all(|n| n.abs_diff(1000) < 160), "{first_key:?}");
        assert!(first_value[32..].iter().all(|n| n.abs_diff(969) < 160), "{first_value:?}");
        assert!(filler.iter().all(|n| n.abs_diff(484) < 110), "{filler:?}");
    }

    #[test]
    fn queries_follow_the_power_law() {
        // With one pair the place of its query has the stated probabilities themselves.
        for power_a in [0.01, 1.0] {
            let one = MqarSection { num_pairs: 1, power_a, ..section(Filler::Zero) };
            let mqar = Mqar::new(&one, 22, Split::Train);
            let mut count = [0f64; 10];
            let examples = examples(&mqar, 20_000);
            for row in &examples {
                let at = row.labels.iter().position(|label| *label >= 0).unwrap();
                count[(at - 2) / 2] += 1.0;
            }
            let weight = |place: usize| ((place + 1) as f64).powf(power_a - 1.0);
            let total: f64 = (0..10).map(weight).sum();
            for (place, count) in count.iter().enumerate() {
                let expected = examples.len() as f64 * weight(place) / total;
                assert!((count - expected).abs() < 5.0 * expected.sqrt(), "a {power_a}, place {place}: {count}");
            }
        }
    }

    #[test]
    fn a_row_is_a_function_of_seed_split_and_number() {
        let train = Mqar::new(&section(Filler::Random), 40, Split::Train);
        let again = Mqar::new(&section(Filler::Random), 40, Split::Train);
        assert_eq!(examples(&train, 20), examples(&again, 20));
        let other = Mqar::new(&MqarSection { seed: 4, ..section(Filler::Random) }, 40, Split::Train);
        let held_out = Mqar::new(&section(Filler::Random), 40, Split::Validation);
        let all: Vec<Vec<i32>> =
            [&train, &other, &held_out].iter().flat_map(|mqar| examples(mqar, 1000)).map(|row| row.ids).collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 3000, "no row twice");
        assert_eq!(train.fingerprint(), other.fingerprint(), "the seed is compared by itself");
        for change in [
            MqarSection { vocab_size: 66, ..section(Filler::Random) },
            MqarSection { num_pairs: 4, ..section(Filler::Random) },
            MqarSection { power_a: 0.02, ..section(Filler::Random) },
            MqarSection { num_examples: Some(9), ..section(Filler::Random) },
            section(Filler::Zero),
        ] {
            assert_ne!(Mqar::new(&change, 40, Split::Train).fingerprint(), train.fingerprint());
        }
    }

    #[test]
    fn the_loader_goes_on_from_its_cursor_and_an_epoch_has_each_example_once() {
        let few = MqarSection { num_examples: Some(12), ..section(Filler::Random) };
        for section in [section(Filler::Random), few] {
            let source: Arc<dyn RowSource> = Arc::new(Mqar::new(&section, 40, Split::Train));
            let mut whole = Loader::shuffled(source.clone(), 7, 0);
            let rows: Vec<Rows> = (0..6).map(|_| whole.next_rows(4)).collect();
            let mut resumed = Loader::shuffled(source, 7, 8);
            assert_eq!(resumed.next_rows(4), rows[2]);
            assert_eq!(resumed.next_rows(12), Rows::concat(&rows[3..]));
            assert_eq!(resumed.cursor(), whole.cursor());
            let ids = |rows: &[Rows]| Rows::concat(rows).ids.chunks(40).map(<[i32]>::to_vec).collect::<HashSet<_>>();
            let epochs = (ids(&rows[..3]), ids(&rows[3..]));
            assert_eq!((epochs.0.len(), epochs.1.len()), (12, 12));
            assert_eq!(epochs.0 == epochs.1, section.num_examples.is_some());
        }
        let held_out = Mqar::new(&section(Filler::Random), 40, Split::Validation);
        let rows = spread(&held_out, 50);
        assert_eq!(rows.len(), 50);
        assert_eq!(rows.iter().map(Rows::tokens).sum::<u64>(), 250);
        assert_eq!(rows, spread(&held_out, 50));
    }
}
