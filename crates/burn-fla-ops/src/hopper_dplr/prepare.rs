//! Everything of a chunk that does not depend on the state, solved for all chunks at once: see the equations of
//! [`super`]. One cube a chunk and head; a warp has 16 tokens.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::exact::{exact_scores, tokens_again};
use super::parts::{add_rows, copy_tile, scale_by, stage_panel};
use super::plan::{CHUNK, KeyPlan, PANEL, QK, SCORES};
use super::products::{begin, commit, declare_operands, fence_shared, product, wait};
use super::tokens::{
    BATCH, Part, Two, added, centre_decays, load_strengths, load_words, logs_at, logs_read, part_of, reader,
    sum_decays, two_of, writer,
};
use crate::hopper_walk::parts::publish;
use crate::tile::hopper::{
    TRIANGLE_COLUMN, TRIANGLE_ROW, column_of, declare, exp2, invert_triangle, load_f32, pack_word, read, row_of,
    store_f32, store_u32, swizzled, write,
};

/// Tokens a warp.
pub(crate) const TOKENS: usize = 16;

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
    table_at: u32,
    out_scale: f32,
    #[comptime] extras: bool,
    #[comptime] plan: KeyPlan,
) {
    let cores = comptime!(plan.cores);
    let panels = comptime!(plan.panels());
    let wide = comptime!((plan.panels() * PANEL) as u32);
    let padded = comptime!(plan.padded() as u32);
    let channels = comptime!(plan.channels("w"));
    // Queries, keys, readers and writers; then products, and the triangle.
    // One panel of queries and one of keys have less room than the inverse's padded rows need.
    let pad = comptime!(if panels == 1 { 2048 } else { 0 });
    let shared = Shared::<[u32]>::new_aligned_slice(comptime!(((4 * panels + 2) * PANEL + pad) / 4), 1024usize);
    // The totals of decays first.
    let mut triangle = Shared::<[f32]>::new_aligned_slice(comptime!(CHUNK * TRIANGLE_COLUMN), 1024usize);
    let mut factors = Shared::<[f32]>::new_aligned_slice(comptime!(plan.padded()), 128usize);
    let q0 = generic_to_shared::<u32>(shared.as_ptr());
    let k0 = q0 + wide;
    let a0 = k0 + wide + comptime!(pad as u32);
    let b0 = a0 + wide;
    let ak0 = b0 + wide;
    let qb0 = ak0 + comptime!(PANEL as u32);
    let t0 = generic_to_shared::<f32>(triangle.as_ptr());
    declare(SCORES);
    declare(QK);
    declare(channels);
    declare_operands(cores);

    let part = part_of(CUBE_POS_X, table, table_at, heads, groups, UNIT_POS, TOKENS);
    // The first of a unit's words in rows of a block.
    let part_at = (part.block * 64u32 + part.first) * comptime!(plan.padded() as u32 / 2) + part.pair;
    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    let row = row_of(warp, lane, 0usize);
    let mut logs = Array::<f32>::new(comptime!(2 * TOKENS * panels));
    let mut middles = Array::<f32>::new(comptime!(2 * panels));
    let mut befores = Array::<f32>::new(comptime!(2 * panels));
    sum_decays(&part, gates, heads, &mut triangle, 0usize, &mut logs, TOKENS, plan);
    sync_cube();
    let fast = centre_decays(&part, &triangle, 0usize, &mut logs, &mut middles, &mut befores, TOKENS, plan);
    #[unroll]
    for panel in 0..panels {
        let middle = two_of(&middles, panel);
        if part.warp == 0u32 {
            let channel = part.channel(panel);
            let at = (part.block * padded + channel) as usize;
            decays[at] = exp2(2.0f32 * middle.low);
            decays[at + 1] = exp2(2.0f32 * middle.high);
            factors[channel as usize] = select(fast, exp2(middle.low), 1.0f32);
            factors[channel as usize + 1] = select(fast, exp2(middle.high), 1.0f32);
        }
        #[unroll]
        for batch in 0..comptime!(TOKENS / BATCH) {
            let mut qs = Array::<u32>::new(BATCH);
            let mut ks = Array::<u32>::new(BATCH);
            let mut readers = Array::<u32>::new(BATCH);
            let mut writers = Array::<u32>::new(BATCH);
            load_words(&part, q, &mut qs, comptime!(batch * BATCH), panel, plan);
            load_words(&part, k, &mut ks, comptime!(batch * BATCH), panel, plan);
            load_words(&part, a, &mut readers, comptime!(batch * BATCH), panel, plan);
            load_words(&part, b, &mut writers, comptime!(batch * BATCH), panel, plan);
            let mut strength = Array::<f32>::new(BATCH);
            load_strengths(&part, strengths, heads, &mut strength, comptime!(batch * BATCH), plan);
            #[unroll]
            for n in 0..BATCH {
                let i = comptime!(batch * BATCH + n);
                let token = comptime!(i as u32);
                let keep = part.inside(token, panel, plan);
                let log = logs_at(&logs, i, panel, TOKENS);
                let before = logs_read(&logs, &befores, i, panel, TOKENS, plan).kept(fast);
                let grown = log.kept(fast).power();
                let left = log.kept(fast).negated().power();
                let to = swizzled(comptime!((panel * PANEL) as u32), part.first + token, part.pair * 4u32);
                let queries = Two::of(qs[n]).scaled(out_scale).times(&grown).kept(keep);
                let keys = added(ks[n], strength[n], plan).times(&left).kept(keep);
                let reads = reader(readers[n], plan).times(&before.power()).kept(keep);
                let writes = writer(readers[n], writers[n], strength[n], plan).kept(keep);
                let ends = writes.times(&log.negated().grown(&middle));
                let writes = writes.times(&left);
                store_u32(q0 + to, pack_word(queries.low, queries.high));
                store_u32(k0 + to, pack_word(keys.low, keys.high));
                store_u32(a0 + to, pack_word(reads.low, reads.high));
                store_u32(b0 + to, pack_word(writes.low, writes.high));
                let word = part_at + token * comptime!(plan.padded() as u32 / 2) + comptime!(32 * panel as u32);
                second[word as usize] = pack_word(ends.low, ends.high);
            }
        }
    }
    fence_shared(cores);
    sync_cube();
    // Queries with keys, with writers, readers with keys, with writers.
    for which in 0..4u32 {
        let reads = which >= 2u32;
        let x = select(reads, a0, q0);
        let y = select(which % 2u32 == 0u32, k0, b0);
        if fast {
            begin(cores);
            #[unroll]
            for n in 0..comptime!(4 * panels) {
                product(SCORES, x, y, n, comptime!(n as u32), false, false, warp, lane, cores);
            }
            commit(cores);
            wait(0u32, cores);
        } else {
            exact_scores(&part, &logs, x, y, reads, t0, row, lane, TOKENS, plan);
        }
        #[unroll]
        for n in 0..32usize {
            let line = row_of(warp, lane, n);
            let column = column_of(lane, n);
            let keep = column < line || (column == line && !reads);
            write(SCORES, n, select(keep, read(SCORES, n), 0.0f32));
        }
        if which == 0u32 {
            #[unroll]
            for n in 0..32usize {
                write(QK, n, read(SCORES, n));
            }
        } else if which == 3u32 {
            #[unroll]
            for n in 0..32usize {
                let to = t0 + (column_of(lane, n) * comptime!(TRIANGLE_COLUMN as u32) + row_of(warp, lane, n)) * 4u32;
                store_f32(to, -read(SCORES, n));
            }
        } else {
            publish(select(reads, ak0, qb0), SCORES, row, lane);
        }
    }
    if !fast {
        tokens_again(&part, a, b, strengths, &logs, &befores, &middles, heads, a0, b0, plan);
    }
    sync_cube();
    // The inverse stands where queries (and keys) did.
    invert_triangle(t0, q0);
    let n0 = t0 + 0u32;
    let h0 = t0 + comptime!(PANEL as u32);
    #[unroll]
    for n in 0..16usize {
        let line = warp + comptime!(4 * n as u32);
        let column = 2u32 * lane;
        let from = q0 + (line * comptime!(TRIANGLE_ROW as u32) + column) * 4u32;
        // Above the diagonal nothing was written.
        let low = select(column <= line, load_f32(from), 0.0f32);
        let high = select(column < line, load_f32(from + 4u32), 0.0f32);
        store_u32(swizzled(n0, line, lane * 4u32), pack_word(low, high));
    }
    fence_shared(cores);
    sync_cube();
    begin(cores);
    #[unroll]
    for n in 0..4usize {
        let keep = comptime!(n as u32);
        product(channels, n0, a0, n, keep, false, true, warp, lane, cores);
        product(SCORES, n0, ak0, n, keep, false, true, warp, lane, cores);
    }
    commit(cores);
    wait(0u32, cores);
    scale_by(channels, &factors, 0usize, lane);
    publish(q0, channels, row, lane);
    publish(h0, SCORES, row, lane);
    fence_shared(cores);
    sync_cube();
    begin(cores);
    #[unroll]
    for n in 0..4usize {
        product(channels, qb0, q0, n, comptime!(n as u32), false, true, warp, lane, cores);
        product(QK, qb0, h0, n, 1u32, false, true, warp, lane, cores);
    }
    commit(cores);
    wait(0u32, cores);
    publish(ak0, QK, row, lane);
    #[unroll]
    for panel in 0..panels {
        if comptime!(panel > 0) {
            sync_cube();
        }
        let mut own = Array::<u32>::new(TOKENS);
        load_all(&part, q, &mut own, panel, plan);
        // Where keys (and readers) were.
        stage_panel(k0, channels, panel, row, lane);
        sync_cube();
        let middle = two_of(&middles, panel);
        #[unroll]
        for i in 0..TOKENS {
            let token = comptime!(i as u32);
            let grown = logs_at(&logs, i, panel, TOKENS).grown(&middle);
            let own = Two::of(own[i]).scaled(out_scale).times(&grown).kept(part.inside(token, panel, plan));
            let to = part_at + token * comptime!(plan.padded() as u32 / 2) + comptime!(32 * panel as u32);
            out[to as usize] = add_rows(k0, part.first + token, part.pair, own);
        }
    }
    begin(cores);
    #[unroll]
    for n in 0..4usize {
        product(channels, h0, b0, n, comptime!(n as u32), true, true, warp, lane, cores);
    }
    commit(cores);
    wait(0u32, cores);
    scale_by(channels, &factors, 0usize, lane);
    #[unroll]
    for panel in 0..panels {
        let mut own = Array::<u32>::new(TOKENS);
        load_all(&part, k, &mut own, panel, plan);
        sync_cube();
        stage_panel(k0, channels, panel, row, lane);
        sync_cube();
        let middle = two_of(&middles, panel);
        let mut strength = Array::<f32>::new(BATCH);
        #[unroll]
        for i in 0..TOKENS {
            let token = comptime!(i as u32);
            if comptime!(i % BATCH == 0) {
                load_strengths(&part, strengths, heads, &mut strength, i, plan);
            }
            let left = logs_at(&logs, i, panel, TOKENS).negated().grown(&middle);
            let own =
                added(own[i], strength[comptime!(i % BATCH)], plan).times(&left).kept(part.inside(token, panel, plan));
            let to = part_at + token * comptime!(plan.padded() as u32 / 2) + comptime!(32 * panel as u32);
            into[to as usize] = add_rows(k0, part.first + token, part.pair, own);
        }
    }
    #[unroll]
    for panel in 0..panels {
        copy_tile(
            q0 + comptime!((panel * PANEL) as u32),
            first,
            &part,
            comptime!(32 * panel as u32),
            padded / 2u32,
            TOKENS,
        );
    }
    copy_tile(ak0, scores, &part, 0u32, 32u32, TOKENS);
    if comptime!(extras) {
        copy_tile(n0, inverse, &part, 0u32, 32u32, TOKENS);
        copy_tile(qb0, answers, &part, 0u32, 32u32, TOKENS);
        copy_tile(h0, passed, &part, 0u32, 32u32, TOKENS);
    }
}

/// All words of a unit's tokens in a panel.
#[cube]
fn load_all(part: &Part, from: &[u32], words: &mut Array<u32>, #[comptime] panel: usize, #[comptime] plan: KeyPlan) {
    #[unroll]
    for i in 0..TOKENS {
        words[i] = from[part.key_pair_at(comptime!(i as u32), panel, plan) as usize];
    }
}
