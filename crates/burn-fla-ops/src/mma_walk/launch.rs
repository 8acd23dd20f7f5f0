//! The launches of these kernels, in the places of those of [`crate::hopper_walk`].

use burn::tensor::DType;
use cubecl::prelude::{CubeCount, CubeDim};

use super::plan::MmaPlan;
use super::{segments, walk};
use crate::bridge::{CubeTensor, alloc};
use crate::hopper_walk::launch::{Decays, Gate, HopperWalk, Walk};
use crate::hopper_walk::plan::WalkPlan;
use crate::tile::hopper::words;

impl HopperWalk {
    /// Runs a walk: its output, and the state that it arrives at.
    pub(crate) fn mma_walk(
        &self,
        w: &Walk<'_>,
        decays: &Decays,
        gate: Option<&Gate<'_>>,
        shape: WalkPlan,
    ) -> [CubeTensor; 2] {
        let g = &decays.g;
        let plan = self.engine.mma_plan(w.roles, self.keys, self.values, self.axis, self.has_bonus);
        let plan = MmaPlan { walk: WalkPlan { stages: plan.walk.stages, ..shape }, ..plan };
        let unused = alloc(g, [32], DType::F32);
        let initial = w.initial.unwrap_or(&unused);
        let between = self.between(w, decays, &unused);
        let out = self.output_of(w, &shape);
        let last = if w.last { alloc(g, self.state_shape(), DType::F32) } else { unused.clone() };
        let products = gate.map_or(&unused, |gate| &gate.products);
        let by_channel = shape.by_channel();
        // SAFETY: as in `walk`.
        unsafe {
            walk::walk::launch_unchecked(
                &g.client,
                CubeCount::new_1d((self.items * self.heads * shape.slices()) as u32),
                CubeDim::new_1d(plan.units() as u32),
                words(w.q),
                words(w.k),
                words(w.v),
                words(gate.map_or(w.v, |gate| gate.x)),
                words(if shape.factors() { &decays.factors } else { w.v }),
                words(&out),
                words(if by_channel { products } else { &unused }),
                gate.map_or(&unused, |gate| &gate.scales).clone().into_buffer_arg(),
                if by_channel { unused.clone() } else { g.clone() }.into_buffer_arg(),
                words(g),
                decays.vectors.clone().into_buffer_arg(),
                words(&decays.vectors),
                decays.levels.clone().into_buffer_arg(),
                decays.weights.clone().into_buffer_arg(),
                decays.table.clone().into_buffer_arg(),
                initial.clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                between.into_buffer_arg(),
                words(gate.map_or(&unused, |gate| &gate.states)),
                gate.map_or(&unused, |gate| &gate.ends).clone().into_buffer_arg(),
                if by_channel { &unused } else { products }.clone().into_buffer_arg(),
                self.heads as u32,
                self.tokens as u32,
                self.scale,
                w.in_factor,
                w.last_factor,
                plan,
            );
        }
        [out, last]
    }

    /// The states at the ends of segments, to `ends`, each from none, and their decays, to `totals`.
    pub(crate) fn mma_segment_states(
        &self,
        w: &Walk<'_>,
        decays: &Decays,
        [initial, ends, totals]: [&CubeTensor; 3],
        shape: WalkPlan,
    ) {
        let g = &decays.g;
        let plan = self.engine.mma_plan(shape.roles, self.keys, self.values, self.axis, self.has_bonus);
        let plan = MmaPlan { walk: WalkPlan { stages: plan.walk.stages, ..shape }, ..plan };
        let unused = alloc(g, [32], DType::F32);
        // SAFETY: as in `walk`.
        unsafe {
            segments::segment_states::launch_unchecked(
                &g.client,
                CubeCount::new_1d((self.items * self.heads * plan.walk.slices()) as u32),
                CubeDim::new_1d(plan.units() as u32),
                words(w.k),
                words(w.v),
                if plan.walk.by_channel() { unused } else { g.clone() }.into_buffer_arg(),
                words(g),
                decays.vectors.clone().into_buffer_arg(),
                decays.levels.clone().into_buffer_arg(),
                decays.table.clone().into_buffer_arg(),
                initial.clone().into_buffer_arg(),
                ends.clone().into_buffer_arg(),
                totals.clone().into_buffer_arg(),
                self.heads as u32,
                w.in_factor,
                plan,
            );
        }
    }
}
