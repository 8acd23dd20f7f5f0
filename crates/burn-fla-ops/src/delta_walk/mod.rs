//! The portable engine of the delta rules and their relatives: CubeCL kernels in plain f32 arithmetic, for any CubeCL
//! device.
//!
//! ```text
//! S̃_t = e^{g_t} ∘ S_{t−1}          u_t = S_xᵀ a_t , S_x the state before or after the decay: S_{t−1} or S̃_t
//! S_t = S̃_t + b_t u_tᵀ + k_t v_tᵀ           o_t = scale · S_tᵀ q_t           S: [K, V]
//! ```
//!
//! | operator | reads | a | b | added values |
//! |---|---|---|---|---|
//! | `delta_rule`, `gated_delta_rule`, `kda`, `gated_delta_product` | S̃ | −k | β k | β v |
//! | `comba` | S_{t−1} | −p | β k | β v |
//! | `dplr` | S_{t−1} | a | b | v |
//! | `rwkv7` | S_{t−1} | −κ | κ ∘ rate | v |
//!
//! In the first two, `b u + k β v` is one vector times one, `k wᵀ` with `w = β (v + u)`. The decay is none, a number a token,
//! or one a key channel; value heads may outnumber key heads.
//!
//! # Forward
//! Every value channel is a recurrence of its own, of one vector of K numbers, in which the answer `u` of a token depends on
//! all tokens before it. So a cube walks a strip of value channels of one head from the first token to the last, with the
//! state in registers: the key channels of one value channel lie in one unit, or over the lanes of a plane where the device
//! has planes of 32. There is no triangular system and no sum of decays: whatever the decays are, it only ever multiplies by
//! `e^{g_t} ≤ 1`. Walks are as many as sequences, heads and strips, and serial in time: with few heads and a long sequence
//! most of a large GPU has nothing to do.
//!
//! # Backward
//! With `Z_t` the gradient of `S_t`, `w` what `k` is multiplied by, and `du_t` that of the answer:
//!
//! ```text
//! Z_t ← Z_t + scale q_t do_tᵀ ,    dw_t = Z_tᵀ k_t ,    du_t = Z_tᵀ b_t
//! Z_{t−1} = e^{g_t} ∘ (Z_t + a_t du_tᵀ)   where S̃ is read,    e^{g_t} ∘ Z_t + a_t du_tᵀ   where S_{t−1} is
//! dq_t = scale S_t do_t ,   dk_t = Z_t w_t ,   db_t = Z_t u_t ,   da_t = S_x du_t
//! ```
//!
//! and for `w = β (v + u)`: `dv = β dw`, `dβ = ⟨v + u, dw⟩`, `du = β dw`. The first two lines do not depend on any S, the last
//! one is a sum over value channels of which every key channel is independent once `u` and `du` are known. Hence four walks:
//!
//! 1. `columns::with_time` again, all chunks in parallel from the states at their borders: `u`;
//! 2. `columns::against_time`, serial: `du`, `dw`, and Z at the borders;
//! 3. `rows::gradients` with time, all chunks in parallel: `dq`, `da`;
//! 4. `rows::gradients` against time, likewise: `dk`, `db`.
//!
//! The decay's gradient, `⟨dS̃, S̃⟩` by key channel, needs S and Z of the same token, which no walk holds. But what the walks
//! leave tells how `⟨S_t, Z_t⟩` changes from token to token (see `ends::gate_gradient`), and it is summed inside each chunk
//! from its value at the chunk's end. Sums over cubes do not occur: a run repeats to the last bit.
//!
//! Saved between forward and backward, besides the inputs: the states at the chunk borders, `4 K V / 64` bytes a token and
//! head. While backward runs, its workspaces take `16 V + 12 K` bytes a token and head for the delta rules and `20 V + 16 K`
//! for the others.
//!
//! Outputs are written over a copy of the values, or over the values themselves where nobody else holds them, and last states
//! over initial ones: so no kernel needs more than eight buffers. A step of generation is that of [`one_step`].

mod columns;
mod ends;
mod launch;
mod operator;
mod parts;
mod plan;
mod rows;

use burn::tensor::{DType, Tensor};

use crate::CuSeqlens;
use crate::bridge::{Planned, apply_with, has_kernels};
use crate::linear_walk::table;
use crate::one_step;
use crate::options::Engine;
use launch::DeltaWalk;
use plan::Gate;

pub(crate) use plan::Form;

/// A checked problem.
pub(crate) struct Problem {
    pub(crate) op: &'static str,
    pub(crate) form: Form,
    /// q, k `[B, T, H, K]` and v `[B, T, HV, V]`; q and k of one dtype, v perhaps of another.
    pub(crate) qkv: [Tensor<4>; 3],
    /// `[B, T, H, K]`, the dtype of q; what the form says.
    pub(crate) a: Option<Tensor<4>>,
    /// β where k is what is added.
    pub(crate) strength: Option<Tensor<3>>,
    /// b or the rate, where it is not, `[B, T, H, K]`.
    pub(crate) b: Option<Tensor<4>>,
    pub(crate) decay: Option<crate::delta::Gate>,
    pub(crate) scale: f64,
    pub(crate) state: Option<Tensor<4>>,
    pub(crate) sequences: CuSeqlens,
    pub(crate) chunk: Option<usize>,
}

impl Problem {
    fn is_tracked(&self) -> bool {
        let decay = match &self.decay {
            None => false,
            Some(crate::delta::Gate::Token(g)) => g.is_tracked(),
            Some(crate::delta::Gate::Key(g)) => g.is_tracked(),
        };
        let others = [&self.a, &self.b, &self.state].into_iter().flatten();
        decay
            || self.qkv.iter().chain(others).any(Tensor::is_tracked)
            || self.strength.as_ref().is_some_and(Tensor::is_tracked)
    }

    fn one_step(self) -> Planned {
        use one_step::Gate;
        let strength = self.strength.map(Tensor::into_dispatch);
        one_step::planned(one_step::Problem {
            op: self.op,
            form: one_step::Form::LowRank(self.form),
            qkv: self.qkv,
            a: self.a,
            b: strength.or_else(|| self.b.map(Tensor::into_dispatch)),
            gate: match self.decay {
                None => (Gate::None, None),
                Some(crate::delta::Gate::Token(g)) => (Gate::Token, Some(g.into_dispatch())),
                Some(crate::delta::Gate::Key(g)) => (Gate::Key, Some(g.into_dispatch())),
            },
            skip: None,
            scale: self.scale,
            state: self.state,
            tiled: false,
        })
    }
}

/// Whether the kernels take a problem with `tokens` tokens of these values and keys.
pub(crate) fn takes(v: &Tensor<4>, keys: usize, tokens: usize, engine: Engine) -> bool {
    tokens > 0 && has_kernels(&v.device(), engine) && plan::takes(v.dtype(), keys, v.dims()[3])
}

/// Runs a checked problem on the kernels.
pub(crate) fn run(problem: Problem) -> (Tensor<4>, Tensor<4>) {
    if one_step::takes(&problem.sequences, problem.is_tracked()) {
        return problem.one_step().run_recurrence();
    }
    let Problem { op, form, qkv: [q, k, v], a, strength, b, decay, scale, state, sequences, chunk } = problem;
    let [batch, tokens, key_heads, keys] = q.dims();
    let [.., heads, values] = v.dims();
    let longest = sequences.lengths().max().unwrap_or(0);
    let table = table::build(&sequences, chunk.unwrap_or(plan::CHUNK).min(longest.next_power_of_two()));
    let operator = DeltaWalk {
        name: op,
        form,
        gate: match &decay {
            None => Gate::None,
            Some(crate::delta::Gate::Token(_)) => Gate::Token,
            Some(crate::delta::Gate::Key(_)) => Gate::Key,
        },
        has_state: state.is_some(),
        scale: scale as f32,
        tokens: batch * tokens,
        heads,
        groups: heads / key_heads,
        keys,
        values,
        chunks: table.chunks,
        sequences: sequences.num_sequences(),
    };
    let mut floats = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    floats.extend(a.map(Tensor::into_dispatch));
    floats.extend(strength.map(Tensor::into_dispatch));
    floats.extend(b.map(Tensor::into_dispatch));
    floats.extend(decay.map(|gate| match gate {
        crate::delta::Gate::Token(g) => g.into_dispatch(),
        crate::delta::Gate::Key(g) => g.into_dispatch(),
    }));
    floats.extend(state.map(|state| state.cast(DType::F32).into_dispatch()));
    let mut outputs = apply_with(operator, floats, vec![table.entries.into()]).into_iter();
    let mut next = || Tensor::from_dispatch(outputs.next().expect("an output and a state"));
    (next(), next())
}
