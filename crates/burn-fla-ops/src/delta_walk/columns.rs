//! The walks in which units own value channels: each column of the state is a recurrence of its own, whose answer
//! `u = Sᵀ a` (with time) or gradient `bᵀ Z` (against it) is a sum over the key channels that comes back at every token.
//! They are serial where that comes back from the token before, and the only ones that are.

use cubecl::prelude::*;

use super::parts::{
    Place, lane_sum, load, load_decays, load_products, load_rows, load_state, place, store_state, strength, token_decay,
};
use super::plan::{Form, Gate, Task, WalkPlan};
use crate::linear_walk::table::{CHUNK_WORDS, SEQUENCE_WORDS};

/// Vectors that a buffer in shared memory holds, one where it is not used.
fn held(plan: WalkPlan, used: bool) -> usize {
    if used { plan.block * plan.stride() } else { 1 }
}

/// The writing strengths and decays by token.
#[cube]
fn load_scalars<B: Float>(
    b: &[B],
    g: &[f32],
    to: &mut Shared<[f32]>,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    #[comptime] plan: WalkPlan,
) {
    for i in range_stepped(UNIT_POS as usize, count, comptime!(plan.units)) {
        to[2 * i] = strength::<B>(b, first + i, head, heads, plan.form);
        to[2 * i + 1] = token_decay(g, first + i, head, heads, plan.gate);
    }
}

/// The reading and the second added vector, where the form has them: `a` and `b`.
#[cube]
fn load_pair<E: Float, B: Float>(
    a: &[E],
    b: &[B],
    to_a: &mut Shared<[Vector<f32, Const<4>>]>,
    to_b: &mut Shared<[Vector<f32, Const<4>>]>,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    #[comptime] plan: WalkPlan,
) {
    if comptime!(plan.form != Form::Key) {
        let sign = comptime!(if plan.form == Form::Free { 1.0f32 } else { -1.0f32 });
        load::<E>(a, to_a, first, head, heads, count, sign, plan);
    }
    if comptime!(plan.form == Form::Free) {
        load::<B>(b, to_b, first, head, heads, count, 1.0f32, plan);
    }
    if comptime!(plan.form == Form::Removal) {
        load_products::<E, B>(a, b, to_b, first, head, heads, count, plan);
    }
}

/// Writes what a lane group summed for its rows: each lane those that are its own.
#[cube]
fn write_rows<V: Float>(sums: &Array<f32>, to: &mut [V], base: usize, p: &Place, #[comptime] plan: WalkPlan) {
    #[unroll]
    for c in 0..comptime!(plan.width) {
        let row = p.tile + p.own + c;
        if p.lane == comptime!(c % plan.lanes) && row < comptime!(plan.rows()) {
            to[base + row] = V::cast_from(sums[c]);
        }
    }
}

/// With time: `u = S_xᵀ a`, `S = S̃ + b uᵀ + k vᵀ`, `o = scale · Sᵀ q`.
///
/// The values stand in `values` from its start on; what is written goes to `written` and further, which may be the same
/// place: every element is read by the units that write it, before. By `task` it is `o`, or what the state answers: `u`, and
/// `v + u` where that is what is added.
///
/// `states` has the slots of [`table`](crate::linear_walk::table) (one more a sequence than it has chunks), or with
/// [`Task::Outputs`] one a sequence, in which the last state takes the place of the first.
#[cube(launch, address_type = "dynamic")]
pub(super) fn with_time<E: Float, B: Float, V: Float>(
    q: &[E],
    k: &[E],
    a: &[E],
    b: &[B],
    g: &[f32],
    table: &[i32],
    states: &mut [f32],
    values: &mut [V],
    heads: usize,
    groups: usize,
    chunks: usize,
    cubes: usize,
    written: usize,
    scale: f32,
    #[comptime] task: Task,
    #[comptime] plan: WalkPlan,
    #[define(E, B, V)] _dtypes: [ElemType; 3],
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

    let mut first_chunk = p.which;
    let mut count = 1usize.runtime();
    let mut sequence = p.which;
    if comptime!(task == Task::Answers) {
        sequence = table[p.which * comptime!(CHUNK_WORDS)] as usize;
    } else {
        let at = chunks * comptime!(CHUNK_WORDS) + p.which * comptime!(SEQUENCE_WORDS);
        first_chunk = table[at] as usize;
        count = table[at + 1] as usize;
    }

    let mut shared_q = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, task != Task::Answers)));
    let mut shared_k = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, true)));
    let mut shared_a = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, form != Form::Key)));
    let mut shared_b = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, !form.one_added())));
    let mut shared_g = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, gate == Gate::Key)));
    let mut shared_v = Shared::<[f32]>::new_slice(comptime!(block * tile));
    let mut scalars = Shared::<[f32]>::new_slice(comptime!(2 * block));

    let mut x = Array::<Vector<f32, Const<4>>>::new(comptime!(width * vectors));
    let slot = if comptime!(task == Task::Outputs) { sequence } else { first_chunk + sequence };
    load_state(&*states, &mut x, slot, &p, heads, plan);

    for m in 0..count {
        let chunk = first_chunk + m;
        let start = table[chunk * comptime!(CHUNK_WORDS) + 1] as usize;
        let length = table[chunk * comptime!(CHUNK_WORDS) + 2] as usize;
        for n in 0..length.div_ceil(block) {
            let first = start + n * block;
            let here = min(block, length - n * block);
            sync_cube();
            if comptime!(task != Task::Answers) {
                load::<E>(q, &mut shared_q, first, key_head, key_heads, here, scale, plan);
            }
            load::<E>(k, &mut shared_k, first, key_head, key_heads, here, 1.0f32, plan);
            load_pair::<E, B>(a, b, &mut shared_a, &mut shared_b, first, key_head, key_heads, here, plan);
            if comptime!(gate == Gate::Key) {
                load_decays(g, &mut shared_g, first, p.head, heads, here, plan);
            }
            load_rows::<V>(&*values, &mut shared_v, first, p.head, heads, here, &p, plan);
            load_scalars::<B>(b, g, &mut scalars, first, p.head, heads, here, plan);
            sync_cube();

            for t in 0..here {
                let at = t * stride + p.lane;
                let beta = scalars[2 * t];
                let decay = Vector::<f32, Const<4>>::new(scalars[2 * t + 1]);
                let mut sums = Array::<Vector<f32, Const<4>>>::new(width);
                #[unroll]
                for c in 0..width {
                    sums[c] = Vector::<f32, Const<4>>::new(0.0f32);
                }
                #[unroll(plan.unrolled())]
                for i in 0..vectors {
                    let reader =
                        if comptime!(form == Form::Key) { shared_k[at + i * lanes] } else { shared_a[at + i * lanes] };
                    let d = if comptime!(gate == Gate::Key) { shared_g[at + i * lanes] } else { decay };
                    #[unroll]
                    for c in 0..width {
                        let before = x[c * vectors + i];
                        let after = if comptime!(gate == Gate::None) { before } else { before * d };
                        sums[c] += if comptime!(form.reads_decayed()) { reader * after } else { reader * before };
                        x[c * vectors + i] = after;
                    }
                }
                // What multiplies k and b, and what is written.
                let mut added = Array::<f32>::new(width);
                let mut answer = Array::<f32>::new(width);
                #[unroll]
                for c in 0..width {
                    let sum = lane_sum(sums[c].vector_sum(), lanes);
                    let value = shared_v[t * tile + p.own + c];
                    if comptime!(form.one_added()) {
                        let rest = if comptime!(form == Form::Key) { value - sum } else { value + sum };
                        answer[c] = rest;
                        added[c] = rest * beta;
                    } else {
                        answer[c] = sum;
                        added[c] = value;
                    }
                    sums[c] = Vector::<f32, Const<4>>::new(0.0f32);
                }
                #[unroll(plan.unrolled())]
                for i in 0..vectors {
                    let key = shared_k[at + i * lanes];
                    let query = if comptime!(task == Task::Answers) { key } else { shared_q[at + i * lanes] };
                    #[unroll]
                    for c in 0..width {
                        let mut next = x[c * vectors + i] + key * Vector::new(added[c]);
                        if comptime!(!form.one_added()) {
                            next += shared_b[at + i * lanes] * Vector::new(answer[c]);
                        }
                        if comptime!(task != Task::Answers) {
                            sums[c] += query * next;
                        }
                        x[c * vectors + i] = next;
                    }
                }
                if comptime!(task != Task::Answers) {
                    #[unroll]
                    for c in 0..width {
                        answer[c] = lane_sum(sums[c].vector_sum(), lanes);
                    }
                }
                let base = written + ((first + t) * heads + p.head) * comptime!(plan.values);
                write_rows::<V>(&answer, values, base, &p, plan);
            }
        }
        if comptime!(task == Task::Borders) {
            store_state(&x, states, chunk + sequence + 1, &p, heads, plan);
        }
    }
    if comptime!(task == Task::Outputs) {
        store_state(&x, states, sequence, &p, heads, plan);
    }
}

/// Against time: the gradient of the state, `Z ← Z + scale q doᵀ`, then with `du = Zᵀ b` what flows to the token before,
/// `e^g ∘ (Z + a duᵀ)` where the state is read after its decay, `e^g ∘ Z + a duᵀ` where it is read before.
///
/// `values` is the workspace: its planes of `plane` numbers are values, answers, gradients of outputs (read here), then
/// what is written here: the gradients of what is added where that is one vector, `Zᵀ k`, otherwise those of the answers and
/// those of the values.
#[cube(launch, address_type = "dynamic")]
pub(super) fn against_time<E: Float, B: Float>(
    q: &[E],
    k: &[E],
    a: &[E],
    b: &[B],
    g: &[f32],
    table: &[i32],
    states: &mut [f32],
    values: &mut [f32],
    heads: usize,
    groups: usize,
    chunks: usize,
    cubes: usize,
    plane: usize,
    scale: f32,
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
    let sequence = p.which;
    let entry = chunks * comptime!(CHUNK_WORDS) + sequence * comptime!(SEQUENCE_WORDS);
    let first_chunk = table[entry] as usize;
    let count = table[entry + 1] as usize;

    let mut shared_q = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, true)));
    let mut shared_k = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, true)));
    let mut shared_a = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, form != Form::Key)));
    let mut shared_b = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, !form.one_added())));
    let mut shared_g = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(held(plan, gate == Gate::Key)));
    let mut shared_o = Shared::<[f32]>::new_slice(comptime!(block * tile));
    let mut scalars = Shared::<[f32]>::new_slice(comptime!(2 * block));

    let mut z = Array::<Vector<f32, Const<4>>>::new(comptime!(width * vectors));
    load_state(&*states, &mut z, first_chunk + count + sequence, &p, heads, plan);

    for m in 0..count {
        let chunk = first_chunk + (count - 1 - m);
        let start = table[chunk * comptime!(CHUNK_WORDS) + 1] as usize;
        let length = table[chunk * comptime!(CHUNK_WORDS) + 2] as usize;
        let blocks = length.div_ceil(block);
        for n in 0..blocks {
            let skipped = (blocks - 1 - n) * block;
            let first = start + skipped;
            let here = min(block, length - skipped);
            sync_cube();
            load::<E>(q, &mut shared_q, first, key_head, key_heads, here, scale, plan);
            load::<E>(k, &mut shared_k, first, key_head, key_heads, here, 1.0f32, plan);
            load_pair::<E, B>(a, b, &mut shared_a, &mut shared_b, first, key_head, key_heads, here, plan);
            if comptime!(gate == Gate::Key) {
                load_decays(g, &mut shared_g, first, p.head, heads, here, plan);
            }
            // Whole tokens: those of the third plane stand two planes of tokens further.
            let tokens = plane / (heads * comptime!(plan.values));
            load_rows::<f32>(&*values, &mut shared_o, first + 2 * tokens, p.head, heads, here, &p, plan);
            load_scalars::<B>(b, g, &mut scalars, first, p.head, heads, here, plan);
            sync_cube();

            for i in 0..here {
                let t = here - 1 - i;
                let at = t * stride + p.lane;
                let beta = scalars[2 * t];
                let decay = Vector::<f32, Const<4>>::new(scalars[2 * t + 1]);
                let mut on_key = Array::<Vector<f32, Const<4>>>::new(width);
                let mut on_second = Array::<Vector<f32, Const<4>>>::new(width);
                #[unroll]
                for c in 0..width {
                    on_key[c] = Vector::<f32, Const<4>>::new(0.0f32);
                    on_second[c] = Vector::<f32, Const<4>>::new(0.0f32);
                }
                #[unroll(plan.unrolled())]
                for i in 0..vectors {
                    let query = shared_q[at + i * lanes];
                    let key = shared_k[at + i * lanes];
                    #[unroll]
                    for c in 0..width {
                        let next = z[c * vectors + i] + query * Vector::new(shared_o[t * tile + p.own + c]);
                        on_key[c] += key * next;
                        if comptime!(!form.one_added()) {
                            on_second[c] += shared_b[at + i * lanes] * next;
                        }
                        z[c * vectors + i] = next;
                    }
                }
                let mut back = Array::<f32>::new(width);
                let base = ((first + t) * heads + p.head) * comptime!(plan.values);
                let mut sums = Array::<f32>::new(width);
                #[unroll]
                for c in 0..width {
                    sums[c] = lane_sum(on_key[c].vector_sum(), lanes);
                }
                if comptime!(form.one_added()) {
                    write_rows::<f32>(&sums, values, 3 * plane + base, &p, plan);
                    #[unroll]
                    for c in 0..width {
                        let gradient = sums[c] * beta;
                        back[c] = if comptime!(form == Form::Key) { -gradient } else { gradient };
                    }
                } else {
                    write_rows::<f32>(&sums, values, 4 * plane + base, &p, plan);
                    #[unroll]
                    for c in 0..width {
                        back[c] = lane_sum(on_second[c].vector_sum(), lanes);
                    }
                    write_rows::<f32>(&back, values, 3 * plane + base, &p, plan);
                }
                #[unroll(plan.unrolled())]
                for i in 0..vectors {
                    let reader =
                        if comptime!(form == Form::Key) { shared_k[at + i * lanes] } else { shared_a[at + i * lanes] };
                    let d = if comptime!(gate == Gate::Key) { shared_g[at + i * lanes] } else { decay };
                    #[unroll]
                    for c in 0..width {
                        let mut next = z[c * vectors + i];
                        if comptime!(gate != Gate::None && !form.reads_decayed()) {
                            next *= d;
                        }
                        next += reader * Vector::new(back[c]);
                        if comptime!(gate != Gate::None && form.reads_decayed()) {
                            next *= d;
                        }
                        z[c * vectors + i] = next;
                    }
                }
            }
        }
        store_state(&z, states, chunk + sequence, &p, heads, plan);
    }
}
