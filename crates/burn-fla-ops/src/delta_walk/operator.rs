//! The launches, forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};
use cubecl::prelude::{AddressType, CubeDim};

use super::ends::{self, Sum};
use super::plan::{Form, Gate, Task, WalkPlan};
use super::{columns, rows};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, owned, storage, zeros};
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
struct Inputs {
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    /// The vector that reads the state, up to its sign.
    a: CubeTensor,
    /// The writing strength, b, or the rate.
    b: CubeTensor,
    g: CubeTensor,
    first: Option<CubeTensor>,
    table: CubeTensor,
}

/// Where each input stands among those of the operator.
struct At {
    a: Option<usize>,
    b: usize,
    g: Option<usize>,
    state: Option<usize>,
    count: usize,
}

impl DeltaWalk {
    fn at(&self) -> At {
        let mut count = 3;
        let mut next = |there: bool| {
            count += usize::from(there);
            there.then(|| count - 1)
        };
        let (a, b) = (next(self.form != Form::Key), next(true));
        let (g, state) = (next(self.gate != Gate::None), next(self.has_state));
        At { a, b: b.expect("always there"), g, state, count }
    }

    fn inputs(&self, given: &[CubeTensor], ints: &[CubeTensor]) -> Inputs {
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

    fn slots(&self) -> usize {
        self.chunks + self.sequences
    }

    fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    fn slots_shape(&self) -> [usize; 4] {
        [self.slots(), self.heads, self.keys, self.values]
    }

    /// Elements of a plane of the workspace of value channels.
    fn plane(&self) -> usize {
        self.tokens * self.heads * self.values
    }

    fn address(&self) -> AddressType {
        let states = self.slots() * self.heads * self.keys * self.values;
        // The workspaces have up to five planes, and a little behind them.
        AddressType::from_len(states.max(6 * self.tokens * self.heads * self.keys.max(self.values)))
    }

    fn plan(&self, like: &CubeTensor, rows_are_values: bool) -> WalkPlan {
        WalkPlan::new(like, self.form, self.gate, [self.keys, self.values], rows_are_values)
    }

    fn with_time(&self, x: &Inputs, states: &CubeTensor, values: &CubeTensor, written: usize, task: Task) {
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

    fn against_time(&self, x: &Inputs, states: &CubeTensor, values: &CubeTensor) {
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
    fn row_gradients(&self, x: &Inputs, states: &CubeTensor, values: &CubeTensor, keys: &CubeTensor, against: bool) {
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

    fn copy_states(&self, from: &CubeTensor, to: &CubeTensor, table: &CubeTensor, last: bool, into_slots: bool) {
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
    fn slots_with(&self, given: &CubeTensor, table: &CubeTensor, last: bool) -> CubeTensor {
        let slots = alloc(given, self.slots_shape(), DType::F32);
        self.copy_states(given, &slots, table, last, true);
        slots
    }

    /// The last (or first) state of every sequence.
    fn taken(&self, slots: &CubeTensor, table: &CubeTensor, last: bool) -> CubeTensor {
        let states = alloc(slots, self.state_shape(), DType::F32);
        self.copy_states(slots, &states, table, last, false);
        states
    }

    fn widen(&self, from: &CubeTensor, to: &CubeTensor, plane: usize) {
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
    fn key_gradient(&self, like: &CubeTensor, keys: &CubeTensor, factor: &CubeTensor, sum: Sum) -> CubeTensor {
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

    fn value_gradient(&self, x: &Inputs, values: &CubeTensor) -> CubeTensor {
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

    fn strength_gradient(&self, x: &Inputs, values: &CubeTensor) -> CubeTensor {
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
    fn gate_gradient(
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

fn spec<const D: usize>(shape: [usize; D], dtype: DType) -> TensorSpec {
    TensorSpec::new(Shape::from(shape), dtype)
}

impl Operator for DeltaWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), spec(self.state_shape(), DType::F32)]
    }

    fn saved(&self, _inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![spec(self.slots_shape(), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let mut x = self.inputs(&inputs, &ints);
        let first = x.first.take();
        // Values and states are written over where nobody else holds them: a step of generation is one launch.
        drop(inputs);
        let first = first.unwrap_or_else(|| zeros(&x.k, self.state_shape(), DType::F32));
        let values = std::mem::replace(&mut x.v, x.k.clone());
        let o = owned(values);
        if save {
            let borders = self.slots_with(&first, &x.table, false);
            self.with_time(&x, &borders, &o, 0, Task::Borders);
            let last = self.taken(&borders, &x.table, true);
            vec![o, last, borders]
        } else {
            let states = owned(first);
            self.with_time(&x, &states, &o, 0, Task::Outputs);
            vec![o, states]
        }
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let at = self.at();
        let x = self.inputs(&inputs, &ints);
        let [borders] = saved.try_into().expect("the states at the borders");
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&x.v, x.v.meta.shape().dims::<4>(), x.v.dtype), contiguous);
        let grad_state = grad_state.map_or_else(|| zeros(&x.v, self.state_shape(), DType::F32), contiguous);

        let planes = [self.form.value_planes(), self.tokens, self.heads, self.values];
        let values = alloc(&x.v, planes, DType::F32);
        self.widen(&x.v, &values, 0);
        self.widen(&grad_o, &values, 2);
        self.with_time(&x, &borders, &values, self.plane(), Task::Answers);
        let grad_borders = self.slots_with(&grad_state, &x.table, true);
        self.against_time(&x, &grad_borders, &values);

        // With the products of states and gradients at the ends of chunks behind the planes.
        let width = self.heads * self.keys;
        let keys = alloc(&x.k, [(self.form.key_planes() * self.tokens + self.chunks) * width], DType::F32);
        self.row_gradients(&x, &borders, &values, &keys, false);
        self.row_gradients(&x, &grad_borders, &values, &keys, true);

        let key = |i: usize, like: &CubeTensor, factor: &CubeTensor, first, second, scaled| {
            wanted[i].then(|| self.key_gradient(like, &keys, factor, Sum { first, second, scaled }))
        };
        let (one_added, removal) = (self.form.one_added(), self.form == Form::Removal);
        let mut result: Vec<Option<CubeTensor>> = (0..at.count).map(|_| None).collect();
        result[0] = key(0, &x.q, &x.q, Some((0, false)), None, false);
        result[1] = match self.form {
            Form::Key => key(1, &x.k, &x.k, Some((1, true)), Some(2), false),
            _ => key(1, &x.k, &x.k, None, Some(2), false),
        };
        result[2] = wanted[2].then(|| self.value_gradient(&x, &values));
        if let Some(i) = at.a {
            result[i] = match removal {
                true => key(i, &x.a, &x.b, Some((1, true)), Some(3), true),
                false => key(i, &x.a, &x.a, Some((1, one_added)), None, false),
            };
        }
        let i = at.b;
        result[i] = match one_added {
            true => wanted[i].then(|| self.strength_gradient(&x, &values)),
            false => key(i, &x.b, &x.a, None, Some(3), removal),
        };
        if let Some(i) = at.g {
            result[i] = wanted[i].then(|| self.gate_gradient(&x, &keys, [&borders, &grad_borders], inputs[i].dtype));
        }
        if let Some(i) = at.state {
            result[i] = wanted[i].then(|| self.taken(&grad_borders, &x.table, false));
        }
        result
    }
}
