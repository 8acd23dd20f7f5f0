//! What the kernels are specialised on, and how that is chosen.

use super::place::StatePlan;
use crate::hopper_walk::Cores;
use crate::tile::hopper::{Acc, Frag};

/// Tokens a chunk.
pub(crate) const CHUNK: usize = 64;
/// Bytes of one panel of 64 rows.
pub(super) const PANEL: usize = 64 * 128;
/// Shared memory a cube may use, less what barriers and small arrays take.
const SHARED: usize = 232_448 - 4_096;
/// Units of the cubes of [`super::prepare`].
pub(super) const PREPARE_UNITS: u32 = 128;
/// Units of the cubes of [`super::gradients`]: two warpgroups that multiply, and the loader's.
pub(super) const GRADIENT_UNITS: u32 = 384;
/// Value channels that a step of [`super::gradients`] takes.
pub(crate) const SLICE: usize = 64;

/// Slots of what warpgroups hand to each other or store: one is read while the next one is written.
pub(super) const SLOTS: usize = 2;
/// Numbers of a stage's decays: the running sums, their exponentials, and the decays to the chunk's end.
pub(crate) const DECAYS: usize = 3 * CHUNK;

/// Scores between the tokens of a chunk.
pub(crate) const SCORES: Acc = Acc::new("a", 64);
/// What tokens read from the state, then what they write to it: value channels × tokens.
pub(super) const READ: Acc = Acc::new("x", 64);
/// What they write, against time.
pub(super) const WRITTEN: Acc = Acc::new("y", 64);
/// Outputs, or against time what they contribute to the gradients of values: tokens × value channels.
pub(super) const OUT: Acc = Acc::new("o", 64);
/// The exponentials of the sums of decays, at the tokens of a unit's columns, and the decays to the chunk's end.
pub(super) const FACTORS: Acc = Acc::new("e", 32);
pub(super) const LEFT: Acc = Acc::new("l", 32);
/// Left operands of 64 tokens.
pub(crate) const TOKENS: Frag = Frag::new("r", 64);
pub(crate) const DECAYED: Frag = Frag::new("d", 64);
/// A transposed tile of values.
pub(super) const HELD: Frag = Frag::new("h", 64);

/// What a chain computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Task {
    /// With time: the outputs.
    Outputs,
    /// With time: the values that tokens write, and the state before each chunk.
    Values,
    /// Against time: the gradients of the values, and that of the state after each chunk.
    Gradients,
    /// With time: what a segment makes of no state, and, in columns of their own behind it, of each unit vector.
    SegmentStates,
    /// Against time: what the outputs of a segment alone make of the gradient of the state before it.
    SegmentGradients,
}

/// A walk from chunk to chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ChainPlan {
    pub(super) task: Task,
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) gated: bool,
    /// Warpgroups that walk, 64 value channels each.
    pub(super) warpgroups: usize,
    pub(super) stages: usize,
    /// There is a state where the walk enters a sequence.
    pub(super) initial: bool,
}

impl ChainPlan {
    /// `narrow`: one walking warpgroup a cube, where that fills more of the device. Beside another warpgroup there is one.
    pub(super) fn new(task: Task, keys: usize, values: usize, gated: bool, narrow: bool) -> Self {
        let plan = Self { task, keys, values, gated, warpgroups: 1, stages: 0, initial: false };
        let plan =
            Self { warpgroups: if narrow || plan.with_queries() || plan.columns() <= 64 { 1 } else { 2 }, ..plan };
        let stages = (SHARED - plan.fixed_bytes()) / (plan.stage_bytes() + 4 * DECAYS);
        Self { stages: stages.min(4), ..plan }
    }

    /// Panels of 64 key channels.
    pub(super) fn panels(&self) -> usize {
        self.keys.div_ceil(64)
    }

    /// Cubes that share the value channels of a head.
    pub(super) fn slices(&self) -> usize {
        self.columns().div_ceil(64 * self.warpgroups)
    }

    pub(super) fn with_queries(&self) -> bool {
        !matches!(self.task, Task::Values | Task::SegmentStates)
    }

    pub(super) fn with_borders(&self) -> bool {
        matches!(self.task, Task::Values | Task::Gradients)
    }

    pub(super) fn against_time(&self) -> bool {
        matches!(self.task, Task::Gradients | Task::SegmentGradients)
    }

    /// Whether chunks leave something in memory; else only the state at the end counts.
    pub(super) fn stores(&self) -> bool {
        !matches!(self.task, Task::SegmentStates | Task::SegmentGradients)
    }

    /// Columns of the state, which are value channels, or with a segment's transition also key channels.
    pub(super) fn columns(&self) -> usize {
        self.segment_state().columns()
    }

    /// Bytes that copies bring to a stage.
    pub(super) fn stage_bytes(&self) -> usize {
        ((1 + self.with_queries() as usize) * self.panels() + self.warpgroups + 1) * PANEL
    }

    /// Panels of the states that are handed on or stored.
    pub(super) fn state_panels(&self) -> usize {
        let some = self.with_borders() || self.task == Task::Outputs;
        some as usize * SLOTS * self.warpgroups * self.panels()
    }

    /// Panels that the walk and the warpgroup beside it hand to each other, without the states.
    pub(super) fn handed_panels(&self) -> usize {
        self.with_queries() as usize * SLOTS
    }

    /// Panels of what is stored for tokens.
    pub(super) fn out_panels(&self) -> usize {
        self.stores() as usize * SLOTS * self.warpgroups
    }

    fn fixed_bytes(&self) -> usize {
        (self.state_panels() + self.handed_panels() + self.out_panels()) * PANEL
    }

    /// The walking warpgroups, the one beside them, the loader's.
    pub(super) fn units(&self) -> usize {
        128 * (self.warpgroups + self.with_queries() as usize + 1)
    }

    /// The state, transposed: 64 value channels, all key channels.
    pub(super) fn state(&self) -> Acc {
        Acc::new("s", 64 * self.panels())
    }

    /// Its state where a segment begins and ends.
    pub(super) fn segment_state(&self) -> StatePlan {
        let Self { keys, values, initial, task, .. } = *self;
        StatePlan { registers: self.state(), keys, values, initial, transition: task == Task::SegmentStates }
    }

    /// The state as a left operand.
    pub(super) fn operand(&self) -> Frag {
        Frag::new("f", 64 * self.panels())
    }
}

/// The gradients of a chunk that only need the states at its borders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GradientPlan {
    pub(crate) keys: usize,
    pub(crate) values: usize,
    pub(crate) gated: bool,
    pub(crate) cores: Cores,
}

/// Stages of value slices.
pub(super) const GRADIENT_STAGES: usize = 2;

impl GradientPlan {
    pub(crate) fn panels(&self) -> usize {
        self.keys.div_ceil(64)
    }

    pub(crate) fn slices(&self) -> usize {
        self.values.div_ceil(SLICE)
    }

    /// Panels of a slice: three of tokens, and two states.
    pub(crate) fn slice_panels(&self) -> usize {
        3 + 2 * self.panels()
    }

    /// Units that meet once a chunk: the multiplying warpgroups and, with a gate, the two warps that finish its gradient.
    pub(crate) fn meeting(&self) -> u32 {
        256 + 64 * self.gated as u32
    }

    pub(crate) fn of_queries(&self) -> Acc {
        Acc::new("q", 64 * self.panels())
    }

    pub(crate) fn of_keys(&self) -> Acc {
        Acc::new("k", 64 * self.panels())
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        (GRADIENT_STAGES * self.slice_panels() + 2 * self.panels() + 2 * self.panels() + self.panels()) * PANEL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASKS: [Task; 5] =
        [Task::Outputs, Task::Values, Task::Gradients, Task::SegmentStates, Task::SegmentGradients];

    #[test]
    fn every_size_that_is_promised_has_a_plan() {
        for keys in (16..=128).step_by(16) {
            for values in (16..=512).step_by(16) {
                for narrow in [false, true] {
                    for task in TASKS {
                        let plan = ChainPlan::new(task, keys, values, true, narrow);
                        assert!(plan.stages >= 2, "{plan:?}");
                    }
                }
                assert!(GradientPlan { keys, values, gated: true, cores: Cores::Hopper }.bytes() <= SHARED);
            }
        }
    }
}
