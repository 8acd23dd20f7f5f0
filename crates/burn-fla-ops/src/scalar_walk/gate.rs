//! The gradient of the log decay, from what the walks already produced.

use cubecl::prelude::*;

use super::table::BORDER_TABLE_WORDS;

/// Warps a cube.
pub(super) const WARPS: usize = 8;

/// `dg_t = ⟨S_e, Z_e⟩ + Σ_{s ≥ t} (q_s · dq_s − k_s · dk_s)` over the tokens up to each border, where `S_e` is the state at
/// the border and `Z_e` its gradient: one warp a border and head.
///
/// The products are of f32 outputs, and the sum starts anew at each border: products of rounded outputs, or a sum over a
/// whole sequence, would be of no use where decays are fast.
#[cube(launch)]
pub(super) fn gate_gradient(
    query_dots: &[f32],
    key_dots: &[f32],
    ends: &[f32],
    table: &[i32],
    dg: &mut [f32],
    heads: u32,
    borders: u32,
    table_at: u32,
    tokens: u32,
    #[comptime] panels: u32,
) {
    let index = CUBE_POS_X * comptime!(WARPS as u32) + UNIT_POS / 32u32;
    if index < borders * heads {
        let lane = UNIT_POS % 32u32;
        let border = index / heads;
        let head = index % heads;
        let at = (table_at + border * comptime!(BORDER_TABLE_WORDS as u32)) as usize;
        let start = table[at] as u32;
        let length = table[at + 1] as u32;
        let mut carry = f32::new(0.0);
        for i in 0..comptime!(4 * panels) {
            carry += ends[(index * comptime!(4 * panels) + i) as usize];
        }
        let blocks = length.div_ceil(32u32);
        for block in 0..blocks {
            let back = block * 32u32 + lane;
            let inside = back < length;
            let token = start + select(inside, length - 1u32 - back, 0u32);
            let mut value = f32::new(0.0);
            if inside {
                for panel in 0..panels {
                    let from = ((panel * tokens + token) * heads + head) as usize;
                    value += query_dots[from] - key_dots[from];
                }
            }
            let sum = carry + plane_inclusive_sum(value);
            if inside {
                dg[(token * heads + head) as usize] = sum;
            }
            carry = plane_broadcast(sum, 31u32);
        }
    }
}
