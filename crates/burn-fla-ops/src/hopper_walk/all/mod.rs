//! All gradients of a problem with a decay by token in one walk against time, where a head has no more channels than a
//! warpgroup walks.
//!
//! ```text
//! dk_i = scale (e^{G_last − G_i} v_i Zᵀ + Σ_{j ≥ i} e^{G_j − G_i} (v_i · do_j) q_j)
//! dv_i = scale (e^{G_last − G_i} Z k_i  + Σ_{j ≥ i} e^{G_j − G_i} (k_i · q_j) do_j)        Z: [K, V], the gradient of the state
//! dq_i = scale (e^{G_i} S do_i          + Σ_{j ≤ i} e^{G_i − G_j} (do_i · v_j) k_j)        S: [K, V], before the chunk
//! ```
//!
//! The states S at the borders of chunks come from a walk with time that does nothing else ([`borders`]): the decay's
//! gradient needs them here, so that dq takes nothing more from memory. Counted with K = V = 64 and in tensors of `B·T·H·K`
//! bf16 (a state at a border is as large as a chunk of one): 3 for the states, 8 for the rest, where a walk for dq with the
//! states and one for dk and dv are 13. What the decay's gradient is summed up from ([`super::gate`]) stays in shared memory.

mod borders;
mod loader;
mod walk;

use burn::tensor::DType;
use cubecl::prelude::*;

use super::gradients::{Gradients, Sides, Wanted};
use super::launch::{Decays, HopperWalk, Walk};
use super::plan::{Axis, CHUNK, WalkPlan};
use super::{KEYS, QUERIES};
use crate::bridge::{CubeTensor, alloc};
use crate::tile::hopper::words;

/// Where the numbers of which a chunk's gradient of the decay is summed up have one of each warp: behind two a token.
const ACROSS: usize = 2 * CHUNK;
/// Where those of a token's keys stand, with steps.
const KEY_SUMS: usize = ACROSS + 4;

/// How many there are.
fn sums(plan: &WalkPlan) -> usize {
    KEY_SUMS + if plan.steps.is_some() { CHUNK } else { 0 }
}

impl HopperWalk {
    /// Whether [`Self::all_gradients`] takes this problem.
    pub(super) fn takes_all_gradients(&self) -> bool {
        self.axis == Axis::Token && self.takes_both_gradients()
    }

    /// [`Self::gradients`] in one walk, with the decay's.
    pub(super) fn all_gradients(
        &self,
        sides: Sides<'_>,
        decays: &Decays,
        states: [Option<&CubeTensor>; 2],
        wanted: Wanted,
        gate: &CubeTensor,
    ) -> Gradients {
        let Sides { reading: q, writing: k, other_reading: grad, other_writing: v } = sides;
        let [initial, grad_state] = states;
        let borders = self.borders(&sides, decays, initial);
        let (in_factor, last_factor) = (self.scale.recip(), self.scale);
        let w = Walk {
            roles: KEYS,
            q: v,
            k: grad,
            v: q,
            initial: grad_state,
            in_factor,
            last_factor,
            last: wanted.state,
            between: None,
        };
        let (initial_grad, steps) = (grad_state.is_some(), decays.steps);
        let plan = WalkPlan { initial: initial_grad, last: wanted.state, steps, ..self.plan(KEYS) };
        let plan = plan.paired(self.heads, self.items, self.engine.processors).with_all();
        let g = &decays.g;
        let unused = alloc(g, [32], DType::F32);
        let between = self.between(&w, decays, &unused);
        let [b, t, _, _] = v.meta.shape().dims::<4>();
        let [dq, dk] = [q, k].map(|x| alloc(x, [b, t, self.heads, self.keys], x.dtype));
        let dv = alloc(v, [b, t, self.heads, self.values], v.dtype);
        let dg = alloc(g, gate.meta.shape().dims::<3>(), DType::F32);
        let key_sums = steps.map(|_| alloc(g, gate.meta.shape().dims::<3>(), DType::F32));
        let last = if wanted.state { alloc(g, self.state_shape(), DType::F32) } else { unused.clone() };
        // SAFETY: rows, states and sums are indexed inside of what the table and the shapes, checked by the public
        // function, say; the buffers above have these sizes.
        unsafe {
            walk::walk_all::launch_unchecked(
                &g.client,
                self.cubes_of(&plan),
                CubeDim::new_1d(plan.units() as u32),
                self.map(q),
                self.map(k),
                self.map(v),
                self.map(grad),
                self.map(&borders),
                self.map(&dq),
                self.map(&dk),
                self.map(&dv),
                words(&dq),
                words(&dk),
                words(&dv),
                dg.clone().into_buffer_arg(),
                key_sums.as_ref().unwrap_or(&unused).clone().into_buffer_arg(),
                g.clone().into_buffer_arg(),
                words(g),
                decays.vectors.clone().into_buffer_arg(),
                decays.weights.clone().into_buffer_arg(),
                decays.table.clone().into_buffer_arg(),
                grad_state.unwrap_or(&unused).clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                between.into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                self.scale,
                in_factor,
                last_factor,
                plan,
            );
        }
        Gradients {
            reading: Some(dq),
            writing: Some(dk),
            other_reading: None,
            other_writing: Some(dv),
            gate: Some(burn_cubecl::kernel::cast(dg, gate.dtype)),
            key_sums,
            state: wanted.state.then_some(last),
        }
    }

    /// The states before all chunks, one below the other.
    fn borders(&self, sides: &Sides<'_>, decays: &Decays, initial: Option<&CubeTensor>) -> CubeTensor {
        let (k, v) = (sides.other_writing, sides.writing);
        let (in_factor, last_factor) = (1.0, 1.0);
        let w = Walk { roles: QUERIES, q: k, k, v, initial, in_factor, last_factor, last: false, between: None };
        let plan = WalkPlan { initial: initial.is_some(), steps: decays.steps, ..self.plan(QUERIES) };
        let plan = plan.paired(self.heads, self.items, self.engine.processors);
        let g = &decays.g;
        let unused = alloc(g, [32], DType::F32);
        let between = self.between(&w, decays, &unused);
        let borders = alloc(g, [1, self.chunks * self.heads * 64, 1, 64], DType::BF16);
        // SAFETY: as in `all_gradients`.
        unsafe {
            borders::write_borders::launch_unchecked(
                &g.client,
                self.cubes_of(&plan),
                CubeDim::new_1d(plan.units() as u32),
                self.map(k),
                self.map(v),
                self.map(&borders),
                g.clone().into_buffer_arg(),
                words(g),
                decays.vectors.clone().into_buffer_arg(),
                decays.table.clone().into_buffer_arg(),
                initial.unwrap_or(&unused).clone().into_buffer_arg(),
                between.into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                plan,
            );
        }
        borders
    }

    /// A cube for each processor that there is work for.
    fn cubes_of(&self, plan: &WalkPlan) -> CubeCount {
        let work = self.items * (self.heads / plan.heads) * plan.slices();
        CubeCount::new_1d(work.min(self.engine.processors) as u32)
    }
}
