//! What a decay by channel asks for before a walk: queries and keys with their decays inside a span. By value these are
//! the gradient of the outputs, where there is one, and the values.
//!
//! With `G` the running sum of log decays in a span and `M` the middle of its values,
//!
//! ```text
//! q'_i = q_i ∘ e^{G_i − M} ,   k'_j = k_j ∘ e^{M − G_j} ,   q'_i · k'_j = Σ q_i k_j e^{G_i − G_j}
//! ```
//!
//! so that all scores of a span are one product, and with `S' = e^M ∘ S` before the span and `S ← e^{G_last − M} ∘
//! (S' + k'ᵀ v)` after it, the states too. A walk whose *outputs* have key channels (those for dq and dk) gives them a
//! factor `e^{G − M}`, or its inverse.
//!
//! The exponents are finite and exact as long as `G` does not fall by more than [`RANGE`] powers of two inside a span:
//! each factor is then between `2^{−RANGE / 2}` and `2^{RANGE / 2}`, and the product of a pair has the relative error of
//! its two roundings whatever its decay is. A chunk in which `G` falls further is cut into 2, 4, … 64 spans, the fewest
//! that do. The decay at a span's first token does not count: no pair inside contains it.
//!
//! Where the state is read before a token (`exclusive`), keys and decays come one row later (see [`super::shift`]), and
//! what is written here has a row for each. The weight of a token's own value, `Σ q_i u k_i` over the key channels, is
//! summed up here too.

use cubecl::prelude::*;

use super::parts::LOG2_E;
use super::plan::CHUNK;
use super::table::{CHUNK_WORDS, FIRST, LAST};
use crate::tile::hopper::{address_of, bf16_high, bf16_low, exp2, load_global_pair, pack_word, reciprocal};

/// Which factors `e^{G − M}` are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Factors {
    None,
    /// They are rounded to bf16, and what is written into the state is divided by what they are.
    Exact,
    /// What is written into the state is divided by the rounded ones.
    ///
    /// For what reads the state with these factors and has outputs with them too, as the two passes of a slot memory do:
    /// where a token reads itself, which counts most, the rounding of its factor is then in none of its products, and it
    /// would be in two of them. In an emulation of gsa's passes with these roundings (normal q, k, v and do, slots a
    /// softmax of normal numbers, K = V = 128, M = 64) it takes dq's error from 4.9e-3 to 4.4e-3; that of a token whose
    /// slot holds hardly anything but itself, which dominates dq where a long sequence has one, from 6.8e-3 to 5.4e-3
    /// with 1.7 % in the place of 7 % over 1.2e-2. Beside it, the gradient of the probabilities in f32 brought 0.7 %, and
    /// that of the scores in f32 too 0.3 %; alone, neither brought anything.
    Rounded,
}

/// Powers of two by which a span may decay. Scores of pairs in the wrong order reach `2^RANGE`: they are selected away,
/// and may be infinite.
pub(super) const RANGE: f32 = 160.0;

/// Tokens that are loaded before the first of them is used.
const BATCH: usize = 16;

/// One cube a chunk and head, one unit two channels.
///
/// `vectors` gets `e^M` and `e^{G_last − M}` of chunks that are one span, `[chunks, H, 2, K]`; `levels` the number of
/// spans of each chunk, `[chunks, H]`. With `exclusive`, `weights` gets those of the tokens' own values, `[tokens, H]`,
/// with the bonus `[H, K]`.
#[cube(launch_unchecked)]
pub(super) fn prepare(
    q: &[u32],
    k: &[u32],
    gates: &[u32],
    table: &[i32],
    q_out: &mut [u32],
    k_out: &mut [u32],
    factors: &mut [u32],
    vectors: &mut [f32],
    levels: &mut [u32],
    bonus: &[f32],
    weights: &mut [f32],
    heads: u32,
    table_at: u32,
    #[comptime] keys: u32,
    #[comptime] wide: bool,
    #[comptime] with_queries: bool,
    #[comptime] with_factors: Factors,
    #[comptime] exclusive: bool,
) {
    let mut shared = Shared::<[f32]>::new_slice(4usize);
    let mut own = Shared::<[f32]>::new_slice(comptime!(if exclusive { 4 * CHUNK } else { 1 }));
    let chunk = CUBE_POS_X / heads;
    let head = CUBE_POS_X % heads;
    let at = (table_at + chunk * comptime!(CHUNK_WORDS as u32)) as usize;
    let start = table[at] as u32;
    let length = table[at + 1] as u32;
    let inside = 2u32 * UNIT_POS < keys;
    // The element of the first row's first channel, and of how many elements a row is.
    let stride = heads * keys;
    let first = (start * heads + head) * keys + 2u32 * UNIT_POS;
    // Rows that write nothing, and those that read nothing; and how much later a row stands in what is written here.
    let mut lead = u32::new(0);
    let mut tail = u32::new(0);
    let mut later = u32::new(0);
    if comptime!(exclusive) {
        lead = table[at + 3] as u32 & FIRST;
        tail = (table[at + 3] as u32 & LAST) / LAST;
        later = table[at + 2] as u32 * stride;
    }

    let mut size = u32::new(CHUNK as i64);
    let mut searching = true;
    // The log decay of the first token, and of all others, of the last span.
    let mut start_low = f32::new(0.0);
    let mut start_high = f32::new(0.0);
    let mut rest_low = f32::new(0.0);
    let mut rest_high = f32::new(0.0);
    while searching {
        let mut widest = f32::new(0.0);
        if inside {
            let mut t = u32::new(0);
            while t < length {
                let mut lows = Array::<f32>::new(BATCH);
                let mut highs = Array::<f32>::new(BATCH);
                #[unroll]
                for i in 0..BATCH {
                    // Past the last token the last one again: it does not count.
                    let token = u32::min(t + comptime!(i as u32), length - 1u32);
                    let (a, b) = gate_pair(gates, first, token, stride, lead, wide, exclusive);
                    lows[i] = a;
                    highs[i] = b;
                }
                #[unroll]
                for i in 0..BATCH {
                    let token = t + comptime!(i as u32);
                    // A power of two.
                    let starts = token & (size - 1u32) == 0u32;
                    let counts = token < length;
                    start_low = select(starts && counts, lows[i], start_low);
                    start_high = select(starts && counts, highs[i], start_high);
                    rest_low = select(starts, 0.0f32, select(counts, rest_low + lows[i], rest_low));
                    rest_high = select(starts, 0.0f32, select(counts, rest_high + highs[i], rest_high));
                    widest = f32::max(widest, f32::max(-rest_low, -rest_high));
                }
                t += comptime!(BATCH as u32);
            }
        }
        let widest = plane_max(widest);
        sync_cube();
        if UNIT_POS % 32u32 == 0u32 {
            shared[(UNIT_POS / 32u32) as usize] = widest;
        }
        sync_cube();
        let mut all = f32::new(0.0);
        // Outside of a kernel the constant is 0.
        #[allow(clippy::reversed_empty_ranges)]
        for i in 0..CUBE_DIM_X / 32u32 {
            all = f32::max(all, shared[i as usize]);
        }
        if all <= RANGE || size == 1u32 {
            searching = false;
        } else {
            size /= 2u32;
        }
    }
    if UNIT_POS == 0 {
        levels[CUBE_POS_X as usize] = comptime!(CHUNK as u32) / size;
    }
    if inside {
        let mut from = u32::new(0);
        while from < length {
            let count = u32::min(size, length - from);
            if size < comptime!(CHUNK as u32) {
                let (a, b) = gate_pair(gates, first, from, stride, lead, wide, exclusive);
                start_low = a;
                start_high = b;
                rest_low = f32::new(0.0);
                rest_high = f32::new(0.0);
                for t in 1..count {
                    let (a, b) = gate_pair(gates, first, from + t, stride, lead, wide, exclusive);
                    rest_low += a;
                    rest_high += b;
                }
            }
            let half_low = rest_low * 0.5f32;
            let half_high = rest_high * 0.5f32;
            if size == comptime!(CHUNK as u32) {
                let to = (CUBE_POS_X * comptime!(2 * keys) + 2u32 * UNIT_POS) as usize;
                vectors[to] = exp2(start_low + half_low);
                vectors[to + 1] = exp2(start_high + half_high);
                vectors[to + comptime!(keys as usize)] = exp2(half_low);
                vectors[to + comptime!(keys as usize + 1)] = exp2(half_high);
            }
            // `G − M`, which is `−rest / 2` at the first token.
            let mut low = f32::new(0.0) - start_low - half_low;
            let mut high = f32::new(0.0) - start_high - half_high;
            let mut t = u32::new(0);
            while t < count {
                let mut qs = Array::<u32>::new(BATCH);
                let mut ks = Array::<u32>::new(BATCH);
                let mut lows = Array::<f32>::new(BATCH);
                let mut highs = Array::<f32>::new(BATCH);
                #[unroll]
                for i in 0..BATCH {
                    // Past the last token the last one again: it is not written.
                    let row = from + u32::min(t + comptime!(i as u32), count - 1u32);
                    if comptime!(with_queries) {
                        qs[i] = read_at(q, first, row, stride, length - tail, exclusive);
                    }
                    ks[i] = written_at(k, first, row, stride, lead, exclusive);
                    let (a, b) = gate_pair(gates, first, row, stride, lead, wide, exclusive);
                    lows[i] = a;
                    highs[i] = b;
                }
                #[unroll]
                for i in 0..BATCH {
                    low += lows[i];
                    high += highs[i];
                    let f_low = exp2(low);
                    let f_high = exp2(high);
                    if t + comptime!(i as u32) < count {
                        let to = ((first + later + (from + t + comptime!(i as u32)) * stride) / 2u32) as usize;
                        if comptime!(with_queries) {
                            q_out[to] = pack_word(bf16_low(qs[i]) * f_low, bf16_high(qs[i]) * f_high);
                        }
                        let rounded = pack_word(f_low, f_high);
                        if comptime!(with_factors == Factors::Rounded) {
                            k_out[to] = pack_word(
                                bf16_low(ks[i]) * reciprocal(bf16_low(rounded)),
                                bf16_high(ks[i]) * reciprocal(bf16_high(rounded)),
                            );
                        } else {
                            k_out[to] = pack_word(bf16_low(ks[i]) * exp2(-low), bf16_high(ks[i]) * exp2(-high));
                        }
                        if comptime!(with_factors != Factors::None) {
                            factors[to] = rounded;
                        }
                    }
                }
                t += comptime!(BATCH as u32);
            }
            from += size;
        }
    }
    if comptime!(exclusive) {
        own_weights(q, k, bonus, &mut own, weights, first, stride, start, head, heads, length - tail, keys);
    }
}

/// `Σ q_i u k_i` over the key channels of each of a chunk's tokens, to `weights`.
#[cube]
fn own_weights(
    q: &[u32],
    k: &[u32],
    bonus: &[f32],
    own: &mut Shared<[f32]>,
    weights: &mut [f32],
    first: u32,
    stride: u32,
    start: u32,
    head: u32,
    heads: u32,
    length: u32,
    #[comptime] keys: u32,
) {
    let inside = 2u32 * UNIT_POS < keys;
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    if inside {
        let at = (head * keys + 2u32 * UNIT_POS) as usize;
        low = bonus[at];
        high = bonus[at + 1];
    }
    let mut t = u32::new(0);
    while t < length {
        let mut products = Array::<f32>::new(BATCH);
        #[unroll]
        for i in 0..BATCH {
            let token = u32::min(t + comptime!(i as u32), length - 1u32);
            let mut product = f32::new(0.0);
            if inside {
                let word = ((first + token * stride) / 2u32) as usize;
                let (a, b) = (q[word], k[word]);
                product = bf16_low(a) * bf16_low(b) * low + bf16_high(a) * bf16_high(b) * high;
            }
            products[i] = product;
        }
        #[unroll]
        for i in 0..BATCH {
            let sum = plane_sum(products[i]);
            if UNIT_POS % 32u32 == 0u32 {
                own[(UNIT_POS / 32u32 * comptime!(CHUNK as u32) + t + comptime!(i as u32)) as usize] = sum;
            }
        }
        t += comptime!(BATCH as u32);
    }
    sync_cube();
    for token in range_stepped(UNIT_POS, length, CUBE_DIM_X) {
        let mut sum = f32::new(0.0);
        // As above.
        #[allow(clippy::reversed_empty_ranges)]
        for warp in 0..CUBE_DIM_X / 32u32 {
            sum += own[(warp * comptime!(CHUNK as u32) + token) as usize];
        }
        weights[((start + token) * heads + head) as usize] = sum;
    }
}

/// The log decays of two channels in a row, as powers of two; `first` is even. The first `lead` rows write nothing.
#[cube]
fn gate_pair(
    gates: &[u32],
    first: u32,
    row: u32,
    stride: u32,
    lead: u32,
    #[comptime] wide: bool,
    #[comptime] exclusive: bool,
) -> (f32, f32) {
    if comptime!(exclusive) {
        let (low, high) = gates_at(gates, first + u32::max(row, lead) * stride - stride, wide);
        (select(row < lead, 0.0f32, low), select(row < lead, 0.0f32, high))
    } else {
        gates_at(gates, first + row * stride, wide)
    }
}

/// [`super::key::gate_at`] at an even element and the next, in one load.
#[cube]
fn gates_at(gates: &[u32], at: u32, #[comptime] wide: bool) -> (f32, f32) {
    if comptime!(wide) {
        let pair = load_global_pair(address_of(gates) + u64::cast_from(at) * 4u64);
        let (low, high) = (f32::reinterpret(pair.extract(0usize)), f32::reinterpret(pair.extract(1usize)));
        (low * LOG2_E, high * LOG2_E)
    } else {
        let word = gates[(at / 2u32) as usize];
        (bf16_low(word) * LOG2_E, bf16_high(word) * LOG2_E)
    }
}

/// Two channels of what a row writes, nothing in the first `lead` rows.
#[cube]
fn written_at(x: &[u32], first: u32, row: u32, stride: u32, lead: u32, #[comptime] exclusive: bool) -> u32 {
    if comptime!(exclusive) {
        let word = x[((first + u32::max(row, lead) * stride - stride) / 2u32) as usize];
        select(row < lead, 0u32, word)
    } else {
        x[((first + row * stride) / 2u32) as usize]
    }
}

/// Two channels of what a row reads with, nothing from row `end` on: that one has a token before it.
#[cube]
fn read_at(x: &[u32], first: u32, row: u32, stride: u32, end: u32, #[comptime] exclusive: bool) -> u32 {
    if comptime!(exclusive) {
        let back = select(row < end, 0u32, stride);
        let word = x[((first + row * stride - back) / 2u32) as usize];
        select(row < end, word, 0u32)
    } else {
        x[((first + row * stride) / 2u32) as usize]
    }
}
