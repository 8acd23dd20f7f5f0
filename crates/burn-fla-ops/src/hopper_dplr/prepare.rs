//! Everything of a chunk that does not depend on the state, solved for all chunks at once: see the equations of
//! [`super`]. A team of a warpgroup a panel of key channels works on a chunk and head.
//!
//! Each warpgroup has the vectors of its panel. Where there are two, one has the products of readers and writers and their
//! triangle's inverse, the other the products that are needed afterwards, meanwhile. No unit keeps what its tokens decay by:
//! Q′ and K′ are made of the tiles that products read, so that few registers are in use and 12 or 16 warps run on a
//! processor.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::octet_tiles::{Decays, write_again, write_tokens};
use super::octets::{prefetch_tokens, rows_of, share_of, tokens_of};
use super::plan::{AB, CHANNELS, KeyPlan, PANEL, QK, RANGE, SCORES};
use super::prepare_steps::{
    finish, place_of, products_of_tokens, publish_words, solve, solved_products, sync_team, tiles_at,
};
use super::products::{declare_operands, fence_shared};
use crate::hopper_walk::Cores;
use crate::tile::hopper::{declare, declare_triangle, sync_warpgroup, warpgroup};

/// The kernel. All but the decays are bf16 in whole chunks, `[chunks, H, 64, …]`, zero after the last token: with the names of
/// [`super`] `first` is Ã, `second` B̂, `out` Q′, `into` K′ and `scores` P; with `extras` also N, `A_qb` and H.
#[cube(launch_unchecked)]
pub(crate) fn prepare(
    q: &[u32],
    k: &[u32],
    a: &[u32],
    b: &[u32],
    gates: &[u32],
    strengths: &[f32],
    table: &[i32],
    first: &mut [u32],
    second: &mut [u32],
    out: &mut [u32],
    into: &mut [u32],
    scores: &mut [u32],
    decays: &mut [f32],
    inverse: &mut [u32],
    answers: &mut [u32],
    passed: &mut [u32],
    heads: u32,
    groups: u32,
    blocks: u32,
    table_at: u32,
    out_scale: f32,
    #[comptime] extras: bool,
    #[comptime] plan: KeyPlan,
) {
    let cores = comptime!(plan.cores);
    let teams = comptime!(plan.prepare_teams() as u32);
    let shared =
        Shared::<[u32]>::new_aligned_slice(comptime!(plan.prepare_teams() * plan.prepare_tiles() / 4), 1024usize);
    let sums = Shared::<[f32]>::new_aligned_slice(comptime!(plan.prepare_teams() * plan.prepare_sums()), 128usize);
    declare(SCORES);
    declare(QK);
    declare(CHANNELS);
    if comptime!(plan.panels() == 1) {
        declare(AB);
    }
    declare_triangle();
    declare_operands(cores);
    let team = if comptime!(teams == 1) { 0u32.runtime() } else { warpgroup() / comptime!(plan.panels() as u32) };
    let panel =
        if comptime!(plan.panels() == 1) { 0u32.runtime() } else { warpgroup() % comptime!(plan.panels() as u32) };
    let t = tiles_at(
        generic_to_shared::<u32>(shared.as_ptr()) + team * comptime!(plan.prepare_tiles() as u32),
        generic_to_shared::<f32>(sums.as_ptr()) + team * comptime!(4 * plan.prepare_sums() as u32),
        plan,
    );
    let own = panel * comptime!(PANEL as u32);
    let mut index = CUBE_POS_X * teams + team;
    let tokens = tokens_of(u32::min(index, blocks - 1u32), table, table_at, heads);
    let mut start = tokens.0;
    let mut length = tokens.1;
    while index < blocks {
        let p = place_of(team, panel, plan);
        let next = u32::min(index + CUBE_COUNT_X * teams, blocks - 1u32);
        let ahead = tokens_of(next, table, table_at, heads);
        let share = share_of(index, (start + 0u32, length + 0u32), heads, groups, p.panel, p.unit, plan);
        let rows = rows_of(&share, q, k, a, b, second, plan);
        let fast = write_tokens(
            &share,
            &rows,
            gates,
            strengths,
            heads,
            t.q + own,
            t.totals,
            decays,
            RANGE,
            out_scale,
            p.team,
            plan,
        );
        if !fast {
            // The decays in the place of the triangle. Computed again is what else would take registers where it is rarely
            // needed.
            let p = place_of(team, panel, plan);
            let share = share_of(index, (start + 0u32, length + 0u32), heads, groups, p.panel, p.unit, plan);
            let rows = rows_of(&share, q, k, a, b, second, plan);
            write_again(
                &share,
                &rows,
                gates,
                strengths,
                heads,
                t.q + own,
                t.totals,
                t.triangle,
                out_scale,
                Decays::None,
                plan,
            );
        }
        if comptime!(cores == Cores::Hopper) {
            let share = share_of(next, ahead, heads, groups, p.panel, p.unit, plan);
            prefetch_tokens(&share, q, k, a, b, gates, heads, plan);
        }
        fence_shared(cores);
        sync_team(&p, plan);
        let p = place_of(team, panel, plan);
        // Readers with keys, queries with writers, both rounded.
        let mut by_key = Array::<u32>::new(16usize);
        let mut by_writer = Array::<u32>::new(16usize);
        products_of_tokens(&t, &p, fast, &mut by_key, &mut by_writer, plan);
        if !fast {
            sync_team(&p, plan);
            let p = place_of(team, panel, plan);
            let share = share_of(index, (start + 0u32, length + 0u32), heads, groups, p.panel, p.unit, plan);
            let rows = rows_of(&share, q, k, a, b, second, plan);
            write_again(
                &share,
                &rows,
                gates,
                strengths,
                heads,
                t.q + own,
                t.totals,
                0u32,
                out_scale,
                Decays::Whole,
                plan,
            );
            fence_shared(cores);
        }
        let p = place_of(team, panel, plan);
        if p.solves {
            solve(&t, &p, plan);
        }
        fence_shared(cores);
        sync_team(&p, plan);
        if p.scores {
            publish_words(t.ak, &by_key, p.row, p.lane);
            publish_words(t.qb, &by_writer, p.row, p.lane);
            fence_shared(cores);
            sync_warpgroup(p.own, 128u32);
        }
        let p = place_of(team, panel, plan);
        // One branch a group of products: the compiler waits for those that begin in one and end in another.
        if p.scores {
            solved_products(&t, &p, true, plan);
        } else {
            solved_products(&t, &p, false, plan);
        }
        fence_shared(cores);
        sync_team(&p, plan);
        if p.scores {
            // What another warpgroup does not write.
            let all = comptime!(extras && plan.panels() == 1);
            finish(&t, &p, index, first, out, into, scores, inverse, answers, passed, true, all, plan);
        } else {
            finish(&t, &p, index, first, out, into, scores, inverse, answers, passed, false, extras, plan);
        }
        // The next chunk's tiles go where these were.
        sync_team(&p, plan);
        start = ahead.0;
        length = ahead.1;
        index += CUBE_COUNT_X * teams;
    }
}
