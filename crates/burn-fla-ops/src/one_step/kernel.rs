//! The kernel: a cube holds some value channels of the state of one head in registers.

use cubecl::prelude::*;

use super::plan::{Form, Gate, StepPlan};
use crate::ssd::Skip;

/// The sum of `value` over the parts, on every unit, in a fixed order. All units of the cube must come here; each call has
/// its own half of `shared`.
#[cube]
fn over_parts<N: Size>(
    value: Vector<f32, N>,
    shared: &mut Shared<[Vector<f32, N>]>,
    #[comptime] half: usize,
    #[comptime] plan: StepPlan,
) -> Vector<f32, N> {
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(plan.lanes);
    let first = comptime!(half * plan.sums());
    let mut own = value;
    if comptime!(plan.planes) {
        #[unroll]
        for bit in comptime!(plan.lanes.ilog2())..5 {
            own += plane_shuffle_xor(own, comptime!(1u32 << bit));
        }
        if unit % 32 < comptime!(plan.lanes) {
            shared[first + unit / 32 * comptime!(plan.lanes) + lane] = own;
        }
    } else {
        shared[first + unit] = own;
    }
    sync_cube();
    let mut total = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for row in 0..comptime!(plan.sums() / plan.lanes) {
        total += shared[first + row * comptime!(plan.lanes) + lane];
    }
    total
}

/// One token of every sequence and head. `states` is read and written in place, and outputs take the place of the values.
///
/// What the form or the gate has not is another buffer that is not read.
#[cube(launch, address_type = "dynamic")]
pub(super) fn step<E: Float, G: Float, B: Float, V: Float, N: Size, M: Size, NB: Size, NG: Size>(
    q: &Tensor<Vector<E, M>>,
    k: &Tensor<Vector<E, M>>,
    a: &Tensor<Vector<E, M>>,
    b: &Tensor<Vector<B, NB>>,
    g: &Tensor<Vector<G, NG>>,
    states: &mut Tensor<Vector<f32, N>>,
    values: &mut Tensor<Vector<V, N>>,
    skip: &Tensor<f32>,
    heads: usize,
    key_heads: usize,
    cubes: usize,
    scale: f32,
    #[comptime] plan: StepPlan,
    #[define(E, G, B, V)] _dtypes: [ElemType; 4],
) {
    if CUBE_POS >= cubes {
        terminate!();
    }
    let (form, gate, keys, width) = comptime!((plan.form, plan.gate, plan.keys, plan.width));
    let (lanes, each) = comptime!((plan.lanes, plan.each));
    let part = UNIT_POS as usize / lanes;
    let row = CUBE_POS / comptime!(plan.tiles());
    let column = CUBE_POS % comptime!(plan.tiles()) * lanes + UNIT_POS as usize % lanes;
    let inside = column < width;
    // What is outside is read from the nearest place inside: a branch would keep the compiler from loading past it.
    let column = min(column, comptime!(width - 1));
    let head = row % heads;
    let mut key_head = head / (heads / key_heads);
    if comptime!(plan.tiled) {
        key_head = head % key_heads;
    }
    let key_row = row / heads * key_heads + key_head;
    // Vectors of key channels of a head, and of this unit.
    let (all, some) = comptime!((keys / plan.vector, each / plan.vector));

    let mut s = Array::<Vector<f32, N>>::new(each);
    #[unroll]
    for j in 0..each {
        if comptime!(plan.has_state) {
            let key = min(part * each + j, comptime!(keys - 1));
            s[j] = states[(row * keys + key) * width + column];
        } else {
            s[j] = Vector::new(0.0f32);
        }
    }
    let value = Vector::<f32, N>::cast_from(values[row * width + column]);
    let mut added = value;

    // The token's vectors, with zeros past the last key channel.
    let mut qs = Array::<f32>::new(each);
    let mut ks = Array::<f32>::new(each);
    let mut readers = Array::<f32>::new(each);
    let mut writers = Array::<f32>::new(each);
    let mut decays = Array::<f32>::new(each);
    let mut one_decay = f32::new(1.0);
    if comptime!(gate == Gate::Head) {
        one_decay = f32::exp(f32::cast_from(g[head].extract(0usize)));
    }
    if comptime!(gate == Gate::Token) {
        let mut log_decay = f32::cast_from(g[row].extract(0usize));
        if comptime!(form.is_duality()) {
            added *= Vector::new(log_decay);
            log_decay *= f32::cast_from(b[head].extract(0usize));
        }
        one_decay = f32::exp(log_decay);
    }
    #[unroll]
    for m in 0..some {
        let place = part * some + m;
        let factor = select(place < all, 1.0f32, 0.0f32);
        let place = min(place, comptime!(all - 1));
        let from_q = q[key_row * all + place];
        let from_k = k[key_row * all + place];
        #[unroll]
        for i in 0..comptime!(plan.vector) {
            let j = comptime!(m * plan.vector + i);
            qs[j] = f32::cast_from(from_q.extract(i)) * factor;
            ks[j] = f32::cast_from(from_k.extract(i)) * factor;
            decays[j] = one_decay;
        }
        if comptime!(gate == Gate::Key) {
            let from_g = g[row * all + place];
            #[unroll]
            for i in 0..comptime!(plan.vector) {
                decays[comptime!(m * plan.vector + i)] = f32::exp(f32::cast_from(from_g.extract(i)));
            }
        }
        if comptime!(form.has_a()) {
            let sign = factor * comptime!(if form.signed() { 1.0f32 } else { -1.0f32 });
            let from_a = a[key_row * all + place];
            #[unroll]
            for i in 0..comptime!(plan.vector) {
                readers[comptime!(m * plan.vector + i)] = f32::cast_from(from_a.extract(i)) * sign;
            }
        } else if comptime!(form.is_low_rank()) {
            #[unroll]
            for i in 0..comptime!(plan.vector) {
                let j = comptime!(m * plan.vector + i);
                readers[j] = f32::new(0.0) - ks[j];
            }
        }
        if comptime!(form.has_writer()) {
            let head_of_b = if comptime!(form == Form::Bonus) { head } else { key_row };
            let from_b = b[head_of_b * all + place];
            #[unroll]
            for i in 0..comptime!(plan.vector) {
                let j = comptime!(m * plan.vector + i);
                writers[j] = f32::cast_from(from_b.extract(i));
                if comptime!(form.is_rate()) {
                    // Of the removal key, without the sign with which it reads.
                    writers[j] *= f32::new(0.0) - readers[j];
                }
            }
        }
    }

    let mut shared = Shared::<[Vector<f32, N>]>::new_slice(comptime!(2 * plan.sums()));
    // What the state answers, and what k is multiplied by.
    let mut answer = Vector::<f32, N>::new(0.0f32);
    let mut written = added;
    if comptime!(form.is_low_rank()) {
        let mut sum = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for j in 0..each {
            let from = if comptime!(form.reads_decayed()) { readers[j] * decays[j] } else { readers[j] };
            sum += Vector::new(from) * s[j];
        }
        answer = over_parts::<N>(sum, &mut shared, 0usize, plan);
        if comptime!(form.one_added()) {
            written = (added + answer) * Vector::new(f32::cast_from(b[row].extract(0usize)));
        }
    }

    let mut value_decay = Vector::<f32, N>::new(1.0f32);
    if comptime!(gate == Gate::Value) {
        let from_g = g[row * width + column];
        #[unroll]
        for i in 0..value_decay.vector_size() {
            value_decay.insert(i, f32::exp(f32::cast_from(from_g.extract(i))));
        }
    }
    let mut sum = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for j in 0..each {
        let before = s[j];
        let own = Vector::new(ks[j]) * written;
        let mut after = before * Vector::new(decays[j]);
        if comptime!(gate == Gate::Value) {
            after = before * value_decay;
        }
        after += own;
        if comptime!(form.is_low_rank() && !form.one_added()) {
            after += Vector::new(writers[j]) * answer;
        }
        if comptime!(form == Form::Bonus) {
            sum += Vector::new(qs[j]) * (before + own * Vector::new(writers[j]));
        } else {
            sum += Vector::new(qs[j]) * after;
        }
        let key = part * each + j;
        let mut there = inside;
        if comptime!(!plan.even()) {
            there = inside && key < keys;
        }
        if there {
            states[(row * keys + key) * width + column] = after;
        }
    }
    let mut o = over_parts::<N>(sum, &mut shared, 1usize, plan) * Vector::new(scale);
    if part == 0 && inside {
        if comptime!(form.skip() == Skip::Head) {
            o += Vector::new(skip[head]) * value;
        }
        if comptime!(form.skip() == Skip::Channel) {
            let first = (head * width + column) * value.vector_size();
            let mut weights = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for i in 0..value.vector_size() {
                weights.insert(i, skip[first + i]);
            }
            o += weights * value;
        }
        values[row * width + column] = Vector::cast_from(o);
    }
}
