//! What a mixer costs besides its maps: the numbers it keeps, and the arithmetic of its recurrence or attention.

use burn_fla_ops as ops;

use super::{MixerConfig, MixerDims};
use crate::NnError;

/// What one layer's mixer keeps of a sequence, and what it computes for one token, its linear maps and short
/// convolutions aside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixerCost {
    /// Numbers of the recurrent state of a sequence, whatever its length.
    pub state: usize,
    /// Numbers kept for each token that a later one may look at: keys and values.
    pub cache: usize,
    /// The most tokens that `cache` is kept for; `None` is all.
    pub window: Option<usize>,
    /// Floating-point operations a token of the forward pass, a multiplication and an addition being two. Recurrences
    /// are counted in their recurrent form, whatever the chunked form adds: it is the work that cannot be saved.
    pub flops: f64,
}

impl MixerConfig {
    /// The mixer's name in tables: that of the variant.
    pub fn kind(&self) -> String {
        let text = format!("{self:?}");
        text.split(['(', ' ']).next().unwrap_or_default().to_string()
    }

    /// The cost of this mixer in sequences of `tokens` tokens.
    ///
    /// A linear recurrence over a state S of n numbers updates (2 n) and reads (2 n) for each token; a delta rule also
    /// reads before it writes (6 n, and 4 n for each further step of a product), a diagonal-plus-low-rank transition has
    /// two outer products (8 n). Softmax attention multiplies each query with the keys and each weight with the values
    /// it looks at, on average over the sequence.
    ///
    /// # Errors
    /// Values that no layer can be built from.
    pub fn cost(&self, tokens: usize) -> Result<MixerCost, NnError> {
        let recurrent = |state: usize, products: f64| MixerCost {
            state,
            cache: 0,
            window: None,
            flops: 2.0 * products * state as f64,
        };
        let outer = |dims: MixerDims| dims.heads * dims.key_width() * dims.value_width();
        let attention = |heads: usize, widths: usize, cache: usize, window: Option<usize>| MixerCost {
            state: 0,
            cache,
            window,
            flops: 2.0 * (heads * widths) as f64 * mean_span(tokens, window),
        };
        Ok(match self {
            Self::Abc(config) => {
                let dims = config.check()?;
                let slots = config.num_slots.unwrap_or(dims.key_width());
                let memory = dims.heads * slots * (dims.key_width() + dims.value_width());
                MixerCost { state: memory + dims.heads * slots, ..recurrent(memory, 2.0) }
            }
            Self::Gsa(config) => {
                let dims = config.check()?;
                let slots = config.num_slots.unwrap_or(dims.key_width());
                recurrent(dims.heads * slots * (dims.key_width() + dims.value_width()), 2.0)
            }
            Self::Gla(config) => recurrent(outer(config.check()?), 2.0),
            Self::Retention(config) => recurrent(outer(config.check()?), 2.0),
            Self::LinearAttention(config) => {
                let dims = config.check()?;
                let keys = config.feature_map.features(dims.key_width());
                recurrent(dims.heads * keys * dims.value_width(), 2.0)
            }
            Self::Rwkv6(config) => recurrent(outer(config.check()?), 2.0),
            Self::Based(config) => {
                let values = config.hidden_size / config.num_heads + 1;
                recurrent(config.num_heads * ops::based::features(config.feature_dim) * values, 2.0)
            }
            Self::Rebased(config) => {
                let values = config.hidden_size / config.num_heads + 1;
                recurrent(config.num_heads * ops::rebased::features(config.feature_dim) * values, 2.0)
            }
            Self::DeltaNet(config) => recurrent(outer(config.check()?), 3.0),
            Self::Comba(config) => recurrent(config.check()?.state(), 3.0),
            Self::GatedDeltaNet(config) => recurrent(config.check()?.state(), 3.0),
            Self::Kda(config) => recurrent(config.check()?.state(), 3.0),
            Self::GatedDeltaProduct(config) => {
                let state = config.check()?.state();
                recurrent(state, 1.0 + 2.0 * config.num_householder as f64)
            }
            Self::MesaNet(config) => {
                let heads = config.check()?;
                let (covariance, memory) = (heads.all_keys() * heads.key_width, heads.state());
                // Both are updated, the values are read once, and each step of the conjugate gradients is a product with H.
                let products = 2.0 * (covariance + 2 * memory + config.max_cg_step_training * covariance) as f64;
                MixerCost { flops: products, ..recurrent(covariance + memory, 0.0) }
            }
            Self::Hgrn(config) => recurrent(config.check()?, 2.0),
            Self::Hgrn2(config) => {
                let heads = config.check()?;
                recurrent(heads.keys() * (config.hidden_size / heads.heads), 2.0)
            }
            Self::LightNet(config) => {
                let heads = config.check()?;
                let memory = heads.keys() * (config.hidden_size / heads.heads);
                MixerCost { state: memory + heads.keys(), ..recurrent(memory, 2.0) }
            }
            Self::Mamba(config) => recurrent(config.inner_size * config.state_size, 3.0),
            Self::Mamba2(config) => recurrent(config.inner_size * config.state_size, 2.0),
            Self::Rwkv7(config) => {
                config.check()?;
                let values = config.value_dim.unwrap_or(config.hidden_size);
                recurrent(config.head_dim * values, 4.0)
            }
            Self::Attention(config) => {
                let (heads, groups) = (config.num_heads, config.num_kv_heads.unwrap_or(config.num_heads));
                let width = config.hidden_size / heads.max(1);
                attention(heads, 2 * width, 2 * groups * width, config.window_size)
            }
            Self::ForgettingAttention(config) => {
                let (heads, groups) = (config.num_heads, config.num_kv_heads.unwrap_or(config.num_heads));
                let width = config.hidden_size / heads.max(1);
                // A window bounds what is kept, not what a sequence from its first token looks at.
                let cost = attention(heads, 2 * width, 2 * groups * width + heads, None);
                MixerCost { window: config.window_size, ..cost }
            }
            Self::LatentAttention(config) => {
                let keys = config.qk_nope_head_dim + config.qk_rope_head_dim;
                let widths = keys + config.v_head_dim;
                attention(config.num_heads, widths, config.num_heads * widths, config.window_size)
            }
            Self::PathAttention(config) => {
                let (heads, groups) = (config.num_heads, config.num_kv_heads.unwrap_or(config.num_heads));
                let width = config.hidden_size / heads.max(1);
                let gates = if config.use_forget_gate { heads } else { 0 };
                // The reflections of the queries are a product of the size of that with the keys.
                attention(heads, 3 * width, 2 * groups * width + gates, None)
            }
            Self::NativeSparseAttention(config) => {
                let (heads, width) = (config.num_heads, config.head_dim);
                let groups = config.num_kv_heads.unwrap_or(heads);
                let selected = (config.block_size * config.block_counts) as f64;
                let span = mean_span(tokens, None) / config.block_size.max(1) as f64
                    + mean_span(tokens, Some(selected as usize))
                    + config.window_size.map_or(0.0, |window| mean_span(tokens, Some(window)));
                MixerCost {
                    flops: 4.0 * (heads * width) as f64 * span,
                    ..attention(heads, 0, 2 * groups * width, None)
                }
            }
        })
    }
}

/// How many tokens one of `tokens` looks at on average, itself included.
fn mean_span(tokens: usize, window: Option<usize>) -> f64 {
    let (n, w) = (tokens.max(1) as f64, window.unwrap_or(usize::MAX).min(tokens.max(1)) as f64);
    // The first w tokens look at 1 to w, the others at w.
    (w * (w + 1.0) / 2.0 + (n - w) * w) / n
}

#[cfg(test)]
mod tests {
    use super::mean_span;

    #[test]
    fn spans_are_those_of_counting() {
        for (tokens, window) in [(1, None), (7, None), (7, Some(3)), (7, Some(7)), (7, Some(100)), (5, Some(1))] {
            let counted: usize = (1..=tokens).map(|t: usize| t.min(window.unwrap_or(t))).sum();
            let mean = counted as f64 / tokens as f64;
            assert!((mean_span(tokens, window) - mean).abs() < 1e-12, "{tokens} {window:?}");
        }
    }
}
