//! What the kernels are specialised on, and how that is chosen.

use crate::hopper_delta::segments;
use crate::hopper_dplr::plan::{Form, GradientPlan, KeyPlan, Task};
use crate::hopper_walk::Cores;
use crate::hopper_walk::plan::{Axis, Borders, CHUNK, PANEL, Roles, WalkPlan};
use crate::mma_walk::plan::MmaPlan;
use crate::tile::mma::Frag;

/// A walk from chunk to chunk, by four warps of 16 or 32 value channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChainPlan {
    pub(super) task: Task,
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
        heads: usize,
        processors: usize,
        shared: usize,
    ) -> Option<Self> {
        let plan = |panels: usize, stages: usize| {
            let against_time = matches!(task, Task::Gradients | Task::SegmentGradients);
            let roles = Roles { outer_is_value: true, against_time, borders: Borders::None };
            let outer = if task == Task::SegmentStates { segments::columns(keys, values) } else { values };
            let walk = WalkPlan::of_sizes(roles, keys, outer, Axis::Key);
            let last = task != Task::Borders;
            let walk = WalkPlan { warpgroups: panels, stages, wide_gates: false, last, ..walk };
            Self { task, values, mma: MmaPlan { walk, bands: panels, value_stages: stages, quarters: false } }
        };
        let slices = plan(1, 1).mma.walk.slices();
        let narrow = slices == 1 || heads * slices <= processors;
        let panels = if narrow { 1 } else { 2 };
        let (twice, once) = (plan(panels, 2), plan(panels, 1));
        // A second cube on a processor hides more than a second stage.
        let cubes = heads * once.mma.walk.slices();
        let at_once = |plan: &Self| usize::min(processors * plan.cubes(shared), cubes);
        let fits = |plan: &Self| plan.shared_bytes() <= shared;
        if fits(&twice) && at_once(&twice) >= at_once(&once) {
            return Some(twice);
        }
        [once, plan(1, 1)].into_iter().find(fits)
    }

    pub(super) fn with_outputs(&self) -> bool {
        matches!(self.task, Task::Outputs | Task::Gradients)
    }

    pub(super) fn with_borders(&self) -> bool {
        matches!(self.task, Task::Borders | Task::Gradients)
    }

    pub(super) fn against_time(&self) -> bool {
        self.mma.walk.roles.against_time
    }

    /// Key channels in whole panels.
    pub(super) fn padded(&self) -> usize {
        64 * self.mma.walk.panels()
    }

    /// Rows of a border's state: value channels in whole slices.
    pub(super) fn border_rows(&self) -> usize {
        64 * self.mma.walk.outer_panels()
    }

    /// What tokens read, transposed: value channels × tokens, 64 columns a band.
    pub(super) fn read(&self) -> Frag {
        Frag::new("x", CHUNK * self.mma.bands)
    }

    /// Where a stage has what that is written with, what values are written with, the values, what outputs read with, and
    /// what they take of values; what the state is read with comes first.
    pub(super) fn second_at(&self) -> u32 {
        (self.mma.walk.panels() * PANEL) as u32
    }

    pub(super) fn added_at(&self) -> u32 {
        2 * self.second_at()
    }

    pub(super) fn values_at(&self) -> u32 {
        3 * self.second_at()
    }

    pub(super) fn out_at(&self) -> u32 {
        self.values_at() + (self.mma.walk.warpgroups * PANEL) as u32
    }

    pub(super) fn scores_at(&self) -> u32 {
        self.out_at() + self.second_at()
    }

    pub(super) fn stage_bytes(&self) -> usize {
        let panels = self.mma.walk.panels();
        let outputs = if self.with_outputs() { panels + 1 } else { 0 };
        (3 * panels + self.mma.walk.warpgroups + outputs) * PANEL
    }

    /// Shared memory of a cube: with the decays of each stage.
    pub(super) fn shared_bytes(&self) -> usize {
        self.mma.walk.stages * (self.stage_bytes() + 4 * self.padded())
    }

    /// Cubes that a processor runs at once, as [`MmaPlan::cubes`] counts them.
    fn cubes(&self, shared: usize) -> usize {
        usize::min((shared + 1024) / (self.shared_bytes() + 1024), 65_536 / (256 * self.mma.units()))
    }
}

/// Whether every kernel, forward and backward, has room where a cube may use so much shared memory.
pub(crate) fn fits(keys: usize, values: usize, shared: usize) -> bool {
    let chain = |task| ChainPlan::new(task, [keys, values], 1, 1, shared).is_some();
    let key = KeyPlan { form: Form::Free, keys, wide: true, cores: Cores::Mma };
    let gradients = GradientPlan::new(key, values, shared);
    let tasks = [Task::Outputs, Task::Borders, Task::Gradients, Task::SegmentStates, Task::SegmentGradients];
    tasks.into_iter().all(chain) && gradients.shared_bytes() <= shared && key.prepare_bytes() <= shared
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
                    // The gradients of more than 64 key channels need 141 KiB.
                    assert_eq!(
                        fits(keys, values, shared),
                        keys <= 64 || shared > LIMITS[2],
                        "{keys} {values} {shared}"
                    );
                }
            }
        }
    }

    #[test]
    fn two_cubes_of_heads_of_64_channels_share_a_processor() {
        let plan = ChainPlan::new(Task::Outputs, [64, 64], 256, 132, LIMITS[1]).unwrap();
        assert_eq!((plan.mma.bands, plan.mma.walk.stages, plan.cubes(LIMITS[1])), (1, 2, 2));
    }
}
