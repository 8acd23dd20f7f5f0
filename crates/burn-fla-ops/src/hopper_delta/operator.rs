//! The launches, forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};
use cubecl::prelude::{CubeCount, CubeDim, TensorMapArg, Tiled};

use super::plan::{CHUNK, ChainPlan, GRADIENT_UNITS, GradientPlan, PREPARE_UNITS, Task};
use super::segments::Cut;
use super::{chain, gradients, groups, prepare};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, zeros};
use crate::hopper_walk::Cores;
use crate::tile::hopper::{panel_map, readable, words};

/// A delta rule. Inputs: q, k, v, beta, with `gated` the log decays, and with `has_state` the initial state.
#[derive(Debug)]
pub(crate) struct HopperDelta {
    pub(crate) name: &'static str,
    pub(crate) gated: bool,
    pub(crate) has_state: bool,
    pub(crate) scale: f32,
    pub(crate) tokens: usize,
    /// Value heads.
    pub(crate) heads: usize,
    /// Value heads that share a key head.
    pub(crate) groups: usize,
    pub(crate) keys: usize,
    pub(crate) values: usize,
    pub(crate) sequences: usize,
    /// Segments of them all: more than sequences where heads are few.
    pub(crate) items: usize,
    pub(crate) chunks: usize,
    /// Which kernels run: these, or those of [`crate::mma_delta`].
    pub(crate) cores: Cores,
}

/// The inputs as the kernels read them.
pub(crate) struct Operands {
    pub(crate) q: CubeTensor,
    pub(crate) k: CubeTensor,
    pub(crate) v: CubeTensor,
    pub(crate) beta: CubeTensor,
    pub(crate) g: CubeTensor,
    initial: Option<CubeTensor>,
    pub(crate) table: CubeTensor,
    /// M of [`prepare`], `[tokens, HV, 64]`.
    pub(crate) inverse: CubeTensor,
    /// The scores of [`crate::mma_delta::prepare`], likewise, where its kernels run.
    pub(crate) scores: CubeTensor,
}

/// What the gradients of queries, keys, strengths and decays are computed from, and where they go.
pub(crate) struct Gradients<'a> {
    pub(crate) written: &'a CubeTensor,
    pub(crate) grad_o: &'a CubeTensor,
    pub(crate) grad_v: &'a CubeTensor,
    pub(crate) states: &'a CubeTensor,
    pub(crate) grad_states: &'a CubeTensor,
    pub(crate) dq: &'a CubeTensor,
    pub(crate) dk: &'a CubeTensor,
    pub(crate) dbeta: &'a CubeTensor,
    pub(crate) dg: &'a CubeTensor,
}

impl HopperDelta {
    pub(crate) fn cut(&self) -> Cut {
        let Self { sequences, items, heads, keys, values, .. } = *self;
        Cut { sequences, items, heads, keys, values }
    }

    pub(crate) fn state_shape(&self) -> [usize; 4] {
        self.cut().state_shape()
    }

    /// The states at the chunks' borders, whole panels, transposed.
    fn borders_shape(&self) -> [usize; 3] {
        [self.chunks * self.heads, self.values.next_multiple_of(128), self.keys.next_multiple_of(64)]
    }

    /// Where the table has its chunks.
    pub(crate) fn chunks_at(&self) -> u32 {
        self.cut().chunks_at()
    }

    fn state_index(&self) -> usize {
        4 + self.gated as usize
    }

    fn operands(&self, inputs: &[CubeTensor], ints: &[CubeTensor]) -> Operands {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let float = |x: &CubeTensor| contiguous(burn_cubecl::kernel::cast(x.clone(), DType::F32));
        let beta = float(&inputs[3]);
        let g = if self.gated { float(&inputs[4]) } else { alloc(&beta, [32], DType::F32) };
        let initial = self.has_state.then(|| contiguous(inputs[self.state_index()].clone()));
        let table = contiguous(ints[0].clone());
        let inverse = alloc(&v, [self.tokens, self.heads, CHUNK], DType::BF16);
        let scores = if self.cores == Cores::Mma { self.mma_scores(&v) } else { inverse.clone() };
        let x = Operands { q, k, v, beta, g, initial, table, inverse, scores };
        match self.cores {
            Cores::Hopper => self.prepare(&x),
            Cores::Mma => self.mma_prepare(&x),
        }
        x
    }

    fn prepare(&self, x: &Operands) {
        // SAFETY: the table has `chunks` chunks of tokens inside of the tensors, whose shapes the public function checked.
        unsafe {
            prepare::prepare::launch_unchecked(
                &x.v.client,
                CubeCount::new_1d((self.chunks * self.heads) as u32),
                CubeDim::new_1d(PREPARE_UNITS),
                self.map(&x.k, self.heads / self.groups, self.keys),
                x.g.clone().into_buffer_arg(),
                x.beta.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                words(&x.inverse),
                self.heads as u32,
                self.groups as u32,
                self.chunks_at(),
                self.gradient_plan().panels(),
                self.gated,
            );
        }
    }

    /// A map of `[tokens, heads, channels]` in boxes of 64 tokens of one head.
    fn map(&self, x: &CubeTensor, heads: usize, channels: usize) -> TensorMapArg<Tiled> {
        panel_map(x, [self.tokens, heads, channels], [heads * channels, channels, 1], [64, 1, 64])
    }

    /// A map of the states at borders, in boxes of 64 × 64.
    fn border_map(&self, x: &CubeTensor) -> TensorMapArg<Tiled> {
        let [count, rows, columns] = x.meta.shape().dims();
        panel_map(x, [count, rows, columns], [rows * columns, columns, 1], [1, 64, 64])
    }

    pub(crate) fn gradient_plan(&self) -> GradientPlan {
        GradientPlan { keys: self.keys, values: self.values, gated: self.gated, cores: self.cores }
    }

    /// Processors of the device that has `x`.
    pub(crate) fn processors(&self, x: &CubeTensor) -> usize {
        x.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize
    }

    fn plan(&self, task: Task, narrow: bool) -> ChainPlan {
        ChainPlan::new(task, self.keys, self.values, self.gated, narrow)
    }

    /// One warpgroup a cube where that does not lengthen the work of the busiest processor.
    fn chain_plan(&self, task: Task, processors: usize) -> ChainPlan {
        let rounds = |plan: &ChainPlan| (self.items * self.heads * plan.slices()).div_ceil(processors);
        let (wide, narrow) = (self.plan(task, false), self.plan(task, true));
        if rounds(&narrow) <= rounds(&wide) { narrow } else { wide }
    }

    /// Walks every segment: the output, the state that it arrives at, and the states at the chunks' borders.
    fn chain(&self, task: Task, x: &Operands, v: &CubeTensor, initial: Option<&CubeTensor>) -> [CubeTensor; 3] {
        if self.cores == Cores::Mma {
            return self.mma_chain(task, x, v, initial);
        }
        let client = v.client.clone();
        let processors = self.processors(v);
        let plan = ChainPlan { initial: initial.is_some(), ..self.chain_plan(task, processors) };
        let work = self.items * self.heads * plan.slices();
        let unused = alloc(&x.g, [32], DType::F32);
        // What is not stored is mapped over what is read.
        let out = if plan.stores() { alloc(v, v.meta.shape().dims::<4>(), DType::BF16) } else { v.clone() };
        let last = match task {
            Task::Values => unused.clone(),
            _ => alloc(&x.g, [self.items, self.heads, self.keys, plan.columns()], DType::F32),
        };
        let borders = alloc(v, if plan.with_borders() { self.borders_shape() } else { [1, 64, 64] }, DType::BF16);
        let key_heads = self.heads / self.groups;
        // SAFETY: as in `prepare`.
        unsafe {
            chain::chain::launch_unchecked(
                &client,
                CubeCount::new_1d(work.min(processors) as u32),
                CubeDim::new_1d(plan.units() as u32),
                self.map(&x.q, key_heads, self.keys),
                self.map(&x.k, key_heads, self.keys),
                self.map(v, self.heads, self.values),
                self.map(&x.inverse, self.heads, CHUNK),
                self.map(&out, self.heads, self.values),
                self.border_map(&borders),
                words(if plan.stores() { &out } else { &unused }),
                x.g.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                initial.unwrap_or(&unused).clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                self.heads as u32,
                self.groups as u32,
                self.items as u32,
                self.scale,
                plan,
            );
        }
        [out, last, borders]
    }

    /// The gradients of all but the values and the state.
    fn gradients(&self, x: &Operands, to: &Gradients<'_>) {
        let key_heads = self.heads / self.groups;
        let values = |x: &CubeTensor| self.map(x, self.heads, self.values);
        // SAFETY: as in `prepare`.
        unsafe {
            gradients::gradients::launch_unchecked(
                &x.v.client,
                CubeCount::new_1d((self.chunks * self.heads).min(self.processors(&x.v)) as u32),
                CubeDim::new_1d(GRADIENT_UNITS),
                self.map(&x.q, key_heads, self.keys),
                self.map(&x.k, key_heads, self.keys),
                values(to.written),
                values(to.grad_o),
                values(to.grad_v),
                self.border_map(to.states),
                self.border_map(to.grad_states),
                self.map(to.dq, self.heads, self.keys),
                self.map(to.dk, self.heads, self.keys),
                words(to.dq),
                words(to.dk),
                to.dbeta.clone().into_buffer_arg(),
                to.dg.clone().into_buffer_arg(),
                x.g.clone().into_buffer_arg(),
                x.beta.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                self.heads as u32,
                self.groups as u32,
                self.chunks as u32,
                self.chunks_at(),
                self.scale,
                self.gradient_plan(),
            );
        }
    }

    /// The sum of the heads that share a key head.
    fn by_key_head(&self, x: CubeTensor, like: &CubeTensor) -> CubeTensor {
        if self.groups == 1 {
            return x;
        }
        let shape = like.meta.shape().dims::<4>();
        let sums = alloc(&x, shape, DType::BF16);
        let count = sums.meta.shape().num_elements() / 2;
        groups::sum_groups::launch(
            &x.client,
            CubeCount::new_1d(count.div_ceil(groups::UNITS as usize) as u32),
            CubeDim::new_1d(groups::UNITS),
            words(&x),
            words(&sums),
            (self.keys / 2) as u32,
            self.groups as u32,
        );
        sums
    }
}

impl Operator for HopperDelta {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), TensorSpec::new(Shape::from(self.state_shape()), DType::F32)]
    }

    fn saved(&self, _: &[TensorSpec]) -> Vec<TensorSpec> {
        self.cut().saved()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let x = self.operands(&inputs, &ints);
        if !self.cut().is_cut() {
            let [o, last, _] = self.chain(Task::Outputs, &x, &x.v, x.initial.as_ref());
            return vec![o, last];
        }
        let [_, ends, _] = self.chain(Task::SegmentStates, &x, &x.v, None);
        let [starts, last] = self.cut().pass(false, &ends, &ends, x.initial.as_ref(), &x.table);
        let [o, ..] = self.chain(Task::Outputs, &x, &x.v, Some(&starts));
        let mut outputs = vec![o, last];
        if save {
            outputs.extend([ends, starts]);
        }
        outputs
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let x = self.operands(&inputs, &ints);
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&x.v, x.v.meta.shape().dims::<4>(), DType::BF16), readable);
        let grad_state = grad_state.map(contiguous);
        // The states from which segments are walked.
        let mut starts = (x.initial.clone(), grad_state.clone());
        let mut first = None;
        if let [transitions, states] = &saved[..] {
            let [_, ends, _] = self.chain(Task::SegmentGradients, &x, &grad_o, None);
            let [after, gradient] = self.cut().pass(true, &ends, transitions, grad_state.as_ref(), &x.table);
            starts = (Some(states.clone()), Some(after));
            first = Some(gradient);
        }
        let [dv, last, grad_states] = self.chain(Task::Gradients, &x, &grad_o, starts.1.as_ref());
        let first = first.unwrap_or(last);
        let others = [0, 1, 3, 4].into_iter().any(|i| i < self.state_index() && wanted[i]);
        let mut result: Vec<Option<CubeTensor>> = (0..inputs.len()).map(|_| None).collect();
        if others {
            let [written, _, states] = self.chain(Task::Values, &x, &x.v, starts.0.as_ref());
            let [b, t, ..] = x.v.meta.shape().dims::<4>();
            let shape = [b, t, self.heads, self.keys];
            let [dq, dk] = [(); 2].map(|()| alloc(&x.v, shape, DType::BF16));
            let tokens = inputs[3].meta.shape().dims::<3>();
            let dbeta = alloc(&x.g, tokens, DType::F32);
            let dg = if self.gated { alloc(&x.g, tokens, DType::F32) } else { alloc(&x.g, [32], DType::F32) };
            let to = Gradients {
                written: &written,
                grad_o: &grad_o,
                grad_v: &dv,
                states: &states,
                grad_states: &grad_states,
                dq: &dq,
                dk: &dk,
                dbeta: &dbeta,
                dg: &dg,
            };
            match self.cores {
                Cores::Hopper => self.gradients(&x, &to),
                Cores::Mma => self.mma_gradients(&x, &to),
            }
            result[0] = Some(self.by_key_head(dq, &x.q));
            result[1] = Some(self.by_key_head(dk, &x.k));
            result[3] = Some(burn_cubecl::kernel::cast(dbeta, inputs[3].dtype));
            if self.gated {
                result[4] = Some(burn_cubecl::kernel::cast(dg, inputs[4].dtype));
            }
        }
        result[2] = Some(dv);
        if self.has_state {
            result[self.state_index()] = Some(first);
        }
        result
    }
}
