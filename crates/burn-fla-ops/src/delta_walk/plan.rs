//! What the walks are specialised on, and how they are laid over units.

use burn::tensor::DType;

use crate::bridge::CubeTensor;
use crate::rows::planes_of_32;

/// Tokens between two saved states: few enough states, and enough pieces of the sequence for the parallel walks.
pub(super) const CHUNK: usize = 64;
/// The largest state that the walks take: what a unit keeps must stay in registers, and a token's vectors in shared memory.
pub(super) const MAX_KEYS: usize = 256;
pub(super) const MAX_VALUES: usize = 512;

/// Floats of shared memory that a cube may use on every device: 16 KiB.
const SHARED_FLOATS: usize = 4096;
/// The same where the device has 48 KiB or more.
const LARGE_SHARED_FLOATS: usize = 8192;
/// Units of a cube at most.
const UNITS: usize = 128;
/// Inner channels of a lane, where lanes share a row.
const PER_LANE: usize = 16;
/// Vectors of one unit that are in registers for certain.
const WRITTEN_OUT: usize = 8;
/// Tokens whose vectors are in shared memory at a time, at most.
const MAX_BLOCK: usize = 16;

/// Where the two vectors of the low-rank term come from: `S_t = S̃_t + b_t u_tᵀ + …`, `u_t = S_xᵀ a_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// The delta rule: `a = −k`, `b = β k`, values `β v`; the state is read after the decay.
    Key,
    /// Comba: `a = −p`, `b = β k`, values `β v`; read before the decay.
    Feedback,
    /// `a` and `b` are given; read before the decay.
    Free,
    /// RWKV7: `a = −κ`, `b = κ ∘ rate`; read before the decay.
    Removal,
}

impl Form {
    /// Whether `b` is a multiple of `k`, so that one vector is added: `β k (v + u)ᵀ`.
    pub(crate) fn one_added(self) -> bool {
        matches!(self, Self::Key | Self::Feedback)
    }

    pub(crate) fn reads_decayed(self) -> bool {
        self == Self::Key
    }

    /// Planes of the workspace of value channels.
    pub(super) fn value_planes(self) -> usize {
        if self.one_added() { 4 } else { 5 }
    }

    /// Planes of the workspace of key channels.
    pub(super) fn key_planes(self) -> usize {
        if self.one_added() { 3 } else { 4 }
    }
}

/// What the log decay depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Gate {
    None,
    /// A number for each token and head.
    Token,
    /// A number for each token, head and key channel.
    Key,
}

/// What a walk with time over value channels is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Task {
    /// Outputs and the last states, sequence by sequence.
    Outputs,
    /// The same, with the states at chunk borders.
    Borders,
    /// What the state answers, for the backward pass: chunk by chunk from the borders.
    Answers,
}

/// One walk. A unit owns `width` rows of the state, of each `vectors` vectors of four inner channels; `lanes` units side by
/// side share the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WalkPlan {
    pub(super) form: Form,
    pub(super) gate: Gate,
    pub(super) keys: usize,
    pub(super) values: usize,
    /// Whether rows are value channels and inner ones key channels, or the other way round.
    pub(super) rows_are_values: bool,
    pub(super) lanes: usize,
    pub(super) vectors: usize,
    pub(super) width: usize,
    pub(super) units: usize,
    /// Tokens whose vectors are in shared memory at a time.
    pub(super) block: usize,
}

impl WalkPlan {
    pub(super) fn new(
        like: &CubeTensor,
        form: Form,
        gate: Gate,
        [keys, values]: [usize; 2],
        rows_are_values: bool,
    ) -> Self {
        let large = like.client.properties().hardware.max_shared_memory_size >= 48 * 1024;
        let floats = if large { LARGE_SHARED_FLOATS } else { SHARED_FLOATS };
        Self::laid_out(planes_of_32(like), floats, form, gate, [keys, values], rows_are_values)
    }

    /// The plan where units exchange values in planes of 32, or else not at all, within `floats` of shared memory.
    fn laid_out(
        planes: bool,
        floats: usize,
        form: Form,
        gate: Gate,
        [keys, values]: [usize; 2],
        rows_are_values: bool,
    ) -> Self {
        let (rows, inner) = if rows_are_values { (values, keys) } else { (keys, values) };
        let (lanes, width) = match planes {
            true => (inner.div_ceil(PER_LANE).next_power_of_two().min(32), rows.next_power_of_two().min(4)),
            false => (1, 1),
        };
        let vectors = inner.div_ceil(4 * lanes);
        let wanted = (rows.div_ceil(width) * lanes).min(UNITS);
        let units = if planes { wanted.next_multiple_of(32) } else { wanted };
        let plan = Self { form, gate, keys, values, rows_are_values, lanes, vectors, width, units, block: 1 };
        Self { block: (floats / plan.floats_a_token()).clamp(1, MAX_BLOCK), ..plan }
    }

    /// An upper bound for every kernel of this orientation.
    fn floats_a_token(&self) -> usize {
        let vector = 4 * self.stride();
        if self.rows_are_values {
            // q, k, and where they are vectors of their own a, b and the decay; the rows' values, two numbers.
            let vectors = 2
                + usize::from(self.form != Form::Key)
                + usize::from(!self.form.one_added())
                + usize::from(self.gate == Gate::Key);
            vectors * vector + self.tile() + 2
        } else {
            // Values, gradients of outputs and of answers, answers where they are added by themselves; two or three
            // numbers a row.
            let vectors = 3 + usize::from(!self.form.one_added());
            vectors * vector + 3 * self.tile() + 1
        }
    }

    /// Whether the loops over a unit's vectors are written out, so that these lie in registers. Where lanes do not share a
    /// row they may be too many for that.
    pub(super) fn unrolled(&self) -> bool {
        self.lanes > 1 || self.vectors <= WRITTEN_OUT
    }

    pub(super) fn rows(&self) -> usize {
        if self.rows_are_values { self.values } else { self.keys }
    }

    pub(super) fn inner(&self) -> usize {
        if self.rows_are_values { self.keys } else { self.values }
    }

    /// Vectors of a token in shared memory, filled up with zeros.
    pub(super) fn stride(&self) -> usize {
        self.lanes * self.vectors
    }

    /// Rows of a cube.
    pub(super) fn tile(&self) -> usize {
        self.units / self.lanes * self.width
    }

    pub(super) fn tiles(&self) -> usize {
        self.rows().div_ceil(self.tile())
    }
}

/// Whether the walks take states of this size in this dtype.
pub(super) fn takes(dtype: DType, keys: usize, values: usize) -> bool {
    matches!(dtype, DType::F32 | DType::BF16) && keys <= MAX_KEYS && values <= MAX_VALUES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_covers_the_state_within_shared_memory() {
        let forms = [Form::Key, Form::Feedback, Form::Free, Form::Removal];
        for (planes, floats) in [(false, SHARED_FLOATS), (true, LARGE_SHARED_FLOATS)] {
            for keys in [1, 3, 16, 48, 100, 128, 256] {
                for values in [1, 3, 64, 72, 300, 512] {
                    for (form, rows_are_values) in forms.into_iter().flat_map(|f| [(f, true), (f, false)]) {
                        let plan = WalkPlan::laid_out(planes, floats, form, Gate::Key, [keys, values], rows_are_values);
                        assert!(
                            plan.stride() * 4 >= plan.inner() && plan.tiles() * plan.tile() >= plan.rows(),
                            "{plan:?}"
                        );
                        assert!(plan.block * plan.floats_a_token() <= floats, "{plan:?}");
                        assert!(plan.units <= UNITS && plan.units.is_multiple_of(plan.lanes), "{plan:?}");
                        assert!(
                            !planes || plan.units.is_multiple_of(32) && plan.vectors * plan.width <= 32,
                            "{plan:?}"
                        );
                    }
                }
            }
        }
    }
}
