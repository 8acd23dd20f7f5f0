//! One launch of each kernel, with the buffers and sizes of a problem.

use burn::tensor::DType;
use cubecl::prelude::{AddressType, CubeDim};

use super::ends::{self, Sum};
use super::plan::{Form, Gate, Task, WalkPlan};
use super::{columns, rows};
use crate::bridge::{CubeTensor, alloc, contiguous, storage};
use crate::linear_walk::gate::sum_channels;
use crate::linear_walk::plan::{FLAT_UNITS, flat, grid};
use crate::rows::unused;

/// A recurrence with a low-rank transition on the portable engine.
///
/// Inputs: q, k, v; a where the form is not [`Form::Key`]; the writing strength, or b; the log decay where there is one; the
/// initial state where there is one.
#[derive(Debug)]
pub(super) struct DeltaWalk {
    pub(super) name: &'static str,
    pub(super) form: Form,
    pub(super) gate: Gate,
    pub(super) has_state: bool,
    pub(super) scale: f32,
    pub(super) tokens: usize,
    /// Value heads.
    pub(super) heads: usize,
    /// Value heads that share a key head.
    pub(super) groups: usize,
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) chunks: usize,
    pub(super) sequences: usize,
}

/// The inputs as the kernels bind them. What the form has not is another buffer that is not read.
#[derive(Clone)]
pub(super) struct Inputs {
    pub(super) q: CubeTensor,
    pub(super) k: CubeTensor,
    pub(super) v: CubeTensor,
    /// The vector that reads the state, up to its sign.
    pub(super) a: CubeTensor,
    /// The writing strength, b, or the rate.
    pub(super) b: CubeTensor,
    pub(super) g: CubeTensor,
    pub(super) first: Option<CubeTensor>,
    pub(super) table: CubeTensor,
}

/// Where each input stands among those of the operator.
pub(super) struct At {
    pub(super) a: Option<usize>,
    pub(super) b: usize,
    pub(super) g: Option<usize>,
    pub(super) state: Option<usize>,
    pub(super) count: usize,
}

impl DeltaWalk {
    pub(super) fn at(&self) -> At {
        let mut count = 3;
        let mut next = |there: bool| {
            count += usize::from(there);
            there.then(|| count - 1)
        };
        let (a, b) = (next(self.form != Form::Key), next(true));
        let (g, state) = (next(self.gate != Gate::None), next(self.has_state));
        At { a, b: b.expect("always there"), g, state, count }
    }

    pub(super) fn inputs(&self, given: &[CubeTensor], ints: &[CubeTensor]) -> Inputs {
        let at = self.at();
        let get = |i: usize| contiguous(given[i].clone());
        let k = get(1);
        Inputs {
            q: get(0),
            v: get(2),
            a: at.a.map_or_else(|| k.clone(), get),
            b: get(at.b),
            g: at.g.map_or_else(|| unused(&k, 1), |i| contiguous(cast(given[i].clone(), DType::F32))),
            first: at.state.map(get),
            table: contiguous(ints[0].clone()),
            k,
        }
    }

    pub(super) fn slots(&self) -> usize {
        self.chunks + self.sequences
    }

    pub(super) fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    pub(super) fn slots_shape(&self) -> [usize; 4] {
        [self.slots(), self.heads, self.keys, self.values]
    }

    /// Elements of a plane of the workspace of value channels.
    pub(super) fn plane(&self) -> usize {
        self.tokens * self.heads * self.values
    }

    pub(super) fn address(&self) -> AddressType {
        let states = self.slots() * self.heads * self.keys * self.values;
        // The workspaces have up to five planes, and a little behind them.
        AddressType::from_len(states.max(6 * self.tokens * self.heads * self.keys.max(self.values)))
    }

    pub(super) fn plan(&self, like: &CubeTensor, rows_are_values: bool) -> WalkPlan {
        WalkPlan::new(like, self.form, self.gate, [self.keys, self.values], rows_are_values)
    }

    pub(super) fn with_time(&self, x: &Inputs, states: &CubeTensor, values: &CubeTensor, written: usize, task: Task) {
        let plan = self.plan(&x.k, true);
        let walks = if task == Task::Answers { self.chunks } else { self.sequences };
        let cubes = walks * self.heads * plan.tiles();
        let dtypes = [storage(x.k.dtype), storage(x.b.dtype), storage(values.dtype)];
        columns::with_time::launch(
            &x.k.client,
            grid(cubes),
            CubeDim::new_1d(plan.units as u32),
            self.address(),
            x.q.clone().into_buffer_arg(),
            x.k.clone().into_buffer_arg(),
            x.a.clone().into_buffer_arg(),
            x.b.clone().into_buffer_arg(),
            x.g.clone().into_buffer_arg(),
            x.table.clone().into_buffer_arg(),
            states.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            self.heads,
            self.groups,
            self.chunks,
            cubes,
            written,
            self.scale,
            task,
            plan,
            dtypes,
        );
    }

    pub(super) fn against_time(&self, x: &Inputs, states: &CubeTensor, values: &CubeTensor) {
        let plan = self.plan(&x.k, true);
        let cubes = self.sequences * self.heads * plan.tiles();
        columns::against_time::launch(
            &x.k.client,
            grid(cubes),
            CubeDim::new_1d(plan.units as u32),
            self.address(),
            x.q.clone().into_buffer_arg(),
            x.k.clone().into_buffer_arg(),
            x.a.clone().into_buffer_arg(),
            x.b.clone().into_buffer_arg(),
            x.g.clone().into_buffer_arg(),
            x.table.clone().into_buffer_arg(),
            states.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            self.heads,
            self.groups,
            self.chunks,
            cubes,
            self.plane(),
            self.scale,
            plan,
            [storage(x.k.dtype), storage(x.b.dtype)],
        );
    }

    /// The sums over value channels, with time from the states, against it from their gradients.
    pub(super) fn row_gradients(
        &self,
        x: &Inputs,
        states: &CubeTensor,
        values: &CubeTensor,
        keys: &CubeTensor,
        against: bool,
    ) {
        let plan = self.plan(&x.k, false);
        let cubes = self.chunks * self.heads * plan.tiles();
        let (first, second) = match (against, self.form) {
            (true, _) => (&x.q, &x.a),
            (false, Form::Free) => (&x.k, &x.b),
            (false, _) => (&x.k, &x.a),
        };
        rows::gradients::launch(
            &x.k.client,
            grid(cubes),
            CubeDim::new_1d(plan.units as u32),
            self.address(),
            first.clone().into_buffer_arg(),
            second.clone().into_buffer_arg(),
            x.b.clone().into_buffer_arg(),
            x.g.clone().into_buffer_arg(),
            x.table.clone().into_buffer_arg(),
            states.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            self.heads,
            self.groups,
            cubes,
            self.tokens,
            self.scale,
            against,
            plan,
            [storage(x.k.dtype), storage(x.b.dtype)],
        );
    }

    pub(super) fn copy_states(
        &self,
        from: &CubeTensor,
        to: &CubeTensor,
        table: &CubeTensor,
        last: bool,
        into_slots: bool,
    ) {
        let size = self.heads * self.keys * self.values;
        let count = self.sequences * size;
        ends::copy_states::launch(
            &from.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            from.clone().into_buffer_arg(),
            to.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            self.chunks,
            size,
            count,
            last,
            into_slots,
        );
    }

    /// Slots of states of which the first (or last) of every sequence is given.
    pub(super) fn slots_with(&self, given: &CubeTensor, table: &CubeTensor, last: bool) -> CubeTensor {
        let slots = alloc(given, self.slots_shape(), DType::F32);
        self.copy_states(given, &slots, table, last, true);
        slots
    }

    /// The last (or first) state of every sequence.
    pub(super) fn taken(&self, slots: &CubeTensor, table: &CubeTensor, last: bool) -> CubeTensor {
        let states = alloc(slots, self.state_shape(), DType::F32);
        self.copy_states(slots, &states, table, last, false);
        states
    }

    pub(super) fn widen(&self, from: &CubeTensor, to: &CubeTensor, plane: usize) {
        let count = self.plane();
        ends::widen::launch(
            &from.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            from.clone().into_buffer_arg(),
            to.clone().into_buffer_arg(),
            plane * count,
            count,
            storage(from.dtype),
        );
    }

    /// The gradient of a vector of key channels that stands in the planes of `keys`.
    pub(super) fn key_gradient(
        &self,
        like: &CubeTensor,
        keys: &CubeTensor,
        factor: &CubeTensor,
        sum: Sum,
    ) -> CubeTensor {
        let out = alloc(like, like.meta.shape().dims::<4>(), like.dtype);
        let count = self.tokens * self.heads / self.groups * self.keys;
        ends::key_gradient::launch(
            &like.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            keys.clone().into_buffer_arg(),
            factor.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.groups,
            count,
            self.keys,
            sum,
            [storage(like.dtype), storage(factor.dtype)],
        );
        out
    }

    pub(super) fn value_gradient(&self, x: &Inputs, values: &CubeTensor) -> CubeTensor {
        let out = alloc(&x.v, x.v.meta.shape().dims::<4>(), x.v.dtype);
        let count = self.plane();
        ends::value_gradient::launch(
            &x.v.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            values.clone().into_buffer_arg(),
            x.b.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count,
            self.values,
            self.form,
            [storage(x.b.dtype), storage(x.v.dtype)],
        );
        out
    }

    pub(super) fn strength_gradient(&self, x: &Inputs, values: &CubeTensor) -> CubeTensor {
        let out = alloc(&x.b, x.b.meta.shape().dims::<3>(), x.b.dtype);
        let count = self.tokens * self.heads;
        ends::strength_gradient::launch(
            &x.b.client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            values.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count,
            self.values,
            storage(x.b.dtype),
        );
        out
    }

    /// The gradient of the log decay, in the dtype given.
    pub(super) fn gate_gradient(
        &self,
        x: &Inputs,
        keys: &CubeTensor,
        [forward, backward]: [&CubeTensor; 2],
        dtype: DType,
    ) -> CubeTensor {
        let client = &x.k.client;
        let count = self.chunks * self.heads * self.keys;
        let end = self.form.key_planes() * self.tokens * self.heads * self.keys;
        ends::end_products::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            forward.clone().into_buffer_arg(),
            backward.clone().into_buffer_arg(),
            x.table.clone().into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            end,
            self.heads * self.keys,
            count,
            self.values,
        );
        let [batch, tokens, ..] = x.v.meta.shape().dims::<4>();
        let by_key = alloc(&x.k, [batch, tokens, self.heads, self.keys], DType::F32);
        ends::gate_gradient::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            x.q.clone().into_buffer_arg(),
            x.k.clone().into_buffer_arg(),
            x.a.clone().into_buffer_arg(),
            x.b.clone().into_buffer_arg(),
            x.g.clone().into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            x.table.clone().into_buffer_arg(),
            by_key.clone().into_buffer_arg(),
            self.heads,
            self.groups,
            self.tokens,
            count,
            self.keys,
            self.form,
            self.gate,
            [storage(x.k.dtype), storage(x.b.dtype)],
        );
        if self.gate == Gate::Key {
            return cast(by_key, dtype);
        }
        let summed = alloc(&x.k, [batch, tokens, self.heads], DType::F32);
        let count = self.tokens * self.heads;
        sum_channels::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            by_key.into_buffer_arg(),
            summed.clone().into_buffer_arg(),
            count,
            self.keys,
        );
        cast(summed, dtype)
    }
}

fn cast(x: CubeTensor, dtype: DType) -> CubeTensor {
    burn_cubecl::kernel::cast(x, dtype)
}
