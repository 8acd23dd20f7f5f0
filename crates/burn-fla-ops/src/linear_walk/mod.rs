//! The portable engine of the decayed linear recurrences: CubeCL kernels in plain f32 arithmetic, for any CubeCL device.
//!
//! ```text
//! S_t = e^{g_t} ∘ S_{t−1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t
//! ```
//!
//! Time is cut into chunks (64 tokens), and every chunk is walked token by token with the state in registers. There is no
//! matrix unit to feed here, so a walk costs no more than the matrix form, and it multiplies by `e^{g_t} ≤ 1` alone: no
//! sum of decays is ever exponentiated with a positive sign, whatever the decays are.
//!
//! 1. `totals`: the sum of log decays of each chunk;
//! 2. `local_state`: each chunk's own contribution to the state, from zero, all chunks in parallel;
//! 3. `pass_states`: a small scan over chunks turns contributions into the states at the chunk borders;
//! 4. `read_out`: each chunk is walked again from its state, writing its outputs.
//!
//! Linear attention is its own gradient: with `Z_t` the gradient of `S_t`, walked against time,
//!
//! ```text
//! Z_t = e^{g_{t+1}} ∘ Z_{t+1} + scale q_t do_tᵀ ,  dq_t = scale · S_t do_t ,  dk_t = Z_t v_t ,  dv_t = Z_tᵀ k_t
//! ```
//!
//! so steps 2 to 4 with other roles are the whole backward. The decay's gradient needs no product of its own: inside a
//! chunk `dg_t = ⟨S_e, Z_e⟩ + Σ_{s ≥ t} (q_s ∘ dq_s − k_s ∘ dk_s)`, with `S_e`, `Z_e` at the chunk's end.
//!
//! A decay by value, `S_t = S_{t−1} diag(e^{g_t}) + k_t v_tᵀ`, is the same with keys and values exchanged: its gradient is
//! `⟨S_e, Z_e⟩ + Σ_{s ≥ t} (do_s ∘ o_s − v_s ∘ dv_s)`, with the outputs walked once more.
//!
//! With a bonus u for the token's own key, the state is read before the token:
//! `o_t = scale · (S_{t−1} + (u ∘ k_t) v_tᵀ)ᵀ q_t`. In a walk, reading then comes first in both directions of time.
//!
//! Saved between forward and backward, besides the inputs: the states at the chunk borders, `4 H K V / 64` bytes a token.

pub(crate) mod gate;
mod launch;
mod operator;
pub(crate) mod plan;
mod states;
pub(crate) mod table;
mod walk;

use std::sync::Arc;

use burn::tensor::{DType, Tensor};

use crate::bridge::Planned;
use crate::one_step;
use crate::recurrence::{Decay, Problem, no_decay};
use crate::ssd::HeadGroups;
use launch::LinearWalk;
use plan::DecayKind;

/// What runs a checked problem on the kernels; `tracked` says whether something else than its tensors is differentiated.
/// The first inputs are q, k, v, the decay, and the initial state where there is one.
pub(crate) fn planned(problem: Problem, tracked: bool) -> Planned {
    if one_step::takes(&problem.sequences, tracked || problem.is_tracked()) {
        return step(problem);
    }
    let problem = problem.with_own_heads();
    let Problem { op, q, k, v, decay, bonus, scale, state, sequences, .. } = problem;
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let device = q.device().inner();
    let (kind, g) = match decay {
        Decay::None => (DecayKind::Head, no_decay(h, &device).into_dispatch()),
        Decay::Head(g) => (DecayKind::Head, g.into_dispatch()),
        Decay::Token(g) => (DecayKind::Token, g.into_dispatch()),
        Decay::Key(g) => (DecayKind::Key, g.into_dispatch()),
        Decay::Value(g) => (DecayKind::Value, g.into_dispatch()),
    };
    let longest = sequences.lengths().max().unwrap_or(0);
    let chunk = problem.chunk.unwrap_or(plan::CHUNK).min(longest.next_power_of_two());
    let table = table::build(&sequences, chunk);
    let operator = LinearWalk {
        name: op,
        decay: kind,
        has_state: state.is_some(),
        has_bonus: bonus.is_some(),
        scale: scale as f32,
        tokens: b * t,
        heads: h,
        keys: dk,
        values: dv,
        chunks: table.chunks,
        sequences: sequences.num_sequences(),
    };
    let mut floats = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), g];
    if let Some(state) = state {
        floats.push(state.cast(DType::F32).into_dispatch());
    }
    if let Some(bonus) = bonus {
        floats.push(bonus.cast(DType::F32).into_dispatch());
    }
    Planned { operator: Arc::new(operator), floats, ints: Vec::new(), tables: vec![table.entries.into()] }
}

/// A problem of one token a sequence.
fn step(problem: Problem) -> Planned {
    let Problem { op, q, k, v, groups, decay, bonus, scale, state, .. } = problem;
    one_step::planned(one_step::Problem {
        op,
        form: if bonus.is_some() { one_step::Form::Bonus } else { one_step::Form::Linear },
        qkv: [q, k, v],
        a: None,
        b: bonus.map(Tensor::into_dispatch),
        gate: match decay {
            Decay::None => (one_step::Gate::None, None),
            Decay::Head(g) => (one_step::Gate::Head, Some(g.into_dispatch())),
            Decay::Token(g) => (one_step::Gate::Token, Some(g.into_dispatch())),
            Decay::Key(g) => (one_step::Gate::Key, Some(g.into_dispatch())),
            Decay::Value(g) => (one_step::Gate::Value, Some(g.into_dispatch())),
        },
        skip: None,
        scale,
        state,
        tiled: groups == HeadGroups::Tiled,
    })
}
