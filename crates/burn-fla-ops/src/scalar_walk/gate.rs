//! The gradient of the log decay, from what the walks already produced.

use cubecl::prelude::*;

use super::table::CHUNK_WORDS;

/// Warps a cube.
pub(super) const WARPS: usize = 8;

/// `dg_t = X + Σ_{i ≥ t} (q_i · dq_i − k_i · dk_i + inter_i) + Σ_{j < t} inter_j` inside a chunk: one warp a chunk and head.
///
/// `inter_j` is the part of `k_j · dk_j` that later chunks contribute, and `X` the product of the state before the chunk
/// with the gradient of that after it, times the chunk's decay. Written so, no two large numbers cancel: the products of
/// pairs inside the chunk are rounded alike on both sides, and every other term is a part of the answer. The simpler
/// `⟨S, Z⟩ + Σ (q · dq − k · dk)` from the last state on was off by 3e-2, and by 0.3 with decays down to −30.
#[cube(launch)]
pub(super) fn gate_gradient(
    query_dots: &[f32],
    key_dots: &[f32],
    ends: &[f32],
    table: &[i32],
    dg: &mut [f32],
    heads: u32,
    chunks: u32,
    table_at: u32,
    tokens: u32,
    #[comptime] panels: u32,
) {
    let index = CUBE_POS_X * comptime!(WARPS as u32) + UNIT_POS / 32u32;
    if index < chunks * heads {
        let lane = UNIT_POS % 32u32;
        let head = index % heads;
        let at = (table_at + index / heads * comptime!(CHUNK_WORDS as u32)) as usize;
        let start = table[at] as u32;
        let length = table[at + 1] as u32;
        let mut across = f32::new(0.0);
        for i in 0..comptime!(4 * panels) {
            across += ends[(index * comptime!(4 * panels) + i) as usize];
        }
        let low = Terms::at(query_dots, key_dots, start, lane, length, head, heads, tokens, panels);
        let high = Terms::at(query_dots, key_dots, start, lane + 32u32, length, head, heads, tokens, panels);
        let sum_low = plane_inclusive_sum(low.after);
        let sum_high = plane_inclusive_sum(high.after) + plane_broadcast(sum_low, 31u32);
        let inter_low = plane_inclusive_sum(low.inter);
        let inter_high = plane_inclusive_sum(high.inter) + plane_broadcast(inter_low, 31u32);
        let total = plane_broadcast(sum_high, 31u32);
        if lane < length {
            let value = total - sum_low + low.after + inter_low - low.inter;
            dg[((start + lane) * heads + head) as usize] = across + value;
        }
        if lane + 32u32 < length {
            let value = total - sum_high + high.after + inter_high - high.inter;
            dg[((start + lane + 32u32) * heads + head) as usize] = across + value;
        }
    }
}

/// What one token adds to the sums.
#[derive(CubeType, Clone, Copy)]
struct Terms {
    /// To the tokens up to it.
    after: f32,
    /// To the tokens after it.
    inter: f32,
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
        #[comptime] panels: u32,
    ) -> Terms {
        let mut after = f32::new(0.0);
        let mut inter = f32::new(0.0);
        if token < length {
            for panel in 0..panels {
                let from = ((panel * tokens + start + token) * heads + head) as usize;
                let later = key_dots[from + (panels * tokens * heads) as usize];
                after += query_dots[from] - (key_dots[from] - later);
                inter += later;
            }
        }
        Terms { after: after + 0.0f32, inter: inter + 0.0f32 }
    }
}
