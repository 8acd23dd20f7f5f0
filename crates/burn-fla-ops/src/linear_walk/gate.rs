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
/// With `exclusive`, where the state is read before the token, it is
/// `⟨S_e, Z_e⟩ + Σ_{s > t} q_s dq_s − Σ_{s ≥ t} k_s dk_s` of the gradients without what has not decayed: a token's own
/// part, and that of neighbours in the chunk, which are in both sums or in neither. With decays down to e^-30 their
/// rounding alone was 1e-5 of the gradient.
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
            dg[at] = sum;
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

/// `w_t = scale · do_t · v_t`, by which a token's own key and query are weighted in each other's gradient, and after them
/// `w'_t = scale · do_t · v_{t−1}`, the same of its query and the key before it: one unit a token and head.
#[cube(launch, address_type = "dynamic")]
pub(super) fn pair_weights<E: Float>(
    grad: &[E],
    v: &[E],
    out: &mut [f32],
    heads: usize,
    count: usize,
    scale: f32,
    #[comptime] values: usize,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    // The first token of all has none before it: what stands there for it is not used.
    let before = max(ABSOLUTE_POS, heads) - heads;
    let mut own = f32::new(0.0);
    let mut other = f32::new(0.0);
    for c in 0..values {
        let given = f32::cast_from(grad[ABSOLUTE_POS * values + c]);
        own += given * f32::cast_from(v[ABSOLUTE_POS * values + c]);
        other += given * f32::cast_from(v[before * values + c]);
    }
    out[ABSOLUTE_POS] = own * scale;
    out[count + ABSOLUTE_POS] = other * scale;
}

/// What has not decayed in the gradient of the queries, `w_t u ∘ k_t + w'_t k_{t−1}`, or with `of_keys` in that of the
/// keys, `w_t u ∘ q_t + w'_{t+1} q_{t+1}`, added to the rest `y` of it; the second of them inside a chunk alone. `x` are
/// the keys, or the queries. One unit a chunk and channel.
#[cube(launch, address_type = "dynamic")]
pub(super) fn add_undecayed<E: Float>(
    x: &[E],
    y: &[f32],
    weights: &[f32],
    bonus: &[f32],
    table: &[i32],
    out: &mut [E],
    heads: usize,
    tokens: usize,
    count: usize,
    #[comptime] keys: usize,
    #[comptime] of_keys: bool,
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
    // The value of the token before, against time the one after it.
    let mut other = f32::new(0.0);
    for n in 0..len {
        let i = if comptime!(of_keys) { len - 1 - n } else { n };
        let row = (start + i) * heads + head;
        let at = row * keys + ABSOLUTE_POS % keys;
        let value = f32::cast_from(x[at]);
        let mut weight = f32::new(0.0);
        if n > 0 {
            weight = weights[(tokens + comptime!(usize::from(of_keys))) * heads + row];
        }
        out[at] = E::cast_from(y[at] + weights[row] * factor * value + weight * other);
        other = value;
    }
}

/// The gradient of a bonus, `Σ_t q_t ∘ k_t w_t` over each chunk, `[chunks, H, K]`. One unit a chunk and channel.
#[cube(launch, address_type = "dynamic")]
pub(super) fn bonus_gradient<E: Float>(
    q: &[E],
    k: &[E],
    weights: &[f32],
    table: &[i32],
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
    let mut sum = f32::new(0.0);
    for i in 0..len {
        let row = (start + i) * heads + head;
        let at = row * keys + ABSOLUTE_POS % keys;
        sum += f32::cast_from(q[at]) * f32::cast_from(k[at]) * weights[row];
    }
    sums[ABSOLUTE_POS] = sum;
}
