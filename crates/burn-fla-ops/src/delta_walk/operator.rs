//! Forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};

use super::ends::Sum;
use super::launch::DeltaWalk;
use super::plan::{Form, Task};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, owned, zeros};

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
