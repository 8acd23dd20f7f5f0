//! Softmax attention whose positions are products of reflections.
//!
//! ```text
//! H_t = I − β_t w_t w_tᵀ
//! s_ij = scale · q_iᵀ H_i H_{i−1} … H_{j+1} k_j + Σ_{l = j+1..i} g_l        for j ≤ i
//! o_i = Σ_j softmax_j(s_ij) v_j
//! ```
//!
//! Every key is reflected by each token after it, the one that asks included. The keys seen so far, reflected up to now,
//! are the state: a later token reflects them once more.
//!
//! Yang et al.: *PaTH Attention: Position Encoding via Accumulating Householder Transformations* (2025).

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::{self, query_key_value};
use crate::bridge::{same_device, same_shape};
use crate::sequences::by_sequence;
use crate::{CuSeqlens, Engine, OpError};

/// Tokens a chunk: within it reflections are products of its vectors, between chunks they act on the keys.
const CHUNK: usize = 64;

/// The keys and values of tokens seen: `P` of them.
#[derive(Clone, Debug)]
pub struct PathState {
    /// Keys, reflected by every token since, f32 `[N, P, G, K]`.
    pub keys: Tensor<4>,
    /// Values, `[N, P, G, V]`, in the dtype of `v`.
    pub values: Tensor<4>,
    /// Natural logarithm of the forget gates, f32 `[N, P, H]`, where there are some.
    pub log_forget: Option<Tensor<3>>,
}

/// Options of [`path_attn`](crate::path_attn()).
#[derive(Clone, Debug, Default)]
pub struct PathOptions {
    /// Factor on the scores; `None` is `K^(-1/2)`.
    pub scale: Option<f64>,
    /// What was seen before. Gradients flow into it.
    pub initial: Option<PathState>,
    /// How many of the `P + T` keys of each row there are: the last ones. `None`: all.
    pub lengths: Option<Vec<usize>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and no query sees another sequence. They begin at
    /// their first token.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// Softmax attention with accumulated reflections over whole sequences.
///
/// `s_ij = scale · q_iᵀ (I − β_i w_i w_iᵀ) … (I − β_{j+1} w_{j+1} w_{j+1}ᵀ) k_j + Σ_{l = j+1..i} g_l`,
/// `o_i = Σ_{j ≤ i} softmax_j(s_ij) v_j`. Returns `o` and the state after the last token; of packed sequences the state is
/// one row as the input is, each sequence reflected up to its own end.
///
/// # Shapes
/// - `q`: `[B, T, H, K]`; `k`: `[B, T, G, K]`; `v`: `[B, T, G, V]`, all of one dtype (f32 or bf16; f64 where the device has
///   it), `H` a multiple of `G`
/// - `w`: `[B, T, G, K]`, of length one; `beta`: `[B, T, G]`, from 0 to 2; `log_forget`: `[B, T, H]`, at most 0; each f32 or
///   the dtype of `q`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, computed in f32
///
/// # Gradients
/// With respect to every tensor and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices, lengths or offsets do not fit together.
pub fn path_attn(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    w: Tensor<4>,
    beta: Tensor<3>,
    log_forget: Option<Tensor<3>>,
    options: PathOptions,
) -> Result<(Tensor<4>, PathState), OpError> {
    const OP: &str = "path_attn";
    let [b, t, heads, keys] = q.dims();
    let [_, _, groups, values] = v.dims();
    crate::attention::check(OP, &q, &k, &v, None, options.cu_seqlens.as_ref())?;
    same_shape(OP, "k", &k, [b, t, groups, keys], "[B, T, G, K]")?;
    query_key_value(OP, &k, &k, &v)?;
    arguments::chunk(OP, options.chunk)?;
    let device = q.device();
    same_shape(OP, "w", &w, [b, t, groups, keys], "[B, T, G, K]")?;
    same_device(OP, "w", &w, &device)?;
    same_shape(OP, "beta", &beta, [b, t, groups], "[B, T, G]")?;
    same_device(OP, "beta", &beta, &device)?;
    if let Some(gate) = &log_forget {
        same_shape(OP, "log_forget", gate, [b, t, heads], "[B, T, H]")?;
        same_device(OP, "log_forget", gate, &device)?;
    }
    let before = options.initial.as_ref().map_or(0, |state| state.keys.dims()[1]);
    if let Some(state) = &options.initial {
        same_shape(OP, "initial keys", &state.keys, [b, before, groups, keys], "[N, P, G, K]")?;
        same_shape(OP, "initial values", &state.values, [b, before, groups, values], "[N, P, G, V]")?;
        same_device(OP, "initial keys", &state.keys, &device)?;
        same_device(OP, "initial values", &state.values, &device)?;
        let wrong = |reason: &str| Err(OpError::Option { op: OP, option: "initial", reason: reason.into() });
        match (&state.log_forget, &log_forget) {
            (Some(gate), Some(_)) => same_shape(OP, "initial log_forget", gate, [b, before, heads], "[N, P, H]")?,
            (None, None) => {}
            _ => return wrong("must have forget gates where the input has them, and only there"),
        }
        if options.cu_seqlens.is_some() {
            return wrong("is not for packed sequences, which begin at their first token");
        }
    }
    if options.cu_seqlens.is_some() && options.lengths.is_some() {
        let reason = "is for rows that are not packed; packed sequences have their lengths in cu_seqlens".into();
        return Err(OpError::Option { op: OP, option: "lengths", reason });
    }
    let seen = before + t;
    if let Some(lengths) = &options.lengths
        && (lengths.len() != b || lengths.iter().any(|length| !(t..=seen).contains(length)))
    {
        let reason = format!("is {lengths:?}, but {b} numbers from {t} (the queries) to {seen} (the keys) are needed");
        return Err(OpError::Option { op: OP, option: "lengths", reason });
    }
    let problem = reference::Problem {
        scale: options.scale.unwrap_or_else(|| (keys as f64).powf(-0.5)),
        chunk: options.chunk.unwrap_or(CHUNK),
        lengths: options.lengths,
    };
    let inputs = reference::Inputs { q, k, v, w, beta, log_forget };
    let Some(sequences) = options.cu_seqlens else {
        return problem.chunked(inputs, options.initial);
    };
    let mut results = Vec::new();
    by_sequence::<4, _>(&sequences, |piece| {
        if piece.length > 0 {
            results.push(problem.chunked(inputs.tokens(piece), None));
        }
        (None, ())
    });
    let results = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    if results.is_empty() {
        return problem.chunked(inputs, None);
    }
    let row = |part: &dyn Fn(&(Tensor<4>, PathState)) -> Tensor<4>| Tensor::cat(results.iter().map(part).collect(), 1);
    let state = PathState {
        keys: row(&|(_, state)| state.keys.clone()),
        values: row(&|(_, state)| state.values.clone()),
        // The gates of a packed row are those of its sequences side by side.
        log_forget: inputs.gates(),
    };
    Ok((row(&|(o, _)| o.clone()), state))
}
