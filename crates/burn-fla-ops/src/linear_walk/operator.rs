//! Forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};

use super::launch::{LinearWalk, Roles, cast};
use super::plan::DecayKind;
use crate::bridge::{CubeTensor, Operator, TensorSpec, contiguous, zeros};

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
        let [q, k, v] = [0, 1, 2].map(|i| contiguous(inputs[i].clone()));
        let g = contiguous(cast(inputs[3].clone(), DType::F32));
        let bonus = self.bonus(&inputs, &g);
        let first = self.has_state.then(|| contiguous(inputs[4].clone()));
        let first = first.unwrap_or_else(|| zeros(&q, self.state_shape(), DType::F32));
        let table = contiguous(ints[0].clone());
        let totals = self.totals(&g, &table);
        let roles = Roles { a: &v, b: &k, rows_are_values: true, against_time: false, in_scale: 1.0 };
        let (borders, last) = self.border_states(&roles, &g, &table, &totals, first);
        let o = self.read_out(&roles, &q, &g, &table, [&borders, &bonus], self.scale, v.dtype);
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
        let [q, k, v] = [0, 1, 2].map(|i| contiguous(inputs[i].clone()));
        let g = contiguous(cast(inputs[3].clone(), DType::F32));
        let bonus = self.bonus(&inputs, &g);
        let table = contiguous(ints[0].clone());
        let [borders, totals] = saved.try_into().expect("states and totals");
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), contiguous);
        let grad_state = grad_state.map_or_else(|| zeros(&v, self.state_shape(), DType::F32), contiguous);

        // Z, the gradient of the state, against time.
        let reading = Roles { a: &grad_o, b: &q, rows_are_values: true, against_time: true, in_scale: self.scale };
        let (grad_borders, grad_first) = self.border_states(&reading, &g, &table, &totals, grad_state);
        let grad_g = wanted[3];
        let by_value = self.decay == DecayKind::Value;
        // What the decay's gradient is made of is read along its own axis.
        let with_keys = grad_g && !by_value;
        let dq = (wanted[0] || with_keys).then(|| {
            let roles = Roles { a: &k, b: &v, rows_are_values: false, against_time: false, in_scale: 1.0 };
            self.read_out(&roles, &grad_o, &g, &table, [&borders, &bonus], self.scale, DType::F32)
        });
        let dk = (wanted[1] || with_keys).then(|| {
            let roles = Roles { a: &q, b: &grad_o, rows_are_values: false, against_time: true, in_scale: self.scale };
            self.read_out(&roles, &v, &g, &table, [&grad_borders, &bonus], 1.0, DType::F32)
        });
        let with_values = grad_g && by_value;
        let dv = (wanted[2] || with_values).then(|| {
            let dtype = if with_values { DType::F32 } else { v.dtype };
            self.read_out(&reading, &k, &g, &table, [&grad_borders, &bonus], 1.0, dtype)
        });
        let o = with_values.then(|| {
            let roles = Roles { a: &v, b: &k, rows_are_values: true, against_time: false, in_scale: 1.0 };
            self.read_out(&roles, &q, &g, &table, [&borders, &bonus], self.scale, DType::F32)
        });
        let (states, given) = ([&borders, &grad_borders], &inputs[3]);
        let dg = match (&dq, &dk, &o, &dv) {
            (_, _, Some(o), Some(dv)) => Some(self.gate_gradient([&grad_o, &v, o, dv], states, &table, given)),
            (Some(dq), Some(dk), _, _) if with_keys => {
                Some(self.gate_gradient([&q, &k, dq, dk], states, &table, given))
            }
            _ => None,
        };
        let weights = self.has_bonus.then(|| self.pair_weights(&grad_o, &v));
        let (dq, dk) = match &weights {
            None => (dq.map(|x| cast(x, q.dtype)), dk.map(|x| cast(x, k.dtype))),
            Some(weights) => (
                dq.map(|y| self.add_undecayed([&k, &y, weights, &bonus, &table], false)),
                dk.map(|y| self.add_undecayed([&q, &y, weights, &bonus, &table], true)),
            ),
        };
        let mut result = vec![dq, dk, dv.map(|x| cast(x, v.dtype)), dg];
        if self.has_state {
            result.push(Some(grad_first));
        }
        if let Some(weights) = &weights {
            result.push(Some(self.bonus_gradient([&q, &k, weights, &table])));
        }
        result
    }
}
