//! The two passes of a slot memory as one operator: what is made of the slots and their decays before a walk is made once,
//! and the probabilities between the passes come prepared for the second. See [`crate::gsa`].

use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use cubecl::prelude::{CubeCount, CubeDim};

use super::engine::{Cores, Engine};
use super::gradients::{Sides, Wanted};
use super::launch::{Decays, HopperWalk, Walk};
use super::plan::{Axis, KeyHeads};
use super::probabilities::{LANES, UNITS, add_words, probabilities};
use super::{FORWARD, cut};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, contiguous, zeros};
use crate::recurrence::{Decay, Problem};
use crate::tile::hopper::{readable, words};

/// Both passes of gsa. Inputs: q, k, v, s, g and, with `has_state`, the two memories. Outputs: o and both memories.
///
/// Saved, besides the inputs: the scores of the first pass, `2 M` bytes a token and head.
#[derive(Debug)]
pub(super) struct SlotWalk {
    pub(super) name: &'static str,
    /// By value: keys k, values s.
    pub(super) first: HopperWalk,
    /// By key: keys s, values v.
    pub(super) second: HopperWalk,
    pub(super) has_state: bool,
}

impl SlotWalk {
    /// The slots as they are written, and the decays.
    fn slots(&self, inputs: &[CubeTensor], ints: &[CubeTensor]) -> (CubeTensor, Decays) {
        let slots = readable(inputs[3].clone());
        let (_, slots, decays) = self.first.prepared(None, slots, &inputs[4], None, &ints[0], true);
        (slots, decays)
    }

    /// The softmax of the scores; or with `grads`, its gradient times what it gives: prepared to read the slots.
    fn probabilities(&self, scores: &CubeTensor, grads: Option<&CubeTensor>, decays: &Decays) -> CubeTensor {
        let [b, t, h, m] = scores.meta.shape().dims::<4>();
        let out = alloc(scores, [b, t, h, m], DType::BF16);
        let rows = b * t * h;
        probabilities::launch(
            &scores.client,
            CubeCount::new_1d((rows * LANES).div_ceil(UNITS) as u32),
            CubeDim::new_1d(UNITS as u32),
            words(scores),
            words(grads.unwrap_or(scores)),
            words(&decays.factors),
            words(&out),
            rows as u32,
            m as u32 / 2,
            grads.is_some(),
        );
        out
    }

    /// `x ← x + y`, of bf16.
    fn add(&self, x: CubeTensor, y: &CubeTensor) -> CubeTensor {
        let count = x.meta.shape().num_elements() / 2;
        add_words::launch(
            &x.client,
            CubeCount::new_1d(count.div_ceil(UNITS) as u32),
            CubeDim::new_1d(UNITS as u32),
            words(&x),
            words(y),
            count as u32,
        );
        x
    }
}

/// Both passes of gsa, of problems that the engine takes, with a softmax of the first one's outputs in the place of the
/// second one's queries. Returns o and both memories.
pub(crate) fn run(first: Problem, second: Problem, cores: Cores) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let Problem { op, q, k, v: slots, decay, state: keys, sequences, scale, .. } = first;
    let Problem { v, state: values, scale: second_scale, .. } = second;
    let Decay::Value(g) = decay else { unreachable!("the first pass decays by value") };
    let [b, t, h, dk] = q.dims();
    let (m, dv) = (slots.dims()[3], v.dims()[3]);
    let device = q.device().inner();
    let engine = Engine::on(&device, cores);
    let plans = [engine.plan(FORWARD, dk, m, Axis::Value, false), engine.plan(FORWARD, m, dv, Axis::Key, false)];
    let cubes = [engine.cubes(FORWARD, dk, m, Axis::Value, false), engine.cubes(FORWARD, m, dv, Axis::Key, false)];
    let table = cut(&sequences, h, &plans, cubes[0].min(cubes[1]));
    let walk = |axis, keys, values, scale: f64| HopperWalk {
        name: op,
        engine,
        axis,
        has_state: false,
        has_bonus: false,
        scale: scale as f32,
        tokens: b * t,
        rows: table.rows,
        heads: h,
        key_heads: KeyHeads::Own,
        keys,
        values,
        sequences: sequences.num_sequences(),
        items: table.items,
        chunks: table.chunks,
    };
    let operator = SlotWalk {
        name: op,
        first: walk(Axis::Value, dk, m, scale),
        second: walk(Axis::Key, m, dv, second_scale),
        has_state: keys.is_some(),
    };
    let size = table.entries.len();
    let table = Tensor::<1, Int>::from_data(TensorData::new(table.entries, [size]), &device);
    let mut floats = [q, k, v, slots, g].map(Tensor::into_dispatch).to_vec();
    // Both are there, or neither.
    floats.extend(keys.into_iter().chain(values).map(|state| state.cast(DType::F32).into_dispatch()));
    let mut outputs = apply(operator, floats, vec![table.into_dispatch()]).into_iter();
    let mut next = || Tensor::from_dispatch(outputs.next().expect("an output and two states"));
    (next(), next(), next())
}

impl Operator for SlotWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let state = |walk: &HopperWalk| TensorSpec::new(Shape::from(walk.state_shape()), DType::F32);
        vec![inputs[2].clone(), state(&self.first), state(&self.second)]
    }

    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[3].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let (slots, decays) = self.slots(&inputs, &ints);
        let initial = |i: usize| self.has_state.then(|| contiguous(inputs[i].clone()));
        let (keys, values) = (initial(5), initial(6));
        let pass = |walk: &HopperWalk, [q, k, v]: [&CubeTensor; 3], initial: Option<&CubeTensor>| {
            let (in_factor, last_factor) = (1.0, 1.0);
            let w = Walk { roles: FORWARD, q, k, v, initial, in_factor, last_factor, last: true, between: None };
            walk.walk(&w, &decays, None)
        };
        let [scores, keys] = pass(&self.first, [&q, &k, &slots], keys.as_ref());
        let p = self.probabilities(&scores, None, &decays);
        let [o, values] = pass(&self.second, [&p, &slots, &v], values.as_ref());
        let mut outputs = vec![o, keys, values];
        if save {
            outputs.push(scores);
        }
        outputs
    }

    /// From the second pass, whose queries' gradients are those of the probabilities, to the first, in which the gradients
    /// of the scores read the slots.
    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let [scores] = saved.try_into().expect("the scores");
        let (slots, decays) = self.slots(&inputs, &ints);
        let initial = |i: usize| self.has_state.then(|| contiguous(inputs[i].clone()));
        let (keys, values) = (initial(5), initial(6));
        let [grad_o, grad_keys, grad_values] = grads.try_into().expect("three outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), readable);
        let [grad_keys, grad_values] = [grad_keys, grad_values].map(|x| x.map(contiguous));
        let with_state = |i: usize| self.has_state && wanted[i];
        let first = Wanted {
            writing: wanted[3],
            other_reading: wanted[0],
            other_writing: wanted[1],
            gate: wanted[4],
            state: with_state(5),
            ..Default::default()
        };
        // What the first pass gives a gradient to has one through the scores.
        let through = wanted[0] || wanted[1] || wanted[3] || wanted[4] || first.state;
        let second = Wanted {
            reading: through,
            writing: wanted[3],
            other_writing: wanted[2],
            gate: wanted[4],
            state: with_state(6),
            ..Default::default()
        };

        let p = self.probabilities(&scores, None, &decays);
        let sides = Sides { reading: &p, writing: &slots, other_reading: &grad_o, other_writing: &v };
        let states = [values.as_ref(), grad_values.as_ref()];
        let of_second = self.second.gradients(sides, &decays, states, second, &inputs[4], None);
        let of_first = of_second.reading.as_ref().filter(|_| through).map(|dp| {
            let grad_scores = self.probabilities(&scores, Some(dp), &decays);
            let sides = Sides { reading: &grad_scores, writing: &slots, other_reading: &q, other_writing: &k };
            let states = [keys.as_ref(), grad_keys.as_ref()];
            self.first.gradients(sides, &decays, states, first, &inputs[4], of_second.gate)
        });
        let mut result: Vec<Option<CubeTensor>> = vec![None, None, of_second.other_writing, None, None];
        let mut state = None;
        if let Some(found) = of_first {
            result[0] = found.other_reading;
            result[1] = found.other_writing;
            result[3] = found.writing.zip(of_second.writing).map(|(x, y)| self.add(x, &y));
            result[4] = found.gate;
            state = found.state;
        }
        if self.has_state {
            result.extend([state, of_second.state]);
        }
        result
    }
}
