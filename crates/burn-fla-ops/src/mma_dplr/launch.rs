//! The launches of these kernels, in the places of those of [`crate::hopper_dplr`].

use burn::tensor::DType;
use cubecl::prelude::{CubeCount, CubeDim};

use super::chain;
use super::plan::ChainPlan;
use crate::bridge::{CubeTensor, alloc};
use crate::hopper_dplr::operands::Operands;
use crate::hopper_dplr::operator::HopperDplr;
use crate::hopper_dplr::plan::Task;
use crate::mma_walk::plan::MmaPlan;
use crate::tile::hopper::words;

impl HopperDplr {
    /// Walks every segment: the output, the state that it arrives at, and the states at the chunks' borders.
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
        let heads = self.items * self.heads;
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
            true => alloc(values, [self.items, self.heads, self.keys, walk.outer], DType::F32),
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
}
