//! What a walk is specialised on beside its [`WalkPlan`], and how it is chosen.

use crate::hopper_walk::plan::{Axis, Borders, CHUNK, PANEL, Roles, WalkPlan};
use crate::tile::mma::{Acc, Frag};

/// Numbers of a chunk's decays: the running sum at each token, the factors of its outputs, and those of its values.
pub(crate) const DECAYS: usize = 3 * 64;
/// Where the factors of the outputs stand among them.
pub(crate) const OF_OUTPUTS: usize = 64;
/// Where the factors of the values stand among them.
pub(crate) const OF_VALUES: usize = 128;

/// The scores of a warp.
pub(super) const SCORES: Acc = Acc::new("a", 64);
/// Left operands: one step for each band.
pub(crate) const LEFT: Frag = Frag::new("l", 32);
/// Right operands.
pub(crate) const RIGHT: Frag = Frag::new("r", 64);

/// One walk of a cube of [`MmaPlan::warps`] warps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MmaPlan {
    /// Its `warpgroups` are panels of 64 outer channels, its `stages` the buffers of queries and keys.
    pub(crate) walk: WalkPlan,
    /// Bands of 16 outer channels that a warp has.
    pub(crate) bands: usize,
    /// Buffers of values: where there is one, they are loaded while scores are computed.
    pub(crate) value_stages: usize,
    /// The outputs of a chunk come in four parts: fewer registers beside those of states.
    pub(crate) quarters: bool,
}

impl MmaPlan {
    /// The plan for a device with this much shared memory a cube, where there is one.
    pub(crate) fn new(
        roles: Roles,
        keys: usize,
        values: usize,
        axis: Axis,
        exclusive: bool,
        shared: usize,
    ) -> Option<Self> {
        let (inner, outer) = if roles.outer_is_value { (keys, values) } else { (values, keys) };
        if inner > 256 || inner == 0 || outer == 0 {
            return None;
        }
        let candidate = |warpgroups, bands, stages, value_stages| {
            let walk = WalkPlan::of_sizes(roles, inner, outer, axis);
            let walk = WalkPlan { warpgroups, stages, exclusive, ..walk };
            let plan = Self { walk, bands, value_stages, quarters: false };
            (plan.shared_bytes() <= shared).then_some(plan)
        };
        let wide = usize::min(outer.div_ceil(64), 2);
        // Two bands halve what a warp reads from shared memory, where registers hold their states.
        let bands = if inner <= 128 && wide == 2 { 2 } else { 1 };
        let twice = if roles.borders == Borders::None { 2 } else { 1 };
        let buffers = [(wide, bands, 2, twice), (wide, bands, 2, 1), (wide, bands, 1, 1), (1, 1, 2, 1), (1, 1, 1, 1)];
        let fitting = || buffers.into_iter().filter_map(|(w, b, s, v)| candidate(w, b, s, v));
        // A second cube on a processor hides more than a second buffer.
        fitting().find(|plan| plan.cubes(shared) >= plan.cubes_of_registers().min(2)).or_else(|| fitting().next())
    }

    /// Warps of a cube.
    pub(crate) fn warps(&self) -> usize {
        4 * self.walk.warpgroups / self.bands
    }

    /// Units of a cube.
    pub(crate) fn units(&self) -> usize {
        32 * self.warps()
    }

    /// Groups of the outer channels, those of a warp, each of which has its own sums of products with the outputs, or its
    /// own scales.
    pub(crate) fn channel_groups(&self) -> usize {
        self.walk.slices() * self.warps()
    }

    /// The state of a band, transposed: 16 outer rows, all inner columns.
    pub(crate) fn state(&self, band: usize) -> Acc {
        Acc::new(["s", "t"][band], 64 * self.walk.panels())
    }

    /// The outputs of a band, transposed: 16 outer rows, a column for each token of a half.
    pub(crate) fn out(&self, band: usize) -> Acc {
        Acc::new(["o", "p"][band], 16 * self.half_groups())
    }

    /// Parts of a chunk whose outputs are computed one after the other: two, where states leave few registers.
    pub(crate) fn halves(&self) -> usize {
        if self.quarters {
            4
        } else if self.bands * self.walk.panels() > 3 {
            2
        } else {
            1
        }
    }

    /// Groups of 16 tokens in one of them.
    pub(crate) fn half_groups(&self) -> usize {
        4 / self.halves()
    }

    /// Sums that a chunk's end has for each channel that decays: one of the state, and two of each half of its tokens.
    pub(crate) fn end_sums(&self) -> usize {
        1 + 2 * self.halves()
    }

    /// Steps of 16 of the inner channels.
    pub(crate) fn steps(&self) -> usize {
        self.walk.inner.div_ceil(16)
    }

    /// Bytes of a tile of 64 tokens with all inner channels.
    pub(super) fn wide(&self) -> usize {
        self.walk.panels() * PANEL
    }

    /// Bytes of a tile of 64 tokens with the cube's outer channels.
    pub(super) fn narrow(&self) -> usize {
        self.walk.warpgroups * PANEL
    }

    /// Bytes of a tile of values: that, and where they are beside the outputs, the rows around it.
    pub(super) fn values(&self) -> usize {
        self.walk.warpgroups * self.walk.value_panel()
    }

    /// Tiles of the outer channels beside values: factors of the outputs, and what outputs are multiplied with.
    pub(super) fn extra_tiles(&self) -> usize {
        self.walk.factors() as usize + self.walk.dots() as usize
    }

    /// Bytes of all tiles: queries, keys, values, the extra ones, and scores.
    pub(super) fn tile_bytes(&self) -> usize {
        let outer = self.value_stages * self.values() + self.extra_tiles() * self.narrow();
        2 * self.walk.stages * self.wide() + outer + PANEL
    }

    /// Numbers of a step's decays, see [`DECAYS`], or by channel two vectors of factors and the weights of the tokens' own
    /// values.
    pub(super) fn decays(&self) -> usize {
        match self.walk.by_channel() {
            true => self.walk.decays(),
            false => DECAYS + if self.walk.steps.is_some() { CHUNK } else { 0 },
        }
    }

    /// Where the running sums of the scores' columns stand among them: with steps, of the tokens that write the state behind
    /// all others. See [`crate::hopper_walk::steps`].
    pub(super) fn columns_at(&self) -> usize {
        if self.walk.columns_at() > 0 { DECAYS } else { 0 }
    }

    /// Where those of their rows stand.
    pub(super) fn rows_at(&self) -> usize {
        if self.walk.rows_at() > 0 { DECAYS } else { 0 }
    }

    /// Shared memory of a cube.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.tile_bytes() + 2 * self.decays() * 4 + 64 * 4
    }

    /// Cubes that a processor runs at once, with 65,536 registers and shared memory for one of `shared` bytes; each takes
    /// 1 KiB more.
    pub(crate) fn cubes(&self, shared: usize) -> usize {
        usize::min((shared + 1024) / (self.shared_bytes() + 1024), self.cubes_of_registers())
    }

    /// Cubes for which a processor has registers, whatever a unit uses.
    fn cubes_of_registers(&self) -> usize {
        65_536 / (256 * self.units())
    }

    /// Whether values, or the extra tiles, are loaded for the step at hand.
    pub(super) fn loads_late(&self) -> bool {
        self.walk.stages > 1 && (self.value_stages == 1 || self.extra_tiles() > 0)
    }

    /// Items of the scores, each 16 rows of them, that a warp computes one after the other.
    pub(super) fn score_turns(&self) -> usize {
        usize::max(4 / self.warps(), 1)
    }

    /// Groups of 16 columns of the scores in an item.
    pub(super) fn score_groups(&self) -> usize {
        if self.warps() == 8 { 2 } else { 4 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssd::Skip;

    /// Shared memory that a cube may use on GPUs of compute capability 8.0, 9.0, and 8.6, 8.9 or 12.0.
    const LIMITS: [usize; 3] = [163 * 1024, 227 * 1024, 99 * 1024];

    #[test]
    fn every_size_has_a_plan_that_fits() {
        for shared in LIMITS {
            for keys in (16..=256).step_by(16) {
                for values in (16..=256).step_by(16) {
                    for borders in [Borders::None, Borders::Write] {
                        for outer_is_value in [false, true] {
                            let roles = Roles { outer_is_value, against_time: false, borders };
                            for (axis, exclusive) in
                                [(Axis::Token, false), (Axis::Key, false), (Axis::Key, true), (Axis::Value, false)]
                            {
                                let Some(plan) = MmaPlan::new(roles, keys, values, axis, exclusive, shared) else {
                                    // The most that the gradients of a decay by channel ask for is not in 99 KiB.
                                    let (decaying, others) =
                                        if axis == Axis::Value { (values, keys) } else { (keys, values) };
                                    assert!(axis.by_channel() && shared == LIMITS[2]);
                                    assert!(decaying > 128 && others > 192, "{keys} {values} {axis:?} {exclusive}");
                                    continue;
                                };
                                assert!(plan.shared_bytes() <= shared && [2, 4, 8].contains(&plan.warps()));
                                // Chosen without them, there is room for steps too.
                                let walk = WalkPlan { steps: Some(Skip::None), ..plan.walk };
                                assert!(axis != Axis::Token || MmaPlan { walk, ..plan }.shared_bytes() <= shared);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn two_cubes_share_a_processor_where_heads_have_128_channels() {
        let roles = Roles { outer_is_value: true, against_time: false, borders: Borders::None };
        let plan = MmaPlan::new(roles, 128, 128, Axis::Token, false, LIMITS[1]).unwrap();
        assert_eq!((plan.warps(), plan.cubes(LIMITS[1])), (4, 2));
        // With a decay by key there are two tiles more: one buffer each leaves room.
        let roles = Roles { outer_is_value: false, against_time: true, borders: Borders::Multiply };
        let plan = MmaPlan::new(roles, 128, 128, Axis::Key, false, LIMITS[1]).unwrap();
        assert_eq!((plan.walk.stages, plan.cubes(LIMITS[1])), (1, 2));
    }
}
