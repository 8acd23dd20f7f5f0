//! The engine for Hopper of the delta rules whose transition is diagonal plus low rank, in bf16: `rwkv7`, `dplr`, and `kda`
//! with `a_t = −e^{g_t} ∘ k_t`, `b_t = β_t k_t` and β k in the place of k.
//!
//! ```text
//! S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t        S: [K, V]
//! ```
//!
//! In a chunk of C = 64 tokens with running sums G of its log decays (`G_0 = 0` before it), the vectors that tokens read are
//! `U = N (ã S + A_ak V)`, with `N = (I − A_ab)⁻¹`, `A_xy[i, j] = Σ x_i y_j e^{G_i − G_j}` (`G_{i−1}` where x is a; j < i
//! there, else j ≤ i), `ã_i = a_i e^{G_{i−1}}`. Put into each other, everything without a state is one operand for each place
//! where the state or the values stand:
//!
//! ```text
//! Ã = N ã          H = N A_ak          Q′ = q̃ + A_qb Ã          P = A_qk + A_qb H          B̂ = b̂          K′ = k̂ + Hᵀ b̂
//! o = Q′ S + P V                    S ← e^{G_C} ∘ S + B̂ᵀ (Ã S) + K′ᵀ V
//! ```
//!
//! with `q̃_i = scale q_i e^{G_i}`, `k̂_j = k_j e^{G_C − G_j}`, b̂ alike. The gradient Z of the state after a chunk goes the same
//! way back, with Ã and B̂, Q′ and K′, V and do exchanged and P transposed. So there are four kernels:
//!
//! | kernel | over | computes | reads and writes, in tensors of K = V = 64 channels |
//! |---|---|---|---|
//! | [`prepare`] | chunks | Ã, B̂, Q′, K′, P; for backward also N, A_qb, H | q k a b g → 5 (8): 10 (13) |
//! | [`chain`] with time | sequences | o, the last state | 5 and v → o: 7 |
//! | (the same for backward) | | the state before each chunk | Ã B̂ K′ v → S: 5 |
//! | [`chain`] against time | sequences | dv, and the gradient Z of the state after each chunk | 5 and do → dv Z: 8 |
//! | [`gradients`] | chunks | all other gradients | q k a b g, Ã B̂ N A_qb H, v do S Z → 5: 19 |
//!
//! The chain is as short as that of a linear attention plus one product, and knows nothing of decays but one number a key
//! channel. Values meet the other gradients in `do Sᵀ`, `V Zᵀ`, `do Vᵀ` alone; the rest is between key channels.
//!
//! Decays inside a chunk are factors `e^{G_i − M}` and `e^{M − G_j}` around its middle M, exact as long as no channel decays
//! by more than 2^-120 over the chunk; a chunk in which one does is summed pair by pair ([`exact`]), in the same kernels.
//!
//! Nothing is saved between forward and backward but the inputs and, where sequences are cut into the segments of
//! [`crate::hopper_delta::segments`], the states between these; while backward runs, operands and states hold
//! `8 K + 512 + 4 K V / 64` bytes a token and head.
//!
//! Measured on an H200, milliseconds forward / both, outputs and gradients right to 5e-3 (gates 4e-3): `rwkv7`
//! 8 × 2048 × 32 × 64 × 64 takes 0.70 / 2.60, 16 × 4096 × 16 × 64 × 64 takes 1.32 / 5.03, `dplr` the same within a tenth. At the
//! latter shape [`prepare`] takes 0.98 (1.12 for backward, 1.4 TB/s), the chains 0.24, 0.26 and 0.17 (all at 4.0 TB/s), and
//! the gradients' kernel of then 2.15 (2.2 TB/s: 4.7 GB, where its tensors are 2.6). Since then the inverse's rows are padded
//! and a synchronisation was added. `benches/results/90-operators.json` has it as it is, long sequences of few heads among it, with
//! the peer beside it. What is known to be left:
//! - [`prepare`] took 1.39 ms (1.42 for backward) of 8 × 2048 × 32 × 128 × 128 on an H100, where its bytes take 0.48, with four
//!   warps a chunk, 252 to 255 registers a unit and 8 warps a processor, whose units waited for their own instructions: a fifth of
//!   an instruction a cycle and warp. Since then a warpgroup has one panel of keys, cubes stay on their processor with 12 (K ≤ 64)
//!   or 16 warps of 168 or 128 registers, rows move 16 bytes at a time instead of 4, a channel of a token takes two
//!   exponentials instead of six, and Q′ and K′ take what they add from the tiles of products, which rounds it once more: outputs
//!   and states were off by 3.3e-3 and 2.2e-3 of their size where they had been by 3.2e-3 and 1.4e-3. In one run on an H100,
//!   forward, before and after: rwkv7 1.799 and 1.279 ms at that shape, 1.310 and 1.097 at 16 × 4096 × 16 × 64 × 64; kda 1.684 and
//!   1.143, 1.207 and 0.998.
//! - Its registers, as counted: a load that is left out by a predicate, and an accumulator that a warpgroup does not write, count
//!   as in use from chunk to chunk, and whatever follows from the unit's number is computed before the loop over chunks unless it is
//!   asked for anew. Together they took 1.5 to 3.3 KB of spills a unit, and with them the same forward passes took 1.1 and 0.65
//!   ms more than before, not 0.52 and 0.21 less. What is left are 0.3 KB (K ≤ 64) and 1.7 KB.
//! - [`gradients`] had warpgroups' products (wgmma) and the next chunk's copies in flight, with two teams a cube where one panel
//!   holds the keys. The compiler waited for every product (C7512) and spilled 750 bytes a unit beside 226 KiB of shared memory:
//!   on an H100 2.93 ms at 8 × 2048 × 32 × 128 × 128, where products of single warps and one chunk a cube take 2.25, and
//!   1.56 at 16 × 4096 × 16 × 64 × 64, both in the same run; their bytes are 0.9. With sums of decays and inter in shared memory
//!   units spill half as much, and kda at the first shape took 1.667 / 5.569 forward / both in the place of 1.704 / 6.685.
//! - Pairs that are summed one by one, where decays are strong, were not timed.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod chain;
pub(crate) mod exact;
pub(crate) mod finish;
pub(crate) mod gradient_parts;
pub(crate) mod gradients;
mod octet_tiles;
mod octets;
pub(crate) mod operands;
pub(crate) mod operator;
pub(crate) mod parts;
pub(crate) mod plan;
mod prepare;
mod prepare_steps;
pub(crate) mod products;
pub(crate) mod tokens;

use burn::tensor::{DType, Tensor};

use crate::bridge::apply_with;
use crate::hopper_delta::{segments, takes_where};
use crate::hopper_walk::{Cores, table};
use crate::{CuSeqlens, Engine};
use operator::HopperDplr;
use plan::Form;

/// Where the vectors of the low-rank term come from.
pub(crate) enum Vectors {
    /// a and b themselves, bf16 `[B, T, H, K]`.
    Free(Tensor<4>, Tensor<4>),
    /// RWKV7: κ and the rate, bf16 `[B, T, H, K]`.
    Removal(Tensor<4>, Tensor<4>),
    /// Kimi delta attention: the writing strengths, `[B, T, HV]`.
    Key(Tensor<3>),
}

/// A checked problem.
pub(crate) struct Problem {
    pub(crate) op: &'static str,
    pub(crate) cores: Cores,
    /// bf16 `[B, T, H, K]`
    pub(crate) q: Tensor<4>,
    /// bf16 `[B, T, H, K]`
    pub(crate) k: Tensor<4>,
    /// What the form says.
    pub(crate) vectors: Vectors,
    /// bf16 `[B, T, HV, V]`; with vectors of their own there are as many heads as keys have.
    pub(crate) v: Tensor<4>,
    /// `[B, T, HV, K]`
    pub(crate) log_decay: Tensor<4>,
    pub(crate) scale: f64,
    /// `[N, HV, K, V]`
    pub(crate) state: Option<Tensor<4>>,
    pub(crate) sequences: CuSeqlens,
}

/// The kernels that take such values with so many key channels, these or those of [`crate::mma_dplr`]: bf16 on a GPU that has
/// them, channels in multiples of 16, and some sequence of more than one token.
pub(crate) fn takes(v: &Tensor<4>, keys: usize, sequences: &CuSeqlens, engine: Engine) -> Option<Cores> {
    takes_where(v, keys, sequences, engine, crate::mma_dplr::plan::fits)
}

/// Runs a problem that [`takes`] accepts: `o` and the last state.
pub(crate) fn run(problem: Problem) -> (Tensor<4>, Tensor<4>) {
    let Problem { op, cores, q, k, vectors, v, log_decay, scale, state, sequences } = problem;
    let [batch, t, key_heads, keys] = q.dims();
    let [.., heads, values] = v.dims();
    let device = v.device().inner();
    let longest = sequences.lengths().max().unwrap_or(0);
    let count = sequences.num_sequences();
    // Each cube walks 64 value channels, or more where there are enough of them.
    let cubes = heads * values.div_ceil(64);
    let processors = crate::hopper_walk::launch::processors(&device);
    let segment = segments::segment_tokens(longest, count, cubes, processors);
    let table = table::build(&sequences, segment);
    let operator = HopperDplr {
        name: op,
        form: match &vectors {
            Vectors::Free(..) => Form::Free,
            Vectors::Removal(..) => Form::Removal,
            Vectors::Key(..) => Form::Key,
        },
        cores,
        has_state: state.is_some(),
        scale: scale as f32,
        tokens: batch * t,
        heads,
        groups: heads / key_heads,
        keys,
        values,
        sequences: count,
        items: table.items,
        chunks: table.chunks,
    };
    let mut floats = vec![q.into_dispatch(), k.into_dispatch()];
    let strengths = match vectors {
        Vectors::Free(a, b) | Vectors::Removal(a, b) => {
            floats.extend([a.into_dispatch(), b.into_dispatch()]);
            None
        }
        Vectors::Key(strengths) => Some(strengths),
    };
    floats.extend([v.into_dispatch(), log_decay.into_dispatch()]);
    floats.extend(strengths.map(Tensor::into_dispatch));
    floats.extend(state.map(|state| state.cast(DType::F32).into_dispatch()));
    let mut outputs = apply_with(operator, floats, vec![table.entries.into()]).into_iter();
    let mut next = || Tensor::from_dispatch(outputs.next().expect("an output and a state"));
    (next(), next())
}
