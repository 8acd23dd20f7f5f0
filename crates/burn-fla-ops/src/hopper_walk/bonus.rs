//! A token's own part in the outputs, where the state is read before it: its weights in a walk, and the gradients that it
//! has of its own.

use burn::tensor::DType;
use cubecl::prelude::*;

use super::launch::HopperWalk;
use super::parts::{Place, Span};
use super::plan::{BESIDE, CHUNK, WalkPlan};
use super::shift::{kept_rows, token_at};
use super::table::{CHUNK_WORDS, LAST};
use crate::bridge::{CubeTensor, alloc};
use crate::rows::sum_rows;
use crate::tile::hopper::{bf16_high, bf16_low, load_u32, pack_word, read, swizzled, words, write};

/// Tokens that are loaded before the first of them is used.
const BATCH: usize = 8;

/// One warp writes the weights of a span's tokens' own values to `to[at..]`, zero where a row's output is none.
#[cube]
pub(super) fn weights_of_span(
    weights: &[f32],
    to: &mut [f32],
    at: usize,
    place: &Place,
    span: &Span,
    heads: u32,
    lane: u32,
    #[comptime] plan: WalkPlan,
) {
    #[unroll]
    for half in 0..2usize {
        let row = lane + comptime!(32 * half as u32);
        to[at + row as usize] = weight_of_row(weights, row, place, span, heads, plan);
    }
}

/// The weight of a row's token's own value, zero where the row's output is none.
#[cube]
pub(crate) fn weight_of_row(
    weights: &[f32],
    row: u32,
    place: &Place,
    span: &Span,
    heads: u32,
    #[comptime] plan: WalkPlan,
) -> f32 {
    let (first, end) = kept_rows(place, span, plan);
    let token = token_at(place.start + span.start, place, plan.out_rows(), plan);
    let mut weight = f32::new(0.0);
    if row >= first && row < end {
        weight = weights[((token + row) * heads + place.head) as usize];
    }
    weight
}

/// Adds the value of the one row whose token's value is not among those of a chunk, but beside them: the last one,
/// against time the first. `values` is the address of the chunk's first.
#[cube]
pub(super) fn add_beside(
    weights: &[f32],
    at: usize,
    values: u32,
    row: u32,
    lane: u32,
    count: u32,
    out_scale: f32,
    #[comptime] plan: WalkPlan,
) {
    let out = comptime!(plan.out());
    let half = comptime!(usize::from(!plan.roles.against_time));
    let edge = comptime!(if plan.roles.against_time { 0u32 } else { CHUNK as u32 - 1 });
    let row = row + comptime!(8 * half as u32);
    if row == edge && row < count {
        let weight = weights[at + row as usize] * out_scale;
        let byte = (lane % 4u32) * 4u32;
        let base = if comptime!(plan.roles.against_time) {
            swizzled(values - comptime!(128 * BESIDE as u32), comptime!(BESIDE as u32 - 1), byte)
        } else {
            swizzled(values, comptime!(CHUNK as u32), byte)
        };
        #[unroll]
        for j in 0..8usize {
            let word = load_u32(base ^ comptime!((j * 16) as u32));
            let i = comptime!(4 * j + 2 * half);
            let a = read(out, i) + weight * bf16_low(word);
            let b = read(out, comptime!(i + 1)) + weight * bf16_high(word);
            write(out, i, a);
            write(out, comptime!(i + 1), b);
        }
    }
}

/// With `w_t = scale · do_t · v_t`: adds `w_t u ∘ k_t` to the gradient of the queries, where it is wanted, writes that of
/// the keys, where it is, with `w_t u ∘ q_t` from the rows of `dk` to `keys_out`, and writes `Σ_t w_t q_t ∘ k_t` over
/// each chunk, `[chunks, H · K]`. One cube a chunk and head, one unit two channels.
#[cube(launch_unchecked)]
pub(super) fn own_gradients(
    q: &[u32],
    k: &[u32],
    v: &[u32],
    grad_o: &[u32],
    bonus: &[f32],
    dq: &mut [u32],
    dk: &[u32],
    keys_out: &mut [u32],
    sums: &mut [f32],
    table: &[i32],
    heads: u32,
    table_at: u32,
    scale: f32,
    #[comptime] keys: u32,
    #[comptime] values: u32,
    #[comptime] with_queries: bool,
    #[comptime] with_keys: bool,
) {
    let mut own = Shared::<[f32]>::new_slice(CHUNK);
    let chunk = CUBE_POS_X / heads;
    let head = CUBE_POS_X % heads;
    let at = (table_at + chunk * comptime!(CHUNK_WORDS as u32)) as usize;
    let start = table[at] as u32;
    // The last row of a sequence reads nothing: it has no token.
    let length = table[at + 1] as u32 - (table[at + 3] as u32 & LAST) / LAST;
    let warps = CUBE_DIM_X / 32u32;
    let lane = UNIT_POS % 32u32;
    let mut t = UNIT_POS / 32u32;
    while t < length {
        let mut products = Array::<f32>::new(BATCH);
        #[unroll]
        for i in 0..BATCH {
            // Past the last token the last one again: it is not kept.
            let token = u32::min(t + comptime!(i as u32) * warps, length - 1u32);
            let row = ((start + token) * heads + head) * comptime!(values / 2);
            let mut product = f32::new(0.0);
            #[unroll]
            for step in 0..comptime!(values.div_ceil(64)) {
                let word = lane + comptime!(32 * step);
                if word < comptime!(values / 2) {
                    let (a, b) = (v[(row + word) as usize], grad_o[(row + word) as usize]);
                    product += bf16_low(a) * bf16_low(b) + bf16_high(a) * bf16_high(b);
                }
            }
            products[i] = product;
        }
        #[unroll]
        for i in 0..BATCH {
            let token = t + comptime!(i as u32) * warps;
            let sum = plane_sum(products[i]);
            if lane == 0u32 && token < length {
                own[token as usize] = sum * scale;
            }
        }
        t += comptime!(BATCH as u32) * warps;
    }
    sync_cube();
    if 2u32 * UNIT_POS < keys {
        let channel = (head * keys + 2u32 * UNIT_POS) as usize;
        let u_low = bonus[channel];
        let u_high = bonus[channel + 1];
        let stride = heads * comptime!(keys / 2);
        let first = (start * heads + head) * comptime!(keys / 2) + UNIT_POS;
        let later = (table[at + 2] as u32 + 1u32) * stride;
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        let mut t = u32::new(0);
        while t < length {
            let mut qs = Array::<u32>::new(BATCH);
            let mut ks = Array::<u32>::new(BATCH);
            let mut dqs = Array::<u32>::new(BATCH);
            let mut dks = Array::<u32>::new(BATCH);
            #[unroll]
            for i in 0..BATCH {
                // Past the last token the last one again: it is not written.
                let token = u32::min(t + comptime!(i as u32), length - 1u32);
                let word = first + token * stride;
                qs[i] = q[word as usize];
                ks[i] = k[word as usize];
                if comptime!(with_queries) {
                    dqs[i] = dq[word as usize];
                }
                if comptime!(with_keys) {
                    dks[i] = dk[(word + later) as usize];
                }
            }
            #[unroll]
            for i in 0..BATCH {
                let token = t + comptime!(i as u32);
                if token < length {
                    let word = (first + token * stride) as usize;
                    let weight = own[token as usize];
                    let w_low = weight * u_low;
                    let w_high = weight * u_high;
                    low += weight * bf16_low(qs[i]) * bf16_low(ks[i]);
                    high += weight * bf16_high(qs[i]) * bf16_high(ks[i]);
                    if comptime!(with_queries) {
                        let a = bf16_low(dqs[i]) + w_low * bf16_low(ks[i]);
                        let b = bf16_high(dqs[i]) + w_high * bf16_high(ks[i]);
                        dq[word] = pack_word(a, b);
                    }
                    if comptime!(with_keys) {
                        let a = bf16_low(dks[i]) + w_low * bf16_low(qs[i]);
                        let b = bf16_high(dks[i]) + w_high * bf16_high(qs[i]);
                        keys_out[word] = pack_word(a, b);
                    }
                }
            }
            t += comptime!(BATCH as u32);
        }
        let to = (chunk * heads * keys) as usize + channel;
        sums[to] = low;
        sums[to + 1] = high;
    }
}

impl HopperWalk {
    /// The gradients of queries and keys with a bonus' part, and its own, from those of the queries by token and of the
    /// keys by row (see [`super::shift`]).
    pub(super) fn own_gradients(
        &self,
        [q, k, v, grad_o, bonus]: [&CubeTensor; 5],
        dq: Option<CubeTensor>,
        dk: Option<CubeTensor>,
        table: &CubeTensor,
    ) -> (Option<CubeTensor>, Option<CubeTensor>, CubeTensor) {
        let sums = alloc(bonus, [self.chunks, self.heads * self.keys], DType::F32);
        let unused = alloc(q, [32], DType::BF16);
        let keys_out = dk.as_ref().map(|_| alloc(k, k.meta.shape().dims::<4>(), DType::BF16));
        if self.chunks > 0 {
            // SAFETY: the table has `chunks` chunks of tokens inside of the tensors, which nothing else reads or writes.
            unsafe {
                own_gradients::launch_unchecked(
                    &q.client,
                    CubeCount::new_1d((self.chunks * self.heads) as u32),
                    CubeDim::new_1d((self.keys / 2).next_multiple_of(32) as u32),
                    words(q),
                    words(k),
                    words(v),
                    words(grad_o),
                    bonus.clone().into_buffer_arg(),
                    words(dq.as_ref().unwrap_or(&unused)),
                    words(dk.as_ref().unwrap_or(&unused)),
                    words(keys_out.as_ref().unwrap_or(&unused)),
                    sums.clone().into_buffer_arg(),
                    table.clone().into_buffer_arg(),
                    self.heads as u32,
                    self.chunks_at(),
                    self.scale,
                    self.keys as u32,
                    self.values as u32,
                    dq.is_some(),
                    dk.is_some(),
                );
            }
        }
        (dq, keys_out, sum_rows(&sums, 0, [self.heads, self.keys]))
    }
}
