//! The steps of [`super::prepare`] between the meetings of a team, and who does them.

use cubecl::prelude::*;

use super::exact::exact_scores;
use super::parts::mask;
use super::plan::{AB, CHANNELS, CHUNK, KeyPlan, PANEL, QK, SCORES};
use super::products::{begin, commit, product, wait};
use super::tokens::Two;
use crate::hopper_walk::parts::publish;
use crate::tile::hopper::{
    Acc, TRIANGLE_COLUMN, TRIANGLE_ROW, column_of, invert_triangle_by, load_f32_pair, load_u32, load_u32_four,
    pack_pair, pack_word, read, row_of, scale_columns, store_f32, store_u32, swizzled, sync_warpgroup, zero,
};
use crate::tile::mma::{address_again, store_global_four, unit_again};

/// Where a team has its tiles: queries, keys, readers and writers, then Q′, K′, Ã and writers; the triangle, then its inverse
/// and H; the inverse's rows, then products with keys of readers, which P follows, and of queries with writers. Behind
/// them all what is by channel: decays' totals, and factors.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) q: u32,
    pub(super) k: u32,
    pub(super) a: u32,
    pub(super) b: u32,
    pub(super) triangle: u32,
    pub(super) n: u32,
    pub(super) h: u32,
    pub(super) x: u32,
    pub(super) ak: u32,
    pub(super) qb: u32,
    pub(super) totals: u32,
    pub(super) factors: u32,
}

#[cube]
pub(super) fn tiles_at(tiles: u32, totals: u32, #[comptime] plan: KeyPlan) -> Tiles {
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let triangle = tiles + 4u32 * wide;
    let x = triangle + comptime!((4 * CHUNK * TRIANGLE_COLUMN) as u32);
    Tiles {
        q: tiles + 0u32,
        k: tiles + wide,
        a: tiles + 2u32 * wide,
        b: tiles + 3u32 * wide,
        triangle,
        n: triangle + 0u32,
        h: triangle + comptime!(PANEL as u32),
        x,
        ak: x + 0u32,
        qb: x + comptime!(PANEL as u32),
        totals,
        factors: totals + comptime!(16 * plan.padded() as u32),
    }
}

/// Who a unit is in its team: each step asks anew. What is computed from it would else be moved before the loop over chunks,
/// all of it, and not fit into registers.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    /// Its panel, and whether it has the triangle, and the products that are needed after it: where there is one warpgroup,
    /// both.
    pub(super) panel: u32,
    pub(super) solves: bool,
    pub(super) scores: bool,
    pub(super) unit: u32,
    pub(super) warp: u32,
    pub(super) lane: u32,
    pub(super) row: u32,
    /// The named barriers of its team and of its warpgroup.
    pub(super) team: u32,
    pub(super) own: u32,
}

#[cube]
pub(super) fn place_of(team: u32, panel: u32, #[comptime] plan: KeyPlan) -> Place {
    let groups = comptime!(plan.panels() as u32);
    let unit = unit_again() % 128u32;
    let lane = unit % 32u32;
    let warp = unit / 32u32;
    // One a team, then one a warpgroup.
    let own = if comptime!(groups == 1) {
        team + 1u32
    } else {
        team * groups + panel + comptime!(plan.prepare_teams() as u32 + 1)
    };
    Place {
        panel,
        solves: panel == 0u32,
        scores: panel == comptime!(groups - 1),
        unit,
        warp,
        lane,
        row: row_of(warp, lane, 0usize),
        team: team + 1u32,
        own,
    }
}

#[cube]
pub(super) fn sync_team(p: &Place, #[comptime] plan: KeyPlan) {
    sync_warpgroup(p.team, comptime!(128 * plan.panels() as u32));
}

/// All products between tokens: readers with keys and queries with writers to words, queries with keys to [`QK`], readers
/// with writers to [`AB`], or where another warpgroup has the others, to [`SCORES`].
#[cube]
pub(super) fn products_of_tokens(
    t: &Tiles,
    p: &Place,
    fast: bool,
    by_key: &mut Array<u32>,
    by_writer: &mut Array<u32>,
    #[comptime] plan: KeyPlan,
) {
    let cores = comptime!(plan.cores);
    let steps = comptime!(4 * plan.panels());
    let solved = comptime!(solved(plan));
    if comptime!(plan.panels() > 1) {
        // Each warpgroup leaves one of them alone: else they would count as in use from one chunk to the next.
        zero(SCORES);
        zero(QK);
    }
    if fast {
        if p.scores {
            begin(cores);
            #[unroll]
            for n in 0..steps {
                let keep = comptime!(n as u32);
                product(SCORES, t.a, t.k, n, keep, false, false, p.warp, p.lane, cores);
                product(CHANNELS, t.q, t.b, n, keep, false, false, p.warp, p.lane, cores);
                product(QK, t.q, t.k, n, keep, false, false, p.warp, p.lane, cores);
                if comptime!(plan.panels() == 1) {
                    product(solved, t.a, t.b, n, keep, false, false, p.warp, p.lane, cores);
                }
            }
            commit(cores);
            wait(0u32, cores);
            pack_masked(SCORES, by_key, p, true);
            pack_masked(CHANNELS, by_writer, p, false);
        }
        if comptime!(plan.panels() > 1) && p.solves {
            begin(cores);
            #[unroll]
            for n in 0..steps {
                product(solved, t.a, t.b, n, comptime!(n as u32), false, false, p.warp, p.lane, cores);
            }
            commit(cores);
            wait(0u32, cores);
        }
    } else {
        // One after the other, so that few are in registers.
        if p.scores {
            exact_scores(SCORES, t.a, t.k, t.triangle, true, plan);
            pack_masked(SCORES, by_key, p, true);
            exact_scores(SCORES, t.q, t.b, t.triangle, false, plan);
            pack_masked(SCORES, by_writer, p, false);
            exact_scores(QK, t.q, t.k, t.triangle, false, plan);
        }
        if p.solves {
            exact_scores(solved, t.a, t.b, t.triangle, true, plan);
        }
    }
    if p.scores {
        mask(QK, p.row, p.lane, false);
    }
    if p.solves {
        mask(solved, p.row, p.lane, true);
    }
}

/// The words of products between tokens, each with those that a token has up to itself (`strict`: before itself).
#[cube]
fn pack_masked(#[comptime] acc: Acc, words: &mut Array<u32>, p: &Place, #[comptime] strict: bool) {
    mask(acc, p.row, p.lane, strict);
    #[unroll]
    for n in 0..16usize {
        words[n] = pack_pair(acc, comptime!(2 * n));
    }
}

/// Where the products of readers and writers are.
fn solved(plan: KeyPlan) -> Acc {
    if plan.panels() == 1 { AB } else { SCORES }
}

/// Ã in the place of the readers, and with `scores` H.
#[cube]
pub(super) fn solved_products(t: &Tiles, p: &Place, #[comptime] scores: bool, #[comptime] plan: KeyPlan) {
    let cores = comptime!(plan.cores);
    let readers = t.a + p.panel * comptime!(PANEL as u32);
    begin(cores);
    #[unroll]
    for n in 0..4usize {
        let keep = comptime!(n as u32);
        product(CHANNELS, t.n, readers, n, keep, false, true, p.warp, p.lane, cores);
        if comptime!(scores) {
            product(SCORES, t.n, t.ak, n, keep, false, true, p.warp, p.lane, cores);
        }
    }
    commit(cores);
    wait(0u32, cores);
    scale_all(CHANNELS, t.factors + p.panel * 256u32, p.lane);
    // All warps have read their panel of readers.
    sync_warpgroup(p.own, 128u32);
    publish(readers, CHANNELS, p.row, p.lane);
    if comptime!(scores) {
        publish(t.h, SCORES, p.row, p.lane);
    }
}

/// Q′ and K′, and with `scores` P; all but B̂ go to device memory, N, `A_qb` and H with `extras`.
#[cube]
pub(super) fn finish(
    t: &Tiles,
    p: &Place,
    block: u32,
    to_first: &mut [u32],
    to_out: &mut [u32],
    to_into: &mut [u32],
    to_scores: &mut [u32],
    to_inverse: &mut [u32],
    to_answers: &mut [u32],
    to_passed: &mut [u32],
    #[comptime] scores: bool,
    #[comptime] extras: bool,
    #[comptime] plan: KeyPlan,
) {
    let cores = comptime!(plan.cores);
    let own = p.panel * comptime!(PANEL as u32);
    let factors = t.factors + p.panel * 256u32;
    let first = u64::cast_from(block * comptime!(CHUNK as u32));
    let row = first * comptime!((2 * plan.padded()) as u64) + u64::cast_from(p.panel * 128u32);
    let square = first * 128u64;
    begin(cores);
    #[unroll]
    for n in 0..4usize {
        let keep = comptime!(n as u32);
        product(CHANNELS, t.qb, t.a + own, n, keep, false, true, p.warp, p.lane, cores);
        product(SCORES, t.h, t.b + own, n, keep, true, true, p.warp, p.lane, cores);
        if comptime!(scores) {
            product(QK, t.qb, t.h, n, 1u32, false, true, p.warp, p.lane, cores);
        }
    }
    commit(cores);
    // While they run.
    copy_out(t.a + own, address_again::<u32>(to_first.as_ptr()) + row, p, comptime!(2 * plan.padded()));
    if comptime!(extras) {
        copy_out(t.n, address_again::<u32>(to_inverse.as_ptr()) + square, p, 128usize);
        copy_out(t.qb, address_again::<u32>(to_answers.as_ptr()) + square, p, 128usize);
        copy_out(t.h, address_again::<u32>(to_passed.as_ptr()) + square, p, 128usize);
    }
    wait(0u32, cores);
    add_queries(t.q + own, factors, p.row, p.lane);
    add_keys(t.k + own, factors, p.row, p.lane);
    if comptime!(scores) {
        publish(t.ak, QK, p.row, p.lane);
    }
    sync_warpgroup(p.own, 128u32);
    copy_out(t.q + own, address_again::<u32>(to_out.as_ptr()) + row, p, comptime!(2 * plan.padded()));
    copy_out(t.k + own, address_again::<u32>(to_into.as_ptr()) + row, p, comptime!(2 * plan.padded()));
    if comptime!(scores) {
        copy_out(t.ak, address_again::<u32>(to_scores.as_ptr()) + square, p, 128usize);
    }
}

/// The inverse N as a tile, from the products of readers and writers.
#[cube]
pub(super) fn solve(t: &Tiles, p: &Place, #[comptime] plan: KeyPlan) {
    let solved = comptime!(solved(plan));
    #[unroll]
    for n in 0..32usize {
        let at = column_of(p.lane, n) * comptime!(TRIANGLE_COLUMN as u32) + row_of(p.warp, p.lane, n);
        store_f32(t.triangle + at * 4u32, -read(solved, n));
    }
    sync_warpgroup(p.own, 128u32);
    invert_triangle_by(t.triangle, t.x, p.unit, p.own);
    #[unroll]
    for n in 0..16usize {
        let line = p.warp + comptime!(4 * n as u32);
        let column = 2u32 * p.lane;
        let found = load_f32_pair(t.x + (line * comptime!(TRIANGLE_ROW as u32) + column) * 4u32);
        // Above the diagonal nothing was written.
        let low = select(column <= line, found.extract(0usize), 0.0f32);
        let high = select(column < line, found.extract(1usize), 0.0f32);
        store_u32(swizzled(t.n, line, p.lane * 4u32), pack_word(low, high));
    }
}

/// Writes a tile from the words of an accumulator's pairs.
#[cube]
pub(super) fn publish_words(tile: u32, words: &Array<u32>, row: u32, lane: u32) {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    #[unroll]
    for j in 0..8usize {
        let at = base ^ comptime!((j * 16) as u32);
        store_u32(at, words[comptime!(2 * j)]);
        store_u32(at + 1024u32, words[comptime!(2 * j + 1)]);
    }
}

/// Multiplies the columns of an accumulator, each with its factor.
#[cube]
fn scale_all(#[comptime] acc: Acc, factors: u32, lane: u32) {
    #[unroll]
    for j in 0..comptime!(acc.columns() / 8) {
        let factor = load_f32_pair(factors + column_of(lane, comptime!(4 * j)) * 4u32);
        scale_columns(acc, j, factor.extract(0usize), factor.extract(1usize));
    }
}

/// Q′ in the place of the queries: `factor ∘ tile + CHANNELS`. A unit reads what it writes.
#[cube]
fn add_queries(tile: u32, factors: u32, row: u32, lane: u32) {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    #[unroll]
    for j in 0..8usize {
        let factor = load_f32_pair(factors + column_of(lane, comptime!(4 * j)) * 4u32);
        #[unroll]
        for half in 0..2usize {
            let at = (base ^ comptime!((j * 16) as u32)) + comptime!((1024 * half) as u32);
            let own = Two::of(load_u32(at));
            let low = read(CHANNELS, comptime!(4 * j + 2 * half)) + own.low * factor.extract(0usize);
            let high = read(CHANNELS, comptime!(4 * j + 2 * half + 1)) + own.high * factor.extract(1usize);
            store_u32(at, pack_word(low, high));
        }
    }
}

/// K′ in the place of the keys: `factor ∘ (tile + SCORES)`.
#[cube]
fn add_keys(tile: u32, factors: u32, row: u32, lane: u32) {
    let base = swizzled(tile, row, (lane % 4u32) * 4u32);
    #[unroll]
    for j in 0..8usize {
        let factor = load_f32_pair(factors + column_of(lane, comptime!(4 * j)) * 4u32);
        #[unroll]
        for half in 0..2usize {
            let at = (base ^ comptime!((j * 16) as u32)) + comptime!((1024 * half) as u32);
            let own = Two::of(load_u32(at));
            let low = (read(SCORES, comptime!(4 * j + 2 * half)) + own.low) * factor.extract(0usize);
            let high = (read(SCORES, comptime!(4 * j + 2 * half + 1)) + own.high) * factor.extract(1usize);
            store_u32(at, pack_word(low, high));
        }
    }
}

/// A warpgroup copies a tile to 64 rows of device memory, `step` bytes apart.
#[cube]
fn copy_out(tile: u32, to: u64, p: &Place, #[comptime] step: usize) {
    let (row, piece) = (p.unit / 8u32, p.unit % 8u32);
    let from = swizzled(tile, row, piece * 16u32);
    let to = to + u64::cast_from(row * comptime!(step as u32) + piece * 16u32);
    #[unroll]
    for i in 0..4usize {
        let four = load_u32_four(from, comptime!(2048 * i));
        let (w, x) = (four.extract(0usize), four.extract(1usize));
        let (y, z) = (four.extract(2usize), four.extract(3usize));
        store_global_four(to, comptime!(16 * i * step), w, x, y, z);
    }
}
