//! The recurrence of [`ssd`](crate::ssd()), whose log decays are `Δ A` and whose values are `Δ x`, from Δ, A and x.
//!
//! ```text
//! o_i = e^{G_i} S c_i + Σ_{j ≤ i} e^{G_i − G'_j} (c_i · b_j) x_j + D ∘ x_i ,   G'_j = G_j − ln Δ_j
//! S  ← e^{G_last} S + Σ_j e^{G_last − G'_j} x_j b_jᵀ
//! ```
//!
//! Beside a chunk's running sums G stand G', and what a token adds is decayed with those: no `Δ x` is written, read or
//! rounded. Exponents are at most ln Δ, where those of the other walks are at most zero. `D ∘ x` is added to the outputs in
//! f32 from the tile of the values.
//!
//! The gradient of x is the walk's that gave that of v; `b_j · db_j`, which the decay's gradient is summed up from anyway, is
//! Δ times the gradient of Δ but for what Δ has through the decay.

use cubecl::prelude::*;

use super::parts::{LOG2_E, Place, decay_at};
use super::plan::{CHUNK, WalkPlan};
use crate::ssd::{LEAST_STEP, Skip};
use crate::tile::hopper::{bf16_high, bf16_low, load_u32, read, swizzled, write};

impl WalkPlan {
    /// Where the running sums of the tokens that write the state stand, after those of all.
    pub(super) fn written(&self) -> usize {
        if self.steps.is_some() { self.heads * CHUNK } else { 0 }
    }

    /// Where the running sums of a walk's columns stand, the tokens whose values it adds up.
    pub(crate) fn columns_at(&self) -> usize {
        if self.roles.against_time { 0 } else { self.written() }
    }

    /// Where those of its rows stand, the tokens of its outputs.
    pub(crate) fn rows_at(&self) -> usize {
        if self.roles.against_time { self.written() } else { 0 }
    }

    /// What is added to the outputs.
    pub(crate) fn skip(&self) -> Skip {
        self.steps.unwrap_or(Skip::None)
    }
}

/// That of a token and head, zero after the last token.
#[cube]
fn number_at(numbers: &[f32], place: &Place, token: u32, heads: u32) -> f32 {
    let mut value = f32::new(0.0);
    if token < place.length {
        value = numbers[((place.start + token) * heads + place.head) as usize];
    }
    value
}

/// What a lane needs of two tokens of a chunk, the second 32 after the first: log decays in powers of two, or Δ.
#[cube]
pub(crate) fn decays_of_two(
    g: &[f32],
    place: &Place,
    token: u32,
    heads: u32,
    #[comptime] plan: WalkPlan,
) -> (f32, f32) {
    if comptime!(plan.steps.is_some()) {
        (number_at(g, place, token, heads), number_at(g, place, token + 32u32, heads))
    } else {
        (decay_at(g, place, token, heads, plan), decay_at(g, place, token + 32u32, heads, plan))
    }
}

/// The running sums of a chunk's log decays at a lane's two tokens, in powers of two.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Sums {
    pub(crate) low: f32,
    pub(crate) high: f32,
    /// Those with which what the tokens write is decayed: without steps the same.
    pub(crate) written_low: f32,
    pub(crate) written_high: f32,
}

#[cube]
impl Sums {
    /// Of a warp's [`decays_of_two`]; `rates` is A.
    pub(crate) fn of(low: f32, high: f32, rates: &[f32], place: &Place, #[comptime] plan: WalkPlan) -> Sums {
        if comptime!(plan.steps.is_some()) {
            let rate = rates[place.head as usize] * LOG2_E;
            let sums = Sums::of_decays(low * rate, high * rate);
            let (written_low, written_high) = (sums.low - log2_of_step(low), sums.high - log2_of_step(high));
            Sums { low: sums.low, high: sums.high, written_low, written_high }
        } else {
            Sums::of_decays(low, high)
        }
    }

    /// Of log decays in powers of two.
    pub(crate) fn of_decays(low: f32, high: f32) -> Sums {
        let low = plane_inclusive_sum(low);
        let high = plane_inclusive_sum(high) + plane_broadcast(low, 31u32);
        Sums { low, high, written_low: low, written_high: high }
    }
}

#[cube]
fn log2_of_step(step: f32) -> f32 {
    f32::ln(max(step, LEAST_STEP)) * LOG2_E
}

/// Adds `D ∘ x` to the outputs. `values` is the address of the chunk's tile, `channel` its first one.
#[cube]
pub(super) fn add_inputs(
    skip: &[f32],
    head: u32,
    channel: u32,
    values: u32,
    row: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    let out = comptime!(plan.out());
    let by_channel = comptime!(plan.skip() == Skip::Channel);
    let mut a = f32::new(0.0);
    let mut b = f32::new(0.0);
    if comptime!(!by_channel) {
        a = skip[head as usize];
        b = a + 0.0f32;
    }
    #[unroll]
    for j in 0..8usize {
        if comptime!(by_channel) {
            // What is past the last channel is not stored.
            let last = comptime!(plan.outer as u32 - 2);
            let column = min(channel + comptime!(8 * j as u32) + lane % 4u32 * 2u32, last);
            let at = (head * comptime!(plan.outer as u32) + column) as usize;
            a = skip[at];
            b = skip[at + 1];
        }
        #[unroll]
        for half in 0..2usize {
            let row = row + comptime!(8 * half as u32);
            let word = load_u32(swizzled(values, row, comptime!(16 * j as u32) + lane % 4u32 * 4u32));
            let i = comptime!(4 * j + 2 * half);
            let low = read(out, i) + a * bf16_low(word);
            let high = read(out, comptime!(i + 1)) + b * bf16_high(word);
            write(out, i, low);
            write(out, comptime!(i + 1), high);
        }
    }
}
