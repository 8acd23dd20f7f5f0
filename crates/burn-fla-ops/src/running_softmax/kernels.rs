//! The running log-sum-exp along time, and what comes of it, on devices with kernels.
//!
//! With `d_t = s_t − z_{t−1}` everything is a function of d alone, and nothing is a difference of two values of z:
//!
//! ```text
//! w_t = e^{s_t − z_t} = σ(d_t)        1 − w_t = e^{g_t} = σ(−d_t)        g_t = z_{t−1} − z_t = −log(1 + e^{d_t})
//! ```
//!
//! Backward, with `u_t` the gradient that reaches `z_t` from later tokens (that of the last z at the end):
//!
//! ```text
//! δ_t  = w_t ((1 − w_t) dw_t − dg_t)        the gradient of d_t
//! ds_t = w_t u_t + δ_t                      u_{t−1} = (1 − w_t) u_t − δ_t
//! ```
//!
//! All factors are between 0 and 1, and `ds_t + u_{t−1} = u_t`: nothing overflows and nothing cancels that is not in the
//! gradients already. A first token without a past has w = 1 whatever its score is, and δ = 0.
//!
//! A cube has [`LANES`] columns of channels and walks a segment of a sequence in steps of [`STEP`] tokens: [`PARTS`] units
//! a column, each with [`TOKENS`] tokens in registers. The units exchange their sums through shared memory, so that each
//! knows what came before its tokens (or, backward, what comes after), and then go over their tokens once more. So each
//! tensor is read and written once. Sums are kept as `(m, l)`, `z = m + log l`, because one l over thousands of tokens
//! keeps digits that z rounds away.

use cubecl::prelude::*;

/// Units along the channels.
pub(super) const LANES: usize = 16;
/// Units along time.
pub(super) const PARTS: usize = 16;
/// Tokens of a unit.
pub(super) const TOKENS: usize = 8;
/// Tokens of a cube at a time.
pub(super) const STEP: usize = PARTS * TOKENS;
/// Words of a segment in the table: first token, length, sequence, first step.
pub(super) const ITEM_WORDS: usize = 4;
/// Words of a sequence in the table: first segment, number of segments.
pub(super) const SEQUENCE_WORDS: usize = 2;
/// The m of a sum of nothing, whose l is 0. No score is below it.
const NOTHING: f32 = f32::MIN;

/// What a kernel is specialised on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Channels of a unit.
    pub(super) vector: usize,
    /// Whether the normaliser itself is the output, in the place of weights and decays.
    pub(super) normaliser: bool,
    /// Whether sequences are cut into segments.
    pub(super) cut: bool,
    /// Whether only what a segment passes on is wanted.
    pub(super) totals: bool,
    /// Whether there is something before the first token; backward, a gradient of the last normaliser.
    pub(super) enters: bool,
    /// Whether the sums before each step are kept; backward, whether the initial state has a gradient.
    pub(super) leaves: bool,
    /// Backward: whether the weights, and the decays or the normaliser, have gradients.
    pub(super) weights: bool,
    pub(super) others: bool,
}

#[derive(CubeType, Clone, Copy)]
pub(super) struct Item {
    pub(super) start: usize,
    pub(super) length: usize,
    pub(super) sequence: usize,
    pub(super) step: usize,
}

#[cube]
pub(super) fn item_at(table: &[i32], item: usize) -> Item {
    let at = item * comptime!(ITEM_WORDS);
    Item {
        start: table[at] as usize,
        length: table[at + 1] as usize,
        sequence: table[at + 2] as usize,
        step: table[at + 3] as usize,
    }
}

/// `z = most + log sum`, and where nothing was summed the sum is 0.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Sum {
    pub(super) most: f32,
    pub(super) sum: f32,
}

#[cube]
fn both(a: &Sum, b: &Sum) -> Sum {
    let most = max(a.most, b.most);
    Sum { most, sum: a.sum * f32::exp(a.most - most) + b.sum * f32::exp(b.most - most) }
}

/// The sum whose logarithm is `z`, which may be −∞: by its bits, for a compiler may take it that no number is infinite.
#[cube]
fn from_normaliser(z: f32) -> Sum {
    let nothing = u32::reinterpret(z) == 0xff80_0000u32;
    Sum { most: select(nothing, f32::new(comptime!(NOTHING)), z), sum: select(nothing, 0.0f32, 1.0f32) }
}

/// What a token does, by `d = s − z` with the z before it.
#[derive(CubeType, Clone, Copy)]
struct Token {
    /// σ(d).
    weight: f32,
    /// σ(−d).
    kept: f32,
    /// `log(1 + e^{−|d|})`.
    more: f32,
}

#[cube]
fn token(d: f32) -> Token {
    let e = f32::exp(-max(d, -d));
    let root = (1.0f32 + e).inverse_sqrt();
    let small = e * (root * root);
    // A difference rounds without bias: backward, thousands of these are multiplied.
    let large = 1.0f32 - small;
    let above = d > 0.0f32;
    Token { weight: select(above, large, small), kept: select(above, small, large), more: e * log1p_over(e) }
}

/// `log(1 + e) / e` for e between 0 and 1, to 1e-9 and its rounding: the logarithm of a sum rounded to 1 loses all digits
/// of a small e, and the usual mend of that loss is one that compilers simplify away.
#[cube]
fn log1p_over(e: f32) -> f32 {
    let mut p = f32::new(0.001_986_696_1);
    p = p * e - 0.013_187_824f32;
    p = p * e + 0.041_006_57_f32;
    p = p * e - 0.081_880_4f32;
    p = p * e + 0.123_779_95f32;
    p = p * e - 0.160_876_23f32;
    p = p * e + 0.198_858_2f32;
    p = p * e - 0.249_864_96f32;
    p = p * e + 0.333_324_98f32;
    p = p * e - 0.499_999_8f32;
    p * e + 1.0f32
}

/// A unit's tokens, in f32: rows from `first` on, the last row again past it.
#[cube]
pub(super) fn load<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    first: usize,
    last: usize,
    column: usize,
    width: usize,
    #[comptime] vector: usize,
) -> Array<f32> {
    let mut raw = Array::<Vector<E, N>>::new(comptime!(TOKENS));
    #[unroll]
    for i in 0..comptime!(TOKENS) {
        raw[i] = x[min(first + i, last) * width + column];
    }
    let mut wide = Array::<f32>::new(comptime!(TOKENS * vector));
    #[unroll]
    for i in 0..comptime!(TOKENS) {
        let value = Vector::<f32, N>::cast_from(raw[i]);
        #[unroll]
        for n in 0..vector {
            wide[comptime!(i * vector + n)] = value.extract(n);
        }
    }
    wide
}

/// Writes a unit's tokens, rows from `first` on, those before `end`.
#[cube]
pub(super) fn store<E: Float, N: Size>(
    values: &Array<f32>,
    y: &mut Tensor<Vector<E, N>>,
    first: usize,
    end: usize,
    column: usize,
    width: usize,
    #[comptime] vector: usize,
) {
    #[unroll]
    for i in 0..comptime!(TOKENS) {
        if first + i < end {
            let mut value = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for n in 0..vector {
                value.insert(n, values[comptime!(i * vector + n)]);
            }
            y[(first + i) * width + column] = Vector::cast_from(value);
        }
    }
}

/// The sum over a unit's own tokens of one channel.
#[cube]
pub(super) fn own_sum(
    s: &Array<f32>,
    first: usize,
    end: usize,
    #[comptime] n: usize,
    #[comptime] vector: usize,
) -> Sum {
    let mut most = f32::new(comptime!(NOTHING));
    #[unroll]
    for i in 0..comptime!(TOKENS) {
        most = select(first + i < end, max(most, s[comptime!(i * vector + n)]), most);
    }
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..comptime!(TOKENS) {
        sum += select(first + i < end, f32::exp(s[comptime!(i * vector + n)] - most), 0.0f32);
    }
    Sum { most, sum }
}

/// What was carried into the step together with the sums of the units before `part`; `at` is the channel in the cube.
#[cube]
pub(super) fn sum_before(
    most: &Shared<[f32]>,
    sums: &Shared<[f32]>,
    carried: &Sum,
    part: usize,
    at: usize,
    #[comptime] vector: usize,
) -> Sum {
    let mut top = carried.most;
    for other in 0..part {
        top = max(top, most[other * comptime!(LANES * vector) + at]);
    }
    let mut sum = carried.sum * f32::exp(carried.most - top);
    for other in 0..part {
        let from = other * comptime!(LANES * vector) + at;
        sum += sums[from] * f32::exp(most[from] - top);
    }
    Sum { most: top, sum }
}

/// Goes over a unit's tokens of one channel: weights, `1 − w`, and `others`, which get the log decays or the normaliser.
#[cube]
pub(super) fn walk(
    s: &Array<f32>,
    weights: &mut Array<f32>,
    kept: &mut Array<f32>,
    others: &mut Array<f32>,
    before: &Sum,
    #[comptime] n: usize,
    #[comptime] plan: Plan,
) {
    let nothing = before.sum == 0.0f32;
    // z is `most + more`: relative to the largest score so far, so that scores of any size keep their digits.
    let mut most = before.most + 0.0f32;
    let mut more = f32::ln(select(nothing, 1.0f32, before.sum));
    #[unroll]
    for i in 0..comptime!(TOKENS) {
        let at = comptime!(i * plan.vector + n);
        let x = s[at] - most;
        let d = x - more;
        let found = token(d);
        let mut weight = found.weight;
        let mut rest = found.kept;
        let mut decay = -(max(d, 0.0f32) + found.more);
        let mut next = max(more - max(x, 0.0f32), 0.0f32) + found.more;
        if comptime!(i == 0) {
            weight = select(nothing, 1.0f32, weight);
            rest = select(nothing, 0.0f32, rest);
            decay = select(nothing, 0.0f32, decay);
            next = select(nothing, 0.0f32, next);
        }
        most = max(most, s[at]);
        more = next;
        weights[at] = weight;
        kept[at] = rest;
        others[at] = if comptime!(plan.normaliser) { most + more } else { decay };
    }
}

/// Weights and log decays, or with `plan.normaliser` the normaliser in the place of the decays; with `plan.totals` the
/// sum over each segment alone.
///
/// `starts` is the initial normaliser, `[N, D]`, or with `plan.cut` the sum before each segment, `[segments, 2, D]`. `ends`
/// gets the last normaliser, `[N, D]`, unless sequences are cut; with `plan.totals` the sums, `[segments, 2, D]`. `borders`
/// gets the sum before each step, `[steps, 2, D]`. A row has `width` vectors.
#[cube(launch, address_type = "dynamic")]
pub(super) fn forward<E: Float, W: Float, N: Size>(
    scores: &Tensor<Vector<E, N>>,
    table: &[i32],
    starts: &[f32],
    weights: &mut Tensor<Vector<W, N>>,
    others: &mut Tensor<Vector<f32, N>>,
    ends: &mut [f32],
    borders: &mut [f32],
    width: usize,
    items: usize,
    #[comptime] plan: Plan,
    #[define(E, W)] _elements: [ElemType; 2],
) {
    let vector = comptime!(plan.vector);
    let mut most = Shared::<[f32]>::new_slice(comptime!(PARTS * LANES * plan.vector));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(PARTS * LANES * plan.vector));
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
                let channel = column * vector + n;
                let mut start_most = f32::new(comptime!(NOTHING));
                let mut start_sum = f32::new(0.0);
                if comptime!(plan.cut && !plan.totals) {
                    let from = 2 * item * channels + channel;
                    start_most = starts[from];
                    start_sum = starts[from + channels];
                } else if comptime!(plan.enters && !plan.totals) {
                    let found = from_normaliser(starts[place.sequence * channels + channel]);
                    start_most = found.most;
                    start_sum = found.sum;
                }
                carry[lane * vector + n] = start_most;
                carry[comptime!(LANES * plan.vector) + lane * vector + n] = start_sum;
            }
        }
        let mut done = 0usize;
        while done < place.length {
            let first = place.start + done + part * comptime!(TOKENS);
            let s = load::<E, N>(scores, first, end - 1, column, width, vector);
            #[unroll]
            for n in 0..vector {
                let own = own_sum(&s, first, end, n, vector);
                let at = (part * comptime!(LANES) + lane) * vector + n;
                most[at] = own.most;
                sums[at] = own.sum;
            }
            sync_cube();
            let mut w = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            let mut rest = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            let mut g = Array::<f32>::new(comptime!(TOKENS * plan.vector));
            let mut next = Array::<f32>::new(comptime!(2 * plan.vector));
            #[unroll]
            for n in 0..vector {
                let at = lane * vector + n;
                let carried = Sum { most: carry[at], sum: carry[comptime!(LANES * plan.vector) + at] };
                let from = part * comptime!(LANES * plan.vector) + at;
                let own = Sum { most: most[from], sum: sums[from] };
                // A total is for the last unit alone to sum up.
                let counted =
                    if comptime!(plan.totals) { select(part == comptime!(PARTS - 1), part, 0usize) } else { part };
                let before = sum_before(&most, &sums, &carried, counted, at, vector);
                if comptime!(!plan.totals) {
                    walk(&s, &mut w, &mut rest, &mut g, &before, n, plan);
                    if comptime!(plan.leaves) {
                        if part == 0 && inside {
                            let to = 2 * (place.step + done / comptime!(STEP)) * channels + column * vector + n;
                            borders[to] = before.most;
                            borders[to + channels] = before.sum;
                        }
                    }
                }
                if part == comptime!(PARTS - 1) {
                    let after = both(&before, &own);
                    next[n] = after.most;
                    next[comptime!(plan.vector + n)] = after.sum;
                }
            }
            if comptime!(!plan.totals) {
                if inside {
                    if comptime!(!plan.normaliser) {
                        store::<W, N>(&w, weights, first, end, column, width, vector);
                    }
                    store::<f32, N>(&g, others, first, end, column, width, vector);
                }
            }
            sync_cube();
            if part == comptime!(PARTS - 1) {
                #[unroll]
                for n in 0..vector {
                    carry[lane * vector + n] = next[n];
                    carry[comptime!(LANES * plan.vector) + lane * vector + n] = next[comptime!(plan.vector + n)];
                }
            }
            done += comptime!(STEP);
        }
        sync_cube();
        if part == 0 && inside {
            #[unroll]
            for n in 0..vector {
                let channel = column * vector + n;
                let found_most = carry[lane * vector + n];
                let found_sum = carry[comptime!(LANES * plan.vector) + lane * vector + n];
                if comptime!(plan.totals) {
                    ends[2 * item * channels + channel] = found_most;
                    ends[(2 * item + 1) * channels + channel] = found_sum;
                } else if comptime!(!plan.cut) {
                    let to = place.sequence * channels + channel;
                    if place.length > 0 {
                        ends[to] = found_most + f32::ln(found_sum);
                    } else if comptime!(plan.enters) {
                        ends[to] = starts[to];
                    }
                }
            }
        }
        item += CUBE_COUNT_Y as usize;
    }
}

/// Passes sums over the segments of each sequence: `sums` holds those of the segments, `[segments, 2, D]`, and receives
/// those before them. `ends` gets the last normaliser. One unit a sequence and channel.
#[cube(launch, address_type = "dynamic")]
pub(super) fn pass_sums(
    sums: &mut [f32],
    initial: &[f32],
    table: &[i32],
    ends: &mut [f32],
    channels: usize,
    count: usize,
    table_at: usize,
    #[comptime] enters: bool,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let sequence = ABSOLUTE_POS / channels;
    let channel = ABSOLUTE_POS % channels;
    let at = table_at + sequence * comptime!(SEQUENCE_WORDS);
    let first = table[at] as usize;
    let segments = table[at + 1] as usize;
    let mut most = f32::new(comptime!(NOTHING));
    let mut sum = f32::new(0.0);
    if comptime!(enters) {
        let found = from_normaliser(initial[ABSOLUTE_POS]);
        most = found.most;
        sum = found.sum;
    }
    for i in 0..segments {
        let from = 2 * (first + i) * channels + channel;
        let own = Sum { most: sums[from], sum: sums[from + channels] };
        sums[from] = most;
        sums[from + channels] = sum;
        let after = both(&Sum { most, sum }, &own);
        most = after.most;
        sum = after.sum;
    }
    if sum != 0.0f32 {
        ends[ABSOLUTE_POS] = most + f32::ln(sum);
    } else if comptime!(enters) {
        ends[ABSOLUTE_POS] = initial[ABSOLUTE_POS];
    }
}
