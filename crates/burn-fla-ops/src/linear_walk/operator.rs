//! The launches, forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};
use cubecl::prelude::{AddressType, CubeDim};

use super::plan::{DecayKind, FLAT_UNITS, WalkPlan, flat, grid};
use super::{gate, states, step, walk};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage, zeros};

/// A decayed linear recurrence on the portable engine. Inputs: q, k, v, g and, with `has_state`, the initial state.
#[derive(Debug)]
pub(super) struct LinearWalk {
    pub(super) name: &'static str,
    pub(super) decay: DecayKind,
    pub(super) has_state: bool,
    pub(super) scale: f32,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) chunks: usize,
    pub(super) sequences: usize,
    /// Every sequence has one token: without gradients the step kernel does it in one launch.
    pub(super) single_step: bool,
}

/// What a walk adds, reads and decays by.
struct Roles<'a> {
    /// Value of the row.
    a: &'a CubeTensor,
    /// Added along the inner channels.
    b: &'a CubeTensor,
    rows_are_values: bool,
    against_time: bool,
    in_scale: f32,
}

impl LinearWalk {
    /// Channels of the log decay: one, or one for each key channel.
    fn channels(&self) -> usize {
        if self.decay == DecayKind::Key { self.keys } else { 1 }
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

    fn totals_shape(&self) -> [usize; 3] {
        [self.chunks, self.heads, self.channels()]
    }

    fn address(&self) -> AddressType {
        let states = self.slots() * self.heads * self.keys * self.values;
        let tokens = self.tokens * self.heads * self.keys.max(self.values);
        AddressType::from_len(states.max(tokens))
    }

    fn plan(&self, roles: &Roles<'_>) -> WalkPlan {
        WalkPlan::new(self.decay, self.keys, self.values, roles.rows_are_values, roles.against_time)
    }

    fn totals(&self, g: &CubeTensor, table: &CubeTensor) -> CubeTensor {
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
    fn border_states(
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
            self.channels(),
            roles.against_time,
        );
        (slots, last)
    }

    fn read_out(
        &self,
        roles: &Roles<'_>,
        c: &CubeTensor,
        g: &CubeTensor,
        table: &CubeTensor,
        states: &CubeTensor,
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

    fn step(&self, [q, k, v, g]: [CubeTensor; 4], state: CubeTensor) -> Vec<CubeTensor> {
        let o = alloc(&v, v.meta.shape().dims::<4>(), v.dtype);
        let next = alloc(&v, self.state_shape(), DType::F32);
        let count = self.tokens * self.heads * self.values;
        let dtype = storage(v.dtype);
        step::step::launch(
            &q.client.clone(),
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            q.into_buffer_arg(),
            k.into_buffer_arg(),
            v.into_buffer_arg(),
            g.into_buffer_arg(),
            state.into_buffer_arg(),
            o.clone().into_buffer_arg(),
            next.clone().into_buffer_arg(),
            self.heads,
            count,
            self.scale,
            self.decay,
            self.keys,
            self.values,
            dtype,
        );
        vec![o, next]
    }

    /// The gradient of the log decay, in the shape and dtype of `like`.
    fn gate_gradient(
        &self,
        [q, k, dq, dk]: [&CubeTensor; 4],
        [forward, backward]: [&CubeTensor; 2],
        table: &CubeTensor,
        like: &CubeTensor,
    ) -> CubeTensor {
        let client = &q.client;
        let count = self.chunks * self.heads * self.keys;
        let ends = alloc(q, [self.chunks, self.heads, self.keys], DType::F32);
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
        );
        let by_key = alloc(q, q.meta.shape().dims::<4>(), DType::F32);
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
            by_key.clone().into_buffer_arg(),
            self.heads,
            count,
            self.keys,
            storage(q.dtype),
        );
        if self.decay == DecayKind::Key {
            return cast(by_key, like.dtype);
        }
        let summed = alloc(q, like.meta.shape().dims::<3>(), DType::F32);
        let count = self.tokens * self.heads;
        gate::sum_channels::launch(
            client,
            flat(count),
            CubeDim::new_1d(FLAT_UNITS),
            self.address(),
            by_key.into_buffer_arg(),
            summed.clone().into_buffer_arg(),
            count,
            self.keys,
        );
        cast(summed, like.dtype)
    }
}

fn cast(x: CubeTensor, dtype: DType) -> CubeTensor {
    burn_cubecl::kernel::cast(x, dtype)
}

fn spec<const D: usize>(shape: [usize; D], dtype: DType) -> TensorSpec {
    TensorSpec::new(Shape::from(shape), dtype)
}

impl Operator for LinearWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), spec(self.state_shape(), DType::F32)]
    }

    fn saved(&self, _inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![spec(self.slots_shape(), DType::F32), spec(self.totals_shape(), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let mut inputs = inputs.into_iter().map(contiguous);
        let mut next = || inputs.next().expect("q, k, v, g");
        let (q, k, v) = (next(), next(), next());
        let g = contiguous(cast(next(), DType::F32));
        let first = inputs.next().unwrap_or_else(|| zeros(&q, self.state_shape(), DType::F32));
        if self.single_step && !save {
            return self.step([q, k, v, g], first);
        }
        let table = contiguous(ints[0].clone());
        let totals = self.totals(&g, &table);
        let roles = Roles { a: &v, b: &k, rows_are_values: true, against_time: false, in_scale: 1.0 };
        let (borders, last) = self.border_states(&roles, &g, &table, &totals, first);
        let o = self.read_out(&roles, &q, &g, &table, &borders, self.scale, v.dtype);
        if save { vec![o, last, borders, totals] } else { vec![o, last] }
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let given = inputs[3].clone();
        let mut inputs = inputs.into_iter().map(contiguous);
        let mut next = || inputs.next().expect("q, k, v, g");
        let (q, k, v) = (next(), next(), next());
        let g = contiguous(cast(next(), DType::F32));
        let table = contiguous(ints[0].clone());
        let [borders, totals] = saved.try_into().expect("states and totals");
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), contiguous);
        let grad_state = grad_state.map_or_else(|| zeros(&v, self.state_shape(), DType::F32), contiguous);

        // Z, the gradient of the state, against time.
        let by_value = Roles { a: &grad_o, b: &q, rows_are_values: true, against_time: true, in_scale: self.scale };
        let (grad_borders, grad_first) = self.border_states(&by_value, &g, &table, &totals, grad_state);
        let grad_g = wanted[3];
        let dq = (wanted[0] || grad_g).then(|| {
            let roles = Roles { a: &k, b: &v, rows_are_values: false, against_time: false, in_scale: 1.0 };
            self.read_out(&roles, &grad_o, &g, &table, &borders, self.scale, DType::F32)
        });
        let dk = (wanted[1] || grad_g).then(|| {
            let roles = Roles { a: &q, b: &grad_o, rows_are_values: false, against_time: true, in_scale: self.scale };
            self.read_out(&roles, &v, &g, &table, &grad_borders, 1.0, DType::F32)
        });
        let dv = wanted[2].then(|| self.read_out(&by_value, &k, &g, &table, &grad_borders, 1.0, v.dtype));
        let dg = match (&dq, &dk) {
            (Some(dq), Some(dk)) if grad_g => {
                Some(self.gate_gradient([&q, &k, dq, dk], [&borders, &grad_borders], &table, &given))
            }
            _ => None,
        };
        let mut result = vec![dq.map(|x| cast(x, q.dtype)), dk.map(|x| cast(x, k.dtype)), dv, dg];
        if self.has_state {
            result.push(Some(grad_first));
        }
        result
    }
}
