//! The launches of these kernels, in the places of those of [`crate::hopper_delta`].

use burn::tensor::DType;
use cubecl::prelude::{CubeCount, CubeDim};

use super::plan::{ChainPlan, GRADIENT_UNITS, GradientChunk, PREPARE_UNITS};
use super::{chain, gradients, prepare};
use crate::bridge::{CubeTensor, alloc};
use crate::hopper_delta::operator::{Gradients, HopperDelta, Operands};
use crate::hopper_delta::plan::Task;
use crate::hopper_walk::plan::CHUNK;
use crate::mma_walk::plan::MmaPlan;
use crate::tile::hopper::words;

/// Shared memory that a cube may use where `x` is.
fn shared(x: &CubeTensor) -> usize {
    x.client.properties().hardware.max_shared_memory_size
}

impl HopperDelta {
    /// M and the scores between the tokens of each chunk.
    pub(crate) fn mma_prepare(&self, x: &Operands) {
        // SAFETY: the table has `chunks` chunks of tokens inside of the tensors, whose shapes the public function checked.
        unsafe {
            prepare::prepare::launch_unchecked(
                &x.v.client,
                CubeCount::new_1d((self.chunks * self.heads) as u32),
                CubeDim::new_1d(PREPARE_UNITS as u32),
                words(&x.q),
                words(&x.k),
                x.g.clone().into_buffer_arg(),
                x.beta.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                words(&x.inverse),
                words(&x.scores),
                self.heads as u32,
                self.groups as u32,
                self.chunks_at(),
                self.scale,
                self.keys,
                self.gated,
            );
        }
    }

    /// Walks: the output, the state that it arrives at, and the states at the chunks' borders, `[chunk, head, V, K]`.
    pub(crate) fn mma_chain(
        &self,
        task: Task,
        x: &Operands,
        v: &CubeTensor,
        initial: Option<&CubeTensor>,
    ) -> [CubeTensor; 3] {
        let heads = self.items * self.heads;
        let plan = ChainPlan::new(task, [self.keys, self.values], self.gated, heads, self.processors(v), shared(v))
            .expect("the engine was chosen by the size");
        let mut walk = plan.mma.walk;
        walk.initial = initial.is_some();
        let plan = ChainPlan { mma: MmaPlan { walk, ..plan.mma }, ..plan };
        let unused = alloc(&x.g, [32], DType::F32);
        let out = if plan.stores() { alloc(v, v.meta.shape().dims::<4>(), DType::BF16) } else { unused.clone() };
        let states = [self.items, self.heads, self.keys, walk.outer];
        let last = if walk.last { alloc(&x.g, states, DType::F32) } else { unused.clone() };
        let border = [self.chunks * self.heads, self.values, self.keys];
        let borders = if plan.with_borders() { alloc(v, border, DType::BF16) } else { unused.clone() };
        // SAFETY: as in `mma_prepare`.
        unsafe {
            chain::chain::launch_unchecked(
                &v.client,
                CubeCount::new_1d((heads * walk.slices()) as u32),
                CubeDim::new_1d(plan.mma.units() as u32),
                words(&x.q),
                words(&x.k),
                words(v),
                words(&x.inverse),
                words(&x.scores),
                words(&out),
                words(&borders),
                x.g.clone().into_buffer_arg(),
                x.table.clone().into_buffer_arg(),
                initial.unwrap_or(&unused).clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                self.heads as u32,
                self.groups as u32,
                self.scale,
                plan,
            );
        }
        [out, last, borders]
    }

    /// The gradients of all but the values and the state.
    pub(crate) fn mma_gradients(&self, x: &Operands, to: &Gradients<'_>) {
        let plan = GradientChunk::new(self.gradient_plan(), shared(&x.v)).expect("the engine was chosen by the size");
        // SAFETY: as in `mma_prepare`.
        unsafe {
            gradients::gradients::launch_unchecked(
                &x.v.client,
                CubeCount::new_1d((self.chunks * self.heads) as u32),
                CubeDim::new_1d(GRADIENT_UNITS as u32),
                words(&x.q),
                words(&x.k),
                words(to.written),
                words(to.grad_o),
                words(to.grad_v),
                words(to.states),
                words(to.grad_states),
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
                plan,
            );
        }
    }

    /// An empty tensor for the scores.
    pub(crate) fn mma_scores(&self, like: &CubeTensor) -> CubeTensor {
        alloc(like, [self.tokens, self.heads, CHUNK], DType::BF16)
    }
}
