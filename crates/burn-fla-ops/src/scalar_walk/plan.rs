//! What a walk is specialised on, and how it is chosen.

use crate::tile::hopper::{Acc, Frag};

/// Tokens a chunk.
pub(super) const CHUNK: usize = 64;
/// Bytes of one panel of 64 rows.
pub(super) const PANEL: usize = 64 * 128;
/// Shared memory a cube may use, less what barriers and decays take.
const SHARED: usize = 232_448 - 4_096;
/// Words of registers that the state before a chunk keeps for each panel of 64 state columns, a warpgroup: two bf16 a word.
pub(super) const BORDER_WORDS: usize = 16 * 128;

/// The scores of a chunk.
pub(super) const SCORES: Acc = Acc::new("a", 64);
/// The outputs of a chunk.
pub(super) const OUT: Acc = Acc::new("o", 64);
/// Decayed scores as a left operand.
pub(super) const DECAYED: Frag = Frag::new("p", 64);
/// Transposed, decayed values as a left operand.
pub(super) const VALUES: Frag = Frag::new("u", 64);

/// What a walk does with the state before each chunk, for the gate's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Borders {
    None,
    /// Writes it.
    Write,
    /// Multiplies what was written with its own state, the gradient of that after the chunk.
    Multiply,
}

/// Which roles the tensors play.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Roles {
    /// Values are the outer channels (they are walked by rows of the transposed state), keys the inner ones; or the
    /// other way round.
    pub(super) outer_is_value: bool,
    /// From the last token to the first.
    pub(super) against_time: bool,
    pub(super) borders: Borders,
}

/// One walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WalkPlan {
    pub(super) roles: Roles,
    /// Inner channels: along which tokens are compared.
    pub(super) inner: usize,
    /// Outer channels: of which the output is.
    pub(super) outer: usize,
    /// Warpgroups that walk, 64 outer channels each.
    pub(super) warpgroups: usize,
    pub(super) stages: usize,
    /// The decay is one number a head.
    pub(super) per_head: bool,
    /// There is a state before the first token.
    pub(super) initial: bool,
    /// The sequence is cut into segments whose states were computed before.
    pub(super) segmented: bool,
    /// The state at the end is wanted.
    pub(super) last: bool,
}

impl WalkPlan {
    /// A plan that fits into shared memory, where there is one.
    pub(super) fn new(roles: Roles, keys: usize, values: usize, per_head: bool) -> Option<Self> {
        let (inner, outer) = if roles.outer_is_value { (keys, values) } else { (values, keys) };
        if inner > 256 || inner == 0 || outer == 0 {
            return None;
        }
        let most = if outer > 64 && inner <= 192 { 2 } else { 1 };
        (1..=most).rev().find_map(|warpgroups| {
            let plan = Self {
                roles,
                inner,
                outer,
                warpgroups,
                stages: 0,
                per_head,
                initial: false,
                segmented: false,
                last: false,
            };
            let stages = (SHARED - plan.fixed_bytes()) / plan.stage_bytes();
            (stages >= 2).then_some(Self { stages: stages.min(4), ..plan })
        })
    }

    /// Panels of 64 inner channels.
    pub(super) fn panels(&self) -> usize {
        self.inner.div_ceil(64)
    }

    /// Cubes that share the outer channels of a head.
    pub(super) fn slices(&self) -> usize {
        self.outer.div_ceil(64 * self.warpgroups)
    }

    /// Panels of 64 outer channels, whole slices counted.
    pub(super) fn outer_panels(&self) -> usize {
        self.slices() * self.warpgroups
    }

    pub(super) fn stage_bytes(&self) -> usize {
        (2 * self.panels() + self.warpgroups) * PANEL
    }

    fn fixed_bytes(&self) -> usize {
        let dots = if self.dots() { self.warpgroups } else { 0 };
        (self.warpgroups * self.panels() + self.warpgroups + dots) * PANEL
    }

    /// Whether the products of the output with another tensor are wanted.
    pub(super) fn dots(&self) -> bool {
        self.roles.borders != Borders::None
    }

    /// The state, transposed: 64 outer rows, all inner columns.
    pub(super) fn state(&self) -> Acc {
        Acc::new("s", 64 * self.panels())
    }

    /// The accumulator of the outputs: a wide state leaves no registers beside it but those of the scores.
    pub(super) fn out(&self) -> Acc {
        if self.shares_registers() { SCORES } else { OUT }
    }

    /// Whether scores and outputs are in the same registers, one after the other.
    pub(super) fn shares_registers(&self) -> bool {
        self.panels() == 4
    }

    /// Units of a cube: the walkers' and the loader's warpgroup.
    pub(super) fn units(&self) -> usize {
        128 * (self.warpgroups + 1)
    }

    /// Numbers of the state in registers, of one head.
    pub(super) fn blob(&self) -> usize {
        self.outer_panels() * self.state().len() * 128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_that_is_promised_has_a_plan() {
        for keys in (16..=256).step_by(16) {
            for values in (16..=256).step_by(16) {
                for borders in [Borders::None, Borders::Write] {
                    for outer_is_value in [false, true] {
                        let roles = Roles { outer_is_value, against_time: false, borders };
                        let plan = WalkPlan::new(roles, keys, values, false).unwrap();
                        assert!(plan.stages >= 2 && plan.fixed_bytes() + plan.stages * plan.stage_bytes() <= SHARED);
                    }
                }
            }
        }
    }
}
