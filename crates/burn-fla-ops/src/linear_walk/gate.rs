//! The gradient of the log decay, from what the walks already produced.

use cubecl::prelude::*;

use super::table::CHUNK_WORDS;

/// `⟨S_e, Z_e⟩` at the end of each chunk: over the value channels, `[chunks, H, K]`, or with `by_value` over the key
/// channels, `[chunks, H, V]`. One unit an element.
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
    #[comptime] by_value: bool,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let channels = comptime!(if by_value { values } else { keys });
    let channel = ABSOLUTE_POS % channels;
    let head = (ABSOLUTE_POS / channels) % heads;
    let chunk = ABSOLUTE_POS / channels / heads;
    let slot = chunk + table[chunk * comptime!(CHUNK_WORDS)] as usize + 1;
    let base =
        (slot * heads + head) * comptime!(keys * values) + channel * comptime!(if by_value { 1 } else { values });
    let mut sum = f32::new(0.0);
    for i in 0..comptime!(if by_value { keys } else { values }) {
        let at = base + i * comptime!(if by_value { values } else { 1 });
        sum += states[at] * grads[at];
    }
    out[ABSOLUTE_POS] = sum;
}

/// `dg_t = ⟨S_e, Z_e⟩ + Σ_{s ≥ t} (q_s dq_s − k_s dk_s)` inside each chunk, by key channel: one unit a chunk and channel.
/// With a decay by value, q is the gradient of the outputs and dq the outputs, k the values and dk their gradient.
///
/// With `exclusive`, where the state is read before the token, it is `⟨S_e, Z_e⟩ + Σ_{s > t} q_s dq_s − Σ_{s ≥ t} k_s dk_s`
/// of the gradients without a token's own part; that of t, which both sums then have but for one, comes in `dg`.
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
    #[comptime] exclusive: bool,
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
        let read = f32::cast_from(q[at]) * dq[at];
        let written = f32::cast_from(k[at]) * dk[at];
        if comptime!(exclusive) {
            sum -= written;
            dg[at] += sum;
            sum += read;
        } else {
            sum += read - written;
            dg[at] = sum;
        }
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

/// `scale · do_t · v_t`, by which a token's own key and query are weighted in each other's gradient: one unit a token and
/// head.
#[cube(launch, address_type = "dynamic")]
pub(super) fn own_weights<E: Float>(
    grad: &[E],
    v: &[E],
    out: &mut [f32],
    count: usize,
    scale: f32,
    #[comptime] values: usize,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let mut sum = f32::new(0.0);
    for c in 0..values {
        sum += f32::cast_from(grad[ABSOLUTE_POS * values + c]) * f32::cast_from(v[ABSOLUTE_POS * values + c]);
    }
    out[ABSOLUTE_POS] = sum * scale;
}

/// What a bonus u has of its own, with the weights w of [`own_weights`]: `q_t ∘ u ∘ k_t w_t`, the part of both `q_t ∘ dq_t` and
/// `k_t ∘ dk_t`, and its gradient `Σ_t q_t ∘ k_t w_t` over each chunk, `[chunks, H, K]`. One unit a chunk and channel.
#[cube(launch, address_type = "dynamic")]
pub(super) fn own_parts<E: Float>(
    q: &[E],
    k: &[E],
    weights: &[f32],
    bonus: &[f32],
    table: &[i32],
    parts: &mut [f32],
    sums: &mut [f32],
    heads: usize,
    count: usize,
    #[comptime] keys: usize,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let head = (ABSOLUTE_POS / keys) % heads;
    let chunk = ABSOLUTE_POS / keys / heads;
    let start = table[chunk * comptime!(CHUNK_WORDS) + 1] as usize;
    let len = table[chunk * comptime!(CHUNK_WORDS) + 2] as usize;
    let factor = bonus[head * keys + ABSOLUTE_POS % keys];
    let mut sum = f32::new(0.0);
    for i in 0..len {
        let row = (start + i) * heads + head;
        let at = row * keys + ABSOLUTE_POS % keys;
        let part = f32::cast_from(q[at]) * f32::cast_from(k[at]) * weights[row];
        parts[at] = part * factor;
        sum += part;
    }
    sums[ABSOLUTE_POS] = sum;
}
