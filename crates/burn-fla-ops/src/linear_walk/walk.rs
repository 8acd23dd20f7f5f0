//! The two walks over a chunk: from zero to the chunk's own contribution, and from its state to its outputs.
//!
//! A unit owns `per_unit` channels of one row of `X` and keeps them in registers. The inner vectors of a block of tokens
//! lie in shared memory, because every row needs them; row values come straight from the buffers.

use cubecl::prelude::*;

use super::plan::{DecayAxis, WalkPlan};
use super::table::CHUNK_WORDS;

/// Where a unit stands.
#[derive(CubeType)]
struct Place {
    head: usize,
    sequence: usize,
    /// The chunk in the table.
    chunk: usize,
    start: usize,
    len: usize,
    row: usize,
    row_in_tile: usize,
    part: usize,
}

#[cube]
fn place(table: &[i32], heads: usize, #[comptime] plan: WalkPlan) -> Place {
    let unit = UNIT_POS as usize;
    let row_tiles = comptime!(plan.row_tiles());
    let tile = comptime!(plan.tile);
    let rest = CUBE_POS / row_tiles;
    let chunk = rest / heads;
    let at = chunk * comptime!(CHUNK_WORDS);
    let row_in_tile = unit % tile;
    Place {
        head: rest % heads,
        sequence: table[at] as usize,
        chunk,
        start: table[at + 1] as usize,
        len: table[at + 2] as usize,
        row: (CUBE_POS % row_tiles) * tile + row_in_tile,
        row_in_tile,
        part: unit / tile,
    }
}

/// Copies the inner vectors of `count` tokens of `chunk`, from `token` on, into shared memory, filled up with zeros to
/// the stride; with `plan.delayed` those of the tokens walked just before them, which the chunk's first has not.
#[cube]
fn load_added<E: Float>(
    from: &[E],
    to: &mut [f32],
    token: usize,
    count: usize,
    chunk: &Place,
    heads: usize,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    let inner = comptime!(plan.inner);
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units())) {
        let channel = i % stride;
        let added = before(token + i / stride, chunk, plan);
        let at = (added * heads + chunk.head) * inner + channel;
        to[i] = if channel < inner { f32::cast_from(from[at]) } else { f32::new(0.0) };
    }
}

/// The token that is added where `token` is read; the chunk's first one, which adds nothing, where it is that one.
#[cube]
fn before(token: usize, chunk: &Place, #[comptime] plan: WalkPlan) -> usize {
    let mut added = token;
    if comptime!(plan.delayed && plan.against_time) {
        added = min(token + 1, chunk.start + chunk.len - 1);
    } else if comptime!(plan.delayed) {
        added = max(token, chunk.start + 1) - 1;
    }
    added
}

/// Copies the inner vectors of `count` tokens from `token` on into shared memory, filled up with zeros to the stride.
#[cube]
fn load<E: Float>(
    from: &[E],
    to: &mut [f32],
    token: usize,
    count: usize,
    head: usize,
    heads: usize,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    let inner = comptime!(plan.inner);
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units())) {
        let channel = i % stride;
        let at = ((token + i / stride) * heads + head) * inner + channel;
        to[i] = if channel < inner { f32::cast_from(from[at]) } else { f32::new(0.0) };
    }
}

/// The decay of inner channels of the same tokens, already exponentiated (1 where the stride is filled up).
#[cube]
fn load_decay(
    g: &[f32],
    to: &mut [f32],
    token: usize,
    count: usize,
    head: usize,
    heads: usize,
    #[comptime] plan: WalkPlan,
) {
    let stride = comptime!(plan.stride());
    let inner = comptime!(plan.inner);
    for i in range_stepped(UNIT_POS as usize, count * stride, comptime!(plan.units())) {
        let channel = i % stride;
        let at = ((token + i / stride) * heads + head) * inner + channel;
        to[i] = if channel < inner { f32::exp(g[at]) } else { f32::new(1.0) };
    }
}

/// The decay of this row at this token, where it does not depend on the inner channel.
#[cube]
fn row_decay(g: &[f32], token: usize, head: usize, row: usize, heads: usize, #[comptime] plan: WalkPlan) -> f32 {
    if comptime!(plan.axis == DecayAxis::Head) {
        f32::exp(g[head])
    } else if comptime!(plan.axis == DecayAxis::Token) {
        f32::exp(g[token * heads + head])
    } else if comptime!(plan.axis == DecayAxis::Row) {
        f32::exp(g[(token * heads + head) * comptime!(plan.rows) + row])
    } else {
        f32::new(1.0)
    }
}

/// Where element (row, channel) of the state in `slot` stands.
#[cube]
fn state_at(slot: usize, head: usize, heads: usize, row: usize, channel: usize, #[comptime] plan: WalkPlan) -> usize {
    let base = (slot * heads + head) * comptime!(plan.rows * plan.inner);
    if comptime!(plan.rows_are_values) {
        base + channel * comptime!(plan.rows) + row
    } else {
        base + row * comptime!(plan.inner) + channel
    }
}

/// Each chunk's own contribution to the state: `X ← decay ∘ X + in_scale a_t b_tᵀ` from zero.
///
/// `states` has one slot more a sequence than it has chunks. With time the contribution goes to the slot after the
/// chunk, against time to the one before it.
#[cube(launch, address_type = "dynamic")]
pub(super) fn local_state<E: Float>(
    a: &[E],
    b: &[E],
    g: &[f32],
    table: &[i32],
    states: &mut [f32],
    heads: usize,
    cubes: usize,
    in_scale: f32,
    #[comptime] plan: WalkPlan,
    #[define(E)] _dtype: ElemType,
) {
    if CUBE_POS >= cubes {
        terminate!();
    }
    let stride = comptime!(plan.stride());
    let per_unit = comptime!(plan.per_unit);
    let block = comptime!(plan.block);
    let p = place(table, heads, plan);
    let active = p.row < comptime!(plan.rows);

    let mut shared_b = Shared::<[f32]>::new_slice(comptime!(plan.block * plan.stride()));
    let mut shared_g = Shared::<[f32]>::new_slice(comptime!(if plan.axis == DecayAxis::Inner {
        plan.block * plan.stride()
    } else {
        1
    }));
    let mut x = Array::<f32>::new(per_unit);
    #[unroll]
    for i in 0..per_unit {
        x[i] = f32::new(0.0);
    }

    let blocks = p.len.div_ceil(block);
    for n in 0..blocks {
        let first = if comptime!(plan.against_time) { (blocks - 1 - n) * block } else { n * block };
        let count = min(block, p.len - first);
        sync_cube();
        load::<E>(b, &mut shared_b, p.start + first, count, p.head, heads, plan);
        if comptime!(plan.axis == DecayAxis::Inner) {
            load_decay(g, &mut shared_g, p.start + first, count, p.head, heads, plan);
        }
        sync_cube();
        if active {
            for j in 0..count {
                let in_block = if comptime!(plan.against_time) { count - 1 - j } else { j };
                let token = p.start + first + in_block;
                let value = f32::cast_from(a[(token * heads + p.head) * comptime!(plan.rows) + p.row]) * in_scale;
                let decay = row_decay(g, token, p.head, p.row, heads, plan);
                let at = in_block * stride + p.part * per_unit;
                #[unroll]
                for i in 0..per_unit {
                    let d = if comptime!(plan.axis == DecayAxis::Inner) { shared_g[at + i] } else { decay };
                    if comptime!(plan.against_time && !plan.exclusive) {
                        x[i] = (x[i] + value * shared_b[at + i]) * d;
                    } else {
                        x[i] = x[i] * d + value * shared_b[at + i];
                    }
                }
            }
        }
    }
    if active {
        let slot = p.chunk + p.sequence + comptime!(if plan.against_time { 0usize } else { 1 });
        #[unroll]
        for i in 0..per_unit {
            let channel = p.part * per_unit + i;
            if channel < comptime!(plan.inner) {
                states[state_at(slot, p.head, heads, p.row, channel, plan)] = x[i];
            }
        }
    }
}

/// Each chunk's outputs `y_t = out_scale · X_t c_t`, walked from the state at its start (against time: at its end).
///
/// With `plan.exclusive` they are read before the token, `y_t = out_scale · (X + in_scale a_t (u ∘ b_t)ᵀ) c_t`, and then
/// with time and against it `X ← decay ∘ X + in_scale a_t b_tᵀ`. `bonus`, u, is that of each key channel, on whichever
/// side it is. With `plan.delayed`, what has not decayed in an output is left out: the bonus, and what the step just
/// before has added.
#[cube(launch, address_type = "dynamic")]
pub(super) fn read_out<E: Float, Y: Float>(
    a: &[E],
    b: &[E],
    c: &[E],
    g: &[f32],
    table: &[i32],
    states: &[f32],
    bonus: &[f32],
    y: &mut [Y],
    heads: usize,
    cubes: usize,
    in_scale: f32,
    out_scale: f32,
    #[comptime] plan: WalkPlan,
    #[define(E, Y)] _dtypes: [ElemType; 2],
) {
    if CUBE_POS >= cubes {
        terminate!();
    }
    let stride = comptime!(plan.stride());
    let per_unit = comptime!(plan.per_unit);
    let block = comptime!(plan.block);
    let tile = comptime!(plan.tile);
    let parts = comptime!(plan.parts);
    let p = place(table, heads, plan);
    let active = p.row < comptime!(plan.rows);

    let mut shared_b = Shared::<[f32]>::new_slice(comptime!(plan.block * plan.stride()));
    let mut shared_c = Shared::<[f32]>::new_slice(comptime!(plan.block * plan.stride()));
    let mut shared_g = Shared::<[f32]>::new_slice(comptime!(if plan.axis == DecayAxis::Inner {
        plan.block * plan.stride()
    } else {
        1
    }));
    let mut shared_y =
        Shared::<[f32]>::new_slice(comptime!(if plan.parts > 1 { plan.block * plan.parts * plan.tile } else { 1 }));

    let mut own = Array::<f32>::new(comptime!(if plan.exclusive { plan.per_unit } else { 1 }));
    if comptime!(plan.exclusive) {
        let keys = comptime!(if plan.rows_are_values { plan.inner } else { plan.rows });
        #[unroll]
        for i in 0..per_unit {
            let mut channel = p.row;
            if comptime!(plan.rows_are_values) {
                channel = p.part * per_unit + i;
            }
            own[i] = if channel < keys { bonus[p.head * keys + channel] } else { f32::new(0.0) };
        }
    }
    let mut x = Array::<f32>::new(per_unit);
    let slot = p.chunk + p.sequence + comptime!(if plan.against_time { 1usize } else { 0 });
    #[unroll]
    for i in 0..per_unit {
        let channel = p.part * per_unit + i;
        x[i] = if active && channel < comptime!(plan.inner) {
            states[state_at(slot, p.head, heads, p.row, channel, plan)]
        } else {
            f32::new(0.0)
        };
    }

    let blocks = p.len.div_ceil(block);
    for n in 0..blocks {
        let first = if comptime!(plan.against_time) { (blocks - 1 - n) * block } else { n * block };
        let count = min(block, p.len - first);
        sync_cube();
        load_added::<E>(b, &mut shared_b, p.start + first, count, &p, heads, plan);
        load::<E>(c, &mut shared_c, p.start + first, count, p.head, heads, plan);
        if comptime!(plan.axis == DecayAxis::Inner) {
            load_decay(g, &mut shared_g, p.start + first, count, p.head, heads, plan);
        }
        sync_cube();
        if active {
            for j in 0..count {
                let in_block = if comptime!(plan.against_time) { count - 1 - j } else { j };
                let token = p.start + first + in_block;
                let out = (token * heads + p.head) * comptime!(plan.rows) + p.row;
                let added = before(token, &p, plan);
                let mut value = f32::cast_from(a[(added * heads + p.head) * comptime!(plan.rows) + p.row]) * in_scale;
                if comptime!(plan.delayed) {
                    if added == token {
                        value = f32::new(0.0);
                    }
                }
                let decay = row_decay(g, token, p.head, p.row, heads, plan);
                let at = in_block * stride + p.part * per_unit;
                let mut sum = f32::new(0.0);
                #[unroll]
                for i in 0..per_unit {
                    let d = if comptime!(plan.axis == DecayAxis::Inner) { shared_g[at + i] } else { decay };
                    if comptime!(plan.delayed) {
                        sum += x[i] * shared_c[at + i];
                        x[i] = (x[i] + value * shared_b[at + i]) * d;
                    } else if comptime!(plan.exclusive) {
                        let added = value * shared_b[at + i];
                        sum += (x[i] + own[i] * added) * shared_c[at + i];
                        x[i] = x[i] * d + added;
                    } else if comptime!(plan.against_time) {
                        let next = x[i] + value * shared_b[at + i];
                        sum += next * shared_c[at + i];
                        x[i] = next * d;
                    } else {
                        let next = x[i] * d + value * shared_b[at + i];
                        sum += next * shared_c[at + i];
                        x[i] = next;
                    }
                }
                if comptime!(plan.parts == 1) {
                    y[out] = Y::cast_from(sum * out_scale);
                } else {
                    shared_y[(in_block * parts + p.part) * tile + p.row_in_tile] = sum;
                }
            }
        }
        if comptime!(plan.parts > 1) {
            sync_cube();
            for i in range_stepped(UNIT_POS as usize, count * tile, comptime!(plan.units())) {
                let in_block = i / tile;
                let row = p.row - p.row_in_tile + i % tile;
                if row < comptime!(plan.rows) {
                    let mut sum = f32::new(0.0);
                    for part in 0..parts {
                        sum += shared_y[(in_block * parts + part) * tile + i % tile];
                    }
                    let token = p.start + first + in_block;
                    let out = (token * heads + p.head) * comptime!(plan.rows) + row;
                    y[out] = Y::cast_from(sum * out_scale);
                }
            }
        }
    }
}
