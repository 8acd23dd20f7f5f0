//! What the kernel is specialised on.

use crate::bridge::CubeTensor;
use crate::delta_walk;
use crate::rows::{UNITS, planes_of_32, vector_size};
use crate::ssd::Skip;

/// The most numbers of the state that a unit keeps: they should stay in registers.
const MOST_KEPT: usize = 64;
/// Vectors of value channels of a cube, at most: 64 channels.
const MOST_LANES: usize = 16;

/// What a token does to the state, and how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// `S' = D ∘ S + k vᵀ`, `o = scale · S'ᵀ q`.
    Linear,
    /// `o = scale · (S + (u ∘ k) vᵀ)ᵀ q`, S before the token.
    Bonus,
    /// With a part of low rank, as [`delta_walk`] has it.
    LowRank(delta_walk::Form),
    /// Of [`ssd`](crate::ssd()): `S' = e^{Δ A} S + k (Δ v)ᵀ`, `o = scale · S'ᵀ q + D ∘ v`, with Δ in the place of the log decay.
    Duality(Skip),
}

impl Form {
    pub(super) fn is_low_rank(self) -> bool {
        matches!(self, Self::LowRank(_))
    }

    /// Whether what is added is `β k (v + u)ᵀ`.
    pub(super) fn one_added(self) -> bool {
        matches!(self, Self::LowRank(form) if form.one_added())
    }

    pub(super) fn reads_decayed(self) -> bool {
        matches!(self, Self::LowRank(form) if form.reads_decayed())
    }

    /// Whether the vector that reads has a buffer of its own.
    pub(super) fn has_a(self) -> bool {
        matches!(self, Self::LowRank(form) if form != delta_walk::Form::Key)
    }

    pub(super) fn has_b(self) -> bool {
        self != Self::Linear
    }

    /// Whether b has a number for each key channel.
    pub(super) fn has_writer(self) -> bool {
        self.has_b() && !self.one_added() && !self.is_duality()
    }

    pub(super) fn is_duality(self) -> bool {
        matches!(self, Self::Duality(_))
    }

    /// What each channel adds of itself to what is read.
    pub(super) fn skip(self) -> Skip {
        if let Self::Duality(skip) = self { skip } else { Skip::None }
    }

    /// Whether that vector is given with its sign.
    pub(super) fn signed(self) -> bool {
        self == Self::LowRank(delta_walk::Form::Free)
    }

    /// Whether b is a rate, which a is multiplied by.
    pub(super) fn is_rate(self) -> bool {
        self == Self::LowRank(delta_walk::Form::Removal)
    }
}

/// What the log decay depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Gate {
    None,
    Head,
    Token,
    Key,
    Value,
}

/// How the state of a head is laid over units: `lanes` side by side own vectors of value channels, and `parts` of them share
/// the key channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepPlan {
    pub(super) form: Form,
    pub(super) gate: Gate,
    pub(super) keys: usize,
    /// Vectors of value channels.
    pub(super) width: usize,
    pub(super) lanes: usize,
    pub(super) parts: usize,
    /// Key channels of a unit, and how many of them are loaded at a time.
    pub(super) each: usize,
    pub(super) vector: usize,
    /// Whether sums go through planes of 32.
    pub(super) planes: bool,
    /// Whether there is a state before the token; else it is zero.
    pub(super) has_state: bool,
    /// Whether head h reads the keys of group `h mod G`, not of `⌊h / (H/G)⌋`.
    pub(super) tiled: bool,
}

impl StepPlan {
    /// The plan on the device of `like`, and the size of its vectors.
    pub(super) fn new(like: &CubeTensor, form: Form, gate: Gate, keys: usize, values: usize) -> (Self, usize) {
        let vector = vector_size(values);
        (Self::laid_out(planes_of_32(like), form, gate, keys, values / vector, vector), vector)
    }

    fn laid_out(planes: bool, form: Form, gate: Gate, keys: usize, width: usize, vector: usize) -> Self {
        let mut lanes = width.next_power_of_two().min(MOST_LANES);
        let each = |lanes: usize| keys.div_ceil(UNITS / lanes);
        while lanes > 1 && each(lanes) * vector > MOST_KEPT {
            lanes /= 2;
        }
        let parts = (UNITS / lanes).min(keys.next_power_of_two());
        let planes = planes && (lanes * parts).is_multiple_of(32);
        let each = keys.div_ceil(parts);
        let vector = [4, 2].into_iter().find(|n| keys.is_multiple_of(*n) && each.is_multiple_of(*n)).unwrap_or(1);
        Self { form, gate, keys, width, lanes, parts, each, vector, planes, has_state: false, tiled: false }
    }

    pub(super) fn units(&self) -> usize {
        self.lanes * self.parts
    }

    pub(super) fn tiles(&self) -> usize {
        self.width.div_ceil(self.lanes)
    }

    /// Whether each unit has all its key channels.
    pub(super) fn even(&self) -> bool {
        self.parts * self.each == self.keys
    }

    /// Numbers of units that one sum over the parts leaves in shared memory.
    pub(super) fn sums(&self) -> usize {
        if self.planes { self.units() / 32 * self.lanes } else { self.units() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_covers_the_state() {
        for keys in [1, 3, 16, 48, 100, 128, 256, 1000] {
            for values in [1, 3, 6, 64, 72, 128, 512] {
                let vector = vector_size(values);
                for planes in [false, true] {
                    let plan = StepPlan::laid_out(planes, Form::Linear, Gate::Key, keys, values / vector, vector);
                    assert!(plan.parts * plan.each >= keys && plan.tiles() * plan.lanes >= plan.width, "{plan:?}");
                    assert!(plan.units() <= UNITS && plan.units().is_power_of_two(), "{plan:?}");
                    assert!(plan.each * vector <= MOST_KEPT, "{plan:?}");
                    assert!(keys % plan.vector == 0 && plan.each % plan.vector == 0, "{plan:?}");
                    // Two sums of vectors of four f32 in 16 KiB.
                    assert!(2 * plan.sums() * 16 <= 16 * 1024, "{plan:?}");
                    assert!(!plan.planes || plan.units().is_multiple_of(32), "{plan:?}");
                }
            }
        }
        // The state of a head of 128 channels: 32 numbers a unit.
        let plan = StepPlan::laid_out(true, Form::Linear, Gate::Key, 128, 32, 4);
        assert_eq!((plan.lanes, plan.parts, plan.each, plan.vector, plan.tiles()), (16, 16, 8, 4, 2));
    }
}
