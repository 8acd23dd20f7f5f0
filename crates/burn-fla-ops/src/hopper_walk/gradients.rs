//! The walks of a backward pass.

use burn::tensor::DType;

use super::launch::{Decays, Gate, HopperWalk, Walk};
use super::plan::{Axis, BORDER_WORDS, Borders, CHUNK, END_SUMS, Roles};
use super::{FORWARD, KEYS, QUERIES, VALUES};
use crate::bridge::{CubeTensor, alloc};

/// The state has two sides, that of the keys and that of the values. On each of them one tensor reads it and one is written
/// into it: q and k, and do and v. The first two fields are those of the side that decays, by value that of the values.
#[derive(Clone, Copy)]
pub(super) struct Sides<'a> {
    pub(super) reading: &'a CubeTensor,
    pub(super) writing: &'a CubeTensor,
    pub(super) other_reading: &'a CubeTensor,
    pub(super) other_writing: &'a CubeTensor,
}

/// What is wanted: gradients of the tensors of [`Sides`], of the decay, and of the initial state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) reading: bool,
    pub(super) writing: bool,
    pub(super) other_reading: bool,
    pub(super) other_writing: bool,
    pub(super) gate: bool,
    pub(super) state: bool,
}

impl Wanted {
    /// Whether walks are needed whose outputs have channels that decay.
    pub(super) fn factors(&self) -> bool {
        self.reading || self.writing || self.gate
    }
}

/// The gradients; with a bonus, that of `writing` by row (see [`super::shift`]). `reading` of a decay by value is what
/// the outputs are, and of use for the decay's gradient alone.
pub(super) struct Gradients {
    pub(super) reading: Option<CubeTensor>,
    pub(super) writing: Option<CubeTensor>,
    pub(super) other_reading: Option<CubeTensor>,
    pub(super) other_writing: Option<CubeTensor>,
    pub(super) gate: Option<CubeTensor>,
    /// With steps, where the decay's is there: `k_t · dk_t`, `[B, T, H]`.
    pub(super) key_sums: Option<CubeTensor>,
    pub(super) state: Option<CubeTensor>,
}

impl HopperWalk {
    /// Backward through a problem whose tensors are prepared. `states` are the initial one and the gradient of the last
    /// one; the decay's gradient has the form of `gate`, and by channel is added to `sum`.
    pub(super) fn gradients(
        &self,
        sides: Sides<'_>,
        decays: &Decays,
        states: [Option<&CubeTensor>; 2],
        wanted: Wanted,
        gate: &CubeTensor,
        sum: Option<CubeTensor>,
    ) -> Gradients {
        let Sides { reading, writing, other_reading, other_writing } = sides;
        let [initial, grad_state] = states;
        let (by_channel, by_value) = (self.axis.by_channel(), self.axis == Axis::Value);
        let with_gate = wanted.gate;
        if with_gate && self.takes_all_gradients() {
            return self.all_gradients(sides, decays, states, wanted, gate);
        }
        let with_reading = wanted.reading || with_gate;
        let with_writing = wanted.writing || with_gate;
        let with_other_writing = wanted.other_writing || (wanted.state && !with_writing);
        let [to_reading, to_writing, to_other_reading, to_other_writing] =
            if by_value { [FORWARD, VALUES, QUERIES, KEYS] } else { [QUERIES, KEYS, FORWARD, VALUES] };

        // The walk for dk gives two products a token: that with all of dk, and that with what later chunks contribute.
        let gate_of = |x, states: Option<&CubeTensor>, products: usize| {
            let plan = self.plan(Roles { borders: Borders::Write, ..to_reading });
            let words = plan.outer_panels() * plan.panels() * BORDER_WORDS;
            let groups = self.engine.channel_groups(&plan);
            let g = &decays.g;
            let products = if by_channel {
                alloc(reading, reading.meta.shape().dims::<4>(), DType::F16)
            } else {
                alloc(g, [products * groups, self.tokens, self.heads], DType::F32)
            };
            let states = states.cloned();
            let states = states.unwrap_or_else(|| alloc(g, [self.chunks, self.heads, 2 * words], DType::BF16));
            let sums = if by_channel { 64 * END_SUMS } else { 4 };
            let scales = if by_channel { self.chunks } else { 1 };
            let scales = alloc(g, [scales, self.heads, groups, CHUNK], DType::F32);
            let ends = alloc(g, [self.chunks, self.heads, sums * plan.outer_panels()], DType::F32);
            Gate { x, products, scales, states, ends }
        };
        let of_reading = with_gate.then(|| gate_of(reading, None, 1));
        let of_writing = of_reading.as_ref().map(|first| gate_of(writing, Some(&first.states), 2));
        let borders = |borders| if with_gate { borders } else { Borders::None };

        let with_time = |roles, q, k, v, between| {
            let (in_factor, last_factor) = (1.0, 1.0);
            Walk { roles, q, k, v, initial, in_factor, last_factor, last: false, between }
        };
        // Both walks in a direction go from the same states.
        let other = |between| with_time(to_other_reading, reading, writing, other_writing, between);
        let between = (self.is_cut() && (with_reading || wanted.other_reading))
            .then(|| self.segment_states(&other(None), decays));
        let d_reading = with_reading.then(|| {
            let roles = Roles { borders: borders(Borders::Write), ..to_reading };
            let w = with_time(roles, other_reading, other_writing, writing, between.as_ref());
            self.walk(&w, decays, of_reading.as_ref())
        });
        let d_other_reading = wanted.other_reading.then(|| self.walk(&other(between.as_ref()), decays, None));
        // `scale` is on the output of a walk: the states of those against time are gradients divided by it.
        let (in_factor, last_factor) = (self.scale.recip(), self.scale);
        let against = |roles, q, k, v, last, between| {
            let initial = grad_state;
            Walk { roles, q, k, v, initial, in_factor, last_factor, last, between }
        };
        let other = |between| against(to_other_writing, writing, reading, other_reading, wanted.state, between);
        let between =
            (self.is_cut() && (with_writing || with_other_writing)).then(|| self.segment_states(&other(None), decays));
        let roles = Roles { borders: borders(Borders::Multiply), ..to_writing };
        let writing_walk = |last| against(roles, other_writing, other_reading, reading, last, between.as_ref());
        let (d_writing, d_other_writing) = if with_writing && with_other_writing && self.takes_both_gradients() {
            let w = writing_walk(wanted.state);
            let [d_writing, d_other_writing, last] = self.walk_both(&w, writing, decays);
            (Some([d_writing, last.clone()]), Some([d_other_writing, last]))
        } else {
            let d_writing = with_writing.then(|| {
                let w = writing_walk(wanted.state && !with_other_writing);
                self.walk(&w, decays, of_writing.as_ref())
            });
            (d_writing, with_other_writing.then(|| self.walk(&other(between.as_ref()), decays, None)))
        };
        let dg = of_reading.as_ref().zip(of_writing.as_ref());
        let dg = dg.map(|(reading, writing)| self.gate_gradient(reading, writing, decays, gate, sum));
        let (dg, key_sums) = dg.map_or((None, None), |(dg, sums)| (Some(dg), sums));
        let first = d_other_writing.as_ref().or(d_writing.as_ref());
        let first = first.filter(|_| wanted.state).map(|[_, state]| state.clone());
        let output = |walked: Option<[CubeTensor; 2]>| walked.map(|[out, _]| out);
        Gradients {
            reading: output(d_reading),
            writing: output(d_writing),
            other_reading: output(d_other_reading),
            other_writing: output(d_other_writing),
            gate: dg,
            key_sums,
            state: first,
        }
    }
}
