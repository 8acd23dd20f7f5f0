//! Forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};

use super::FORWARD;
use super::gradients::{Sides, Wanted};
use super::launch::{Decays, Factors, HopperWalk, Walk};
use super::plan::Axis;
use crate::bridge::{CubeTensor, Operator, TensorSpec, contiguous, zeros};
use crate::ssd::Skip;
use crate::tile::hopper::readable;

impl HopperWalk {
    /// Forward of [`ssd`](crate::ssd()): the values are x and the decays Δ, with A, and D in the form of `by`: anything where it
    /// has none.
    pub(crate) fn forward_of_steps(
        &self,
        inputs: &[CubeTensor],
        table: &CubeTensor,
        [rates, skip]: [&CubeTensor; 2],
        by: Skip,
    ) -> Vec<CubeTensor> {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let (q, k, decays) = self.prepared(Some(q), k, &inputs[3], None, table, Factors::None);
        let decays = decays.with_steps(rates, skip, by);
        self.walk_forward([&q.expect("queries were given"), &k, &v], inputs, &decays)
    }

    /// Backward of [`Self::forward_of_steps`]: the gradients of q, k, x and the log decay, `k_t · dk_t` where the latter is
    /// there, and the gradient of the initial state. `wanted` is of q, k, x, the log decay and the state.
    pub(crate) fn backward_of_steps(
        &self,
        inputs: &[CubeTensor],
        table: &CubeTensor,
        [rates, skip]: [&CubeTensor; 2],
        by: Skip,
        grads: [Option<CubeTensor>; 2],
        wanted: [bool; 5],
    ) -> [Option<CubeTensor>; 6] {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let [reading, writing, other_writing, gate, state] = wanted;
        let wanted = Wanted { reading, writing, other_writing, gate, state, ..Default::default() };
        let initial = self.has_state.then(|| contiguous(inputs[4].clone()));
        let [grad_o, grad_state] = grads;
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), readable);
        let grad_state = grad_state.map(contiguous);
        let (reading, writing, decays) = self.prepared(Some(q), k, &inputs[3], None, table, Factors::None);
        let decays = decays.with_steps(rates, skip, by);
        let reading = reading.expect("it was given");
        let sides = Sides { reading: &reading, writing: &writing, other_reading: &grad_o, other_writing: &v };
        let states = [initial.as_ref(), grad_state.as_ref()];
        let found = self.gradients(sides, &decays, states, wanted, &inputs[3], None);
        let [dq, dk] = [found.reading, found.writing].map(|x| x.map(|x| self.over_groups(x, &reading)));
        [dq, dk, found.other_writing, found.gate, found.key_sums, found.state]
    }

    fn walk_forward(&self, [q, k, v]: [&CubeTensor; 3], inputs: &[CubeTensor], decays: &Decays) -> Vec<CubeTensor> {
        let initial = self.has_state.then(|| contiguous(inputs[4].clone()));
        let w = Walk {
            roles: FORWARD,
            q,
            k,
            v,
            initial: initial.as_ref(),
            in_factor: 1.0,
            last_factor: 1.0,
            last: true,
            between: None,
        };
        self.walk(&w, decays, None).to_vec()
    }

    /// The bonus among the inputs.
    fn bonus(&self, inputs: &[CubeTensor]) -> Option<CubeTensor> {
        self.has_bonus.then(|| contiguous(inputs[4 + usize::from(self.has_state)].clone()))
    }
}

impl Operator for HopperWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), TensorSpec::new(Shape::from(self.state_shape()), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let bonus = self.bonus(&inputs);
        let (q, k, v, decays) = if self.axis == Axis::Value {
            let (_, v, decays) = self.prepared(None, v, &inputs[3], None, &ints[0], Factors::Exact);
            (q, k, v, decays)
        } else {
            let (q, k, decays) = self.prepared(Some(q), k, &inputs[3], bonus.as_ref(), &ints[0], Factors::None);
            (q.expect("queries were given"), k, v, decays)
        };
        self.walk_forward([&q, &k, &v], &inputs, &decays)
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        _saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let by_value = self.axis == Axis::Value;
        let bonus = self.bonus(&inputs);
        let own = bonus.is_some() && (wanted[0] || wanted[1] || wanted[4 + usize::from(self.has_state)]);
        let gate = wanted[3] && !matches!(self.axis, Axis::None | Axis::Head);
        let state = self.has_state && wanted[4];
        let (dq, dk, dv) = (wanted[0], wanted[1], wanted[2]);
        let wanted = if by_value {
            Wanted { writing: dv, other_reading: dq, other_writing: dk, gate, state, ..Default::default() }
        } else {
            Wanted { reading: dq, writing: dk, other_writing: dv, gate, state, ..Default::default() }
        };

        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let initial = self.has_state.then(|| contiguous(inputs[4].clone()));
        let (queries, keys, values) = (q.clone(), k.clone(), v.clone());
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), readable);
        let grad_state = grad_state.map(contiguous);
        let grad = grad_o.clone();
        let (reading, writing, other_reading, other_writing) =
            if by_value { (grad_o, v, q, k) } else { (q, k, grad_o, v) };
        let factors = if wanted.factors() { Factors::Exact } else { Factors::None };
        let (reading, writing, decays) =
            self.prepared(Some(reading), writing, &inputs[3], bonus.as_ref(), &ints[0], factors);
        let reading = reading.expect("it was given");
        let sides = Sides {
            reading: &reading,
            writing: &writing,
            other_reading: &other_reading,
            other_writing: &other_writing,
        };
        let states = [initial.as_ref(), grad_state.as_ref()];
        let mut found = self.gradients(sides, &decays, states, wanted, &inputs[3], None);
        let mut grad_bonus = None;
        if let Some(bonus) = &bonus {
            let (dq, dk) = (found.reading.take().filter(|_| dq), found.writing.take().filter(|_| dk));
            if own {
                let inputs = [&queries, &keys, &values, &grad, bonus];
                let (dq, dk, du) = self.own_gradients(inputs, dq, dk, &decays.table);
                (found.reading, found.writing, grad_bonus) = (dq, dk, Some(du));
            }
        }
        let mut result = if by_value {
            vec![found.other_reading, found.other_writing, found.writing, found.gate]
        } else {
            let shared = |x: Option<CubeTensor>| x.map(|x| self.over_groups(x, &queries));
            vec![shared(found.reading), shared(found.writing), found.other_writing, found.gate]
        };
        if self.has_state {
            result.push(found.state);
        }
        if self.has_bonus {
            result.push(grad_bonus);
        }
        result
    }
}
