//! The engine for Hopper of the delta rules, in bf16: `delta_rule` and `gated_delta_rule`.
//!
//! ```text
//! S_t = e^{g_t} S_{t−1} + k_t w_tᵀ ,   w_t = β_t (v_t − e^{g_t} S_{t−1}ᵀ k_t) ,   o_t = scale · S_tᵀ q_t        S: [K, V]
//! ```
//!
//! In a chunk of 64 tokens with running sums G of its log decays, the values W that its tokens write solve a unit lower
//! triangular system, `(I + A) W = diag(β) (V − e^G ∘ K S)` with `A_ij = β_i e^{G_i − G_j} (k_i · k_j)` for `j < i` (Yang et
//! al.: *Parallelizing Linear Transformers with the Delta Rule over Sequence Length*, 2024). So there are four kernels:
//!
//! | kernel | over | computes | reads and writes, in tensors of K = V channels |
//! |---|---|---|---|
//! | [`prepare`] | chunks | `M = (I + A)⁻¹ diag(β)`, f32 inside, bf16 `[64]` a token | k → M: 1.5 |
//! | [`chain`] with time | sequences | o, the last state | q k v M → o: 4.5 |
//! | (the same for backward) | | W and the state before each chunk | k v M → W S: 5.5 |
//! | [`chain`] against time | sequences | dv, and the gradient Z of the state after each chunk | q k do M → dv Z: 6.5 |
//! | [`gradients`] | chunks | dq, dk, dβ, dg | q k W do dv S Z → dq dk: 11 |
//!
//! The recurrence of Z is that of S with the triangular system transposed, and needs neither S nor W. Once the states at the
//! chunks' borders are known, all other gradients are those of a linear attention that writes W, and of another one that
//! reads −dv with its keys.
//!
//! Heads too few to keep the processors busy have their sequences cut into [`segments`], which are walked side by side: first
//! for what each makes of no state and of unit vectors, then, from the states that follow, for its outputs.
//!
//! Nothing but the inputs is saved between forward and backward, and of segments, where there are any, two states:
//! `4 K (2 V + K)` bytes for a head and 1024 tokens or more. While backward runs, W, M and the states S and Z hold
//! `2 V + 128 + 4 K V / 64` bytes a token and head.
//!
//! Measured on an H200: `benches/results/68-hopper-delta.json` and `68-hopper-delta-segments.json`. What was tried, in
//! milliseconds, forward / both:
//! - Scores first, so that they become P under the other products, and all loads of decays before the first store (each store
//!   is volatile, and held up the load behind it), and triangles joined by products of warps in three tf32 parts:
//!   8 × 2048 × 32 × 128 × 128 went from 0.365 / 1.388 to 0.294 / 1.248, with a gate from 0.415 / 1.481 to 0.355 / 1.350.
//! - Segments: 1 × 16,384 × 16 × 128 × 128 went from 0.542 / 1.691 to 0.331 / 1.061, with a gate from 0.758 / 2.045 to
//!   0.369 / 1.174. Two segments would walk as far as one; three pay.
//! - In `prepare`, forward substitution over whole columns by 64 units took as long as blocks joined by products of units,
//!   0.166 and 0.177.
//! - The L2 norms of queries and keys are row-wise kernels before these. Inside, they would save 10 passes over a tensor: counted
//!   for the 340M configuration of DeltaNet at 8 × 2048 tokens 0.34 GB, 0.08 ms, where a layer's products take 1.9 ms and the rule,
//!   its convolutions and norms another 0.7. Not built. A gate's activation is a kernel before these too: a number a token and head.
//! - A second warpgroup beside the walk has what is between the tokens of a chunk. Before, one did all in turn: on an H100,
//!   1 × 8192 × 32 × 128 × 128 with 8 key heads took 2.65 µs a chunk with time, 4,700 cycles, where its six products are 1,280
//!   cycles of the tensor cores. Now three of them, all exponentials of scores and the outputs' stores are off the way from state
//!   to state, on which are three products of 640 cycles and one packing before each. On H100s, with a gate, forward / both, at that
//!   shape from 0.423 / 1.312 to 0.278 / 1.013, with 16 key heads from 0.432 / 1.383 to 0.273 / 1.060; 8 × 2048 × 32 × 128 × 128
//!   from 0.394 / 1.680 to 0.361 / 1.642, 1 × 16,384 × 16 × 128 × 128 from 0.380 / 1.297 to 0.334 / 1.225 and
//!   8 × 2048 × 4 × 128 × 256 from 0.119 / 0.450 to 0.092 / 0.410.
//! - Since then the stores are a warp's of the loader's warpgroup, so that no warpgroup meets, and queries are read once for both of
//!   their products: without a gate 8 × 2048 × 4 × 128 × 256 takes 0.094 / 0.365 (0.098 / 0.380 before both changes) and
//!   1 × 65,536 × 16 × 128 × 128 1.003 / 3.911 (1.083 / 4.007). The shapes above were not timed again.
//! - With queries a cube walks 64 value channels, not 128: two walking warpgroups and one beside them would leave shared memory
//!   for two stages of tiles at K = 128, and the one beside holds the one that is loaded next.
//! - Left: more than 128 key channels and Comba's feedback run on the portable engine.
//!
//! Value heads may outnumber key heads: the kernels read a key head for each value head, and what its gradients' parts are
//! is summed up at the end.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod beside;
mod chain;
pub(crate) mod gradient_parts;
mod gradients;
pub(crate) mod groups;
pub(crate) mod operator;
pub(crate) mod parts;
pub(crate) mod place;
pub(crate) mod plan;
pub(crate) mod prepare;
pub(crate) mod segments;
mod store;
mod walk;

use burn::tensor::{DType, Tensor};

use crate::bridge::{apply_with, has_mma, is_hopper};
use crate::hopper_walk::table;
use crate::hopper_walk::{Cores, shared_memory};
use crate::{CuSeqlens, Engine};
use operator::HopperDelta;

/// The most key channels of a head.
const MOST_KEYS: usize = 128;
/// The most value channels of a head.
const MOST_VALUES: usize = 512;

/// A checked problem.
pub(crate) struct Problem {
    pub(crate) op: &'static str,
    pub(crate) cores: Cores,
    /// bf16 `[B, T, H, K]`
    pub(crate) q: Tensor<4>,
    /// bf16 `[B, T, H, K]`
    pub(crate) k: Tensor<4>,
    /// bf16 `[B, T, HV, V]`
    pub(crate) v: Tensor<4>,
    /// `[B, T, HV]`
    pub(crate) beta: Tensor<3>,
    /// `[B, T, HV]`
    pub(crate) decay: Option<Tensor<3>>,
    pub(crate) scale: f64,
    /// `[N, HV, K, V]`
    pub(crate) state: Option<Tensor<4>>,
    pub(crate) sequences: CuSeqlens,
}

/// The kernels that take such values with so many key channels, these or those of [`crate::mma_delta`]: bf16 on a GPU that
/// has them, channels in multiples of 16, and some sequence of more than one token.
pub(crate) fn takes(v: &Tensor<4>, keys: usize, sequences: &CuSeqlens, engine: Engine) -> Option<Cores> {
    takes_where(v, keys, sequences, engine, crate::mma_delta::plan::fits)
}

/// The same, where those since Ampere `fit` key channels, value channels and so much shared memory a cube.
pub(crate) fn takes_where(
    v: &Tensor<4>,
    keys: usize,
    sequences: &CuSeqlens,
    engine: Engine,
    fit: impl Fn(usize, usize, usize) -> bool,
) -> Option<Cores> {
    let values = v.dims()[3];
    let device = v.device();
    let taken = v.dtype() == DType::BF16
        && sequences.lengths().any(|n| n > 1)
        && keys.is_multiple_of(16)
        && keys <= MOST_KEYS
        && values.is_multiple_of(16)
        && values <= MOST_VALUES;
    if !taken {
        return None;
    }
    let mma = || has_mma(&device) && fit(keys, values, shared_memory(&device));
    if engine == Engine::Mma && mma() {
        return Some(Cores::Mma);
    }
    if is_hopper(&device) {
        return Some(Cores::Hopper);
    }
    mma().then_some(Cores::Mma)
}

/// Runs a problem that [`takes`] accepts: `o` and the last state.
pub(crate) fn run(problem: Problem) -> (Tensor<4>, Tensor<4>) {
    let Problem { op, cores, q, k, v, beta, decay, scale, state, sequences } = problem;
    let [b, t, key_heads, keys] = q.dims();
    let [.., heads, values] = v.dims();
    let device = v.device().inner();
    let longest = sequences.lengths().max().unwrap_or(0);
    let count = sequences.num_sequences();
    // Each cube walks 64 value channels, or more where there are enough of them.
    let cubes = heads * values.div_ceil(64);
    let processors = crate::hopper_walk::launch::processors(&device);
    let segment = segments::segment_tokens(longest, count, cubes, processors);
    let table = table::build(&sequences, segment);
    let operator = HopperDelta {
        name: op,
        gated: decay.is_some(),
        has_state: state.is_some(),
        scale: scale as f32,
        tokens: b * t,
        heads,
        groups: heads / key_heads,
        keys,
        values,
        sequences: count,
        items: table.items,
        chunks: table.chunks,
        cores,
    };
    let mut floats = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), beta.into_dispatch()];
    floats.extend(decay.map(Tensor::into_dispatch));
    floats.extend(state.map(|state| state.cast(DType::F32).into_dispatch()));
    let mut outputs = apply_with(operator, floats, vec![table.entries.into()]).into_iter();
    let mut next = || Tensor::from_dispatch(outputs.next().expect("an output and a state"));
    (next(), next())
}
