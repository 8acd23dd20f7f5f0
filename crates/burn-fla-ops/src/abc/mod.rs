//! Attention with bounded-memory control: M slots, each a softmax-weighted mean of the keys and of the values so far,
//! read by a softmax over the slots.
//!
//! ```text
//! z_t  = log(e^{z_{t−1}} + e^{s_t})                                  for each slot
//! Hk_t = Σ_{j ≤ t} k_j (e^{s_j − z_t})ᵀ        Hk: [K, M]
//! p_t  = softmax_M(scale · Hk_tᵀ q_t)
//! Hv_t = Σ_{j ≤ t} e^{s_j − z_t} v_jᵀ          Hv: [M, V]
//! o_t  = Hv_tᵀ p_t
//! ```
//!
//! It is gated slot attention with the weights `e^{s_t − z_t}` and the log decays `z_{t−1} − z_t` of a running softmax.
//! The normaliser z is part of the state, so a continued sequence is the whole one.
//!
//! # Bytes
//! On a Hopper GPU, for each token and head, forward (bf16, M slots): the running softmax reads s and writes weights and f32
//! decays, 8 M; preparing them for the walks 10 M; the first pass 4 K + 6 M; the probabilities 6 M; the second pass 4 V + 4 M:
//! 34 M + 4 K + 4 V, where [`gsa`](crate::gsa()) moves 26 M + 4 K + 4 V. Backward makes weights and decays again, 8 M, and
//! its last kernel reads s, the gradients of the weights from both passes and that of the decays, and writes that of s, 12 M,
//! where gsa adds up the two gradients in 6 M. So abc moves 22 M bytes more than gsa in both directions together: at
//! (8, 2048, 32) with 64 slots 0.74 GB, counted 0.25 ms at 2.9 TB/s. A sequence that is cut into segments (few channels and
//! rows) has the scores read once more forward, and what the last kernel reads once more backward: 2 M, 2 M and 10 M.
//!
//! Saved for backward besides the inputs: 8 M / 128 for the sums before every 128th token, where gsa saves nothing. Both make
//! the scores of the first pass again, 4 K + 6 M. To save them, 2 M, took 3 to 11 % less of both passes at the five sizes that
//! are measured (adce9f5 beside 4521904, H100s of two machines). With the running softmax as tensor operations weights, decays
//! and each step of the scan were saved: 297,000 bytes a token at that size, and 38.1 ms forward, where gsa takes 0.6 (one H100).
//!
//! Weights and decays could be made inside of what prepares them, and never be written: 16 M bytes less. Not built: chunks cut
//! by strong decays read the decays again inside of the walks.
//!
//! Peng et al.: *ABC: Attention with Bounded-memory Control* (2022).

pub mod reference;

use burn::tensor::Tensor;

use crate::bridge::{same_device, same_shape};
use crate::gsa::{GsaOptions, GsaState, Slots};
use crate::{CuSeqlens, Engine, OpError, gsa};

/// What [`abc`](crate::abc()) keeps of the tokens seen.
#[derive(Clone, Debug)]
pub struct AbcState {
    /// The mean keys of the slots, f32 `[N, H, K, M]`.
    pub keys: Tensor<4>,
    /// The mean values of the slots, f32 `[N, H, M, V]`.
    pub values: Tensor<4>,
    /// The logarithm of the weight of the tokens seen, f32 `[N, H, M]`; −∞ where there were none.
    pub normaliser: Tensor<3>,
}

/// Options of [`abc`](crate::abc()).
#[derive(Clone, Debug, Default)]
pub struct AbcOptions {
    /// Factor on the queries; `None` is `K^(-1/2)`.
    pub scale: Option<f64>,
    /// State before the first token; `None` is that of no tokens. Gradients flow into it.
    pub initial_state: Option<AbcState>,
    /// Packed sequences: the row (batch 1) holds several sequences, and the state restarts at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// Attention with bounded-memory control over whole sequences. Returns `o` and the state after the last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`; `scores`: s, `[B, T, H, M]`, finite, how much slot m takes in of token
///   t; all of one dtype (f32 or bf16; f64 where the device has it)
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state in f32 (f64 for f64). Both softmaxes are f32.
///
/// # Gradients
/// With respect to all four tensors and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn abc(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scores: Tensor<4>,
    options: AbcOptions,
) -> Result<(Tensor<4>, AbcState), OpError> {
    const OP: &str = "abc";
    let sequences = gsa::check(OP, &q, &k, &v, &scores, "scores", options.cu_seqlens.as_ref())?;
    let n = sequences.num_sequences();
    let [_, _, h, m] = scores.dims();
    let (memory, normaliser) = match options.initial_state {
        Some(AbcState { keys, values, normaliser }) => {
            let memory = GsaState { keys, values };
            gsa::check_state(OP, &memory, &q, &v, &scores, n)?;
            same_shape(OP, "initial_state.normaliser", &normaliser, [n, h, m], "[N, H, M]")?;
            same_device(OP, "initial_state.normaliser", &normaliser, &q.device())?;
            (Some(memory), Some(normaliser.reshape([n, h * m])))
        }
        None => (None, None),
    };
    gsa::check_chunk(OP, options.chunk)?;
    let options = GsaOptions {
        scale: options.scale,
        initial_state: memory,
        cu_seqlens: options.cu_seqlens,
        engine: options.engine,
        chunk: options.chunk,
    };
    let (o, state, normaliser) = gsa::run(OP, [q, k, v], Slots::Running(scores, normaliser), options)?;
    let normaliser = normaliser.expect("the slots are those of a running softmax").reshape([n, h, m]);
    Ok((o, AbcState { keys: state.keys, values: state.values, normaliser }))
}
