//! What the kernels are specialised on, and how that is chosen.

use crate::hopper_delta::place::StatePlan;
use crate::hopper_walk::Cores;
use crate::tile::hopper::{Acc, Frag, TRIANGLE_COLUMN, TRIANGLE_ROW};

/// Tokens a chunk.
pub(crate) const CHUNK: usize = 64;
/// Bytes of one panel of 64 rows.
pub(crate) const PANEL: usize = 64 * 128;
/// Shared memory a cube of a chain may use, less what barriers and alignment take.
const SHARED: usize = 232_448 - 1_536;
/// Units that compute the gradients of a chunk.
pub(crate) const TEAM: usize = 256;

/// Powers of two by which a channel may decay over a chunk for its scores to be products of two factors: each is then
/// between `2^{−RANGE / 2}` and `2^{RANGE / 2}`. Where a channel decays further, pairs are summed one by one.
pub(crate) const RANGE: f32 = 120.0;

/// Where the vectors of the low-rank term come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// `a` and `b` are given.
    Free,
    /// RWKV7: `a = −κ`, `b = κ ∘ rate`.
    Removal,
    /// Kimi delta attention: a is −k and reads the state after the token's decay; b is β k, and so is what values are added with.
    Key,
}

impl Form {
    /// Whether the state is read after the token's decay.
    pub(crate) fn reads_decayed(self) -> bool {
        self == Self::Key
    }
}

/// The heads of a problem, and what its inputs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeyPlan {
    pub(crate) form: Form,
    pub(crate) keys: usize,
    /// Log decays are f32, otherwise bf16.
    pub(crate) wide: bool,
    pub(crate) cores: Cores,
}

impl KeyPlan {
    /// Panels of 64 key channels.
    pub(crate) fn panels(&self) -> usize {
        self.keys.div_ceil(64)
    }

    /// Key channels in whole panels.
    pub(crate) fn padded(&self) -> usize {
        64 * self.panels()
    }

    /// Chunks that a cube of [`super::prepare`] works on side by side, each by a warpgroup a panel: on Hopper as many as shared
    /// memory has room for, in one cube, because the compiler gives the units of smaller cubes so many registers that fewer
    /// would run at a time.
    pub(crate) fn prepare_teams(&self) -> usize {
        match (self.cores, self.panels()) {
            (Cores::Hopper, 1) => 3,
            (Cores::Hopper, _) => 2,
            (Cores::Mma, _) => 1,
        }
    }

    /// Units of these cubes.
    pub(crate) fn prepare_units(&self) -> usize {
        128 * self.panels() * self.prepare_teams()
    }

    /// Bytes of a chunk's tiles there: its tokens' vectors, then the triangle and its inverse, which later products replace.
    pub(crate) fn prepare_tiles(&self) -> usize {
        4 * self.panels() * PANEL + 4 * CHUNK * (TRIANGLE_COLUMN + TRIANGLE_ROW)
    }

    /// Numbers of its decays: four warps' totals, and what half the chunk decays.
    pub(crate) fn prepare_sums(&self) -> usize {
        5 * self.padded()
    }

    /// Shared memory of a cube.
    pub(crate) fn prepare_bytes(&self) -> usize {
        self.prepare_teams() * (self.prepare_tiles() + 4 * self.prepare_sums())
    }

    /// All key channels of a chunk's tokens.
    pub(crate) fn channels(&self, name: &'static str) -> Acc {
        Acc::new(name, self.padded())
    }
}

/// Products between the tokens of a chunk, and those of queries and keys.
pub(crate) const SCORES: Acc = Acc::new("x", 64);
pub(crate) const QK: Acc = Acc::new("p", 64);
/// Those of readers and writers, where one warpgroup has them beside the others, and a panel of channels.
pub(crate) const AB: Acc = Acc::new("y", 64);
pub(crate) const CHANNELS: Acc = Acc::new("w", 64);

/// What tokens read from the state: value channels × tokens.
pub(crate) const READ: Acc = Acc::new("x", 64);
/// Outputs: value channels × tokens.
pub(crate) const OUT: Acc = Acc::new("o", 64);
/// Left operands of 64 tokens: what was read, and the values.
pub(crate) const TOKENS: Frag = Frag::new("r", 64);
pub(crate) const VALUES: Frag = Frag::new("v", 64);

/// What a chain computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Task {
    /// With time: the outputs.
    Outputs,
    /// With time: the state before each chunk.
    Borders,
    /// Against time: the gradients of the values, and that of the state after each chunk.
    Gradients,
    /// With time: what a segment makes of no state, and, in columns of their own behind it, of each unit vector.
    SegmentStates,
    /// Against time: what the outputs of a segment alone make of the gradient of the state before it.
    SegmentGradients,
}

/// A walk from chunk to chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChainPlan {
    pub(crate) task: Task,
    pub(crate) keys: usize,
    pub(crate) values: usize,
    /// Warpgroups that walk, 64 value channels each.
    pub(crate) warpgroups: usize,
    pub(crate) stages: usize,
    /// There is a state where the walk enters a sequence.
    pub(crate) initial: bool,
}

impl ChainPlan {
    /// `narrow`: one warpgroup a cube, where that fills more of the device.
    pub(crate) fn new(task: Task, keys: usize, values: usize, narrow: bool) -> Self {
        let plan = Self { task, keys, values, warpgroups: 1, stages: 0, initial: false };
        let warpgroups = if narrow || plan.columns() <= 64 { 1 } else { 2 };
        let plan = Self { warpgroups, ..plan };
        let stage = plan.stage_bytes() + 4 * plan.padded();
        let all = ((SHARED - plan.fixed_bytes()) / stage).min(4);
        // Two stages where two cubes share a processor.
        let half = (SHARED / 2).saturating_sub(plan.fixed_bytes()) / stage;
        let stages = if warpgroups == 1 && half >= 2 { half.min(4) } else { all };
        Self { stages, ..plan }
    }

    /// Panels of 64 key channels.
    pub(crate) fn panels(&self) -> usize {
        self.keys.div_ceil(64)
    }

    pub(crate) fn padded(&self) -> usize {
        64 * self.panels()
    }

    /// Cubes that share the value channels of a head.
    pub(crate) fn slices(&self) -> usize {
        self.columns().div_ceil(64 * self.warpgroups)
    }

    pub(crate) fn with_outputs(&self) -> bool {
        matches!(self.task, Task::Outputs | Task::Gradients)
    }

    pub(crate) fn with_borders(&self) -> bool {
        matches!(self.task, Task::Borders | Task::Gradients)
    }

    pub(crate) fn against_time(&self) -> bool {
        matches!(self.task, Task::Gradients | Task::SegmentGradients)
    }

    /// Whether chunks leave something in memory; else only the state at the end counts.
    pub(crate) fn stores(&self) -> bool {
        self.with_outputs() || self.with_borders()
    }

    /// Whether the state at the end is written.
    pub(crate) fn with_last(&self) -> bool {
        self.task != Task::Borders
    }

    /// Columns of the state, which are value channels, or with a segment's transition also key channels.
    pub(crate) fn columns(&self) -> usize {
        self.segment_state().columns()
    }

    /// Panels that copies bring to a stage: what is read with, written with, and added from values; for outputs also what
    /// they are read with and the products between tokens; and the values.
    pub(crate) fn stage_panels(&self) -> usize {
        (3 + self.with_outputs() as usize) * self.panels() + self.with_outputs() as usize + self.warpgroups
    }

    pub(crate) fn stage_bytes(&self) -> usize {
        self.stage_panels() * PANEL
    }

    fn fixed_bytes(&self) -> usize {
        let borders = if self.with_borders() { self.panels() } else { 0 };
        self.warpgroups * (self.with_outputs() as usize + borders) * PANEL
    }

    /// The walking warpgroups, and the loader's warp.
    pub(crate) fn units(&self) -> usize {
        128 * self.warpgroups + 32
    }

    /// Cubes that run on a processor at a time.
    pub(crate) fn resident(&self) -> usize {
        let bytes = self.fixed_bytes() + self.stages * (self.stage_bytes() + 4 * self.padded());
        if self.warpgroups == 1 && 2 * bytes <= SHARED { 2 } else { 1 }
    }

    /// The state, transposed: 64 value channels, all key channels.
    pub(crate) fn state(&self) -> Acc {
        Acc::new("s", self.padded())
    }

    /// Its state where a segment begins and ends.
    pub(crate) fn segment_state(&self) -> StatePlan {
        let Self { keys, values, initial, task, .. } = *self;
        StatePlan { registers: self.state(), keys, values, initial, transition: task == Task::SegmentStates }
    }

    /// The state as a left operand.
    pub(crate) fn operand(&self) -> Frag {
        Frag::new("f", self.padded())
    }
}

/// The gradients of a chunk, from the states at its borders.
///
/// First Ã, B̂, N and H have their tiles, where the tokens' vectors come later, then A_qb, values, the outputs' gradients, and
/// both states, where running sums of decays, and at last what units take over from accumulators, come later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GradientPlan {
    pub(crate) key: KeyPlan,
    pub(crate) values: usize,
    /// Running sums of decays, and inter, have rooms of their own, so that units do not hold them through all products.
    pub(crate) parks: bool,
}

impl GradientPlan {
    /// The plan for cubes that may use `shared` bytes of shared memory.
    pub(crate) fn new(key: KeyPlan, values: usize, shared: usize) -> Self {
        let plan = Self { key, values, parks: true };
        Self { parks: plan.shared_bytes() <= shared, ..plan }
    }

    pub(crate) fn slices(&self) -> usize {
        self.values.div_ceil(64)
    }

    /// Where the second part of the tiles begins.
    pub(crate) fn second_part(&self) -> u32 {
        (4 * self.key.panels() * PANEL) as u32
    }

    /// Both parts of the tiles: the four of values, three scores and a state are there beside the sums; the last steps need six.
    pub(crate) fn tile_bytes(&self) -> usize {
        let panels = self.key.panels();
        (4 * panels + usize::max(6, 2 * panels + 4)) * PANEL
    }

    /// Numbers of either room of what units do not hold.
    pub(crate) fn parked(&self) -> usize {
        if self.parks { CHUNK * self.key.padded() } else { 32 }
    }

    pub(crate) fn shared_bytes(&self) -> usize {
        self.tile_bytes() + 4 * (self.team_sums() + 2 * self.parked())
    }

    /// Numbers that warps sum up and exchange, see [`super::finish::Sums`].
    pub(crate) fn team_sums(&self) -> usize {
        (3 * TEAM / 32 + 2) * self.key.padded()
    }

    /// dQ′ or dK′, then what they become.
    pub(crate) fn outer(&self) -> Acc {
        self.key.channels("m")
    }

    /// dÃ or dB̂, then what they become.
    pub(crate) fn inner(&self) -> Acc {
        self.key.channels("n")
    }

    pub(crate) fn inter(&self) -> Acc {
        self.key.channels("i")
    }

    pub(crate) fn operand(&self) -> Frag {
        Frag::new("f", self.key.padded())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_that_is_promised_has_a_plan() {
        for keys in (16..=128).step_by(16) {
            for values in (16..=512).step_by(16) {
                for narrow in [false, true] {
                    for task in
                        [Task::Outputs, Task::Borders, Task::Gradients, Task::SegmentStates, Task::SegmentGradients]
                    {
                        let plan = ChainPlan::new(task, keys, values, narrow);
                        assert!(plan.stages >= 2, "{plan:?}");
                    }
                }
                let key = KeyPlan { form: Form::Free, keys, wide: true, cores: Cores::Hopper };
                assert!(GradientPlan::new(key, values, SHARED).parks);
                assert!(key.prepare_bytes() <= 232_448, "{key:?}");
                // Where log decays are strong, sums of all channels stand where the triangle and its inverse do.
                assert!(4 * CHUNK * (TRIANGLE_COLUMN + TRIANGLE_ROW) >= 4 * CHUNK * key.padded(), "{key:?}");
            }
        }
    }
}
