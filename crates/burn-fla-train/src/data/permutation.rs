//! A shuffle that is a function: element i of epoch e under a seed, in constant time and memory.

/// A bijection of `0..n` for every (seed, epoch): a Feistel network over the next even power of two, walked until
/// the image falls inside (fewer than four rounds of walking on average).
///
/// A resumed run needs only its cursor: nothing was consumed, no buffer is lost.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    seed: u64,
}

/// Rounds of the network; four make a pseudo-random permutation, two more cost nothing here.
const ROUNDS: u64 = 6;

impl Permutation {
    /// The permutations of `0..n` under `seed`.
    pub fn new(n: u64, seed: u64) -> Self {
        Permutation { n, seed }
    }

    /// The number of elements.
    pub fn len(&self) -> u64 {
        self.n
    }

    /// Whether there is nothing to permute.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Where `index` goes in `epoch`.
    ///
    /// # Panics
    /// If `index` is not below [`Permutation::len`].
    pub fn at(&self, epoch: u64, index: u64) -> u64 {
        assert!(index < self.n, "index {index} of a permutation of {}", self.n);
        let bits = 64 - (self.n - 1).leading_zeros();
        let half = bits.div_ceil(2).max(1);
        let mask = (1u64 << half) - 1;
        let key = mix(self.seed ^ mix(epoch));
        let mut x = index;
        loop {
            let (mut left, mut right) = (x >> half, x & mask);
            for round in 0..ROUNDS {
                let next = left ^ (mix(key ^ mix(right ^ (round << 48))) & mask);
                (left, right) = (right, next);
            }
            x = left << half | right;
            if x < self.n {
                return x;
            }
        }
    }
}

/// SplitMix64's finaliser: every input bit changes half of the output bits.
pub(super) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_bijection_for_any_size() {
        for n in [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097] {
            let permutation = Permutation::new(n, 42);
            for epoch in 0..3 {
                let mut seen = vec![false; n as usize];
                for index in 0..n {
                    let to = permutation.at(epoch, index) as usize;
                    assert!(!seen[to], "n = {n}, epoch {epoch}: {to} twice");
                    seen[to] = true;
                }
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, epoch| -> Vec<u64> {
            let permutation = Permutation::new(1000, seed);
            (0..1000).map(|index| permutation.at(epoch, index)).collect()
        };
        let fixed = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(x, y)| x == y).count();
        let identity: Vec<u64> = (0..1000).collect();
        assert!(fixed(&order(1, 0), &identity) < 20);
        assert!(fixed(&order(1, 0), &order(1, 1)) < 20);
        assert!(fixed(&order(1, 0), &order(2, 0)) < 20);
        assert_eq!(order(7, 3), order(7, 3));
    }

    #[test]
    fn neighbours_are_spread() {
        let permutation = Permutation::new(10_000, 3);
        let close = (1..10_000).filter(|&i| permutation.at(0, i).abs_diff(permutation.at(0, i - 1)) < 100).count();
        // By chance two of 10,000 lie within 100 of each other in about 2 % of the cases.
        assert!((100..350).contains(&close), "{close}");
    }
}
