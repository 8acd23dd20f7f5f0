//! The gradient of the log decay, from what the walks already produced.

use burn::tensor::DType;
use cubecl::prelude::*;

use super::engine::Cores;
use super::launch::{Decays, Gate, HopperWalk};
use super::plan::{Axis, Borders, CHUNK, END_SUMS, Roles};
use super::table::{CHUNK_WORDS, FIRST};
use super::{KEYS, VALUES};
use crate::bridge::{CubeTensor, alloc};
use crate::tile::hopper::{bf16_high, bf16_low, f16_high, f16_low, pack_word, words};

/// Warps a cube.
pub(super) const WARPS: usize = 8;

/// `dg_t = X + Σ_{i ≥ t} (q_i · dq_i − k_i · dk_i + inter_i) + Σ_{j < t} inter_j` inside a chunk: one warp a chunk and head.
///
/// The products come in `parts` sums, each of some channels; `X` in `sums`. `inter_j` is the part of `k_j · dk_j` that
/// later chunks contribute, and `X` the product of the state before the chunk with the gradient of that after it, times
/// the chunk's decay. Written so, no two large numbers cancel: the products of pairs inside the chunk are rounded alike
/// on both sides, and every other term is a part of the answer. The simpler `⟨S, Z⟩ + Σ (q · dq − k · dk)` from the last
/// state on was off by 3e-2, and by 0.3 with decays down to −30.
///
/// `with_keys`: `k_i · dk_i` goes to `key_sums`.
#[cube(launch)]
pub(super) fn gate_gradient(
    query_dots: &[f32],
    key_dots: &[f32],
    ends: &[f32],
    table: &[i32],
    dg: &mut [f32],
    key_sums: &mut [f32],
    heads: u32,
    chunks: u32,
    table_at: u32,
    tokens: u32,
    #[comptime] parts: u32,
    #[comptime] sums: u32,
    #[comptime] with_keys: bool,
) {
    let index = CUBE_POS_X * comptime!(WARPS as u32) + UNIT_POS / 32u32;
    if index < chunks * heads {
        let lane = UNIT_POS % 32u32;
        let head = index % heads;
        let at = (table_at + index / heads * comptime!(CHUNK_WORDS as u32)) as usize;
        let start = table[at] as u32;
        let length = table[at + 1] as u32;
        let mut across = f32::new(0.0);
        for i in 0..sums {
            across += ends[(index * sums + i) as usize];
        }
        let low = Terms::at(query_dots, key_dots, start, lane, length, head, heads, tokens, parts);
        let high = Terms::at(query_dots, key_dots, start, lane + 32u32, length, head, heads, tokens, parts);
        let (value_low, value_high) = sum_chunk(&low, &high);
        if lane < length {
            dg[((start + lane) * heads + head) as usize] = across + value_low;
        }
        if lane + 32u32 < length {
            dg[((start + lane + 32u32) * heads + head) as usize] = across + value_high;
        }
        if comptime!(with_keys) {
            #[unroll]
            for half in 0..2u32 {
                let token = lane + comptime!(32 * half);
                if token < length {
                    let to = (start + token) * heads + head;
                    let mut sum = f32::new(0.0);
                    for part in 0..parts {
                        sum += key_dots[(part * tokens * heads + to) as usize];
                    }
                    key_sums[to as usize] = sum;
                }
            }
        }
    }
}

/// What one token adds to the sums.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Terms {
    /// To the tokens up to it.
    pub(super) after: f32,
    /// To the tokens after it.
    pub(super) inter: f32,
}

/// A chunk's sums at each token, by a warp: those of token `lane` and of 32 tokens later.
#[cube]
pub(super) fn sum_chunk(low: &Terms, high: &Terms) -> (f32, f32) {
    let sum_low = plane_inclusive_sum(low.after);
    let sum_high = plane_inclusive_sum(high.after) + plane_broadcast(sum_low, 31u32);
    let inter_low = plane_inclusive_sum(low.inter);
    let inter_high = plane_inclusive_sum(high.inter) + plane_broadcast(inter_low, 31u32);
    let total = plane_broadcast(sum_high, 31u32);
    (total - sum_low + low.after + inter_low - low.inter, total - sum_high + high.after + inter_high - high.inter)
}

#[cube]
impl Terms {
    fn at(
        query_dots: &[f32],
        key_dots: &[f32],
        start: u32,
        token: u32,
        length: u32,
        head: u32,
        heads: u32,
        tokens: u32,
        #[comptime] parts: u32,
    ) -> Terms {
        let mut after = f32::new(0.0);
        let mut inter = f32::new(0.0);
        if token < length {
            for part in 0..parts {
                let from = ((part * tokens + start + token) * heads + head) as usize;
                let later = key_dots[from + (parts * tokens * heads) as usize];
                after += query_dots[from] - (key_dots[from] - later);
                inter += later;
            }
        }
        Terms { after: after + 0.0f32, inter: inter + 0.0f32 }
    }
}

/// Tokens whose products and scales are loaded before the first of them is used.
const BATCH: usize = 16;

/// The gradient of a log decay by key: `dg_t = X + Σ_{i ≥ t} (a_i − b_i)` inside a chunk, for each key channel; one cube a
/// chunk and head, one unit two channels. By value it is the same with `a_i = do_i ∘ o_i` and `b_i = v_i ∘ dv_i`.
///
/// `a_i = q_i ∘ dq_i` and `b_i = k_i ∘ dk_i` come without the part of a token's own key and value, which is in both and
/// would cancel. The parts of pairs of one span are products of the same rounded numbers in both, and cancel exactly
/// where they must; both are kept in f16 with a scale for each 16 tokens and `share` channels, because their own rounding
/// is summed up over a chunk. `X`, the product of the state after the chunk with its gradient, comes as that of the state
/// before the last span, and what the span's tokens contribute, as it is contained in their `b_i`, in `sums` of the
/// [`END_SUMS`] places. Both in bf16, and with `X` computed from the state after the chunk, a gradient was 1 to 8 % off.
/// A chunk's last tokens contribute most, all but undecayed: `X` also has what their `b_i` were rounded up by, so that it
/// is in the gradients after them, of which they are a part, and not in all those before them. With a state's gradient
/// large beside those of the outputs, and log decays from −8 to −1, it was 1.5e-2 there.
///
/// Where the state is read before a token (`exclusive`), rows are those of [`super::shift`]. With `add`, it is added to
/// what is there.
#[cube(launch_unchecked)]
pub(super) fn channel_gate_gradient(
    query_products: &[u32],
    key_products: &[u32],
    query_scales: &[f32],
    key_scales: &[f32],
    levels: &[u32],
    ends: &[f32],
    table: &[i32],
    dg: &mut [u32],
    heads: u32,
    table_at: u32,
    #[comptime] keys: u32,
    #[comptime] padded: u32,
    #[comptime] share: u32,
    #[comptime] sums: usize,
    #[comptime] wide: bool,
    #[comptime] exclusive: bool,
    #[comptime] add: bool,
) {
    let chunk = CUBE_POS_X / heads;
    let head = CUBE_POS_X % heads;
    let at = (table_at + chunk * comptime!(CHUNK_WORDS as u32)) as usize;
    let start = table[at] as u32;
    let length = table[at + 1] as u32;
    if 2u32 * UNIT_POS < keys {
        let panel = CUBE_POS_X * comptime!(padded / 64) + UNIT_POS / 32u32;
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        #[unroll]
        for sum in 0..sums {
            let end = ((panel * comptime!(END_SUMS as u32) + comptime!(sum as u32)) * 64u32 + 2u32 * (UNIT_POS % 32u32))
                as usize;
            low += ends[end];
            high += ends[end + 1];
        }
        // Tokens that share a scale: 16, or as many as a span has; a power of two.
        let group = u32::min(comptime!(CHUNK as u32) / levels[CUBE_POS_X as usize], 16u32);
        let scales = (CUBE_POS_X * comptime!(padded / share) + 2u32 * UNIT_POS / share) * comptime!(CHUNK as u32);
        let stride = heads * comptime!(keys / 2);
        let first = (start * heads + head) * comptime!(keys / 2) + UNIT_POS;
        // Rows that write no token, how much later the products of a row stand than its decay's gradient.
        let mut lead = u32::new(0);
        let mut later = u32::new(0);
        if comptime!(exclusive) {
            lead = table[at + 3] as u32 & FIRST;
            later = (table[at + 2] as u32 + 1u32) * stride;
        }
        let first = if comptime!(exclusive) { first - stride } else { first + 0u32 };
        let mut done = u32::new(0);
        while done < length {
            let mut a = Array::<u32>::new(BATCH);
            let mut b = Array::<u32>::new(BATCH);
            let mut scales_a = Array::<f32>::new(BATCH);
            let mut scales_b = Array::<f32>::new(BATCH);
            #[unroll]
            for i in 0..BATCH {
                // Past the first token it again: it is not written.
                let token = length - 1u32 - u32::min(done + comptime!(i as u32), length - 1u32);
                let word = (first + later + token * stride) as usize;
                a[i] = query_products[word];
                b[i] = key_products[word];
                let scale = (scales + token - (token & (group - 1u32))) as usize;
                scales_a[i] = query_scales[scale];
                scales_b[i] = key_scales[scale];
            }
            #[unroll]
            for i in 0..BATCH {
                let back = done + comptime!(i as u32);
                if back < length {
                    let token = length - 1u32 - back;
                    let (of_query, of_key) = (scales_a[i], scales_b[i]);
                    low += f16_low(a[i]) * of_query - f16_low(b[i]) * of_key;
                    high += f16_high(a[i]) * of_query - f16_high(b[i]) * of_key;
                    let word = (first + token * stride) as usize;
                    let mut of_low = low + 0.0f32;
                    let mut of_high = high + 0.0f32;
                    if token < lead {
                        // It writes no token.
                    } else if comptime!(wide) {
                        if comptime!(add) {
                            of_low += f32::reinterpret(dg[2 * word]);
                            of_high += f32::reinterpret(dg[2 * word + 1]);
                        }
                        dg[2 * word] = u32::reinterpret(of_low);
                        dg[2 * word + 1] = u32::reinterpret(of_high);
                    } else {
                        if comptime!(add) {
                            of_low += bf16_low(dg[word]);
                            of_high += bf16_high(dg[word]);
                        }
                        dg[word] = pack_word(of_low, of_high);
                    }
                }
            }
            done += comptime!(BATCH as u32);
        }
    }
}

impl HopperWalk {
    /// The gradient of the log decay; by channel it is added to `sum`, where there is one. With steps (see [`super::steps`])
    /// also `k_t · dk_t`, `[B, T, H]`.
    pub(crate) fn gate_gradient(
        &self,
        reading: &Gate<'_>,
        writing: &Gate<'_>,
        decays: &Decays,
        like: &CubeTensor,
        sum: Option<CubeTensor>,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let table = &decays.table;
        if self.axis.by_channel() {
            return (self.channel_gate_gradient(reading, writing, decays, like, sum), None);
        }
        let dg = alloc(like, like.meta.shape().dims::<3>(), DType::F32);
        let key_sums = decays.steps.map(|_| alloc(like, like.meta.shape().dims::<3>(), DType::F32));
        let warps = self.chunks * self.heads;
        let parts = reading.products.meta.shape().dims::<3>()[0];
        let ends = writing.ends.meta.shape().dims::<3>()[2];
        gate_gradient::launch(
            &like.client,
            CubeCount::new_1d(warps.div_ceil(WARPS) as u32),
            CubeDim::new_1d(32 * WARPS as u32),
            reading.products.clone().into_buffer_arg(),
            writing.products.clone().into_buffer_arg(),
            writing.ends.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            dg.clone().into_buffer_arg(),
            key_sums.clone().unwrap_or_else(|| alloc(like, [1], DType::F32)).into_buffer_arg(),
            self.heads as u32,
            self.chunks as u32,
            self.chunks_at(),
            self.tokens as u32,
            parts as u32,
            ends as u32,
            key_sums.is_some(),
        );
        (burn_cubecl::kernel::cast(dg, like.dtype), key_sums)
    }

    fn channel_gate_gradient(
        &self,
        reading: &Gate<'_>,
        writing: &Gate<'_>,
        decays: &Decays,
        like: &CubeTensor,
        sum: Option<CubeTensor>,
    ) -> CubeTensor {
        let Decays { table, levels, .. } = decays;
        let wide = like.dtype != DType::BF16;
        let add = sum.is_some();
        let dtype = if wide { DType::F32 } else { DType::BF16 };
        let dg = sum.unwrap_or_else(|| alloc(like, like.meta.shape().dims::<4>(), dtype));
        let padded = writing.ends.meta.shape().dims::<3>()[2] / END_SUMS;
        let share = padded / writing.scales.meta.shape().dims::<4>()[2];
        let writes = if self.axis == Axis::Value { VALUES } else { KEYS };
        let roles = Roles { borders: Borders::Multiply, ..writes };
        let sums = match self.engine.cores {
            Cores::Hopper => END_SUMS,
            Cores::Mma => self.engine.mma_plan(roles, self.keys, self.values, self.axis, self.has_bonus).end_sums(),
        };
        if self.chunks > 0 {
            // SAFETY: the table has `chunks` chunks of tokens inside of the tensors.
            unsafe {
                channel_gate_gradient::launch_unchecked(
                    &like.client,
                    CubeCount::new_1d((self.chunks * self.heads) as u32),
                    CubeDim::new_1d((self.decaying() / 2).next_multiple_of(32) as u32),
                    words(&reading.products),
                    words(&writing.products),
                    reading.scales.clone().into_buffer_arg(),
                    writing.scales.clone().into_buffer_arg(),
                    levels.clone().into_buffer_arg(),
                    writing.ends.clone().into_buffer_arg(),
                    table.clone().into_buffer_arg(),
                    words(&dg),
                    self.heads as u32,
                    self.chunks_at(),
                    self.decaying() as u32,
                    padded as u32,
                    share as u32,
                    sums,
                    wide,
                    self.has_bonus,
                    add,
                );
            }
        }
        burn_cubecl::kernel::cast(dg, like.dtype)
    }
}
