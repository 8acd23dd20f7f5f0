//! What the kernels are specialised on, and how that is chosen.

use crate::hopper_delta::plan::{GradientPlan, Task};
use crate::hopper_delta::segments;
use crate::hopper_walk::plan::{Axis, Borders, CHUNK, PANEL, Roles, WalkPlan};
use crate::mma_walk::plan::{DECAYS, MmaPlan};
use crate::tile::mma::Frag;

/// Units of the cubes of [`super::prepare`].
pub(super) const PREPARE_UNITS: usize = 128;
/// Units of the cubes of [`super::gradients`]: four warps for what tokens read with, four for what they write with.
pub(super) const GRADIENT_UNITS: usize = 256;

/// A walk from chunk to chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChainPlan {
    pub(super) task: Task,
    pub(super) gated: bool,
    /// Value channels.
    pub(super) values: usize,
    /// Its state and its units. The outer channels are values, and behind them where the task has it the columns of a
    /// segment's transition; every stage has a buffer of each operand.
    pub(super) mma: MmaPlan,
}

impl ChainPlan {
    /// The plan for `heads` heads of all segments together, on a device with so many processors and so much shared memory
    /// a cube, where there is one.
    ///
    /// Few heads have cubes of 64 value channels, so that more processors walk.
    pub(super) fn new(
        task: Task,
        [keys, values]: [usize; 2],
        gated: bool,
        heads: usize,
        processors: usize,
        shared: usize,
    ) -> Option<Self> {
        let plan = |panels: usize, stages: usize| {
            let against_time = matches!(task, Task::Gradients | Task::SegmentGradients);
            let roles = Roles { outer_is_value: true, against_time, borders: Borders::None };
            let outer = if task == Task::SegmentStates { segments::columns(keys, values) } else { values };
            let walk = WalkPlan::of_sizes(roles, keys, outer, Axis::Token);
            let walk = WalkPlan { warpgroups: panels, stages, last: task != Task::Values, ..walk };
            Self {
                task,
                gated,
                values,
                mma: MmaPlan { walk, bands: panels, value_stages: stages, quarters: gated && panels == 2 },
            }
        };
        let slices = plan(1, 1).mma.walk.slices();
        let narrow = slices == 1 || heads * slices <= processors;
        let panels = if narrow { 1 } else { 2 };
        let fits = |plan: &Self| plan.shared_bytes() <= shared;
        let (twice, once) = (plan(panels, 2), plan(panels, 1));
        // A second cube on a processor hides more than a second stage.
        let cubes = heads * once.mma.walk.slices();
        let at_once = |plan: &Self| usize::min(processors * plan.cubes(shared), cubes);
        if fits(&twice) && at_once(&twice) >= at_once(&once) {
            return Some(twice);
        }
        [once, plan(1, 1)].into_iter().find(fits)
    }

    pub(super) fn with_queries(&self) -> bool {
        !matches!(self.task, Task::Values | Task::SegmentStates)
    }

    pub(super) fn with_borders(&self) -> bool {
        matches!(self.task, Task::Values | Task::Gradients)
    }

    pub(super) fn against_time(&self) -> bool {
        self.mma.walk.roles.against_time
    }

    /// Whether chunks leave something in memory; else only the state at the end counts.
    pub(super) fn stores(&self) -> bool {
        self.with_borders() || self.task == Task::Outputs
    }

    /// What tokens read and then what they write, transposed: value channels × tokens, 64 columns a band.
    pub(super) fn written(&self) -> Frag {
        Frag::new("x", CHUNK * self.mma.bands)
    }

    /// Where a stage has its values, M, scores and queries: its keys come first.
    pub(super) fn values_at(&self) -> u32 {
        (self.mma.walk.panels() * PANEL) as u32
    }

    pub(super) fn inverse_at(&self) -> u32 {
        self.values_at() + (self.mma.walk.warpgroups * PANEL) as u32
    }

    pub(super) fn scores_at(&self) -> u32 {
        self.inverse_at() + PANEL as u32
    }

    pub(super) fn queries_at(&self) -> u32 {
        self.scores_at() + PANEL as u32
    }

    pub(super) fn stage_bytes(&self) -> usize {
        let panels = self.mma.walk.panels();
        let queries = if self.with_queries() { panels + 1 } else { 0 };
        (panels + self.mma.walk.warpgroups + 1 + queries) * PANEL
    }

    /// Shared memory of a cube.
    pub(super) fn shared_bytes(&self) -> usize {
        self.mma.walk.stages * self.stage_bytes() + 2 * DECAYS * 4
    }

    /// Cubes that a processor runs at once, as [`MmaPlan::cubes`] counts them.
    fn cubes(&self, shared: usize) -> usize {
        usize::min((shared + 1024) / (self.shared_bytes() + 1024), 65_536 / (256 * self.mma.units()))
    }
}

/// Numbers of a chunk's tokens in [`super::gradients`]: their decays and strengths.
pub(super) const TOKEN_NUMBERS: usize = 4 * CHUNK;

/// The gradients of a chunk that only need the states at its borders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GradientChunk {
    pub(super) shape: GradientPlan,
    /// Buffers of value slices, one or two.
    pub(super) stages: usize,
}

impl GradientChunk {
    pub(super) fn new(shape: GradientPlan, shared: usize) -> Option<Self> {
        let plan = |stages| Self { shape, stages };
        [plan(2), plan(1)].into_iter().find(|plan| plan.shared_bytes() <= shared)
    }

    pub(super) fn slice_bytes(&self) -> usize {
        self.shape.slice_panels() * PANEL
    }

    /// Buffers of queries and keys.
    pub(super) fn own_stages(&self) -> usize {
        self.stages
    }

    /// Queries, keys, and slices, in the place of one of which dk is joined.
    pub(super) fn tile_bytes(&self) -> usize {
        self.own_stages() * 2 * self.shape.panels() * PANEL + self.stages * self.slice_bytes()
    }

    /// Shared memory of a cube: with the decays and strengths, the sums of tokens, and those of warps.
    fn shared_bytes(&self) -> usize {
        self.tile_bytes() + 4 * (2 * TOKEN_NUMBERS + 4 * CHUNK + 8) + 256
    }
}

/// Whether every kernel, forward and backward, has a plan where a cube may use so much shared memory.
pub(crate) fn fits(keys: usize, values: usize, shared: usize) -> bool {
    let chain = |task| ChainPlan::new(task, [keys, values], true, 1, 1, shared).is_some();
    let shape = GradientPlan { keys, values, gated: true, cores: crate::hopper_walk::Cores::Mma };
    let tasks = [Task::Outputs, Task::Values, Task::Gradients, Task::SegmentStates, Task::SegmentGradients];
    tasks.into_iter().all(chain) && GradientChunk::new(shape, shared).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory that a cube may use on GPUs of compute capability 8.0, 9.0, and 8.6, 8.9 or 12.0.
    const LIMITS: [usize; 3] = [163 * 1024, 227 * 1024, 99 * 1024];

    #[test]
    fn every_size_that_is_promised_has_a_plan() {
        for shared in LIMITS {
            for keys in (16..=128).step_by(16) {
                for values in (16..=512).step_by(16) {
                    assert!(fits(keys, values, shared), "{keys} {values} {shared}");
                }
            }
        }
    }

    #[test]
    fn few_heads_have_narrow_cubes_and_many_share_a_processor() {
        let plan = |heads, shared| ChainPlan::new(Task::Outputs, [128, 128], true, heads, 132, shared).unwrap();
        let few = plan(16, LIMITS[1]);
        assert_eq!((few.mma.bands, few.mma.walk.stages, few.mma.walk.slices()), (1, 2, 2));
        let many = plan(256, LIMITS[1]);
        assert_eq!((many.mma.bands, many.mma.walk.stages, many.cubes(LIMITS[1])), (2, 1, 2));
        assert_eq!(plan(256, LIMITS[2]).mma.walk.stages, 1);
    }
}
