//! The walks in which units own key channels: with the answers and their gradients known, a row of the state depends on no
//! other row, so that every chunk is walked by itself, and the sums over value channels stay inside a unit's own row.

use cubecl::prelude::*;

use super::parts::{
    four, lane_sum, load_row_decays, load_row_products, load_rows, load_state, place, strength, token_decay,
};
use super::plan::{Form, Gate, WalkPlan};
use crate::linear_walk::table::CHUNK_WORDS;

/// Numbers that a buffer in shared memory holds, one where it is not used.
fn held(plan: WalkPlan, used: bool) -> usize {
    if used { plan.block * plan.tile() } else { 1 }
}

/// The vectors of value channels of `count` tokens in plane `from` of the workspace, times a factor, and times the writing
/// strength where `by_strength`.
#[cube]
fn load_plane<B: Float>(
    values: &[f32],
    strengths: &[B],
    to: &mut Shared<[Vector<f32, Const<4>>]>,
    from: usize,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    factor: f32,
    #[comptime] by_strength: bool,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units)) {
        let token = first + i / stride;
        let base = from + (token * heads + head) * comptime!(plan.values);
        let mut by = factor;
        if comptime!(by_strength) {
            by *= strength::<B>(strengths, token, head, heads, plan.form);
        }
        to[i] = four::<f32>(values, base, (i % stride) * 4, comptime!(plan.values)) * Vector::new(by);
    }
}

/// The gradients that are sums over the value channels, f32 `[planes, tokens, heads, K]`.
///
/// With time, the state: `dq = scale · S do` in plane 0, `da = S_x du` in plane 1; `first` is k, `second` b where the form
/// has it (κ and, as `third`, the rate where b is their product). Against time, its gradient: `dk = Z w` in plane 2 with w
/// what k is multiplied by, `db = Z u` in plane 3; `first` is q, `second` what reads the state. `third` is the writing
/// strength where the form has one.
#[cube(launch, address_type = "dynamic")]
pub(super) fn gradients<E: Float, B: Float>(
    first: &[E],
    second: &[E],
    third: &[B],
    g: &[f32],
    table: &[i32],
    states: &[f32],
    values: &[f32],
    keys: &mut [f32],
    heads: usize,
    groups: usize,
    cubes: usize,
    tokens: usize,
    scale: f32,
    #[comptime] against: bool,
    #[comptime] plan: WalkPlan,
    #[define(E, B)] _dtypes: [ElemType; 2],
) {
    if CUBE_POS >= cubes {
        terminate!();
    }
    let (form, gate) = comptime!((plan.form, plan.gate));
    let (lanes, vectors, width) = comptime!((plan.lanes, plan.vectors, plan.width));
    let (block, stride, tile) = comptime!((plan.block, plan.stride(), plan.tile()));
    let p = place(heads, plan);
    let key_head = p.head / groups;
    let key_heads = heads / groups;
    let chunk = p.which;
    let entry = chunk * comptime!(CHUNK_WORDS);
    let sequence = table[entry] as usize;
    let start = table[entry + 1] as usize;
    let length = table[entry + 2] as usize;
    let plane = tokens * heads * comptime!(plan.values);
    let (two_added, has_second) = comptime!((!form.one_added(), against || !form.one_added()));

    // What is added, the answers where they are added by themselves, the gradients of outputs and of answers.
    let mut shared_w = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(block * stride));
    let mut shared_u =
        Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(if two_added { block * stride } else { 1 }));
    let mut shared_o = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(block * stride));
    let mut shared_d = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(block * stride));
    let mut row_first = Shared::<[f32]>::new_slice(comptime!(held(plan, true)));
    let mut row_second = Shared::<[f32]>::new_slice(comptime!(held(plan, has_second)));
    let mut row_decay = Shared::<[f32]>::new_slice(comptime!(held(plan, gate == Gate::Key)));
    let mut decays = Shared::<[f32]>::new_slice(block);

    let mut x = Array::<Vector<f32, Const<4>>>::new(comptime!(width * vectors));
    let slot = chunk + sequence + comptime!(if against { 1usize } else { 0 });
    load_state(states, &mut x, slot, &p, heads, plan);

    let blocks = length.div_ceil(block);
    for n in 0..blocks {
        let skipped = if comptime!(against) { (blocks - 1 - n) * block } else { n * block };
        let token = start + skipped;
        let here = min(block, length - skipped);
        let added = if comptime!(form.one_added()) { plane } else { 0usize.runtime() };
        let on_output = if comptime!(against) { scale } else { f32::new(1.0) };
        let by_strength = comptime!(form.one_added());
        sync_cube();
        load_plane::<B>(values, third, &mut shared_w, added, token, p.head, heads, here, 1.0f32, by_strength, plan);
        if comptime!(two_added) {
            load_plane::<B>(values, third, &mut shared_u, plane, token, p.head, heads, here, 1.0f32, false, plan);
        }
        load_plane::<B>(values, third, &mut shared_o, 2 * plane, token, p.head, heads, here, on_output, false, plan);
        load_plane::<B>(values, third, &mut shared_d, 3 * plane, token, p.head, heads, here, 1.0f32, by_strength, plan);
        load_rows::<E>(first, &mut row_first, token, key_head, key_heads, here, &p, plan);
        if comptime!(has_second) {
            if comptime!(!against && form == Form::Removal) {
                load_row_products::<E, B>(second, third, &mut row_second, token, key_head, key_heads, here, &p, plan);
            } else {
                load_rows::<E>(second, &mut row_second, token, key_head, key_heads, here, &p, plan);
            }
        }
        if comptime!(gate == Gate::Key) {
            load_row_decays(g, &mut row_decay, token, p.head, heads, here, &p, plan);
        }
        for i in range_stepped(UNIT_POS as usize, here, comptime!(plan.units)) {
            decays[i] = token_decay(g, token + i, p.head, heads, gate);
        }
        sync_cube();

        for j in 0..here {
            let t = if comptime!(against) { here - 1 - j } else { j };
            let at = t * stride + p.lane;
            #[unroll]
            for c in 0..width {
                let own = t * tile + p.own + c;
                let one = row_first[own];
                let two = if comptime!(has_second) { row_second[own] } else { f32::new(0.0) };
                let decay = if comptime!(gate == Gate::Key) { row_decay[own] } else { decays[t] };
                let decay = Vector::<f32, Const<4>>::new(decay);
                let mut left = Vector::<f32, Const<4>>::new(0.0f32);
                let mut right = Vector::<f32, Const<4>>::new(0.0f32);
                #[unroll(plan.unrolled())]
                for i in 0..vectors {
                    let here = at + i * lanes;
                    let before = x[c * vectors + i];
                    if comptime!(against) {
                        // `two` reads the state, with the other sign but where it is given as a.
                        let next = before + shared_o[here] * Vector::new(one);
                        left += shared_w[here] * next;
                        if comptime!(two_added) {
                            right += shared_u[here] * next;
                        }
                        let back = if comptime!(form == Form::Free) { two } else { -two };
                        let mut next = next;
                        if comptime!(gate != Gate::None && !form.reads_decayed()) {
                            next *= decay;
                        }
                        next += shared_d[here] * Vector::new(back);
                        if comptime!(gate != Gate::None && form.reads_decayed()) {
                            next *= decay;
                        }
                        x[c * vectors + i] = next;
                    } else {
                        let after = if comptime!(gate == Gate::None) { before } else { before * decay };
                        right += shared_d[here] * if comptime!(form.reads_decayed()) { after } else { before };
                        let mut next = after + shared_w[here] * Vector::new(one);
                        if comptime!(two_added) {
                            next += shared_u[here] * Vector::new(two);
                        }
                        left += shared_o[here] * next;
                        x[c * vectors + i] = next;
                    }
                }
                let row = p.tile + p.own + c;
                let base = ((token + t) * heads + p.head) * comptime!(plan.keys) + row;
                let size = tokens * heads * comptime!(plan.keys);
                let mut left = lane_sum(left.vector_sum(), lanes);
                if comptime!(!against) {
                    left *= scale;
                }
                let writes = p.lane == comptime!(c % plan.lanes) && row < comptime!(plan.keys);
                let plane_of_left = comptime!(if against { 2usize } else { 0 });
                if writes {
                    keys[plane_of_left * size + base] = left;
                }
                if comptime!(two_added || !against) {
                    let right = lane_sum(right.vector_sum(), lanes);
                    if writes {
                        keys[(plane_of_left + 1) * size + base] = right;
                    }
                }
            }
        }
    }
}
