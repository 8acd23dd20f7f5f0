//! One token a sequence, as generation needs it: the state is read and written once.

use cubecl::prelude::*;

use super::plan::DecayKind;

/// `S' = e^g ∘ S + k vᵀ`, `o = scale · S'ᵀ q`, or with `exclusive` `o = scale · (S + (u ∘ k) vᵀ)ᵀ q`: one unit a value
/// channel, which walks down the key channels.
#[cube(launch, address_type = "dynamic")]
pub(super) fn step<E: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    g: &[f32],
    state: &[f32],
    bonus: &[f32],
    o: &mut [E],
    next: &mut [f32],
    heads: usize,
    count: usize,
    scale: f32,
    #[comptime] kind: DecayKind,
    #[comptime] keys: usize,
    #[comptime] values: usize,
    #[comptime] exclusive: bool,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let value = ABSOLUTE_POS % values;
    let row = ABSOLUTE_POS / values;
    let head = row % heads;
    let added = f32::cast_from(v[ABSOLUTE_POS]);
    let mut decay = f32::new(1.0);
    if comptime!(kind == DecayKind::Head) {
        decay = f32::exp(g[head]);
    }
    if comptime!(kind == DecayKind::Token) {
        decay = f32::exp(g[row]);
    }
    if comptime!(kind == DecayKind::Value) {
        decay = f32::exp(g[ABSOLUTE_POS]);
    }
    let mut sum = f32::new(0.0);
    for c in 0..keys {
        let channel = row * keys + c;
        let at = channel * values + value;
        if comptime!(kind == DecayKind::Key) {
            decay = f32::exp(g[channel]);
        }
        let before = state[at];
        let own = f32::cast_from(k[channel]) * added;
        let updated = before * decay + own;
        next[at] = updated;
        if comptime!(exclusive) {
            sum += f32::cast_from(q[channel]) * (before + own * bonus[head * keys + c]);
        } else {
            sum += f32::cast_from(q[channel]) * updated;
        }
    }
    o[ABSOLUTE_POS] = E::cast_from(sum * scale);
}
