//! One launch of each kernel, with the buffers and sizes of a problem.

use burn::tensor::DType;
use cubecl::prelude::{AddressType, CubeDim};

use super::plan::{DecayKind, FLAT_UNITS, WalkPlan, flat, grid};
use super::{gate, states, walk};
use crate::bridge::{CubeTensor, alloc, contiguous, storage};
use crate::rows::sum_rows;

/// A decayed linear recurrence on the portable engine. Inputs: q, k, v, g, with `has_state` the initial state and with
/// `has_bonus` the bonus, `[H, K]`.
#[derive(Debug)]
pub(super) struct LinearWalk {
    pub(super) name: &'static str,
    pub(super) decay: DecayKind,
    pub(super) has_state: bool,
    pub(super) has_bonus: bool,
    pub(super) scale: f32,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) chunks: usize,
    pub(super) sequences: usize,
}

/// What a walk adds, reads and decays by.
pub(super) struct Roles<'a> {
    /// Value of the row.
    pub(super) a: &'a CubeTensor,
    /// Added along the inner channels.
    pub(super) b: &'a CubeTensor,
    pub(super) rows_are_values: bool,
    pub(super) against_time: bool,
    pub(super) in_scale: f32,
}

impl LinearWalk {
    /// Channels of the log decay: one, or one for each key or value channel.
    fn channels(&self) -> usize {
        match self.decay {
            DecayKind::Head | DecayKind::Token => 1,
            DecayKind::Key => self.keys,
            DecayKind::Value => self.values,
        }
    }

    fn slots(&self) -> usize {
        self.chunks + self.sequences
    }

    pub(super) fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    pub(super) fn slots_shape(&self) -> [usize; 4] {
        [self.slots(), self.heads, self.keys, self.values]
    }

    pub(super) fn totals_shape(&self) -> [usize; 3] {
        [self.chunks, self.heads, self.channels()]
    }

    fn address(&self) -> AddressType {
        let states = self.slots() * self.heads * self.keys * self.values;
        let tokens = self.tokens * self.heads * self.keys.max(self.values);
        AddressType::from_len(states.max(tokens))
    }

    fn plan(&self, roles: &Roles<'_>) -> WalkPlan {
        let plan = WalkPlan::new(self.decay, self.keys, self.values, roles.rows_are_values, roles.against_time);
        WalkPlan { exclusive: self.has_bonus, delayed: self.has_bonus && !roles.rows_are_values, ..plan }
    }

    /// The bonus among the inputs, or another buffer that is not read.
    pub(super) fn bonus(&self, inputs: &[CubeTensor], other: &CubeTensor) -> CubeTensor {
        let at = 4 + usize::from(self.has_state);
        if self.has_bonus { contiguous(inputs[at].clone()) } else { other.clone() }
    }

    pub(super) fn totals(&self, g: &CubeTensor, table: &CubeTensor) -> CubeTensor {
        let out = alloc(g, self.totals_shape(), DType::F32);
        let count = self.chunks * self.heads * self.channels();
        states::totals::launch(
            &g.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            g.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.heads,
            count,
            self.decay,
            self.channels(),
        );
        out
    }

    /// The states at all chunk borders, and the one that the walk arrives at.
    pub(super) fn border_states(
        &self,
        roles: &Roles<'_>,
        g: &CubeTensor,
        table: &CubeTensor,
        totals: &CubeTensor,
        first: CubeTensor,
    ) -> (CubeTensor, CubeTensor) {
        let plan = self.plan(roles);
        let slots = alloc(g, self.slots_shape(), DType::F32);
        let cubes = self.chunks * self.heads * plan.row_tiles();
        walk::local_state::launch(
            &g.client,
            grid(cubes),
            CubeDim::new_1d(plan.units() as u32),
            self.address(),
            roles.a.clone().into_buffer_arg(),
            roles.b.clone().into_buffer_arg(),
            g.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            slots.clone().into_buffer_arg(),
            self.heads,
            cubes,
            roles.in_scale,
            plan,
            storage(roles.a.dtype),
        );
        let last = alloc(g, self.state_shape(), DType::F32);
        let count = self.state_shape().iter().product();
        states::pass_states::launch(
            &g.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            slots.clone().into_buffer_arg(),
            totals.clone().into_buffer_arg(),
            first.into_buffer_arg(),
            table.clone().into_buffer_arg(),
            last.clone().into_buffer_arg(),
            self.heads,
            self.chunks,
            count,
            self.keys,
            self.values,
            self.decay,
            self.channels(),
            roles.against_time,
        );
        (slots, last)
    }

    pub(super) fn read_out(
        &self,
        roles: &Roles<'_>,
        c: &CubeTensor,
        g: &CubeTensor,
        table: &CubeTensor,
        [states, bonus]: [&CubeTensor; 2],
        out_scale: f32,
        dtype: DType,
    ) -> CubeTensor {
        let plan = self.plan(roles);
        let shape = roles.a.meta.shape().dims::<4>();
        let y = alloc(g, shape, dtype);
        let cubes = self.chunks * self.heads * plan.row_tiles();
        walk::read_out::launch(
            &g.client,
            grid(cubes),
            CubeDim::new_1d(plan.units() as u32),
            self.address(),
            roles.a.clone().into_buffer_arg(),
            roles.b.clone().into_buffer_arg(),
            c.clone().into_buffer_arg(),
            g.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            states.clone().into_buffer_arg(),
            bonus.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            self.heads,
            cubes,
            roles.in_scale,
            out_scale,
            plan,
            [storage(roles.a.dtype), storage(dtype)],
        );
        y
    }
    /// The gradient of the log decay, in the shape and dtype of `like`; what q and k stand for with a decay by value,
    /// [`gate::gate_gradient`] says.
    pub(super) fn gate_gradient(
        &self,
        [q, k, dq, dk]: [&CubeTensor; 4],
        [forward, backward]: [&CubeTensor; 2],
        table: &CubeTensor,
        like: &CubeTensor,
    ) -> CubeTensor {
        let client = &q.client;
        let by_value = self.decay == DecayKind::Value;
        let channels = if by_value { self.values } else { self.keys };
        let count = self.chunks * self.heads * channels;
        let ends = alloc(q, [self.chunks, self.heads, channels], DType::F32);
        gate::end_products::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            forward.clone().into_buffer_arg(),
            backward.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            ends.clone().into_buffer_arg(),
            self.heads,
            count,
            self.keys,
            self.values,
            by_value,
        );
        let by_channel = alloc(q, q.meta.shape().dims::<4>(), DType::F32);
        gate::gate_gradient::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            q.clone().into_buffer_arg(),
            k.clone().into_buffer_arg(),
            dq.clone().into_buffer_arg(),
            dk.clone().into_buffer_arg(),
            ends.into_buffer_arg(),
            table.clone().into_buffer_arg(),
            by_channel.clone().into_buffer_arg(),
            self.heads,
            count,
            channels,
            self.has_bonus,
            storage(q.dtype),
        );
        if matches!(self.decay, DecayKind::Key | DecayKind::Value) {
            return cast(by_channel, like.dtype);
        }
        let summed = alloc(q, like.meta.shape().dims::<3>(), DType::F32);
        let count = self.tokens * self.heads;
        gate::sum_channels::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            by_channel.into_buffer_arg(),
            summed.clone().into_buffer_arg(),
            count,
            self.keys,
        );
        cast(summed, like.dtype)
    }
}

impl LinearWalk {
    /// [`gate::pair_weights`].
    pub(super) fn pair_weights(&self, grad_o: &CubeTensor, v: &CubeTensor) -> CubeTensor {
        let weights = alloc(v, [2, self.tokens, self.heads], DType::F32);
        let count = self.tokens * self.heads;
        gate::pair_weights::launch(
            &v.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            grad_o.clone().into_buffer_arg(),
            v.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            self.heads,
            count,
            self.scale,
            self.values,
            storage(v.dtype),
        );
        weights
    }

    /// [`gate::add_undecayed`].
    pub(super) fn add_undecayed(&self, [x, y, weights, bonus, table]: [&CubeTensor; 5], of_keys: bool) -> CubeTensor {
        let out = alloc(x, x.meta.shape().dims::<4>(), x.dtype);
        let count = self.chunks * self.heads * self.keys;
        gate::add_undecayed::launch(
            &x.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            x.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            bonus.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.heads,
            self.tokens,
            count,
            self.keys,
            of_keys,
            storage(x.dtype),
        );
        out
    }

    /// The gradient of the bonus.
    pub(super) fn bonus_gradient(&self, [q, k, weights, table]: [&CubeTensor; 4]) -> CubeTensor {
        let sums = alloc(q, [self.chunks, self.heads * self.keys], DType::F32);
        let count = self.chunks * self.heads * self.keys;
        gate::bonus_gradient::launch(
            &q.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            q.clone().into_buffer_arg(),
            k.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            self.heads,
            count,
            self.keys,
            storage(q.dtype),
        );
        sum_rows(&sums, 0, [self.heads, self.keys])
    }
}

pub(super) fn cast(x: CubeTensor, dtype: DType) -> CubeTensor {
    burn_cubecl::kernel::cast(x, dtype)
}
