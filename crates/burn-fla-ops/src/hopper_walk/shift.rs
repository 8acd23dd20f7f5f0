//! A state that is read before the token (`exclusive`): keys, values and decays come one token later, and then it is read
//! after them like any other.
//!
//! ```text
//! o_i = scale · S_{i−1}ᵀ q_i = scale · S'_iᵀ q_i
//! S'_i = diag(e^{g'_i}) S'_{i−1} + k'_i v'_iᵀ ,   g', k', v'_i = g, k, v_{i−1}
//! ```
//!
//! A sequence of `T` tokens has `T + 1` rows: row `r` reads with token `r` (queries, and gradients of the outputs) and
//! writes token `r − 1` (keys, values, decays). Row 0 writes nothing and row `T` reads nothing. What [`super::prepare`]
//! writes has all rows, with zeros there; all else stands by token, and is loaded and stored beside its row.
//!
//! So the token just before, which has not decayed in what is read, is a row's own, and no part of a decay's gradient.
//! Walked with the decays of the token before instead, its part cancels in that gradient but for its rounding, which was
//! 4e-3 with log decays down to −4, 1.4e-2 from −8 to −1, and 5.8e-2 from −30 to 0. It was also faster, 0.585 ms forward
//! and 2.742 both where this takes 0.625 and 2.906 (8 × 2048 × 32 × 128 × 128 on an H200): 2,048 tokens are 33 chunks
//! here, the first and last of which are stored row by row, and [`super::bonus`] sums up `do · v` itself, as a token's own
//! value is not always in its row's chunk.

use cubecl::prelude::*;

use super::parts::{Place, Span};
use super::plan::{CHUNK, WalkPlan};
use super::table::{FIRST, LAST};

/// Where the tensor of a walk's tile has a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Rows {
    /// At its row, counted over all sequences.
    Prepared,
    /// At the token that it reads with.
    Reading,
    /// At the token that it writes.
    Written,
}

impl WalkPlan {
    /// Rows of the queries and keys of a walk, of its values, and of its outputs.
    pub(crate) fn query_rows(&self) -> Rows {
        match (self.roles.outer_is_value, self.roles.against_time) {
            (true, _) => Rows::Prepared,
            (false, false) => Rows::Reading,
            (false, true) => Rows::Written,
        }
    }

    pub(crate) fn key_rows(&self) -> Rows {
        match (self.roles.outer_is_value, self.roles.against_time) {
            (true, _) => Rows::Prepared,
            (false, false) => Rows::Written,
            (false, true) => Rows::Reading,
        }
    }

    pub(crate) fn value_rows(&self) -> Rows {
        match (self.roles.outer_is_value, self.roles.against_time) {
            (false, _) => Rows::Prepared,
            (true, false) => Rows::Written,
            (true, true) => Rows::Reading,
        }
    }

    /// Whether its values stand by row and its outputs by token, as its queries do.
    pub(crate) fn values_of_other_rows(&self) -> bool {
        self.value_rows() == Rows::Prepared && self.out_rows() == Rows::Reading
    }

    pub(crate) fn out_rows(&self) -> Rows {
        match (self.roles.outer_is_value, self.roles.against_time) {
            (_, false) => Rows::Reading,
            (true, true) => Rows::Written,
            (false, true) => Rows::Prepared,
        }
    }
}

/// Where a tensor has the row `row` of a sequence, both counted from the first token of all; before the first of a sequence
/// this is no token of it.
#[cube]
pub(crate) fn token_at(row: u32, place: &Place, #[comptime] rows: Rows, #[comptime] plan: WalkPlan) -> u32 {
    if comptime!(!plan.exclusive || rows == Rows::Reading) {
        row + 0u32
    } else if comptime!(rows == Rows::Prepared) {
        row + place.later
    } else {
        row - 1u32
    }
}

/// The first row of a span that writes a token: the second one where a sequence begins.
#[cube]
pub(crate) fn first_written(place: &Place, span: &Span, #[comptime] plan: WalkPlan) -> u32 {
    let mut first = u32::new(0);
    if comptime!(plan.exclusive) {
        if place.flags & FIRST != 0u32 && span.start == 0u32 {
            first = u32::new(1);
        }
    }
    first
}

/// How many rows of a span read: all but the last one of a sequence.
#[cube]
pub(crate) fn count_reading(place: &Place, span: &Span, #[comptime] plan: WalkPlan) -> u32 {
    let mut count = span.count + 0u32;
    if comptime!(plan.exclusive) {
        if place.flags & LAST != 0u32 && span.start + span.count == place.length {
            count -= 1u32;
        }
    }
    count
}

/// The rows of a span whose outputs are kept: from the first on, up to the second.
#[cube]
pub(crate) fn kept_rows(place: &Place, span: &Span, #[comptime] plan: WalkPlan) -> (u32, u32) {
    if comptime!(plan.out_rows() == Rows::Written) {
        (first_written(place, span, plan), span.count + 0u32)
    } else if comptime!(plan.out_rows() == Rows::Reading) {
        (u32::new(0), count_reading(place, span, plan))
    } else {
        (u32::new(0), span.count + 0u32)
    }
}

/// Whether all rows of a span of `count` are kept, and it is a whole chunk.
#[cube]
pub(super) fn whole(kept: (u32, u32), count: u32) -> bool {
    let (first, end) = kept;
    first == 0u32 && end == count && count == comptime!(CHUNK as u32)
}
