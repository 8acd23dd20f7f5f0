//! The launches, forward and backward, as the bridge calls them.

use burn::tensor::{DType, Shape};
use cubecl::prelude::{CubeCount, CubeDim, TensorMapArg, Tiled};

use super::operands::{Gradients, Inputs, Operands};
use super::plan::{CHUNK, ChainPlan, Form, GradientPlan, KeyPlan, TEAM, Task};
use super::{chain, gradients, prepare};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, zeros};
use crate::hopper_delta::groups;
use crate::hopper_delta::segments::Cut;
use crate::hopper_walk::Cores;
use crate::tile::hopper::{panel_map, readable, words};

/// Processors of a tensor's device.
fn processors(x: &CubeTensor) -> usize {
    x.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize
}

/// A delta rule with a diagonal-plus-low-rank transition. Inputs: q, k, where the form is not [`Form::Key`] a and b, v, the log
/// decays, where it is the writing strengths, and with `has_state` the initial state.
#[derive(Debug)]
pub(crate) struct HopperDplr {
    pub(crate) name: &'static str,
    pub(crate) form: Form,
    pub(crate) cores: Cores,
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
}

/// Where the inputs are.
struct At {
    v: usize,
    g: usize,
    strengths: Option<usize>,
    state: usize,
}

impl HopperDplr {
    fn at(&self) -> At {
        match self.form {
            Form::Key => At { v: 2, g: 3, strengths: Some(4), state: 5 },
            Form::Free | Form::Removal => At { v: 4, g: 5, strengths: None, state: 6 },
        }
    }

    fn cut(&self) -> Cut {
        let Self { sequences, items, heads, keys, values, .. } = *self;
        Cut { sequences, items, heads, keys, values }
    }

    fn blocks(&self) -> usize {
        self.chunks * self.heads
    }

    /// Where the table has its chunks.
    pub(crate) fn chunks_at(&self) -> u32 {
        self.cut().chunks_at()
    }

    fn key_plan(&self, g: &CubeTensor) -> KeyPlan {
        KeyPlan { form: self.form, keys: self.keys, wide: g.dtype == DType::F32, cores: self.cores }
    }

    fn inputs(&self, inputs: &[CubeTensor], ints: &[CubeTensor]) -> Inputs {
        let at = self.at();
        let float = |x: &CubeTensor| readable(burn_cubecl::kernel::cast(x.clone(), DType::F32));
        let g = &inputs[at.g];
        let g = if g.dtype == DType::BF16 { readable(g.clone()) } else { float(g) };
        let of = |i: usize| readable(inputs[if i < at.v { i } else { 1 }].clone());
        Inputs {
            qkab: [of(0), of(1), of(2), of(3)],
            v: readable(inputs[at.v].clone()),
            strengths: at.strengths.map_or_else(|| alloc(&g, [32], DType::F32), |i| float(&inputs[i])),
            g,
            initial: self.has_state.then(|| contiguous(inputs[at.state].clone())),
            table: contiguous(ints[0].clone()),
        }
    }

    fn prepare(&self, x: &Inputs, extras: bool) -> Operands {
        let plan = self.key_plan(&x.g);
        let blocks = self.blocks();
        let wide = || alloc(&x.v, [blocks, CHUNK, plan.padded()], DType::BF16);
        let square = || alloc(&x.v, [blocks, CHUNK, CHUNK], DType::BF16);
        let extra = || if extras { square() } else { alloc(&x.v, [1, CHUNK, CHUNK], DType::BF16) };
        let found = Operands {
            first: wide(),
            second: wide(),
            out: wide(),
            into: wide(),
            scores: square(),
            decays: alloc(&x.v, [blocks, plan.padded()], DType::F32),
            extras: [extra(), extra(), extra()],
        };
        let [q, k, a, b] = &x.qkab;
        let cubes = match self.cores {
            // One on each processor, which goes from chunk to chunk.
            Cores::Hopper => blocks.div_ceil(plan.prepare_teams()).min(processors(&x.v)),
            Cores::Mma => blocks,
        };
        // SAFETY: the table has `chunks` chunks of tokens inside of the tensors, whose shapes the public function checked.
        unsafe {
            prepare::prepare::launch_unchecked(
                &x.v.client,
                CubeCount::new_1d(cubes as u32),
                CubeDim::new_1d(plan.prepare_units() as u32),
                words(q),
                words(k),
                words(a),
                words(b),
                words(&x.g),
                x.strengths.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                words(&found.first),
                words(&found.second),
                words(&found.out),
                words(&found.into),
                words(&found.scores),
                found.decays.clone().into_buffer_arg(),
                words(&found.extras[0]),
                words(&found.extras[1]),
                words(&found.extras[2]),
                self.heads as u32,
                self.groups as u32,
                blocks as u32,
                self.chunks_at(),
                self.scale,
                extras,
                plan,
            );
        }
        found
    }

    /// A map of `[tokens, heads, channels]` in boxes of 64 tokens of one head.
    fn map(&self, x: &CubeTensor) -> TensorMapArg<Tiled> {
        let (heads, channels) = (self.heads, self.values);
        panel_map(x, [self.tokens, heads, channels], [heads * channels, channels, 1], [64, 1, 64])
    }

    /// A map of blocks of rows, in boxes of 64 × 64.
    fn block_map(x: &CubeTensor) -> TensorMapArg<Tiled> {
        let [count, rows, columns] = x.meta.shape().dims();
        panel_map(x, [count, rows, columns], [rows * columns, columns, 1], [1, 64, 64])
    }

    /// One warpgroup a cube where that does not lengthen the work of the busiest processor.
    fn chain_plan(&self, task: Task, processors: usize) -> ChainPlan {
        let plan = |narrow| ChainPlan::new(task, self.keys, self.values, narrow);
        let rounds =
            |plan: &ChainPlan| (self.items * self.heads * plan.slices()).div_ceil(processors * plan.resident());
        let (wide, narrow) = (plan(false), plan(true));
        if rounds(&narrow) <= rounds(&wide) { narrow } else { wide }
    }

    /// Walks every segment: the output, the state that it arrives at, and the states at the chunks' borders.
    fn chain(
        &self,
        task: Task,
        x: &Operands,
        table: &CubeTensor,
        values: &CubeTensor,
        initial: Option<&CubeTensor>,
    ) -> [CubeTensor; 3] {
        let client = values.client.clone();
        let processors = processors(values);
        // With two panels of keys the outputs' chain has two stages and a processor to itself: on an H100 it took 0.412 ms at
        // 8 × 2048 × 32 × 128 × 128, that of single warps 0.352, and at 16 × 4096 × 16 × 64 × 64 0.24 and 0.335.
        let wide = self.keys > 64 && self.values > 64 && self.sequences * self.heads >= processors;
        if self.cores == Cores::Mma || (task == Task::Outputs && wide && !self.cut().is_cut()) {
            return self.mma_chain(task, x, table, values, initial);
        }
        let plan = ChainPlan { initial: initial.is_some(), ..self.chain_plan(task, processors) };
        let work = self.items * self.heads * plan.slices();
        let unused = alloc(values, [32], DType::F32);
        let o = match plan.with_outputs() {
            true => alloc(values, values.meta.shape().dims::<4>(), DType::BF16),
            false => values.clone(),
        };
        let last = match plan.with_last() {
            true => alloc(values, [self.items, self.heads, self.keys, plan.columns()], DType::F32),
            false => unused.clone(),
        };
        let rows = plan.slices() * 64 * plan.warpgroups;
        let blocks = if plan.with_borders() { [self.blocks(), rows, plan.padded()] } else { [1, 64, 64] };
        let borders = alloc(values, blocks, DType::BF16);
        let [first, second, out, into] = x.for_walk(plan.against_time());
        // SAFETY: as in `prepare`.
        unsafe {
            chain::chain::launch_unchecked(
                &client,
                CubeCount::new_1d(work.min(processors * plan.resident()) as u32),
                CubeDim::new_1d(plan.units() as u32),
                Self::block_map(first),
                Self::block_map(second),
                Self::block_map(out),
                Self::block_map(into),
                Self::block_map(&x.scores),
                self.map(values),
                self.map(&o),
                Self::block_map(&borders),
                words(if plan.with_outputs() { &o } else { &unused }),
                x.decays.clone().into_buffer_arg(),
                table.clone().into_buffer_arg(),
                initial.unwrap_or(&unused).clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                plan,
            );
        }
        [o, last, borders]
    }
}

impl HopperDplr {
    /// The sum of the heads that share a key head.
    fn by_key_head(&self, x: CubeTensor) -> CubeTensor {
        if self.groups == 1 {
            return x;
        }
        let [batch, tokens, heads, keys] = x.meta.shape().dims::<4>();
        let sums = alloc(&x, [batch, tokens, heads / self.groups, keys], DType::BF16);
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

    /// The gradients of q, k, a and b where the form has them, of the decays, and of the writing strengths.
    fn gradients(
        &self,
        x: &Inputs,
        operands: &Operands,
        grad_o: &CubeTensor,
        states: &CubeTensor,
        grad_states: &CubeTensor,
    ) -> [CubeTensor; 6] {
        let shared = x.v.client.properties().hardware.max_shared_memory_size;
        let plan = GradientPlan::new(self.key_plan(&x.g), self.values, shared);
        let [batch, tokens, ..] = x.v.meta.shape().dims::<4>();
        let shape = [batch, tokens, self.heads, self.keys];
        let pair = self.form != Form::Key;
        let of = |there: bool| alloc(&x.v, if there { shape } else { [1, 1, 1, 32] }, DType::BF16);
        let to = Gradients {
            dq: of(true),
            dk: of(true),
            da: of(pair),
            db: of(pair),
            dg: alloc(&x.g, shape, x.g.dtype),
            dbeta: alloc(&x.g, if pair { [1, 1, 32] } else { [batch, tokens, self.heads] }, DType::F32),
        };
        self.launch_gradients(x, operands, [grad_o, states, grad_states], &to, plan);
        let Gradients { dq, dk, da, db, dg, dbeta } = to;
        [self.by_key_head(dq), self.by_key_head(dk), da, db, dg, dbeta]
    }

    fn launch_gradients(
        &self,
        x: &Inputs,
        operands: &Operands,
        [grad_o, states, grad_states]: [&CubeTensor; 3],
        to: &Gradients,
        plan: GradientPlan,
    ) {
        let [q, k, a, b] = &x.qkab;
        let [inverse, answers, passed] = &operands.extras;
        let rows = |x: &CubeTensor| x.meta.shape().dims::<3>()[1] as u32;
        // SAFETY: as in `prepare`; the operands have `chunks` chunks of each head.
        unsafe {
            gradients::gradients::launch_unchecked(
                &x.v.client,
                CubeCount::new_1d((self.chunks * self.heads) as u32),
                CubeDim::new_1d(TEAM as u32),
                words(&operands.first),
                words(&operands.second),
                words(inverse),
                words(answers),
                words(passed),
                words(&x.v),
                words(grad_o),
                words(states),
                words(grad_states),
                words(q),
                words(k),
                words(a),
                words(b),
                words(&x.g),
                x.strengths.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                words(&to.dq),
                words(&to.dk),
                words(&to.da),
                words(&to.db),
                words(&to.dg),
                to.dbeta.clone().into_buffer_arg(),
                self.heads as u32,
                self.groups as u32,
                rows(states),
                rows(grad_states),
                self.chunks_at(),
                self.scale,
                plan,
            );
        }
    }
}

impl Operator for HopperDplr {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[self.at().v].clone(), TensorSpec::new(Shape::from(self.cut().state_shape()), DType::F32)]
    }

    fn saved(&self, _: &[TensorSpec]) -> Vec<TensorSpec> {
        self.cut().saved()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let x = self.inputs(&inputs, &ints);
        let operands = self.prepare(&x, false);
        let chain = |task, initial: Option<&CubeTensor>| self.chain(task, &operands, &x.table, &x.v, initial);
        if !self.cut().is_cut() {
            let [o, last, _] = chain(Task::Outputs, x.initial.as_ref());
            return vec![o, last];
        }
        let [_, ends, _] = chain(Task::SegmentStates, None);
        let [starts, last] = self.cut().pass(false, &ends, &ends, x.initial.as_ref(), &x.table);
        let [o, ..] = chain(Task::Outputs, Some(&starts));
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
        let at = self.at();
        let x = self.inputs(&inputs, &ints);
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&x.v, x.v.meta.shape().dims::<4>(), DType::BF16), readable);
        let grad_state = grad_state.map(contiguous);
        let others = (0..at.state).any(|i| i != at.v && wanted[i]);
        let operands = self.prepare(&x, others);
        // The states from which segments are walked.
        let mut starts = (x.initial.clone(), grad_state.clone());
        let mut first = None;
        if let [transitions, states] = &saved[..] {
            let [_, ends, _] = self.chain(Task::SegmentGradients, &operands, &x.table, &grad_o, None);
            let [after, gradient] = self.cut().pass(true, &ends, transitions, grad_state.as_ref(), &x.table);
            starts = (Some(states.clone()), Some(after));
            first = Some(gradient);
        }
        let [dv, last, grad_states] = self.chain(Task::Gradients, &operands, &x.table, &grad_o, starts.1.as_ref());
        let first = first.unwrap_or(last);
        let mut result: Vec<Option<CubeTensor>> = (0..inputs.len()).map(|_| None).collect();
        if others {
            let [_, _, states] = self.chain(Task::Borders, &operands, &x.table, &x.v, starts.0.as_ref());
            let [dq, dk, da, db, dg, dbeta] = self.gradients(&x, &operands, &grad_o, &states, &grad_states);
            let like = |gradient: CubeTensor, i: usize| match gradient.dtype == inputs[i].dtype {
                true => gradient,
                false => burn_cubecl::kernel::cast(gradient, inputs[i].dtype),
            };
            for (i, gradient) in [dq, dk, da, db].into_iter().enumerate().take(at.v) {
                result[i] = Some(gradient);
            }
            result[at.g] = Some(like(dg, at.g));
            if let Some(i) = at.strengths {
                result[i] = Some(like(dbeta, i));
            }
        }
        result[at.v] = Some(dv);
        if self.has_state {
            result[at.state] = Some(first);
        }
        result
    }
}
