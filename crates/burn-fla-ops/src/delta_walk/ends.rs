//! The small kernels around the walks: states in and out of the slots, the workspace of value channels, and the gradients
//! made of what the walks left.

use cubecl::prelude::*;

use super::plan::{Form, Gate};
use crate::linear_walk::table::{CHUNK_WORDS, SEQUENCE_WORDS};

/// Copies the states of the sequences, `[N, H, K, V]`, into their first (or `last`) slots, or out of them.
#[cube(launch, address_type = "dynamic")]
pub(super) fn copy_states(
    from: &[f32],
    to: &mut [f32],
    table: &[i32],
    chunks: usize,
    size: usize,
    count: usize,
    #[comptime] last: bool,
    #[comptime] into_slots: bool,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let sequence = ABSOLUTE_POS / size;
    let at = chunks * comptime!(CHUNK_WORDS) + sequence * comptime!(SEQUENCE_WORDS);
    let mut slot = table[at] as usize + sequence;
    if comptime!(last) {
        slot += table[at + 1] as usize;
    }
    let there = slot * size + ABSOLUTE_POS % size;
    if comptime!(into_slots) {
        to[there] = from[ABSOLUTE_POS];
    } else {
        to[ABSOLUTE_POS] = from[there];
    }
}

/// A buffer as f32 into a larger one, from `at` on.
#[cube(launch, address_type = "dynamic")]
pub(super) fn widen<E: Float>(from: &[E], to: &mut [f32], at: usize, count: usize, #[define(E)] _dtype: ElemType) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    to[at + ABSOLUTE_POS] = f32::cast_from(from[ABSOLUTE_POS]);
}

/// `dv` of the last plane of the workspace: the gradient of what is added, times the strength with which it was.
#[cube(launch, address_type = "dynamic")]
pub(super) fn value_gradient<B: Float, V: Float>(
    values: &[f32],
    strengths: &[B],
    dv: &mut [V],
    count: usize,
    #[comptime] channels: usize,
    #[comptime] form: Form,
    #[define(B, V)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let mut gradient = values[comptime!(form.value_planes() - 1) * count + ABSOLUTE_POS];
    if comptime!(form.one_added()) {
        gradient *= f32::cast_from(strengths[ABSOLUTE_POS / channels]);
    }
    dv[ABSOLUTE_POS] = V::cast_from(gradient);
}

/// `dβ = ⟨v + u, dw⟩`: one unit a token and head.
#[cube(launch, address_type = "dynamic")]
pub(super) fn strength_gradient<B: Float>(
    values: &[f32],
    out: &mut [B],
    count: usize,
    #[comptime] channels: usize,
    #[define(B)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let plane = count * channels;
    let base = ABSOLUTE_POS * channels;
    let mut sum = f32::new(0.0);
    for c in 0..channels {
        sum += values[plane + base + c] * values[3 * plane + base + c];
    }
    out[ABSOLUTE_POS] = B::cast_from(sum);
}

/// Which planes of the key channels make a gradient: `± first + factor ∘ second`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sum {
    /// A plane, and whether it is subtracted.
    pub(super) first: Option<(usize, bool)>,
    pub(super) second: Option<usize>,
    /// Whether the second plane is multiplied by `factor`.
    pub(super) scaled: bool,
}

/// A gradient of key channels, `[tokens, key heads, K]`: the sum over the heads that share a key head.
#[cube(launch, address_type = "dynamic")]
pub(super) fn key_gradient<E: Float, F: Float>(
    keys: &[f32],
    factor: &[F],
    out: &mut [E],
    groups: usize,
    count: usize,
    #[comptime] channels: usize,
    #[comptime] sum: Sum,
    #[define(E, F)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let plane = count * groups;
    let base = ABSOLUTE_POS / channels * groups * channels + ABSOLUTE_POS % channels;
    let mut total = f32::new(0.0);
    for group in 0..groups {
        let at = base + group * channels;
        if comptime!(sum.first.is_some()) {
            let (from, negative) = comptime!(sum.first.unwrap_or((0, false)));
            let x = keys[from * plane + at];
            total += if comptime!(negative) { -x } else { x };
        }
        if comptime!(sum.second.is_some()) {
            let mut x = keys[comptime!(sum.second.unwrap_or(0)) * plane + at];
            if comptime!(sum.scaled) {
                x *= f32::cast_from(factor[ABSOLUTE_POS]);
            }
            total += x;
        }
    }
    out[ABSOLUTE_POS] = E::cast_from(total);
}

/// `⟨S_e, Z_e⟩` over the value channels at the end of each chunk, `[chunks, H, K]`, behind the planes of key channels.
#[cube(launch, address_type = "dynamic")]
pub(super) fn end_products(
    states: &[f32],
    grads: &[f32],
    table: &[i32],
    keys: &mut [f32],
    at: usize,
    size: usize,
    count: usize,
    #[comptime] values: usize,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let chunk = ABSOLUTE_POS / size;
    let slot = chunk + table[chunk * comptime!(CHUNK_WORDS)] as usize + 1;
    let base = (slot * size + ABSOLUTE_POS % size) * values;
    let mut sum = f32::new(0.0);
    for v in 0..values {
        sum += states[base + v] * grads[base + v];
    }
    keys[at + ABSOLUTE_POS] = sum;
}

/// Below this log decay, e^-17 < 2^-24, what a row keeps is less than the rounding of what it is added to.
const FORGOTTEN: f32 = -17.0;

/// The gradient of the log decay by key channel, f32 `[tokens, heads, K]`: one unit a chunk, head and channel.
///
/// With `R_t = ⟨S_t, Z_t⟩` of a row, Z without what token t itself reads, and the sums of a chunk starting from those at
/// its end: `P_t = R_t + q ∘ dq − k ∘ dk − b ∘ db` is `⟨S̃_t, dS_t⟩`. Where the state is read before its decay that is `dg_t`,
/// and `R_{t−1} = dg_t + a ∘ da`; where it is read after, `dg_t = P_t + a ∘ da` and `R_{t−1} = dg_t`.
///
/// These are sums of terms of order one, with their rounding, however small `dg_t` is. Where the decay is so strong that
/// nothing of `dg_t` could show in such a sum it is taken as zero, and the rounding so far is forgotten with it.
#[cube(launch, address_type = "dynamic")]
pub(super) fn gate_gradient<E: Float, B: Float>(
    q: &[E],
    k: &[E],
    a: &[E],
    b: &[B],
    g: &[f32],
    keys: &[f32],
    table: &[i32],
    dg: &mut [f32],
    heads: usize,
    groups: usize,
    tokens: usize,
    count: usize,
    #[comptime] channels: usize,
    #[comptime] form: Form,
    #[comptime] gate: Gate,
    #[define(E, B)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let channel = ABSOLUTE_POS % channels;
    let head = (ABSOLUTE_POS / channels) % heads;
    let chunk = ABSOLUTE_POS / channels / heads;
    let start = table[chunk * comptime!(CHUNK_WORDS) + 1] as usize;
    let length = table[chunk * comptime!(CHUNK_WORDS) + 2] as usize;
    let plane = tokens * heads * channels;
    let mut sum = keys[comptime!(form.key_planes()) * plane + ABSOLUTE_POS];
    for i in 0..length {
        let row = (start + length - 1 - i) * heads + head;
        let at = row * channels + channel;
        let shared = row / groups * channels + channel;
        let decay = if comptime!(gate == Gate::Key) { g[at] } else { g[row] };
        let reader = f32::cast_from(a[shared]);
        let read = reader * keys[plane + at];
        let read = if comptime!(form == Form::Free) { read } else { -read };
        sum += f32::cast_from(q[shared]) * keys[at] - f32::cast_from(k[shared]) * keys[2 * plane + at];
        if comptime!(form == Form::Free) {
            sum -= f32::cast_from(b[shared]) * keys[3 * plane + at];
        }
        if comptime!(form == Form::Removal) {
            sum -= reader * f32::cast_from(b[shared]) * keys[3 * plane + at];
        }
        if comptime!(form.reads_decayed()) {
            sum = if decay < FORGOTTEN { f32::new(0.0) } else { sum + read };
            dg[at] = sum;
        } else {
            sum = if decay < FORGOTTEN { f32::new(0.0) } else { sum };
            dg[at] = sum;
            sum += read;
        }
    }
}
