//! The short convolution on devices with kernels.
//!
//! Tokens are cut into runs that never cross the border of a sequence. A unit walks one run of a few channels in batches
//! of tokens, with the last `W − 1` inputs in registers, so each input is read once (and `W − 1` of them twice, where a
//! run begins). Nothing is saved besides the inputs: backward makes `z` again. It walks `W − 1` tokens past the end of
//! its run, because `dx_t = Σ_j w_j ∘ dz_{t+W−1−j}`.
//!
//! Tried at 256 MiB a tensor, 4 taps, on an H200 (copy: 4.1 TB/s), forward and backward in ms (token by token: 0.279 and
//! 0.613 on an H100). With sigmoids of plain instructions and batches that are loaded ahead: 0.163 and 0.328 for batches
//! of 4, 0.150 and 0.340 of 8 (runs of 64 tokens), 0.314 backward for runs of 128. With sigmoids of approximate
//! instructions and loads under a condition: 0.163 and 0.294 for batches of 4, 0.165 and 0.377 of 8, whose registers leave
//! room for half as many units. Forward of 8 loaded ahead, backward of 4, runs of 128: 0.164 and 0.270.
//!
//! Since then forward walks runs of 64 again (twice as many units, 3.9 waves of them in the place of 1.9; 434 instructions for 32
//! elements, as before), and backward loads without conditions (518 instructions for 16 elements; now 510, of which some 30 run at
//! the end of a sequence alone): 0.206 and 0.317 on an H100, 0.88 and 0.86 of its copy, where they had 0.79 and 0.72 of an
//! H200's.

use cubecl::prelude::*;

use crate::rows::{UNITS, sigmoid, vector_size};

/// What the kernels are specialised on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ConvPlan {
    /// Channels of a vector.
    pub(super) vector: usize,
    /// Vectors of a token.
    pub(super) width: usize,
    /// Taps of the convolution.
    pub(super) taps: usize,
    /// Tokens of a run.
    pub(super) run: usize,
    /// Pieces of a run, each of which a unit walks.
    pub(super) pieces: usize,
    /// Tokens that are loaded at once.
    pub(super) batch: usize,
    pub(super) silu: bool,
    pub(super) bias: bool,
    pub(super) packed: bool,
    /// Whether sigmoids are made of approximate instructions.
    pub(super) approximate: bool,
}

impl ConvPlan {
    /// Taps that one load brings: those of a channel lie side by side.
    pub(super) fn word(&self) -> usize {
        vector_size(self.taps)
    }
}

/// Numbers of a run in the table of packed sequences: its sequence, the sequence's first token, the run's first token,
/// and the sequence's end.
pub(super) const RUN_WORDS: usize = 4;

/// Where a piece of a run lies.
#[derive(CubeType)]
struct Span {
    sequence: usize,
    /// First token of the sequence.
    start: usize,
    /// First token of the piece; at the end of the sequence or past it where it has none.
    first: usize,
    /// One past the last token of the piece.
    last: usize,
    /// One past the last token of the sequence.
    end: usize,
}

#[cube]
fn span(piece: usize, table: &Tensor<i32>, tokens: u32, #[comptime] plan: ConvPlan) -> Span {
    let length = comptime!(plan.run / plan.pieces);
    let run = piece / comptime!(plan.pieces);
    let before = piece % comptime!(plan.pieces) * length;
    if comptime!(plan.packed) {
        let at = run * comptime!(RUN_WORDS);
        let first = table[at + 2] as usize + before;
        let end = table[at + 3] as usize;
        Span { sequence: table[at] as usize, start: table[at + 1] as usize, first, last: min(first + length, end), end }
    } else {
        let tokens = tokens as usize;
        let runs = tokens.div_ceil(comptime!(plan.run));
        let sequence = run / runs;
        let start = sequence * tokens;
        let first = start + run % runs * comptime!(plan.run) + before;
        let end = start + tokens;
        Span { sequence, start, first, last: min(first + length, end), end }
    }
}

/// Whether a piece is the last one of its sequence that has tokens, or the first one of a sequence that has none.
#[cube]
fn ends(span: &Span) -> bool {
    span.last == span.end && (span.first < span.end || span.first == span.start)
}

/// The taps of a vector of channels, from `weight` `[D, W]`.
#[cube]
fn load_taps<N: Size, W: Size>(
    weight: &Tensor<Vector<f32, W>>,
    column: usize,
    #[comptime] plan: ConvPlan,
) -> Array<Vector<f32, N>> {
    let loads = comptime!(plan.taps / plan.word());
    let mut taps = Array::<Vector<f32, N>>::new(comptime!(plan.taps));
    #[unroll]
    for j in 0..loads {
        let mut words = Array::<Vector<f32, W>>::new(comptime!(plan.vector));
        #[unroll]
        for i in 0..comptime!(plan.vector) {
            words[i] = weight[(column * comptime!(plan.vector) + i) * loads + j];
        }
        #[unroll]
        for k in 0..comptime!(plan.word()) {
            let mut tap = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for i in 0..comptime!(plan.vector) {
                tap.insert(i, words[i].extract(k));
            }
            taps[comptime!(j * plan.word() + k)] = tap;
        }
    }
    taps
}

#[cube]
fn load_bias<N: Size>(bias: &Tensor<f32>, column: usize, #[comptime] plan: ConvPlan) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::new(0.0f32);
    if comptime!(plan.bias) {
        #[unroll]
        for i in 0..comptime!(plan.vector) {
            value.insert(i, bias[column * comptime!(plan.vector) + i]);
        }
    }
    value
}

/// The `W − 1` inputs before the first token of a run, with room for a batch behind them.
#[cube]
fn load_window<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    span: &Span,
    column: usize,
    #[comptime] plan: ConvPlan,
) -> Array<Vector<f32, N>> {
    let before = comptime!(plan.taps - 1);
    let mut window = Array::<Vector<f32, N>>::new(comptime!(before + plan.batch));
    #[unroll]
    for j in 0..before {
        window[j] = Vector::<f32, N>::new(0.0f32);
        if span.first + j >= span.start + before {
            let token = span.first + j - before;
            window[j] = Vector::cast_from(x[token * comptime!(plan.width) + column]);
        }
    }
    window
}

/// Loads a batch from `token` on without a condition, so that its loads are in flight together; from `end` on it repeats the
/// token before that.
#[cube]
fn fill<E: Float, N: Size>(
    batch: &mut Array<Vector<E, N>>,
    x: &Tensor<Vector<E, N>>,
    token: usize,
    end: usize,
    column: usize,
    #[comptime] plan: ConvPlan,
) {
    #[unroll]
    for i in 0..comptime!(plan.batch) {
        let token = min(token + i, max(end, 1usize) - 1);
        batch[i] = x[token * comptime!(plan.width) + column];
    }
}

/// What precedes the next batch.
#[cube]
fn shift<N: Size>(window: &mut Array<Vector<f32, N>>, #[comptime] plan: ConvPlan) {
    #[unroll]
    for j in 0..comptime!(plan.taps - 1) {
        window[j] = window[comptime!(j + plan.batch)];
    }
}

#[cube(launch, address_type = "dynamic")]
pub(super) fn forward_kernel<E: Float, N: Size, W: Size>(
    x: &Tensor<Vector<E, N>>,
    weight: &Tensor<Vector<f32, W>>,
    bias: &Tensor<f32>,
    table: &Tensor<i32>,
    y: &mut Tensor<Vector<E, N>>,
    cache: &mut Tensor<Vector<E, N>>,
    runs: u32,
    tokens: u32,
    #[comptime] plan: ConvPlan,
    #[define(E)] _element: ElemType,
) {
    let mut at = ABSOLUTE_POS;
    while at < runs as usize * comptime!(plan.width) {
        let column = at % comptime!(plan.width);
        let span = span(at / comptime!(plan.width), table, tokens, plan);
        let taps = load_taps::<N, W>(weight, column, plan);
        let bias = load_bias::<N>(bias, column, plan);
        let mut window = load_window::<E, N>(x, &span, column, plan);
        let mut ahead = Array::<Vector<E, N>>::new(comptime!(plan.batch));
        fill::<E, N>(&mut ahead, x, span.first, span.last, column, plan);
        let mut token = span.first;
        while token < span.last {
            let start = token * comptime!(plan.width) + column;
            #[unroll]
            for i in 0..comptime!(plan.batch) {
                window[comptime!(plan.taps - 1 + i)] = Vector::cast_from(ahead[i]);
            }
            fill::<E, N>(&mut ahead, x, token + comptime!(plan.batch), span.last, column, plan);
            #[unroll]
            for i in 0..comptime!(plan.batch) {
                let mut z = bias;
                #[unroll]
                for j in 0..comptime!(plan.taps) {
                    z += taps[j] * window[comptime!(i + j)];
                }
                if comptime!(plan.silu) {
                    z *= sigmoid::<N>(z, plan.approximate);
                }
                if token + i < span.last {
                    y[start + comptime!(i * plan.width)] = Vector::cast_from(z);
                }
            }
            shift::<N>(&mut window, plan);
            token += comptime!(plan.batch);
        }
        if ends(&span) {
            #[unroll]
            for i in 0..comptime!(plan.taps) {
                let mut value = Vector::<E, N>::new(E::from_int(0));
                if span.end + i >= span.start + comptime!(plan.taps) {
                    let token = span.end + i - comptime!(plan.taps);
                    value = x[token * comptime!(plan.width) + column];
                }
                cache[(span.sequence * comptime!(plan.taps) + i) * comptime!(plan.width) + column] = value;
            }
        }
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

/// Unit `p · width + column` walks the runs `p, p + partials, …` and writes its part of row `p` of `partial`:
/// `D · W` gradients of the weight, then, with a bias, its `D`.
#[cube(launch, address_type = "dynamic")]
pub(super) fn backward_kernel<E: Float, N: Size, W: Size>(
    x: &Tensor<Vector<E, N>>,
    weight: &Tensor<Vector<f32, W>>,
    bias: &Tensor<f32>,
    table: &Tensor<i32>,
    dy: &Tensor<Vector<E, N>>,
    dx: &mut Tensor<Vector<E, N>>,
    partial: &mut Tensor<f32>,
    runs: u32,
    tokens: u32,
    partials: u32,
    #[comptime] plan: ConvPlan,
    #[comptime] weight_grad: bool,
    #[define(E)] _element: ElemType,
) {
    let zero = Vector::<f32, N>::new(0.0f32);
    let one = Vector::<f32, N>::new(1.0f32);
    let before = comptime!(plan.taps - 1);
    let column = ABSOLUTE_POS % comptime!(plan.width);
    let row = ABSOLUTE_POS / comptime!(plan.width);
    let taps = load_taps::<N, W>(weight, column, plan);
    let bias = load_bias::<N>(bias, column, plan);
    let mut dw = Array::<Vector<f32, N>>::new(comptime!(plan.taps));
    let mut db = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for j in 0..comptime!(plan.taps) {
        dw[j] = zero;
    }
    let mut run = row;
    if row >= partials as usize {
        run = runs as usize;
    }
    while run < runs as usize {
        let span = span(run, table, tokens, plan);
        let mut window = load_window::<E, N>(x, &span, column, plan);
        let mut dzs = Array::<Vector<f32, N>>::new(comptime!(before + plan.batch));
        #[unroll]
        for j in 0..before {
            dzs[j] = zero;
        }
        let mut x_batch = Array::<Vector<E, N>>::new(comptime!(plan.batch));
        let mut dy_batch = Array::<Vector<E, N>>::new(comptime!(plan.batch));
        let mut token = span.first;
        while token < span.last + before {
            fill::<E, N>(&mut x_batch, x, token, span.end, column, plan);
            fill::<E, N>(&mut dy_batch, dy, token, span.end, column, plan);
            let start = token * comptime!(plan.width) + column;
            #[unroll]
            for i in 0..comptime!(plan.batch) {
                window[comptime!(before + i)] = Vector::cast_from(x_batch[i]);
                dzs[comptime!(before + i)] = Vector::cast_from(dy_batch[i]);
            }
            // What was repeated past the end has no gradient; the inputs there are then multiplied with zero.
            if token + comptime!(plan.batch) > span.end {
                #[unroll]
                for i in 0..comptime!(plan.batch) {
                    if token + i >= span.end {
                        dzs[comptime!(before + i)] = zero;
                    }
                }
            }
            #[unroll]
            for i in 0..comptime!(plan.batch) {
                let here = token + i;
                let mut dz = dzs[comptime!(before + i)];
                if comptime!(plan.silu) {
                    let mut z = bias;
                    #[unroll]
                    for j in 0..comptime!(plan.taps) {
                        z += taps[j] * window[comptime!(i + j)];
                    }
                    let s = sigmoid::<N>(z, plan.approximate);
                    dz *= s * (one + z * (one - s));
                }
                dzs[comptime!(before + i)] = dz;
                if comptime!(weight_grad) {
                    // The tokens past the run are another's.
                    if here < span.last {
                        #[unroll]
                        for j in 0..comptime!(plan.taps) {
                            dw[j] += dz * window[comptime!(i + j)];
                        }
                        db += dz;
                    }
                }
                let mut grad = zero;
                #[unroll]
                for j in 0..comptime!(plan.taps) {
                    grad += taps[j] * dzs[comptime!(before + i - j)];
                }
                if here >= span.first + before && here < span.last + before {
                    let target = if comptime!(i >= before) {
                        start + comptime!((i - before) * plan.width)
                    } else {
                        start - comptime!((before - i) * plan.width)
                    };
                    dx[target] = Vector::cast_from(grad);
                }
            }
            shift::<N>(&mut window, plan);
            shift::<N>(&mut dzs, plan);
            token += comptime!(plan.batch);
        }
        run += partials as usize;
    }
    if comptime!(weight_grad) {
        if row < partials as usize {
            let dim = comptime!(plan.width * plan.vector);
            let columns = comptime!(if plan.bias { plan.taps + 1 } else { plan.taps });
            let base = row * comptime!(dim * columns);
            #[unroll]
            for i in 0..comptime!(plan.vector) {
                let channel = column * comptime!(plan.vector) + i;
                #[unroll]
                for j in 0..comptime!(plan.taps) {
                    partial[base + channel * comptime!(plan.taps) + j] = dw[j].extract(i);
                }
                if comptime!(plan.bias) {
                    partial[base + comptime!(dim * plan.taps) + channel] = db.extract(i);
                }
            }
        }
    }
}

/// Adds the gradient of the cache to that of the inputs which it holds.
#[cube(launch, address_type = "dynamic")]
pub(super) fn add_cache_gradient<E: Float, N: Size>(
    dcache: &Tensor<Vector<E, N>>,
    table: &Tensor<i32>,
    dx: &mut Tensor<Vector<E, N>>,
    runs: u32,
    tokens: u32,
    #[comptime] plan: ConvPlan,
    #[define(E)] _element: ElemType,
) {
    let mut at = ABSOLUTE_POS;
    while at < runs as usize * comptime!(plan.width) {
        let column = at % comptime!(plan.width);
        let span = span(at / comptime!(plan.width), table, tokens, plan);
        if ends(&span) {
            #[unroll]
            for i in 0..comptime!(plan.taps) {
                if span.end + i >= span.start + comptime!(plan.taps) {
                    let place = (span.end + i - comptime!(plan.taps)) * comptime!(plan.width) + column;
                    let slot = (span.sequence * comptime!(plan.taps) + i) * comptime!(plan.width) + column;
                    let value = Vector::<f32, N>::cast_from(dx[place]) + Vector::<f32, N>::cast_from(dcache[slot]);
                    dx[place] = Vector::cast_from(value);
                }
            }
        }
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}
