//! The products of [`super::gradients`].

use cubecl::prelude::*;

use super::gradients::TOKENS_OF_WARP;
use super::parts::{mask, staged};
use super::plan::{CHUNK, GradientPlan, KeyPlan, PANEL, READ, TEAM, TOKENS};
use super::products::{product, product_of};
use super::tokens::{BATCH, Part, Two, added, load_words, logs_at, logs_read, reader, writer};
use crate::hopper_delta::parts::pack_all;
use crate::hopper_walk::Cores;
use crate::hopper_walk::parts::publish;
use crate::tile::hopper::{
    Acc, bf16_high, bf16_low, column_of, load_f32_pair, load_u32, pack_word, read, store_f32_pair, store_u32, swizzled,
    sync_warpgroup, write,
};

/// Half of the columns of dP.
pub(crate) const OUTER: Acc = Acc::new("p", 32);
/// Products between tokens.
pub(crate) const ACC: Acc = Acc::new("c", 64);

/// Where a team's tiles are: queries, keys, readers and writers with their decays; Ã, B̂; N, A_qb, H; values, the outputs'
/// gradients, and both states, whose places take later
///
/// | place | holds |
/// |---|---|
/// | values | dP |
/// | outputs' gradients | dH, then dA_ak |
/// | state | dQ′, then dÃ |
/// | its gradient | dK′, then dA_ab |
/// | A_qb | dA_qb |
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) q: u32,
    pub(crate) k: u32,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) first: u32,
    pub(crate) second: u32,
    pub(crate) n: u32,
    pub(crate) qb: u32,
    pub(crate) h: u32,
    pub(crate) v: u32,
    pub(crate) o: u32,
    pub(crate) s: u32,
    pub(crate) z: u32,
    /// Room for running sums of decays, and for what units take over from accumulators at last.
    pub(crate) logs: u32,
    pub(crate) stage: u32,
    /// Room for what units do not hold, where the plan has it: running sums of decays, and inter.
    pub(crate) parked: u32,
    pub(crate) inter: u32,
}

/// Writes the tiles of a panel of the tokens' vectors, with their decays from the chunk's middle, or where not all decays are
/// `fast`, without any.
#[cube]
pub(crate) fn store_tokens(
    t: &Room,
    part: &Part,
    q: &[u32],
    k: &[u32],
    a: &[u32],
    b: &[u32],
    logs: &Array<f32>,
    befores: &Array<f32>,
    strength: &Array<f32>,
    fast: bool,
    out_scale: f32,
    #[comptime] panel: usize,
    #[comptime] key: KeyPlan,
) {
    let mut qs = Array::<u32>::new(BATCH);
    let mut ks = Array::<u32>::new(BATCH);
    let mut readers = Array::<u32>::new(BATCH);
    let mut writers = Array::<u32>::new(BATCH);
    load_words(part, q, &mut qs, 0usize, panel, key);
    load_words(part, k, &mut ks, 0usize, panel, key);
    load_words(part, a, &mut readers, 0usize, panel, key);
    load_words(part, b, &mut writers, 0usize, panel, key);
    #[unroll]
    for i in 0..TOKENS_OF_WARP {
        let token = comptime!(i as u32);
        let keep = part.inside(token, panel, key);
        let log = logs_at(logs, i, panel, TOKENS_OF_WARP).kept(fast);
        let before = logs_read(logs, befores, i, panel, TOKENS_OF_WARP, key).kept(fast);
        let left = log.negated().power();
        let to = swizzled(comptime!((panel * PANEL) as u32), part.first + token, part.pair * 4u32);
        let queries = Two::of(qs[i]).scaled(out_scale).times(&log.power()).kept(keep);
        let keys = added(ks[i], strength[i], key).times(&left).kept(keep);
        let reads = reader(readers[i], key).times(&before.power()).kept(keep);
        let writes = writer(readers[i], writers[i], strength[i], key).times(&left).kept(keep);
        store_u32(t.q + to, pack_word(queries.low, queries.high));
        store_u32(t.k + to, pack_word(keys.low, keys.high));
        store_u32(t.a + to, pack_word(reads.low, reads.high));
        store_u32(t.b + to, pack_word(writes.low, writes.high));
    }
}

/// Over a slice of values: what the warpgroup's operands are multiplied with in the states, and half of dP.
#[cube]
pub(crate) fn outer_products(t: &Room, slice: u32, reads: bool, warp: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let steps = comptime!(4 * plan.key.panels());
    let (x, held, other, tokens) =
        (select(reads, t.second, t.first), select(reads, t.z, t.s), select(reads, t.s, t.z), select(reads, t.o, t.v));
    let half = t.v + select(reads, 0u32, comptime!(PANEL as u32 / 2));
    let grads = t.o + 0u32;
    #[unroll]
    for n in 0..steps {
        product(READ, x, held, n, comptime!(n as u32), false, false, warp, lane, Cores::Mma);
    }
    #[unroll]
    for n in 0..4usize {
        let keep = slice + comptime!(n as u32);
        product(outer, tokens, other, n, keep, false, true, warp, lane, Cores::Mma);
        product(OUTER, grads, half, n, keep, false, false, warp, lane, Cores::Mma);
    }
    pack_all(TOKENS, READ);
    #[unroll]
    for n in 0..4usize {
        product_of(inner, TOKENS, other, n, slice + comptime!(n as u32), true, lane, Cores::Mma);
    }
}

/// A unit's share of the products of both states, over the value channels of a slice.
#[cube]
pub(crate) fn end_products(t: &Room, part: &Part, ends: &mut Array<f32>, #[comptime] plan: GradientPlan) {
    #[unroll]
    for panel in 0..comptime!(plan.key.panels()) {
        #[unroll]
        for i in 0..8usize {
            let at = swizzled(comptime!((panel * PANEL) as u32), part.first + comptime!(i as u32), part.pair * 4u32);
            let state = Two::of(load_u32(t.s + at));
            let gradient = Two::of(load_u32(t.z + at));
            ends[comptime!(2 * panel)] += state.low * gradient.low;
            ends[comptime!(2 * panel + 1)] += state.high * gradient.high;
        }
    }
}

/// Rows of tokens that the chunk does not have become zero.
#[cube]
pub(crate) fn keep_rows(#[comptime] acc: Acc, row: u32, length: u32) {
    if length < comptime!(CHUNK as u32) {
        #[unroll]
        for n in 0..comptime!(acc.len()) {
            let line = row + comptime!((n / 2 % 2 * 8) as u32);
            write(acc, n, select(line < length, read(acc, n), 0.0f32));
        }
    }
}

/// Writes a warpgroup's half of dP, masked.
#[cube]
pub(crate) fn publish_outer(tile: u32, reads: bool, row: u32, lane: u32, length: u32) {
    let first = select(reads, 0u32, 32u32);
    let base = swizzled(tile, row, (lane % 4u32) * 4u32) ^ (first * 2u32);
    #[unroll]
    for j in 0..4usize {
        #[unroll]
        for half in 0..2usize {
            let i = comptime!(4 * j + 2 * half);
            let line = row + comptime!(8 * half as u32);
            let column = first + column_of(lane, i);
            let low = select(column <= line && line < length, read(OUTER, i), 0.0f32);
            let high = select(column < line && line < length, read(OUTER, comptime!(i + 1)), 0.0f32);
            let to = (base ^ comptime!((j * 16) as u32)) + comptime!((half * 1024) as u32);
            store_u32(to, pack_word(low, high));
        }
    }
}

/// dA_qb and dÃ; dH and dB̂. Both in registers.
#[cube]
pub(crate) fn answers(t: &Room, reads: bool, warp: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let inner = comptime!(plan.inner());
    let x = select(reads, t.s, t.second);
    let y = select(reads, t.first, t.z);
    let (dp, qb, h, s, z) = (t.v, t.qb, t.h, t.s, t.z);
    #[unroll]
    for n in 0..comptime!(4 * plan.key.panels()) {
        product(ACC, x, y, n, comptime!(n as u32), false, false, warp, lane, Cores::Mma);
    }
    if reads {
        #[unroll]
        for n in 0..4usize {
            product(ACC, dp, h, n, 1u32, false, false, warp, lane, Cores::Mma);
            product(inner, qb, s, n, 1u32, true, true, warp, lane, Cores::Mma);
        }
    } else {
        #[unroll]
        for n in 0..4usize {
            product(ACC, qb, dp, n, 1u32, true, true, warp, lane, Cores::Mma);
            product(inner, h, z, n, 1u32, false, true, warp, lane, Cores::Mma);
        }
    }
}

/// Hands dA_qb, dÃ and dH on; dã, in registers, and dA_ak.
#[cube]
pub(crate) fn solve(t: &Room, reads: bool, row: u32, warp: u32, lane: u32, id: u32, #[comptime] plan: GradientPlan) {
    let inner = comptime!(plan.inner());
    if reads {
        mask(ACC, row, lane, false);
        publish(t.qb, ACC, row, lane);
        publish(t.s, inner, row, lane);
    } else {
        publish(t.o, ACC, row, lane);
    }
    // The warpgroup itself: what it wrote it alone reads now.
    let own = 2u32 * id + 1u32 + select(reads, 0u32, 1u32);
    sync_warpgroup(own, 128u32);
    let (n0, x, y) = (t.n, t.s, t.o);
    if reads {
        #[unroll]
        for n in 0..4usize {
            product(inner, n0, x, n, comptime!(n as u32), true, true, warp, lane, Cores::Mma);
        }
    } else {
        #[unroll]
        for n in 0..4usize {
            product(ACC, n0, y, n, comptime!(n as u32), true, true, warp, lane, Cores::Mma);
        }
        mask(ACC, row, lane, true);
        sync_warpgroup(own, 128u32);
        publish(t.o, ACC, row, lane);
    }
}

/// dA_ab.
#[cube]
pub(crate) fn solve_again(t: &Room, row: u32, warp: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let operand = comptime!(plan.operand());
    let (first, dak, h) = (t.first, t.o, t.h);
    pack_all(operand, comptime!(plan.inner()));
    #[unroll]
    for n in 0..comptime!(4 * plan.key.panels()) {
        product_of(ACC, operand, first, n, comptime!(n as u32), false, lane, Cores::Mma);
    }
    #[unroll]
    for n in 0..4usize {
        product(ACC, dak, h, n, 1u32, false, false, warp, lane, Cores::Mma);
    }
    mask(ACC, row, lane, true);
    publish(t.z, ACC, row, lane);
}

/// Leaves a unit's running sums in shared memory.
#[cube]
pub(crate) fn park(room: u32, logs: &Array<f32>, unit: u32, #[comptime] panels: usize) {
    let to = room + unit * 8u32;
    #[unroll]
    for n in 0..comptime!(TOKENS_OF_WARP * panels) {
        store_f32_pair(to + comptime!((n * TEAM * 8) as u32), logs[comptime!(2 * n)], logs[comptime!(2 * n + 1)]);
    }
}

/// Takes them up again.
#[cube]
pub(crate) fn take_back(room: u32, logs: &mut Array<f32>, unit: u32, #[comptime] panels: usize) {
    let from = room + unit * 8u32;
    #[unroll]
    for n in 0..comptime!(TOKENS_OF_WARP * panels) {
        let found = load_f32_pair(from + comptime!((n * TEAM * 8) as u32));
        logs[comptime!(2 * n)] = found.extract(0usize);
        logs[comptime!(2 * n + 1)] = found.extract(1usize);
    }
}

/// The products of keys and writers with what the state after the chunk gives to their gradients.
#[cube]
pub(crate) fn inter_products(t: &Room, row: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let inter = comptime!(plan.inter());
    let base = swizzled(0u32, row, (lane % 4u32) * 4u32);
    let room = staged(t.inter, row, lane % 4u32);
    #[unroll]
    for j in 0..comptime!(inter.columns() / 8) {
        #[unroll]
        for half in 0..2usize {
            let at = (base ^ comptime!((j % 8 * 16) as u32)) + comptime!((j / 8 * PANEL + half * 1024) as u32);
            let i = comptime!(4 * j + 2 * half);
            let next = comptime!(4 * j + 2 * half + 1);
            let key = load_u32(t.k + at);
            let writer = load_u32(t.b + at);
            let low = bf16_low(key) * read(outer, i) + bf16_low(writer) * read(inner, i);
            let high = bf16_high(key) * read(outer, next) + bf16_high(writer) * read(inner, next);
            if comptime!(plan.parks) {
                let to = (room ^ comptime!((j % 8 * 32) as u32)) + comptime!((j / 8 * 2 * PANEL + half * 2048) as u32);
                store_f32_pair(to, low, high);
            } else {
                write(inter, i, low);
                write(inter, next, high);
            }
        }
    }
}

/// What tokens of the chunk give to each other's gradients.
#[cube]
pub(crate) fn add_pairs(t: &Room, reads: bool, warp: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let (dqb, dp, dak, dab) = (t.qb, t.v, t.o, t.z);
    let (q, k, a, b) = (t.q, t.k, t.a, t.b);
    if reads {
        #[unroll]
        for n in 0..4usize {
            product(outer, dqb, b, n, 1u32, false, true, warp, lane, Cores::Mma);
            product(outer, dp, k, n, 1u32, false, true, warp, lane, Cores::Mma);
            product(inner, dab, b, n, 1u32, false, true, warp, lane, Cores::Mma);
            product(inner, dak, k, n, 1u32, false, true, warp, lane, Cores::Mma);
        }
    } else {
        #[unroll]
        for n in 0..4usize {
            product(outer, dp, q, n, 1u32, true, true, warp, lane, Cores::Mma);
            product(outer, dak, a, n, 1u32, true, true, warp, lane, Cores::Mma);
            product(inner, dqb, q, n, 1u32, true, true, warp, lane, Cores::Mma);
            product(inner, dab, a, n, 1u32, true, true, warp, lane, Cores::Mma);
        }
    }
}
