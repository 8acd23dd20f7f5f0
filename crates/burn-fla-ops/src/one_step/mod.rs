//! One token of every sequence, as generation has it: one launch, for all recurrences with a state `[K, V]` a head.
//!
//! ```text
//! S̃ = e^g ∘ S ,   u = S_xᵀ a ,   S' = S̃ + b uᵀ + k vᵀ ,   o = scale · S'ᵀ q
//! ```
//!
//! S_x is S or S̃; `a` and `b` are there where the transition has a part of low rank, in the forms of [`delta_walk`]. For
//! [`ssd`](crate::ssd()) the kernel also makes g and v of Δ, A and x, in f32, and adds `D ∘ x`: one launch in the place of three.
//! The state is read once and written once, in place where nobody else holds it: 8 K V bytes a head, beside which the token's
//! vectors are nothing. A cube takes 64 value channels of a head, and every unit loads its 32 numbers before it uses the first.
//! Nothing is differentiated here; tracked tensors go to the kernels of sequences.
//!
//! For 64 sequences of 16 heads of 128 × 128 on an H200, whose copy moves 4.0 TB/s, 0.037 ms (gla), 0.038 (delta_rule) and
//! 0.041 (rwkv7): 1.11 to 1.21 of the floor (`benches/results/91-steps.json`). With half as many value channels a cube, and
//! half as many numbers a unit, it took 0.038, 0.039 and 0.045. With a token's vectors loaded one channel at a time, by key
//! channels in turns, rwkv7 took 0.050.

mod kernel;
mod plan;

use std::sync::Arc;

use burn::tensor::{DType, Shape, Tensor};
use cubecl::prelude::CubeDim;

use crate::CuSeqlens;
use crate::bridge::{CubeTensor, Operator, Planned, TensorSpec, alloc, contiguous, owned, storage};
use crate::linear_walk::plan::grid;
use crate::rows::address;
use crate::ssd::Skip;
use plan::StepPlan;
pub(crate) use plan::{Form, Gate};

/// A checked problem, of one token a sequence.
pub(crate) struct Problem {
    pub(crate) op: &'static str,
    pub(crate) form: Form,
    /// q, k `[B, T, G, K]` and v `[B, T, H, V]`.
    pub(crate) qkv: [Tensor<4>; 3],
    /// As the form reads it.
    pub(crate) a: Option<Tensor<4>>,
    /// The strength `[.., H]`, b, the rate, the bonus `[H, K]`, or A `[H]`.
    pub(crate) b: Option<burn::backend::DispatchTensor>,
    pub(crate) gate: (Gate, Option<burn::backend::DispatchTensor>),
    /// D, where the form has one.
    pub(crate) skip: Option<burn::backend::DispatchTensor>,
    pub(crate) scale: f64,
    pub(crate) state: Option<Tensor<4>>,
    /// Whether heads read groups of keys by turns.
    pub(crate) tiled: bool,
}

/// Whether every sequence has one token, and nothing is differentiated.
pub(crate) fn takes(sequences: &CuSeqlens, tracked: bool) -> bool {
    !tracked && sequences.total() > 0 && sequences.lengths().all(|n| n == 1)
}

/// What runs a problem that [`takes`] accepts.
pub(crate) fn planned(problem: Problem) -> Planned {
    let Problem { op, form, qkv: [q, k, v], a, b, gate: (gate, g), skip, scale, state, tiled } = problem;
    let [batch, tokens, key_heads, keys] = q.dims();
    let [.., heads, values] = v.dims();
    let sequences = batch * tokens;
    let operator = Step {
        name: op,
        form,
        gate,
        has_state: state.is_some(),
        scale: scale as f32,
        key_heads,
        state: [sequences, heads, keys, values],
        tiled,
    };
    let mut floats = vec![q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    floats.extend(a.map(Tensor::into_dispatch));
    floats.extend(b);
    floats.extend(g);
    floats.extend(skip);
    floats.extend(state.map(|state| state.cast(DType::F32).into_dispatch()));
    Planned { operator: Arc::new(operator), floats, ints: Vec::new(), tables: Vec::new() }
}

/// Inputs: q, k, v; a, b, the log decay, D and the state where they are there.
#[derive(Clone, Debug)]
struct Step {
    name: &'static str,
    form: Form,
    gate: Gate,
    has_state: bool,
    scale: f32,
    key_heads: usize,
    /// Its shape.
    state: [usize; 4],
    tiled: bool,
}

impl Operator for Step {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), TensorSpec::new(Shape::from(self.state), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let mut inputs = inputs.into_iter();
        let mut next = |there: bool| there.then(|| inputs.next().expect("as `run` gives them"));
        let (q, k, v) = (next(true), next(true), next(true));
        let [q, k] = [q, k].map(|x| contiguous(x.expect("always there")));
        // What is not there is bound as another buffer.
        let mut or_unused = |there: bool| next(there).map_or_else(|| k.clone(), contiguous);
        let a = or_unused(self.form.has_a());
        let b = or_unused(self.form.has_b());
        let g = or_unused(self.gate != Gate::None);
        let skip = or_unused(self.form.skip() != Skip::None);
        let state = next(self.has_state);
        // Written over where nobody else holds them.
        let o = owned(v.expect("always there"));
        let state = state.map_or_else(|| alloc(&q, self.state, DType::F32), owned);
        let [sequences, heads, keys, values] = self.state;
        let (plan, vector) = StepPlan::new(&q, self.form, self.gate, keys, values);
        let plan = StepPlan { has_state: self.has_state, tiled: self.tiled, ..plan };
        let cubes = sequences * heads * plan.tiles();
        kernel::step::launch(
            &q.client.clone(),
            grid(cubes),
            CubeDim::new_1d(plan.units() as u32),
            address(&[&state, &o, &q, &g]),
            vector,
            plan.vector,
            if self.form.has_writer() { plan.vector } else { 1 },
            match self.gate {
                Gate::Key => plan.vector,
                Gate::Value => vector,
                _ => 1,
            },
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            a.into_tensor_arg(),
            b.clone().into_tensor_arg(),
            g.clone().into_tensor_arg(),
            state.clone().into_tensor_arg(),
            o.clone().into_tensor_arg(),
            skip.into_tensor_arg(),
            heads,
            self.key_heads,
            cubes,
            self.scale,
            plan,
            [storage(q.dtype), storage(g.dtype), storage(b.dtype), storage(o.dtype)],
        );
        vec![o, state]
    }

    fn backward(
        &self,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        unreachable!("the step takes untracked tensors only")
    }
}
