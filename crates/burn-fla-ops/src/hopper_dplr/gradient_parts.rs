//! The products of [`super::gradients`].

use cubecl::prelude::*;

use super::parts::{mask, panel_of};
use super::plan::{CHUNK, GradientPlan, PANEL, READ, TOKENS};
use super::tokens::{Part, Two};
use crate::hopper_delta::parts::pack_all;
use crate::hopper_walk::parts::{load_tile, publish};
use crate::tile::hopper::{
    Acc, bf16_high, bf16_low, column_of, commit, fence, fence_shared, k_major, load_3d, load_u32, mma_registers,
    mma_shared, mn_major, pack_word, read, store_u32, swizzled, sync_warpgroup, wait, write,
};

/// Half of the columns of dP.
pub(super) const OUTER: Acc = Acc::new("p", 32);
/// Products between tokens.
pub(super) const ACC: Acc = Acc::new("c", 64);

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
pub(super) struct Room {
    pub(super) q: u32,
    pub(super) k: u32,
    pub(super) a: u32,
    pub(super) b: u32,
    pub(super) first: u32,
    pub(super) second: u32,
    pub(super) n: u32,
    pub(super) qb: u32,
    pub(super) h: u32,
    pub(super) v: u32,
    pub(super) o: u32,
    pub(super) s: u32,
    pub(super) z: u32,
}

/// One unit loads a slice of 64 value channels.
#[cube]
pub(super) fn load_slice(
    t: &Room,
    part: &Part,
    slice: u32,
    values: u64,
    grad_o: u64,
    states: u64,
    grad_states: u64,
    barrier: u32,
    #[comptime] plan: GradientPlan,
) {
    let channel = slice * 64u32;
    #[unroll]
    for n in 0..comptime!(plan.key.panels()) {
        load_3d(panel_of(t.z, n), grad_states, comptime!(64 * n as u32), channel, part.block, barrier);
        load_3d(panel_of(t.s, n), states, comptime!(64 * n as u32), channel, part.block, barrier);
    }
    load_tile(t.o, grad_o, channel, part.head, part.start, barrier, 1usize);
    load_tile(t.v, values, channel, part.head, part.start, barrier, 1usize);
}

/// Over a slice of values: what the warpgroup's operands are multiplied with in the states, and half of dP.
#[cube]
pub(super) fn outer_products(t: &Room, slice: u32, reads: bool, #[comptime] plan: GradientPlan) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let steps = comptime!(4 * plan.key.panels());
    let (x, held, other, tokens) =
        (select(reads, t.second, t.first), select(reads, t.z, t.s), select(reads, t.s, t.z), select(reads, t.o, t.v));
    let half = t.v + select(reads, 0u32, comptime!(PANEL as u32 / 2));
    let grads = t.o + 0u32;
    fence();
    #[unroll]
    for n in 0..steps {
        mma_shared(READ, k_major(x, CHUNK, n), k_major(held, CHUNK, n), comptime!(n as u32), false, false);
    }
    commit();
    #[unroll]
    for n in 0..4usize {
        let keep = slice + comptime!(n as u32);
        mma_shared(outer, k_major(tokens, CHUNK, n), mn_major(other, CHUNK, n), keep, false, true);
        mma_shared(OUTER, k_major(grads, CHUNK, n), k_major(half, CHUNK, n), keep, false, false);
    }
    commit();
    wait(1u32);
    pack_all(TOKENS, READ);
    fence();
    #[unroll]
    for n in 0..4usize {
        mma_registers(inner, TOKENS, n, mn_major(other, CHUNK, n), slice + comptime!(n as u32), true);
    }
    commit();
    wait(0u32);
}

/// A unit's share of the products of both states, over the value channels of a slice.
#[cube]
pub(super) fn end_products(t: &Room, part: &Part, ends: &mut Array<f32>, #[comptime] plan: GradientPlan) {
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
pub(super) fn keep_rows(#[comptime] acc: Acc, row: u32, length: u32) {
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
pub(super) fn publish_outer(tile: u32, reads: bool, row: u32, lane: u32, length: u32) {
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
pub(super) fn answers(t: &Room, reads: bool, #[comptime] plan: GradientPlan) {
    let inner = comptime!(plan.inner());
    let x = select(reads, t.s, t.second);
    let y = select(reads, t.first, t.z);
    let (dp, qb, h, s, z) = (t.v, t.qb, t.h, t.s, t.z);
    fence();
    #[unroll]
    for n in 0..comptime!(4 * plan.key.panels()) {
        mma_shared(ACC, k_major(x, CHUNK, n), k_major(y, CHUNK, n), comptime!(n as u32), false, false);
    }
    if reads {
        #[unroll]
        for n in 0..4usize {
            mma_shared(ACC, k_major(dp, CHUNK, n), k_major(h, CHUNK, n), 1u32, false, false);
            mma_shared(inner, mn_major(qb, CHUNK, n), mn_major(s, CHUNK, n), 1u32, true, true);
        }
    } else {
        #[unroll]
        for n in 0..4usize {
            mma_shared(ACC, mn_major(qb, CHUNK, n), mn_major(dp, CHUNK, n), 1u32, true, true);
            mma_shared(inner, k_major(h, CHUNK, n), mn_major(z, CHUNK, n), 1u32, false, true);
        }
    }
    commit();
    wait(0u32);
}

/// Hands dA_qb, dÃ and dH on; dã, in registers, and dA_ak.
#[cube]
pub(super) fn solve(t: &Room, reads: bool, row: u32, lane: u32, id: u32, #[comptime] plan: GradientPlan) {
    let inner = comptime!(plan.inner());
    if reads {
        mask(ACC, row, lane, false);
        publish(t.qb, ACC, row, lane);
        publish(t.s, inner, row, lane);
    } else {
        publish(t.o, ACC, row, lane);
    }
    fence_shared();
    // The warpgroup itself: what it wrote it alone reads now.
    let own = 2u32 * id + 1u32 + select(reads, 0u32, 1u32);
    sync_warpgroup(own, 128u32);
    fence();
    let (n0, x, y) = (t.n, t.s, t.o);
    if reads {
        #[unroll]
        for n in 0..4usize {
            mma_shared(inner, mn_major(n0, CHUNK, n), mn_major(x, CHUNK, n), comptime!(n as u32), true, true);
        }
        commit();
        wait(0u32);
    } else {
        #[unroll]
        for n in 0..4usize {
            mma_shared(ACC, mn_major(n0, CHUNK, n), mn_major(y, CHUNK, n), comptime!(n as u32), true, true);
        }
        commit();
        wait(0u32);
        mask(ACC, row, lane, true);
        sync_warpgroup(own, 128u32);
        publish(t.o, ACC, row, lane);
        fence_shared();
    }
}

/// dA_ab.
#[cube]
pub(super) fn solve_again(t: &Room, row: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let operand = comptime!(plan.operand());
    let (first, dak, h) = (t.first, t.o, t.h);
    pack_all(operand, comptime!(plan.inner()));
    fence();
    #[unroll]
    for n in 0..comptime!(4 * plan.key.panels()) {
        mma_registers(ACC, operand, n, k_major(first, CHUNK, n), comptime!(n as u32), false);
    }
    #[unroll]
    for n in 0..4usize {
        mma_shared(ACC, k_major(dak, CHUNK, n), k_major(h, CHUNK, n), 1u32, false, false);
    }
    commit();
    wait(0u32);
    mask(ACC, row, lane, true);
    publish(t.z, ACC, row, lane);
}

/// The products of keys and writers with what the state after the chunk gives to their gradients.
#[cube]
pub(super) fn inter_products(t: &Room, row: u32, lane: u32, #[comptime] plan: GradientPlan) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let inter = comptime!(plan.inter());
    let base = swizzled(0u32, row, (lane % 4u32) * 4u32);
    #[unroll]
    for j in 0..comptime!(inter.columns() / 8) {
        #[unroll]
        for half in 0..2usize {
            let at = (base ^ comptime!((j % 8 * 16) as u32)) + comptime!((j / 8 * PANEL + half * 1024) as u32);
            let i = comptime!(4 * j + 2 * half);
            let next = comptime!(4 * j + 2 * half + 1);
            let key = load_u32(t.k + at);
            let writer = load_u32(t.b + at);
            write(inter, i, bf16_low(key) * read(outer, i) + bf16_low(writer) * read(inner, i));
            write(inter, next, bf16_high(key) * read(outer, next) + bf16_high(writer) * read(inner, next));
        }
    }
}

/// What tokens of the chunk give to each other's gradients.
#[cube]
pub(super) fn add_pairs(t: &Room, reads: bool, #[comptime] plan: GradientPlan) {
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let (dqb, dp, dak, dab) = (t.qb, t.v, t.o, t.z);
    let (q, k, a, b) = (t.q, t.k, t.a, t.b);
    fence();
    if reads {
        #[unroll]
        for n in 0..4usize {
            mma_shared(outer, k_major(dqb, CHUNK, n), mn_major(b, CHUNK, n), 1u32, false, true);
            mma_shared(outer, k_major(dp, CHUNK, n), mn_major(k, CHUNK, n), 1u32, false, true);
            mma_shared(inner, k_major(dab, CHUNK, n), mn_major(b, CHUNK, n), 1u32, false, true);
            mma_shared(inner, k_major(dak, CHUNK, n), mn_major(k, CHUNK, n), 1u32, false, true);
        }
    } else {
        #[unroll]
        for n in 0..4usize {
            mma_shared(outer, mn_major(dp, CHUNK, n), mn_major(q, CHUNK, n), 1u32, true, true);
            mma_shared(outer, mn_major(dak, CHUNK, n), mn_major(a, CHUNK, n), 1u32, true, true);
            mma_shared(inner, mn_major(dqb, CHUNK, n), mn_major(q, CHUNK, n), 1u32, true, true);
            mma_shared(inner, mn_major(dab, CHUNK, n), mn_major(a, CHUNK, n), 1u32, true, true);
        }
    }
    commit();
    wait(0u32);
}
