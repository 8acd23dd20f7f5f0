//! The gradient of the log decay, from what the walks already produced.

use cubecl::prelude::*;

use super::table::CHUNK_WORDS;

/// `⟨S_e, Z_e⟩` over the value channels at the end of each chunk, `[chunks, H, K]`: one unit an element.
#[cube(launch, address_type = "dynamic")]
pub(super) fn end_products(
    states: &[f32],
    grads: &[f32],
    table: &[i32],
    out: &mut [f32],
    heads: usize,
    count: usize,
    #[comptime] keys: usize,
    #[comptime] values: usize,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let key = ABSOLUTE_POS % keys;
    let head = (ABSOLUTE_POS / keys) % heads;
    let chunk = ABSOLUTE_POS / keys / heads;
    let slot = chunk + table[chunk * comptime!(CHUNK_WORDS)] as usize + 1;
    let base = ((slot * heads + head) * keys + key) * values;
    let mut sum = f32::new(0.0);
    for v in 0..values {
        sum += states[base + v] * grads[base + v];
    }
    out[ABSOLUTE_POS] = sum;
}

/// `dg_t = ⟨S_e, Z_e⟩ + Σ_{s ≥ t} (q_s dq_s − k_s dk_s)` inside each chunk, by key channel: one unit a chunk and channel.
///
/// `dq` and `dk` are f32 as the walks summed them: from rounded ones the errors of a whole chunk would add up.
#[cube(launch, address_type = "dynamic")]
pub(super) fn gate_gradient<E: Float>(
    q: &[E],
    k: &[E],
    dq: &[f32],
    dk: &[f32],
    ends: &[f32],
    table: &[i32],
    dg: &mut [f32],
    heads: usize,
    count: usize,
    #[comptime] keys: usize,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let key = ABSOLUTE_POS % keys;
    let head = (ABSOLUTE_POS / keys) % heads;
    let chunk = ABSOLUTE_POS / keys / heads;
    let start = table[chunk * comptime!(CHUNK_WORDS) + 1] as usize;
    let len = table[chunk * comptime!(CHUNK_WORDS) + 2] as usize;
    let mut sum = ends[ABSOLUTE_POS];
    for i in 0..len {
        let at = ((start + len - 1 - i) * heads + head) * keys + key;
        sum += f32::cast_from(q[at]) * dq[at] - f32::cast_from(k[at]) * dk[at];
        dg[at] = sum;
    }
}

/// Sums over the last dimension: a decay by token is one number for all key channels.
#[cube(launch, address_type = "dynamic")]
pub(crate) fn sum_channels(x: &[f32], out: &mut [f32], count: usize, #[comptime] channels: usize) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let mut sum = f32::new(0.0);
    for c in 0..channels {
        sum += x[ABSOLUTE_POS * channels + c];
    }
    out[ABSOLUTE_POS] = sum;
}
