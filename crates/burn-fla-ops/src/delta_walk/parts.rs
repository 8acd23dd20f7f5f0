//! What the walks share: where a cube stands, the state in registers, and the loads into shared memory.

use cubecl::prelude::*;

use super::plan::{Form, Gate, WalkPlan};

/// Four channels from `channel` on of the row that starts at `base`, zeros behind the last one.
#[cube]
pub(super) fn four<E: Float>(
    from: &[E],
    base: usize,
    channel: usize,
    #[comptime] inner: usize,
) -> Vector<f32, Const<4>> {
    let mut out = Vector::<f32, Const<4>>::new(0.0f32);
    #[unroll]
    for j in 0..4usize {
        // Read in any case, within the row, and chosen then: a branch a number is slow to compile and to run.
        let x = f32::cast_from(from[base + min(channel + j, comptime!(inner - 1))]);
        out.insert(j, select(channel + j < inner, x, f32::new(0.0)));
    }
    out
}

/// The sum over the lanes that share a row, the same bits on each.
#[cube]
pub(super) fn lane_sum(value: f32, #[comptime] lanes: usize) -> f32 {
    let mut total = value;
    #[unroll]
    for bit in 0..comptime!(lanes.ilog2()) {
        total += plane_shuffle_xor(total, comptime!(1u32 << bit));
    }
    total
}

/// Where a unit stands.
#[derive(CubeType)]
pub(super) struct Place {
    pub(super) head: usize,
    /// The sequence or the chunk that the cube walks.
    pub(super) which: usize,
    /// First row of the cube.
    pub(super) tile: usize,
    pub(super) lane: usize,
    /// First row of the unit, from that of the cube.
    pub(super) own: usize,
}

#[cube]
pub(super) fn place(heads: usize, #[comptime] plan: WalkPlan) -> Place {
    let unit = UNIT_POS as usize;
    let tiles = comptime!(plan.tiles());
    let rest = CUBE_POS / tiles;
    Place {
        head: rest % heads,
        which: rest / heads,
        tile: (CUBE_POS % tiles) * comptime!(plan.tile()),
        lane: unit % comptime!(plan.lanes),
        own: unit / comptime!(plan.lanes) * comptime!(plan.width),
    }
}

/// Where element (row, inner channel) of the state in `slot` stands.
#[cube]
fn state_at(slot: usize, head: usize, heads: usize, row: usize, channel: usize, #[comptime] plan: WalkPlan) -> usize {
    let base = (slot * heads + head) * comptime!(plan.keys * plan.values);
    if comptime!(plan.rows_are_values) {
        base + channel * comptime!(plan.values) + row
    } else {
        base + row * comptime!(plan.values) + channel
    }
}

#[cube]
pub(super) fn load_state(
    states: &[f32],
    x: &mut Array<Vector<f32, Const<4>>>,
    slot: usize,
    p: &Place,
    heads: usize,
    #[comptime] plan: WalkPlan,
) {
    #[unroll]
    for c in 0..comptime!(plan.width) {
        let row = p.tile + p.own + c;
        #[unroll(plan.unrolled())]
        for i in 0..comptime!(plan.vectors) {
            let mut vector = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for j in 0..4usize {
                let channel = (i * comptime!(plan.lanes) + p.lane) * 4 + j;
                let inside = row < comptime!(plan.rows()) && channel < comptime!(plan.inner());
                let row = min(row, comptime!(plan.rows() - 1));
                let channel = min(channel, comptime!(plan.inner() - 1));
                let value = states[state_at(slot, p.head, heads, row, channel, plan)];
                vector.insert(j, select(inside, value, f32::new(0.0)));
            }
            x[c * comptime!(plan.vectors) + i] = vector;
        }
    }
}

#[cube]
pub(super) fn store_state(
    x: &Array<Vector<f32, Const<4>>>,
    states: &mut [f32],
    slot: usize,
    p: &Place,
    heads: usize,
    #[comptime] plan: WalkPlan,
) {
    #[unroll]
    for c in 0..comptime!(plan.width) {
        let row = p.tile + p.own + c;
        #[unroll(plan.unrolled())]
        for i in 0..comptime!(plan.vectors) {
            let vector = x[c * comptime!(plan.vectors) + i];
            let first = (i * comptime!(plan.lanes) + p.lane) * 4;
            if row < comptime!(plan.rows()) && first < comptime!(plan.inner()) {
                #[unroll]
                for j in 0..4usize {
                    if comptime!(plan.inner().is_multiple_of(4)) || first + j < comptime!(plan.inner()) {
                        states[state_at(slot, p.head, heads, row, first + j, plan)] = vector.extract(j);
                    }
                }
            }
        }
    }
}

/// The inner vectors of `count` tokens from `token` on, times `factor`.
#[cube]
pub(super) fn load<E: Float>(
    from: &[E],
    to: &mut Shared<[Vector<f32, Const<4>>]>,
    first: usize,
    row: usize,
    rows: usize,
    count: usize,
    factor: f32,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units)) {
        let base = ((first + i / stride) * rows + row) * comptime!(plan.inner());
        to[i] = four::<E>(from, base, (i % stride) * 4, comptime!(plan.inner())) * Vector::new(factor);
    }
}

/// The products of the inner vectors of two buffers.
#[cube]
pub(super) fn load_products<E: Float, B: Float>(
    from: &[E],
    with: &[B],
    to: &mut Shared<[Vector<f32, Const<4>>]>,
    first: usize,
    row: usize,
    rows: usize,
    count: usize,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units)) {
        let base = ((first + i / stride) * rows + row) * comptime!(plan.inner());
        let channel = (i % stride) * 4;
        to[i] = four::<E>(from, base, channel, comptime!(plan.inner()))
            * four::<B>(with, base, channel, comptime!(plan.inner()));
    }
}

/// The decays of the inner channels, already exponentiated: 1 behind the last channel.
#[cube]
pub(super) fn load_decays(
    g: &[f32],
    to: &mut Shared<[Vector<f32, Const<4>>]>,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units)) {
        let base = ((first + i / stride) * heads + head) * comptime!(plan.inner());
        to[i] = four::<f32>(g, base, (i % stride) * 4, comptime!(plan.inner())).exp();
    }
}

/// One number a token and row of the cube, from a buffer `[tokens, heads, rows]`.
#[cube]
pub(super) fn load_rows<E: Float>(
    from: &[E],
    to: &mut Shared<[f32]>,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    p: &Place,
    #[comptime] plan: WalkPlan,
) {
    let tile = comptime!(plan.tile());
    for i in range_stepped(UNIT_POS as usize, count * tile, comptime!(plan.units)) {
        let row = p.tile + i % tile;
        let at = ((first + i / tile) * heads + head) * comptime!(plan.rows()) + row;
        to[i] = if row < comptime!(plan.rows()) { f32::cast_from(from[at]) } else { f32::new(0.0) };
    }
}

/// The products of one number a token and row of two buffers.
#[cube]
pub(super) fn load_row_products<E: Float, B: Float>(
    from: &[E],
    with: &[B],
    to: &mut Shared<[f32]>,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    p: &Place,
    #[comptime] plan: WalkPlan,
) {
    let tile = comptime!(plan.tile());
    for i in range_stepped(UNIT_POS as usize, count * tile, comptime!(plan.units)) {
        let row = p.tile + i % tile;
        let at = ((first + i / tile) * heads + head) * comptime!(plan.rows()) + row;
        to[i] = if row < comptime!(plan.rows()) {
            f32::cast_from(from[at]) * f32::cast_from(with[at])
        } else {
            f32::new(0.0)
        };
    }
}

/// The decays of the rows of a cube, already exponentiated.
#[cube]
pub(super) fn load_row_decays(
    g: &[f32],
    to: &mut Shared<[f32]>,
    first: usize,
    head: usize,
    heads: usize,
    count: usize,
    p: &Place,
    #[comptime] plan: WalkPlan,
) {
    let tile = comptime!(plan.tile());
    for i in range_stepped(UNIT_POS as usize, count * tile, comptime!(plan.units)) {
        let row = p.tile + i % tile;
        let at = ((first + i / tile) * heads + head) * comptime!(plan.rows()) + row;
        to[i] = if row < comptime!(plan.rows()) { f32::exp(g[at]) } else { f32::new(1.0) };
    }
}

/// `exp` of the decay of a token, 1 where there is none.
#[cube]
pub(super) fn token_decay(g: &[f32], token: usize, head: usize, heads: usize, #[comptime] gate: Gate) -> f32 {
    if comptime!(gate == Gate::Token) { f32::exp(g[token * heads + head]) } else { f32::new(1.0) }
}

/// The writing strength of a token, 1 where the form has none.
#[cube]
pub(super) fn strength<B: Float>(b: &[B], token: usize, head: usize, heads: usize, #[comptime] form: Form) -> f32 {
    if comptime!(form.one_added()) { f32::cast_from(b[token * heads + head]) } else { f32::new(1.0) }
}
