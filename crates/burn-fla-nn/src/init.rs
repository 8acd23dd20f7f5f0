//! How parameters start.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Numbers that one thread draws at a time; even, since they are drawn in pairs.
const RUN: usize = 1 << 16;
/// Words of 32 bits that two uniform draws take from the stream.
const PAIR_WORDS: usize = 4;
/// Numbers of a vector that one thread changes at a time.
const SLICE: usize = 64;
/// Multiply-adds below which threads cost more than they save.
const WORTH_THREADS: usize = 1 << 16;

/// How a parameter starts. The fans of a matrix `[out, in]` are its sizes, as in PyTorch.
#[derive(Clone, Copy)]
pub enum Init<'a> {
    /// N(0, σ²) with the model's `initializer_range` as σ.
    Normal,
    /// N(0, σ²) with this σ.
    NormalOf(f64),
    /// The same number everywhere.
    Constant(f64),
    /// Evenly from \[−bound, bound).
    Uniform(f64),
    /// Evenly from ±gain·√(6 / (in + out)) (Glorot and Bengio 2010).
    XavierUniform(f64),
    /// A matrix with orthonormal rows or columns, whichever are fewer, times this gain (Saxe et al. 2013).
    Orthogonal(f64),
    /// The number for each element, counted row-major.
    Values(&'a dyn Fn(usize) -> f64),
    /// Each element from draws of its own.
    Drawn(&'a dyn Fn(&mut Draws) -> f64),
}

/// The random numbers of one parameter: a ChaCha stream that depends on the seed and on the parameter's path alone.
#[derive(Debug)]
pub struct Draws(ChaCha8Rng);

impl Draws {
    /// The stream of (`seed`, `path`).
    pub fn new(seed: u64, path: &str) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&fnv1a(0xcbf2_9ce4_8422_2325, path).to_le_bytes());
        // A second hash from another start, so that two paths would have to collide twice to share a stream.
        key[16..24].copy_from_slice(&fnv1a(0x9e37_79b9_7f4a_7c15, path).to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Evenly from (0, 1], with 53 random bits: its logarithm is finite.
    pub fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// `count` numbers, two of each pair of uniform draws. Threads draw from places of the one stream that they count out, so
    /// that the numbers do not depend on how many there are.
    fn pairs<T: Send>(&mut self, count: usize, pair: impl Fn(f64, f64) -> [T; 2] + Sync) -> Vec<T> {
        let start = self.0.get_word_pos();
        let run = |at: usize| {
            let mut draws = Self(self.0.clone());
            draws.0.set_word_pos(start + (at * RUN / 2 * PAIR_WORDS) as u128);
            let pairs = (count - at * RUN).min(RUN).div_ceil(2);
            (0..pairs).flat_map(|_| pair(draws.uniform(), draws.uniform())).collect()
        };
        let runs: Vec<Vec<T>> = (0..count.div_ceil(RUN)).into_par_iter().map(run).collect();
        self.0.set_word_pos(start + (count.div_ceil(2) * PAIR_WORDS) as u128);
        let mut values = Vec::with_capacity(count + 1);
        runs.into_iter().for_each(|mut run| values.append(&mut run));
        values.truncate(count);
        values
    }

    /// `count` draws of N(0, std²), by the Box–Muller transform.
    fn normals<T: Send>(&mut self, count: usize, std: f64, number: impl Fn(f64) -> T + Sync) -> Vec<T> {
        self.pairs(count, |first, second| {
            let radius = std * (-2.0 * first.ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * second).sin_cos();
            [number(radius * cos), number(radius * sin)]
        })
    }
}

fn fnv1a(start: u64, text: &str) -> u64 {
    text.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

impl Init<'_> {
    /// The numbers of a parameter; `std` is the model's `initializer_range`.
    pub(crate) fn draw(&self, draws: &mut Draws, shape: &[usize], std: f64) -> Vec<f32> {
        let count = shape.iter().product();
        // The taps of a convolution [channels, 1, W] have the fan of one channel.
        let rows = shape.first().copied().unwrap_or(1);
        let columns = count / rows.max(1);
        let mut even = |bound: f64| {
            let number = |draw: f64| (bound * (2.0 * draw - 1.0)) as f32;
            draws.pairs(count, |first, second| [first, second].map(number))
        };
        match *self {
            Self::Normal => draws.normals(count, std, narrow),
            Self::NormalOf(std) => draws.normals(count, std, narrow),
            Self::Constant(value) => vec![value as f32; count],
            Self::Uniform(bound) => even(bound),
            Self::XavierUniform(gain) => even(gain * (6.0 / (rows + columns) as f64).sqrt()),
            Self::Orthogonal(gain) => {
                let short = rows.min(columns);
                let mut vectors = draws.normals(count, 1.0, |x| x);
                orthonormalize(&mut vectors, short, rows.max(columns));
                let at = |i: usize| {
                    let (row, column) = (i / columns, i % columns);
                    let index = if rows <= columns { i } else { column * rows + row };
                    (gain * vectors[index]) as f32
                };
                (0..count).map(at).collect()
            }
            Self::Values(of) => (0..count).map(|i| of(i) as f32).collect(),
            Self::Drawn(of) => (0..count).map(|_| of(draws) as f32).collect(),
        }
    }
}

fn narrow(value: f64) -> f32 {
    value as f32
}

/// Makes the `rows` vectors of `width` numbers orthonormal, by Gram–Schmidt, each one twice: once leaves the rounding of
/// the first differences in.
fn orthonormalize(vectors: &mut [f64], rows: usize, width: usize) {
    for i in 0..rows {
        let (done, rest) = vectors.split_at_mut(i * width);
        let vector = &mut rest[..width];
        let threads = i * width >= WORTH_THREADS;
        for _ in 0..2 {
            let dot = |other: &[f64]| -> f64 { other.iter().zip(vector.iter()).map(|(a, b)| a * b).sum() };
            let dots: Vec<f64> = match threads {
                true => done.par_chunks_exact(width).map(dot).collect(),
                false => done.chunks_exact(width).map(dot).collect(),
            };
            let subtract = |(first, part): (usize, &mut [f64])| {
                for (other, dot) in done.chunks_exact(width).zip(&dots) {
                    part.iter_mut().zip(&other[first * SLICE..]).for_each(|(x, y)| *x -= dot * y);
                }
            };
            match threads {
                true => vector.par_chunks_mut(SLICE).enumerate().for_each(subtract),
                false => vector.chunks_mut(SLICE).enumerate().for_each(subtract),
            }
        }
        let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
        vector.iter_mut().for_each(|x| *x /= norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(seed: u64, path: &str, std: f64, count: usize) -> Vec<f32> {
        Init::NormalOf(std).draw(&mut Draws::new(seed, path), &[count], 1.0)
    }

    #[test]
    fn draws_depend_on_seed_and_path_alone() {
        assert_eq!(normal(1, "a", 0.02, 7), normal(1, "a", 0.02, 7));
        assert_ne!(normal(1, "a", 0.02, 7), normal(1, "b", 0.02, 7));
        assert_ne!(normal(1, "a", 0.02, 7), normal(2, "a", 0.02, 7));
        assert_eq!(normal(1, "a", 0.02, 4), normal(1, "a", 0.02, 8)[..4]);
    }

    #[test]
    fn threads_draw_what_one_would() {
        let mut one = Draws::new(5, "a");
        let mut expected = Vec::new();
        while expected.len() < 2 * RUN + 7 {
            let radius = 0.5 * (-2.0 * one.uniform().ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * one.uniform()).sin_cos();
            expected.extend([(radius * cos) as f32, (radius * sin) as f32]);
        }
        let mut draws = Draws::new(5, "a");
        assert_eq!(Init::NormalOf(0.5).draw(&mut draws, &[2 * RUN + 7], 1.0), expected[..2 * RUN + 7]);
        assert_eq!(draws.uniform(), one.uniform(), "the stream goes on behind what was drawn");

        let mut one = Draws::new(6, "a");
        let expected: Vec<f32> = (0..2 * RUN + 7).map(|_| (0.5 * (2.0 * one.uniform() - 1.0)) as f32).collect();
        assert_eq!(Init::Uniform(0.5).draw(&mut Draws::new(6, "a"), &[2 * RUN + 7], 1.0), expected);
    }

    #[test]
    fn draws_are_normal() {
        let draws = normal(3, "x", 0.5, 100_001);
        let mean = draws.iter().map(|x| f64::from(*x)).sum::<f64>() / draws.len() as f64;
        let moment = |p: i32| draws.iter().map(|x| f64::from(*x).powi(p)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((moment(2).sqrt() - 0.5).abs() < 0.01);
        // Kurtosis of a normal distribution is 3.
        assert!((moment(4) / moment(2).powi(2) - 3.0).abs() < 0.1);
    }

    #[test]
    fn even_draws_reach_their_bounds_and_no_further() {
        let draws = Init::XavierUniform(2.0).draw(&mut Draws::new(1, "x"), &[300, 100], 1.0);
        let bound = 2.0 * (6.0f64 / 400.0).sqrt() as f32;
        let largest = draws.iter().fold(0f32, |a, x| a.max(x.abs()));
        assert!(largest <= bound && largest > 0.999 * bound, "{largest} {bound}");
        let variance = draws.iter().map(|x| x * x).sum::<f32>() / draws.len() as f32;
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.03);
    }

    #[test]
    fn orthogonal_matrices_are() {
        // The last one is large enough for threads.
        for [rows, columns] in [[5, 9], [9, 5], [6, 6], [260, 300]] {
            let matrix = Init::Orthogonal(0.5).draw(&mut Draws::new(1, "x"), &[rows, columns], 1.0);
            let short = rows.min(columns);
            for i in 0..short {
                for j in 0..short {
                    let product = |k: usize| match rows <= columns {
                        true => matrix[i * columns + k] * matrix[j * columns + k],
                        false => matrix[k * columns + i] * matrix[k * columns + j],
                    };
                    let dot: f32 = (0..rows.max(columns)).map(product).sum();
                    let expected = if i == j { 0.25 } else { 0.0 };
                    assert!((dot - expected).abs() < 1e-6, "{rows} x {columns}: {i} {j} {dot}");
                }
            }
        }
    }
}
