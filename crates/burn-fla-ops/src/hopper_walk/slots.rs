//! The two passes of a slot memory as one operator: what is made of the slots and their decays before a walk is made once,
//! and the probabilities between the passes come prepared for the second. See [`crate::gsa`].

use burn::tensor::{DType, Shape, Tensor};
use cubecl::prelude::{CubeCount, CubeDim};

use super::engine::{Cores, Engine};
use super::gradients::{Sides, Wanted};
use super::launch::{Decays, Factors, HopperWalk, Walk};
use super::plan::{Axis, KeyHeads};
use super::probabilities::{LANES, UNITS, add_words, probabilities};
use super::{FORWARD, cut};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply_with, contiguous, zeros};
use crate::recurrence::{Decay, Problem};
use crate::running_softmax::launch::{Grads, RunningSums};
use crate::tile::hopper::{readable, words};

/// Both passes of gsa. Inputs: q, k, v, s, g and, with `has_state`, the two memories. Outputs: o and both memories.
///
/// With `running`, s are the scores of a running softmax, there is no g, and the initial normaliser comes last of the
/// inputs, the last one last of the outputs. Weights and decays are made of the scores before the first pass, and again
/// before the backward passes: they live as long as an operator runs.
///
/// Saved, besides the inputs: with `running`, the running sum before every 128th token, `8 M / 128` bytes a token and head.
/// The scores of the first pass, `2 M` bytes, are made again by a walk more.
#[derive(Debug)]
pub(super) struct SlotWalk {
    pub(super) name: &'static str,
    /// By value: keys k, values s.
    pub(super) first: HopperWalk,
    /// By key: keys s, values v.
    pub(super) second: HopperWalk,
    pub(super) has_state: bool,
    running: Option<RunningSums>,
    has_normaliser: bool,
}

/// What the walks read of the slots, and what a running softmax gives besides.
struct Written {
    /// As they are written.
    slots: CubeTensor,
    decays: Decays,
    /// The log decays as they came.
    log_decay: CubeTensor,
    running: Option<(CubeTensor, CubeTensor)>,
}

impl SlotWalk {
    /// Where the inputs have the memories.
    fn states_at(&self) -> usize {
        if self.running.is_some() { 4 } else { 5 }
    }

    /// Where the inputs have the initial normaliser.
    fn normaliser_at(&self) -> usize {
        self.states_at() + if self.has_state { 2 } else { 0 }
    }

    fn initial(&self, inputs: &[CubeTensor]) -> [Option<CubeTensor>; 2] {
        [0, 1].map(|i| self.has_state.then(|| contiguous(inputs[self.states_at() + i].clone())))
    }

    /// The slots as they are written, and the decays; with `save`, the sums that a backward pass needs of a running softmax.
    fn slots(&self, inputs: &[CubeTensor], ints: &[CubeTensor], save: bool) -> Written {
        let scores = readable(inputs[3].clone());
        let (slots, log_decay, running) = match &self.running {
            None => (scores, inputs[4].clone(), None),
            Some(sums) => {
                let initial = self.has_normaliser.then(|| contiguous(inputs[self.normaliser_at()].clone()));
                let table = contiguous(ints[1].clone());
                let found = sums.forward(&scores, initial.as_ref(), &table, DType::BF16, save);
                (found.weights, found.others, Some((found.end, found.borders)))
            }
        };
        let (_, slots, decays) = self.first.prepared(None, slots, &log_decay, None, &ints[0], Factors::Rounded);
        Written { slots, decays, log_decay, running }
    }

    /// A pass forward: its outputs, and its memory after the last token.
    fn pass(
        walk: &HopperWalk,
        [q, k, v]: [&CubeTensor; 3],
        initial: Option<&CubeTensor>,
        decays: &Decays,
    ) -> [CubeTensor; 2] {
        let (in_factor, last_factor) = (1.0, 1.0);
        let w = Walk { roles: FORWARD, q, k, v, initial, in_factor, last_factor, last: true, between: None };
        walk.walk(&w, decays, None)
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
///
/// With `running` the first one's values are the scores of a running softmax, its initial normaliser is this, `[N, H · M]`,
/// and the last one is returned.
pub(crate) fn run(
    first: Problem,
    second: Problem,
    cores: Cores,
    running: Option<Option<Tensor<2>>>,
) -> (Tensor<4>, Tensor<4>, Tensor<4>, Option<Tensor<2>>) {
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
    let is_running = running.is_some();
    let (running, normaliser) = match running {
        None => (None, None),
        Some(initial) => {
            // What a sequence without tokens hands on is not for kernels to write: it may be −∞.
            let empty = sequences.lengths().any(|length| length == 0);
            let nothing = || Tensor::full([sequences.num_sequences(), h * m], f32::NEG_INFINITY, (&device, DType::F32));
            let initial = initial.map(|x| x.cast(DType::F32)).or_else(|| empty.then(nothing));
            (Some(RunningSums::new(&sequences, h * m, false, &device)), initial)
        }
    };
    let (running, sums_table) = running.unzip();
    let operator = SlotWalk {
        name: op,
        first: walk(Axis::Value, dk, m, scale),
        second: walk(Axis::Key, m, dv, second_scale),
        has_state: keys.is_some(),
        running,
        has_normaliser: normaliser.is_some(),
    };
    let mut floats = [q, k, v, slots].map(Tensor::into_dispatch).to_vec();
    if !is_running {
        floats.push(g.into_dispatch());
    }
    // Both are there, or neither.
    floats.extend(keys.into_iter().chain(values).map(|state| state.cast(DType::F32).into_dispatch()));
    floats.extend(normaliser.map(Tensor::into_dispatch));
    let tables = [Some(table.entries.into()), sums_table].into_iter().flatten().collect();
    let mut outputs = apply_with(operator, floats, tables).into_iter();
    let mut next = || Tensor::from_dispatch(outputs.next().expect("an output and two states"));
    let found = (next(), next(), next());
    let normaliser = is_running.then(|| Tensor::from_dispatch(outputs.next().expect("the last normaliser")));
    (found.0, found.1, found.2, normaliser)
}

impl Operator for SlotWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let state = |walk: &HopperWalk| TensorSpec::new(Shape::from(walk.state_shape()), DType::F32);
        let end = self.running.as_ref().map(|sums| TensorSpec::new(sums.end_shape(), DType::F32));
        [inputs[2].clone(), state(&self.first), state(&self.second)].into_iter().chain(end).collect()
    }

    fn saved(&self, _: &[TensorSpec]) -> Vec<TensorSpec> {
        self.running.iter().map(|sums| TensorSpec::new(sums.borders_shape(), DType::F32)).collect()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let Written { slots, decays, running, .. } = self.slots(&inputs, &ints, save);
        let [keys, values] = self.initial(&inputs);
        let [scores, keys] = Self::pass(&self.first, [&q, &k, &slots], keys.as_ref(), &decays);
        let p = self.probabilities(&scores, None, &decays);
        let [o, values] = Self::pass(&self.second, [&p, &slots, &v], values.as_ref(), &decays);
        let (end, borders) = running.unzip();
        [o, keys, values].into_iter().chain(end).chain(borders.filter(|_| save)).collect()
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
        let Written { slots, decays, log_decay, .. } = self.slots(&inputs, &ints, false);
        let [keys, values] = self.initial(&inputs);
        // The kernel of forward, so that they are its scores to the last bit.
        let [scores, _] = Self::pass(&self.first, [&q, &k, &slots], keys.as_ref(), &decays);
        let mut grads = grads.into_iter();
        let mut grad = || grads.next().flatten();
        let grad_o = grad().map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), readable);
        let [grad_keys, grad_values, grad_end] = [grad(), grad(), grad()].map(|x| x.map(contiguous));
        let with_state = |i: usize| self.has_state && wanted[self.states_at() + i];
        let with_normaliser = self.has_normaliser && wanted[self.normaliser_at()];
        // A running softmax has a gradient through both.
        let [with_slots, with_gate] = match self.running {
            Some(_) => [wanted[3] || with_normaliser; 2],
            None => [wanted[3], wanted[4]],
        };
        let first = Wanted {
            writing: with_slots,
            other_reading: wanted[0],
            other_writing: wanted[1],
            gate: with_gate,
            state: with_state(0),
            ..Default::default()
        };
        // What the first pass gives a gradient to has one through the scores.
        let through = wanted[0] || wanted[1] || with_slots || with_gate || first.state;
        let second = Wanted {
            reading: through,
            writing: with_slots,
            other_writing: wanted[2],
            gate: with_gate,
            state: with_state(1),
            ..Default::default()
        };

        let p = self.probabilities(&scores, None, &decays);
        let sides = Sides { reading: &p, writing: &slots, other_reading: &grad_o, other_writing: &v };
        let states = [values.as_ref(), grad_values.as_ref()];
        let of_second = self.second.gradients(sides, &decays, states, second, &log_decay, None);
        let of_first = of_second.reading.as_ref().filter(|_| through).map(|dp| {
            let grad_scores = self.probabilities(&scores, Some(dp), &decays);
            let sides = Sides { reading: &grad_scores, writing: &slots, other_reading: &q, other_writing: &k };
            let states = [keys.as_ref(), grad_keys.as_ref()];
            self.first.gradients(sides, &decays, states, first, &log_decay, of_second.gate)
        });
        let (mut dq, mut dk, mut dslots, mut dg, mut state) = (None, None, None, None, None);
        if let Some(found) = of_first {
            (dq, dk, dg, state) = (found.other_reading, found.other_writing, found.gate, found.state);
            dslots = found.writing.zip(of_second.writing);
        }
        let mut result: Vec<Option<CubeTensor>> = vec![dq, dk, of_second.other_writing];
        let mut normaliser = None;
        match &self.running {
            None => result.extend([dslots.map(|(x, y)| self.add(x, &y)), dg]),
            Some(sums) => {
                let found = dslots.map(|(x, y)| {
                    let (scores, table) = (readable(inputs[3].clone()), contiguous(ints[1].clone()));
                    let borders = &saved[0];
                    let grads = Grads { weights: &[x, y], others: dg.as_ref(), end: grad_end.as_ref() };
                    sums.backward(&scores, borders, &table, grads, with_normaliser)
                });
                let (ds, first) = found.unzip();
                result.push(ds);
                normaliser = first.flatten();
            }
        }
        if self.has_state {
            result.extend([state, of_second.state]);
        }
        if self.has_normaliser {
            result.push(normaliser);
        }
        result
    }
}
