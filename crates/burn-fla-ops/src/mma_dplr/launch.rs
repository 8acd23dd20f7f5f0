//! The launches of these kernels, in the places of those of [`crate::hopper_dplr`].

use burn::tensor::DType;
use cubecl::prelude::{CubeCount, CubeDim};

use super::plan::{ChainPlan, GradientRoom};
use super::{chain, gradients};
use crate::bridge::{CubeTensor, alloc};
use crate::hopper_dplr::operands::{Gradients, Inputs, Operands};
use crate::hopper_dplr::operator::HopperDplr;
use crate::hopper_dplr::plan::{GradientPlan, TEAM, Task};
use crate::mma_walk::plan::MmaPlan;
use crate::tile::hopper::words;

impl HopperDplr {
    /// Walks every sequence: the output, the state that it arrives at, and the states at the chunks' borders.
    pub(crate) fn mma_chain(
        &self,
        task: Task,
        x: &Operands,
        table: &CubeTensor,
        values: &CubeTensor,
        initial: Option<&CubeTensor>,
    ) -> [CubeTensor; 3] {
        let hardware = &values.client.properties().hardware;
        let processors = hardware.num_streaming_multiprocessors.unwrap_or(132) as usize;
        let heads = self.sequences * self.heads;
        let sizes = [self.keys, self.values];
        let plan = ChainPlan::new(task, sizes, heads, processors, hardware.max_shared_memory_size)
            .expect("the engine was chosen by the size");
        let mut walk = plan.mma.walk;
        walk.initial = initial.is_some();
        let plan = ChainPlan { mma: MmaPlan { walk, ..plan.mma }, ..plan };
        let unused = alloc(values, [32], DType::F32);
        let out = match plan.with_outputs() {
            true => alloc(values, values.meta.shape().dims::<4>(), DType::BF16),
            false => unused.clone(),
        };
        let last = match walk.last {
            true => alloc(values, [self.sequences, self.heads, self.keys, self.values], DType::F32),
            false => unused.clone(),
        };
        let blocks = if plan.with_borders() { self.chunks * self.heads } else { 1 };
        let borders = alloc(values, [blocks, plan.border_rows(), plan.padded()], DType::BF16);
        let [first, second, outer, into] = x.for_walk(plan.against_time());
        // SAFETY: as in `prepare`; the operands have `chunks` chunks of each head.
        unsafe {
            chain::chain::launch_unchecked(
                &values.client,
                CubeCount::new_1d((heads * walk.slices()) as u32),
                CubeDim::new_1d(plan.mma.units() as u32),
                words(first),
                words(second),
                words(outer),
                words(into),
                words(&x.scores),
                words(values),
                words(&out),
                words(&borders),
                words(&x.decays),
                table.clone().into_buffer_arg(),
                initial.unwrap_or(&unused).clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                self.heads as u32,
                plan,
            );
        }
        [out, last, borders]
    }

    /// The gradients of all but the values and the state.
    pub(crate) fn mma_gradients(
        &self,
        x: &Inputs,
        operands: &Operands,
        [grad_o, states, grad_states]: [&CubeTensor; 3],
        to: &Gradients,
        shape: GradientPlan,
    ) {
        let [q, k, a, b] = &x.qkab;
        let [inverse, answers, passed] = &operands.extras;
        let rows = |x: &CubeTensor| x.meta.shape().dims::<3>()[1] as u32;
        // SAFETY: as in `mma_chain`.
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
                GradientRoom { shape },
            );
        }
    }
}
