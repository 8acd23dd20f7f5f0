//! Choosing a token from logits.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::NnError;

/// How a token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely tokens.
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together have this probability, the one that reaches it included.
    pub top_p: Option<f64>,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl SamplingConfig {
    /// The most likely token, always.
    pub const fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }
}

impl Default for SamplingConfig {
    /// The model's own distribution.
    fn default() -> Self {
        Self { temperature: 1.0, ..Self::greedy() }
    }
}

/// Chooses tokens by a [`SamplingConfig`]; the same seed and logits give the same tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplingConfig,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// A temperature below 0, a `top_k` of 0, a `top_p` outside (0, 1].
    pub fn new(config: &SamplingConfig) -> Result<Self, NnError> {
        let SamplingConfig { temperature, top_k, top_p, seed } = *config;
        if !temperature.is_finite() || temperature < 0.0 {
            return Err(NnError::argument("temperature", format!("{temperature} is not 0 or above")));
        }
        if top_k == Some(0) {
            return Err(NnError::argument("top_k", "0 tokens leave nothing to choose"));
        }
        if let Some(p) = top_p
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(NnError::argument("top_p", format!("{p} is not above 0 and at most 1")));
        }
        Ok(Self { config: config.clone(), rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token, given the logits of the whole vocabulary.
    ///
    /// # Errors
    /// Logits that are empty or not all numbers.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32, NnError> {
        let best = argmax(logits)?;
        if self.config.temperature == 0.0 {
            return Ok(best as u32);
        }
        let max = f64::from(logits[best]);
        let mut weights: Vec<(f64, usize)> = logits
            .iter()
            .enumerate()
            .map(|(i, z)| (((f64::from(*z) - max) / self.config.temperature).exp(), i))
            .collect();
        if self.config.top_k.is_some() || self.config.top_p.is_some() {
            // Most likely first; of equals the smaller id.
            weights.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            weights.truncate(self.config.top_k.unwrap_or(weights.len()).max(1));
            if let Some(p) = self.config.top_p {
                let total: f64 = weights.iter().map(|(w, _)| w).sum();
                let mut sum = 0.0;
                let kept = weights
                    .iter()
                    .position(|(w, _)| {
                        sum += w;
                        sum >= p * total
                    })
                    .map_or(weights.len(), |last| last + 1);
                weights.truncate(kept);
            }
        }
        let total: f64 = weights.iter().map(|(w, _)| w).sum();
        let mut left = total * (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        for (weight, token) in &weights {
            if left < *weight {
                return Ok(*token as u32);
            }
            left -= weight;
        }
        // Only rounding leads here.
        Ok(best as u32)
    }
}

/// The first of the largest logits.
fn argmax(logits: &[f32]) -> Result<usize, NnError> {
    let mut best: Option<usize> = None;
    for (i, z) in logits.iter().enumerate() {
        if z.is_nan() || *z == f32::INFINITY {
            return Err(NnError::argument("logits", format!("the model gave {z} for token {i}")));
        }
        if best.is_none_or(|b| *z > logits[b]) {
            best = Some(i);
        }
    }
    best.ok_or_else(|| NnError::argument("logits", "there are none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(config: SamplingConfig, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(&config).expect("a valid config");
        (0..count).map(|_| sampler.next(logits).expect("finite logits")).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(draw(SamplingConfig::greedy(), &[0.0, 3.0, 3.0, -1.0], 1), [1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let count = 40_000;
        let drawn = draw(SamplingConfig { seed: 7, ..Default::default() }, &logits, count);
        let total: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        for (i, z) in logits.iter().enumerate() {
            let seen = drawn.iter().filter(|t| **t as usize == i).count() as f64 / count as f64;
            let expected = f64::from(*z).exp() / total;
            assert!((seen - expected).abs() < 0.01, "{i}: {seen} {expected}");
        }
        assert_eq!(drawn, draw(SamplingConfig { seed: 7, ..Default::default() }, &logits, count));
        assert_ne!(drawn, draw(SamplingConfig { seed: 8, ..Default::default() }, &logits, count));
    }

    #[test]
    fn top_k_and_top_p_leave_the_likely_ones() {
        let logits = [1.0f32, 4.0, 2.0, 3.0];
        let config = |top_k, top_p| SamplingConfig { temperature: 5.0, top_k, top_p, seed: 1 };
        let kinds = |config| {
            let mut kinds = draw(config, &logits, 2000);
            kinds.sort_unstable();
            kinds.dedup();
            kinds
        };
        assert_eq!(kinds(config(Some(2), None)), [1, 3]);
        assert_eq!(kinds(config(None, Some(1e-9))), [1]);
        assert_eq!(kinds(config(None, Some(1.0))), [0, 1, 2, 3]);
        // At temperature 5 the four have 0.34, 0.28, 0.23, 0.15.
        assert_eq!(kinds(config(None, Some(0.5))), [1, 3]);
        assert_eq!(kinds(config(Some(9), None)), [0, 1, 2, 3]);
    }

    #[test]
    fn values_out_of_range_are_errors() {
        for config in [
            SamplingConfig { temperature: -1.0, ..Default::default() },
            SamplingConfig { temperature: f64::NAN, ..Default::default() },
            SamplingConfig { top_k: Some(0), ..Default::default() },
            SamplingConfig { top_p: Some(0.0), ..Default::default() },
            SamplingConfig { top_p: Some(1.5), ..Default::default() },
        ] {
            assert!(Sampler::new(&config).is_err(), "{config:?}");
        }
        let mut sampler = Sampler::new(&SamplingConfig::greedy()).expect("valid");
        assert!(sampler.next(&[0.0, f32::NAN]).is_err());
        assert!(sampler.next(&[]).is_err());
    }
}
