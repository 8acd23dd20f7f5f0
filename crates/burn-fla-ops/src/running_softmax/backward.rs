//! The gradients, against time: see [`super::kernels`].

use cubecl::prelude::*;

use super::kernels::{
    LANES, PARTS, Plan, SEQUENCE_WORDS, STEP, Sum, TOKENS, item_at, load, own_sum, store, sum_before, walk,
};

/// The gradient of the scores, or with `plan.totals` what a segment does to the gradient that comes to its end,
/// `u_start = P u_end + Q`, as `[segments, 2, D]` in `firsts`.
///
/// `borders` is what [`forward`](super::kernels::forward) kept. `weight_grads` are added up. `others` are the gradients of
/// the log decays, or with `plan.normaliser` those of the normaliser. `lasts` is the gradient of the last normaliser,
/// `[N, D]`, or with `plan.cut` that at the end of each segment, at every second row of `[segments, 2, D]`; `firsts` gets
/// that of the initial normaliser, unless sequences are cut.
#[cube(launch, address_type = "dynamic")]
pub(super) fn backward<E: Float, W: Float, N: Size>(
    scores: &Tensor<Vector<E, N>>,
    table: &[i32],
    borders: &[f32],
    weight_grads: &Sequence<OwnedTensor<Vector<W, N>>>,
    others: &Tensor<Vector<f32, N>>,
    lasts: &[f32],
    score_grads: &mut Tensor<Vector<E, N>>,
    firsts: &mut [f32],
    width: usize,
    items: usize,
    #[comptime] plan: Plan,
    #[define(E, W)] _elements: [ElemType; 2],
) {
    let vector = comptime!(plan.vector);
    let mut most = Shared::<[f32]>::new_slice(comptime!(PARTS * LANES * plan.vector));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(PARTS * LANES * plan.vector));
    let mut products = Shared::<[f32]>::new_slice(comptime!(PARTS * LANES * plan.vector));
    let mut offsets = Shared::<[f32]>::new_slice(comptime!(PARTS * LANES * plan.vector));
    let mut carry = Shared::<[f32]>::new_slice(comptime!(2 * LANES * plan.vector));
    let part = UNIT_POS as usize / comptime!(LANES);
    let lane = UNIT_POS as usize % comptime!(LANES);
    let wanted = CUBE_POS_X as usize * comptime!(LANES) + lane;
    let inside = wanted < width;
    let column = min(wanted, width - 1);
    let channels = width * vector;
    let mut item = CUBE_POS_Y as usize;
    while item < items {
        let place = item_at(table, item);
        let end = place.start + place.length;
        if part == 0 {
            #[unroll]
            for n in 0..vector {
                let mut last = f32::new(0.0);
                if comptime!(plan.enters && !plan.totals) {
                    let entry = if comptime!(plan.cut) { 2 * item } else { place.sequence };
                    last = lasts[entry * channels + column * vector + n];
                }
                carry[lane * vector + n] = last;
                carry[comptime!(LANES * plan.vector) + lane * vector + n] = f32::new(1.0);
            }
        }
        let steps = place.length.div_ceil(comptime!(STEP));
        for back in 0..steps {
            let step = steps - 1 - back;
            let first = place.start + step * comptime!(STEP) + part * comptime!(TOKENS);
            let s = load::<E, N>(scores, first, end - 1, column, width, vector);
            let mut dw = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            #[unroll]
            for i in 0..comptime!(TOKENS * plan.vector) {
                dw[i] = f32::new(0.0);
            }
            if comptime!(plan.weights) {
                #[unroll]
                for list in 0..weight_grads.len() {
                    let found = load::<W, N>(weight_grads.index(list), first, end - 1, column, width, vector);
                    #[unroll]
                    for i in 0..comptime!(TOKENS * plan.vector) {
                        dw[i] += found[i];
                    }
                }
            }
            let mut given = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            if comptime!(plan.others) {
                let found = load::<f32, N>(others, first, end - 1, column, width, vector);
                #[unroll]
                for i in 0..comptime!(TOKENS * plan.vector) {
                    given[i] = found[i];
                }
            } else {
                #[unroll]
                for i in 0..comptime!(TOKENS * plan.vector) {
                    given[i] = f32::new(0.0);
                }
            }
            #[unroll]
            for n in 0..vector {
                let own = own_sum(&s, first, end, n, vector);
                let at = (part * comptime!(LANES) + lane) * vector + n;
                most[at] = own.most;
                sums[at] = own.sum;
            }
            sync_cube();
            let mut w = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            let mut kept = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            // Later the gradients of the scores.
            let mut ds = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            #[unroll]
            for n in 0..vector {
                let at = lane * vector + n;
                let from = 2 * (place.step + step) * channels + column * vector + n;
                let carried = Sum { most: borders[from], sum: borders[from + channels] };
                let before = sum_before(&most, &sums, &carried, part, at, vector);
                walk(&s, &mut w, &mut kept, &mut ds, &before, n, plan);
                let nothing = before.sum == 0.0f32;
                let mut product = f32::new(1.0);
                let mut offset = f32::new(0.0);
                #[unroll]
                for j in 0..comptime!(TOKENS) {
                    let i = comptime!(TOKENS - 1 - j);
                    let token = comptime!(i * plan.vector + n);
                    let live = first + i < end;
                    if comptime!(plan.normaliser) {
                        // Here it is the gradient of z itself that is added.
                        given[token] = select(live, given[token], 0.0f32);
                    } else {
                        let mut delta = w[token] * (kept[token] * dw[token] - given[token]);
                        if comptime!(i == 0) {
                            delta = select(nothing, 0.0f32, delta);
                        }
                        given[token] = select(live, delta, 0.0f32);
                    }
                    w[token] = select(live, w[token], 0.0f32);
                    kept[token] = select(live, kept[token], 1.0f32);
                    if comptime!(plan.normaliser) {
                        offset = kept[token] * (offset + given[token]);
                    } else {
                        offset = kept[token] * offset - given[token];
                    }
                    product *= kept[token];
                }
                let to = part * comptime!(LANES * plan.vector) + at;
                products[to] = product;
                offsets[to] = offset;
            }
            sync_cube();
            let mut next = Array::<f32>::new(comptime!(2 * plan.vector));
            #[unroll]
            for n in 0..vector {
                let at = lane * vector + n;
                let mut u = carry[at];
                let mut product = carry[comptime!(LANES * plan.vector) + at];
                for other in 0..comptime!(PARTS) - 1 - part {
                    let from = (comptime!(PARTS) - 1 - other) * comptime!(LANES * plan.vector) + at;
                    u = products[from] * u + offsets[from];
                    product *= products[from];
                }
                #[unroll]
                for j in 0..comptime!(TOKENS) {
                    let i = comptime!(TOKENS - 1 - j);
                    let token = comptime!(i * plan.vector + n);
                    if comptime!(plan.normaliser) {
                        u += given[token];
                        ds[token] = w[token] * u;
                        u *= kept[token];
                    } else {
                        ds[token] = w[token] * u + given[token];
                        u = kept[token] * u - given[token];
                    }
                }
                next[n] = u;
                next[comptime!(plan.vector + n)] = product * products[part * comptime!(LANES * plan.vector) + at];
            }
            if comptime!(!plan.totals) {
                if inside {
                    store::<E, N>(&ds, score_grads, first, end, column, width, vector);
                }
            }
            sync_cube();
            if part == 0 {
                #[unroll]
                for n in 0..vector {
                    carry[lane * vector + n] = next[n];
                    carry[comptime!(LANES * plan.vector) + lane * vector + n] = next[comptime!(plan.vector + n)];
                }
            }
        }
        if part == 0 && inside {
            #[unroll]
            for n in 0..vector {
                let channel = column * vector + n;
                let u = carry[lane * vector + n];
                if comptime!(plan.totals) {
                    firsts[2 * item * channels + channel] = carry[comptime!(LANES * plan.vector) + lane * vector + n];
                    firsts[(2 * item + 1) * channels + channel] = u;
                } else if comptime!(plan.leaves && !plan.cut) {
                    firsts[place.sequence * channels + channel] = u;
                }
            }
        }
        item += CUBE_COUNT_Y as usize;
    }
}

/// Passes gradients over the segments of each sequence, from its end: `segments` holds P and Q of each, `[segments, 2, D]`,
/// and receives the gradient at its end in the place of P. `firsts` gets that of the initial normaliser. One unit a
/// sequence and channel.
#[cube(launch, address_type = "dynamic")]
pub(super) fn pass_gradients(
    segments: &mut [f32],
    lasts: &[f32],
    table: &[i32],
    firsts: &mut [f32],
    channels: usize,
    count: usize,
    table_at: usize,
    #[comptime] enters: bool,
    #[comptime] leaves: bool,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let sequence = ABSOLUTE_POS / channels;
    let channel = ABSOLUTE_POS % channels;
    let at = table_at + sequence * comptime!(SEQUENCE_WORDS);
    let first = table[at] as usize;
    let found = table[at + 1] as usize;
    let mut u = f32::new(0.0);
    if comptime!(enters) {
        u = lasts[ABSOLUTE_POS];
    }
    for i in 0..found {
        let from = 2 * (first + found - 1 - i) * channels + channel;
        let product = segments[from];
        segments[from] = u;
        u = product * u + segments[from + channels];
    }
    if comptime!(leaves) {
        firsts[ABSOLUTE_POS] = u;
    }
}
