//! The engine for Hopper of the linear recurrences, in bf16, with a decay by head, by token, or by token and key (or
//! value: the same with the sides of the state exchanged):
//!
//! ```text
//! S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t
//! ```
//!
//! One kernel ([`walk`]) walks a sequence from chunk to chunk with the state in registers, and it is the whole backward
//! pass too: with `o = walk(q, k, v)`, `dq = walk(do, v, k)`, and against time `dv = walk(k, q, do)` and
//! `dk = walk(v, do, q)`. Nothing is saved between forward and backward but the inputs: 0 bytes a token.
//!
//! Where batch and heads do not fill the GPU, a sequence is cut into segments ([`segments`]).
//!
//! The gate's gradient ([`gate`]) needs `q · dq` and `k · dk`, which two of the walks sum up from their f32 outputs, and
//! for each chunk the product of the state before it with the gradient of that after it: the walk for dq writes the
//! states in bf16 (`2 K V / 64` bytes a token and head, for the time of the backward pass alone), that for dk multiplies
//! them with its own.
//!
//! A decay by key ([`prepare`], [`key`]) needs queries and keys with their decays inside a chunk, which one more kernel
//! writes before the walks, and the gradients of queries and keys a factor. Nothing is saved for backward either; while a
//! backward pass runs, its buffers hold 10 K bytes a token and head beside the states.
//!
//! A decay by value is all of this with keys and values exchanged: the outputs are then what has the factor, and are walked
//! once more for the decay's gradient, in the place of dq. The two passes of a slot memory ([`slots`]) are one operator.
//!
//! Where the state is read before the token, keys and values are walked one token later ([`shift`]); the weight of a
//! token's own value ([`bonus`]) comes from [`prepare`] too and stands beside the diagonal of the scores; its part of dq
//! and dk is added after the walks.
//!
//! Heads may share queries and keys ([`groups`]), with a decay by head or token. Of `ssd` the walks take Δ, A and D
//! themselves ([`steps`]).
//!
//! Where at most 64 channels decay beside at most 128 others, the kernels of [`crate::mma_walk`] walk: [`Cores::suits`] has
//! the numbers.
//!
//! Measured on an H100: `benches/results/61-hopper-simple-gla.json`, and beside flash-linear-attention
//! `62-hopper-gla.json`. What is known to be left:
//! - Restarting the gate's sum at every 512th token instead (a twentieth of the states) gave errors of 3e-2 in dg.
//! - Writing and reading these states is a fifth of the backward pass's traffic. The walks for dk and dv are one where a head
//!   has at most 64 channels ([`both`], and with that for dq and the gate's sums, [`all`]); with more, each warpgroup holds a part
//!   of the state, which the second output needs whole.
//! - The decay's gradient from `o · do` and `v · dv`, which are the same sums, saves no pass: whichever walk makes them reads a
//!   fourth tensor for them.
//! - ptxas waits for the scores before the state goes to shared memory (C7517). In gla's walks at K = V = 128 it spills 20 words
//!   in that for dq and none in the others (1 to 23 in three of the four where addresses were made before the loop); with 256
//!   inner channels, 32 in that for dq and 49 in that for dk (66 and 88).
//! - With K = V = 64 one warpgroup walks alone on a processor, where heads are odd in number or no more than processors.
//! - simple_gla at 16 × 4096 × 16 × 64 × 64 on an H100 takes 0.195 ms forward, 0.156 for the states at the borders and 0.398 for all
//!   gradients ([`all`]). Of 134 MB each these move 4, 3 and 8 (a state at a border is as large as a chunk of a tensor), at 2.72,
//!   2.59 (by count) and 2.69 TB/s, where a copy moves 2.85. With a walk for dq that kept the states, one for dk and dv, and a kernel for the
//!   gate's sums it was 0.290, 0.378 and 0.018 backward, for 6 and 7 tensors. States at every second border only, the others
//!   made anew from the chunk before, would save one of these 15: for two heads side by side there is no shared memory for that.
//! - One state kept for four chunks, the others' products derived from it by what queries read and keys write between two borders
//!   ([`gate`]), would save 3 of 22 tensors with 128 channels. In an emulation dg was off by 4e-3 to 1.2e-2 with
//!   decays from 0 to −0.02 … −0.3 where it is off by 2e-3 so: the error of one border, 1e-3 of its product, stands in all
//!   tokens of a chunk.
//! - ptxas ignores `setmaxnreg` in all walks but those with K = V = 128 (C7508): CubeCL's kernels say no least number of cubes a
//!   processor (`.minnctapersm 1` by hand in the PTX: it is accepted, and nothing is spilled).
//! - A slot memory as two operators, with a softmax between them: 0.91 ms forward and 4.52 both at
//!   8 × 2048 × 32 × 128 × 128 with 64 slots on an H200, where one operator takes 0.49 and 3.29.
//! - In gsa, of the error of dq (4.9e-3 in an emulation of all roundings, 5.0e-3 to 6.6e-3 found) the softmax between the
//!   passes is not the cause: logits, probabilities, their gradient and that of the logits in bf16, each alone, give 4e-4,
//!   0, 1.3e-3 and 1.1e-3. It is products of the factors by channel ([`prepare::Factors`] has the rest).
//! - Segments compute their states anew for each of the four walks.
//! - HGRN2's keys are `1 − e^g`, and [`prepare`] could make them from the decays it reads: they would be neither written
//!   nor read forward, and neither read, nor their gradients written and read, backward. Counted for the 340M
//!   configuration at 8 × 2048 tokens: 5 passes over 34 MB, 0.04 ms, where a layer's products take 1.9 and its recurrence
//!   0.5. Not built.
//! - By key, preparing is a fifth of the time (forward and backward): idle warps of the loader's warpgroup could do it
//!   inside the walks. On an H100 at 8 × 2048 × 32 × 128 × 128 gla's walks for dq and dk took 0.443 and 0.483 ms, 9 tensors of
//!   134 MB each at 2.6 TB/s: what is left there is bytes. At 8 × 2048 × 4 × 128 × 256 they took 0.147 and 0.204 ms for 218 MB:
//!   one warpgroup with 64 × 256 of the state walks alone on a processor, 9 and 13 µs a chunk, of which its products are one by
//!   count. Two warpgroups with half of the values each would share scores and outputs through shared memory. Not built.
//! - Of what that for dk did more in a chunk, the sums at its end were 96 exchanges between units, half of them one after
//!   the other (a division before them, with a subroutine, had the compiler check for each whether all units were there), and are
//!   28; and the states at the border, loaded in four to six turns from device memory, are fetched to the L2 cache a chunk
//!   before.
//! - By key, products in bf16 (not f16 with scales), with the state taken after a chunk, left 1 to 8 % in dg: both were
//!   changed at once. The product of the states at a border beside a product in flight: 2.86 ms forward and backward at
//!   8 × 2048 × 32 × 128 × 128 on one H100, where another gave 2.64 without.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

mod all;
pub(crate) mod bonus;
mod both;
mod engine;
mod gate;
mod gradients;
mod groups;
pub(crate) mod key;
pub(crate) mod launch;
mod loads;
mod operator;
pub(crate) mod parts;
pub(crate) mod plan;
mod prepare;
mod probabilities;
pub(crate) mod products;
mod segments;
pub(crate) mod shift;
mod slots;
pub(crate) mod states;
pub(crate) mod steps;
pub(crate) mod table;
mod walk;

use std::sync::Arc;

use burn::tensor::{DType, Tensor};

use crate::CuSeqlens;
use crate::bridge::{Planned, has_mma, is_hopper};
use crate::recurrence::{Decay, Problem};
use crate::ssd::HeadGroups;
use engine::Engine;
pub(crate) use engine::{Cores, shared_memory};
pub(crate) use launch::HopperWalk;
use plan::{Axis, Borders, KeyHeads, Roles, WalkPlan};
pub(crate) use slots::run as run_slots;
use table::Table;

/// The roles of the forward pass, and of the gradients.
const FORWARD: Roles = Roles { outer_is_value: true, against_time: false, borders: Borders::None };
const QUERIES: Roles = Roles { outer_is_value: false, against_time: false, borders: Borders::None };
const KEYS: Roles = Roles { outer_is_value: false, against_time: true, borders: Borders::None };
const VALUES: Roles = Roles { outer_is_value: true, against_time: true, borders: Borders::None };

/// The most channels that a walk compares tokens along.
const MOST_CHANNELS: usize = 256;

/// Whether this engine takes a problem: on a Hopper GPU, sizes and dtypes as in [`takes_size`].
pub(crate) fn takes(problem: &Problem) -> bool {
    takes_size(problem) && is_hopper(&problem.q.device())
}

/// Whether the kernels of [`crate::mma_walk`] are the faster ones for a problem that both engines take: see [`Cores::suits`].
pub(crate) fn prefers_mma(problem: &Problem) -> bool {
    let (keys, values) = (problem.q.dims()[3], problem.v.dims()[3]);
    Cores::suits(axis_of(&problem.decay), keys, values) == Cores::Mma
}

fn axis_of(decay: &Decay) -> Axis {
    match decay {
        Decay::Key(_) => Axis::Key,
        Decay::Token(_) => Axis::Token,
        Decay::Head(_) => Axis::Head,
        Decay::None => Axis::None,
        Decay::Value(_) => Axis::Value,
    }
}

/// Whether the engine of [`crate::mma_walk`] takes a problem: sizes and dtypes as in [`takes_size`], where the device has
/// the shared memory for them.
pub(crate) fn takes_with_mma(problem: &Problem) -> bool {
    let device = problem.q.device();
    if !takes_size(problem) || !has_mma(&device) {
        return false;
    }
    let (keys, values) = (problem.q.dims()[3], problem.v.dims()[3]);
    // As `run` divides them.
    let values = if values <= MOST_CHANNELS { values } else { values.div_ceil(32) * 16 };
    Engine::on(&device, Cores::Mma).takes(keys, values, axis_of(&problem.decay), problem.bonus.is_some())
}

/// bf16, chunks of the engine's own choice, key channels in multiples of 16 up to 256 and value channels up to 512 (256
/// where they decay), and some sequence of more than one token.
fn takes_size(problem: &Problem) -> bool {
    let (keys, values) = (problem.q.dims()[3], problem.v.dims()[3]);
    problem.q.dtype() == DType::BF16
        && problem.chunk.is_none()
        && problem.scale.abs() > f64::from(f32::MIN_POSITIVE)
        && problem.sequences.lengths().any(|n| n > 1)
        && keys.is_multiple_of(16)
        && keys <= MOST_CHANNELS
        && values.is_multiple_of(16)
        && values <= if matches!(problem.decay, Decay::Value(_)) { MOST_CHANNELS } else { 2 * MOST_CHANNELS }
}

/// Whether this engine takes the second pass of a slot memory together with the first, where it takes each.
pub(crate) fn takes_both(second: &Problem) -> bool {
    second.v.dims()[3] <= MOST_CHANNELS
}

/// Runs a problem that [`takes`] accepts.
///
/// Columns of the state are independent of each other: where a head has more value channels than a walk takes, both
/// halves become heads of their own, with the same queries, keys and decays.
pub(crate) fn run(problem: Problem, cores: Cores) -> (Tensor<4>, Tensor<4>) {
    let [b, t, h, dv] = problem.v.dims();
    let dk = problem.q.dims()[3];
    if dv <= MOST_CHANNELS {
        return run_whole(problem, cores);
    }
    let problem = problem.with_own_heads();
    let n = problem.sequences.num_sequences();
    let half = dv.div_ceil(32) * 16;
    let twice = |x: Tensor<4>| x.unsqueeze_dim::<5>(3).repeat_dim(3, 2).reshape([b, t, 2 * h, dk]);
    let decay = match problem.decay {
        Decay::None => Decay::None,
        Decay::Head(g) => Decay::Head(g.unsqueeze_dim::<2>(1).repeat_dim(1, 2).reshape([2 * h])),
        Decay::Token(g) => Decay::Token(g.unsqueeze_dim::<4>(3).repeat_dim(3, 2).reshape([b, t, 2 * h])),
        Decay::Key(g) => Decay::Key(twice(g)),
        Decay::Value(_) => unreachable!("not taken with so many values"),
    };
    // The second half may end with channels of zeros.
    let even = |x: Tensor<4>| {
        let [first, second, third, _] = x.dims();
        let options = (&x.device(), x.dtype());
        match 2 * half - dv {
            0 => x,
            rest => Tensor::cat(vec![x, Tensor::zeros([first, second, third, rest], options)], 3),
        }
    };
    let halves =
        |s: Tensor<4>| even(s).reshape([n, h, dk, 2, half]).permute([0, 1, 3, 2, 4]).reshape([n, 2 * h, dk, half]);
    let halved = Problem {
        q: twice(problem.q),
        k: twice(problem.k),
        v: even(problem.v).reshape([b, t, 2 * h, half]),
        decay,
        bonus: problem.bonus.map(|u| u.unsqueeze_dim::<3>(1).repeat_dim(1, 2).reshape([2 * h, dk])),
        state: problem.state.map(halves),
        ..problem
    };
    let (o, state) = run_whole(halved, cores);
    let state = state.reshape([n, h, 2, dk, half]).permute([0, 1, 3, 2, 4]).reshape([n, h, dk, 2 * half]);
    (o.reshape([b, t, h, 2 * half]).narrow(3, 0, dv), state.narrow(3, 0, dv))
}

/// Cuts sequences into what cubes walk, by the walk that has the fewest; so many run `at_once`.
fn cut(sequences: &CuSeqlens, heads: usize, plans: &[WalkPlan], at_once: usize) -> Table {
    let shifted = plans.iter().any(|plan| plan.exclusive);
    let longest = sequences.lengths().max().unwrap_or(0) + usize::from(shifted);
    let cubes = heads * plans.iter().map(WalkPlan::slices).min().unwrap_or(1);
    let segment = table::segment_tokens(longest, sequences.num_sequences(), cubes, at_once);
    if shifted { table::build_shifted(sequences, segment) } else { table::build(sequences, segment) }
}

/// What runs a problem that [`takes`] accepts, where it is one operator: with at most [`MOST_CHANNELS`] value channels. Its
/// inputs are q, k, v, the decay, and the initial state where there is one.
pub(crate) fn planned(problem: Problem, cores: Cores) -> Result<Planned, Box<Problem>> {
    planned_with_steps(problem, cores).map(|(_, planned)| planned)
}

/// The same, and the walk in it, which takes Δ, A and D itself: see [`steps`].
pub(crate) fn planned_with_steps(problem: Problem, cores: Cores) -> Result<(Arc<HopperWalk>, Planned), Box<Problem>> {
    if problem.v.dims()[3] > MOST_CHANNELS {
        return Err(Box::new(problem));
    }
    Ok(plan_whole(problem, cores))
}

/// [`run`], where no walk compares tokens along more than 256 channels.
fn run_whole(problem: Problem, cores: Cores) -> (Tensor<4>, Tensor<4>) {
    plan_whole(problem, cores).1.run_recurrence()
}

fn plan_whole(problem: Problem, cores: Cores) -> (Arc<HopperWalk>, Planned) {
    let Problem { op, q, k, v, groups, decay, bonus, scale, state, sequences, .. } = problem;
    let [b, t, h, dv] = v.dims();
    let [_, _, shared, dk] = q.dims();
    let key_heads = match groups {
        _ if shared == h => KeyHeads::Own,
        HeadGroups::Contiguous => KeyHeads::Contiguous(shared),
        HeadGroups::Tiled => KeyHeads::Tiled(shared),
    };
    let device = q.device().inner();
    let (axis, g) = match decay {
        Decay::Key(g) => (Axis::Key, g.into_dispatch()),
        Decay::Value(g) => (Axis::Value, g.into_dispatch()),
        Decay::Token(g) => (Axis::Token, g.into_dispatch()),
        Decay::Head(g) => (Axis::Head, g.into_dispatch()),
        // Nobody reads it. Zeros made by an operation, `linear_attn` forward took 0.417 ms at 8 × 2048 × 32 × 128 × 128 on
        // an H100, where its kernel takes 0.19; uploaded, 0.227 there and 0.202 at 8 × 2048 × 4 × 128 × 256, where a decay
        // that is given takes 0.097.
        Decay::None => (Axis::None, v.clone().without_autodiff().into_dispatch()),
    };
    let engine = Engine::on(&device, cores);
    let plan = engine.plan(FORWARD, dk, dv, axis, bonus.is_some());
    let table = cut(&sequences, h, &[plan], engine.cubes(FORWARD, dk, dv, axis, bonus.is_some()));
    let operator = HopperWalk {
        name: op,
        engine,
        axis,
        has_state: state.is_some(),
        has_bonus: bonus.is_some(),
        scale: scale as f32,
        tokens: b * t,
        rows: table.rows,
        heads: h,
        key_heads,
        keys: dk,
        values: dv,
        sequences: sequences.num_sequences(),
        items: table.items,
        chunks: table.chunks,
    };
    let mut floats = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), g];
    if let Some(state) = state {
        floats.push(state.cast(DType::F32).into_dispatch());
    }
    if let Some(bonus) = bonus {
        floats.push(bonus.cast(DType::F32).into_dispatch());
    }
    let walk = Arc::new(operator);
    let planned = Planned { operator: walk.clone(), floats, ints: Vec::new(), tables: vec![table.entries.into()] };
    (walk, planned)
}
