//! The tiles of a chunk's tokens, from the [`super::octets`] of units.

use cubecl::prelude::*;

use super::octets::{
    OCTET, RUN, Rows, Share, TOKEN_WORDS, ahead, centre, gate_words, load_gates, load_token, narrower, share_totals,
    sum_gates,
};
use super::parts::staged;
use super::plan::{Form, KeyPlan, PANEL};
use super::tokens::{Two, added, reader, writer};
use crate::tile::hopper::{exp2, pack_word, store_f32_pair, store_u32_four, sync_warpgroup};
use crate::tile::mma::{address_again, store_global_four};

/// What the tiles of tokens hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Decays {
    /// Vectors with the factors of their decays around the chunk's middle.
    Factors,
    /// Vectors as they are.
    None,
    /// Vectors with the decays from the chunk's start and to its end.
    Whole,
}

/// Numbers `2 j` and the next.
#[cube]
fn pair(x: &Array<f32>, #[comptime] j: usize) -> Two {
    Two { low: x[comptime!(2 * j)], high: x[comptime!(2 * j + 1)] }
}

/// Writes the unit's numbers of token `i` to the tiles, and where these have decays also its numbers of B̂. `to`: the panel of
/// queries; those of keys, readers and writers are `panels` later each.
///
/// `soon`: the decay up to the state that the token reads; it becomes that of the next token.
#[cube]
fn write_token(
    share: &Share,
    rows: &Rows,
    to: u32,
    words: &Array<u32>,
    strength: f32,
    logs: &Array<f32>,
    starts: &Array<f32>,
    middles: &Array<f32>,
    soon: &mut Array<f32>,
    out_scale: f32,
    #[comptime] i: usize,
    #[comptime] decays: Decays,
    #[comptime] plan: KeyPlan,
) {
    let at = comptime!(i % ahead(plan) * TOKEN_WORDS);
    let mut queries = Array::<u32>::new(4usize);
    let mut keys = Array::<u32>::new(4usize);
    let mut readers = Array::<u32>::new(4usize);
    let mut writers = Array::<u32>::new(4usize);
    let mut ends = Array::<u32>::new(4usize);
    #[unroll]
    for j in 0..4usize {
        let (a, b) =
            comptime!(if plan.form == Form::Key { (at + 4 + j, at + 4 + j) } else { (at + 8 + j, at + 12 + j) });
        let (a, b) = (words[a], words[b]);
        let q = Two::of(words[comptime!(at + j)]).scaled(out_scale);
        let k = added(words[comptime!(at + 4 + j)], strength, plan);
        let r = reader(a, plan);
        let w = writer(a, b, strength, plan);
        let log = pair(logs, comptime!(4 * i + j));
        let middle = pair(middles, j);
        if comptime!(decays == Decays::None) {
            queries[j] = pack_word(q.low, q.high);
            keys[j] = pack_word(k.low, k.high);
            readers[j] = pack_word(r.low, r.high);
            writers[j] = pack_word(w.low, w.high);
        } else {
            let factors = comptime!(decays == Decays::Factors);
            let grown = if comptime!(factors) { log.power() } else { log.grown(&middle) };
            let left = if comptime!(factors) { log.negated().power() } else { log.negated().grown(&middle) };
            let read = if comptime!(plan.form.reads_decayed()) {
                Two { low: grown.low + 0.0f32, high: grown.high + 0.0f32 }
            } else if comptime!(i == 0) {
                let start = pair(starts, j);
                if comptime!(factors) { start.power() } else { start.grown(&middle) }
            } else {
                Two { low: soon[comptime!(2 * j)], high: soon[comptime!(2 * j + 1)] }
            };
            soon[comptime!(2 * j)] = grown.low;
            soon[comptime!(2 * j + 1)] = grown.high;
            let q = q.times(&grown);
            let k = k.times(&left);
            let r = r.times(&read);
            let w = w.times(&left);
            queries[j] = pack_word(q.low, q.high);
            keys[j] = pack_word(k.low, k.high);
            readers[j] = pack_word(r.low, r.high);
            writers[j] = pack_word(w.low, w.high);
            if comptime!(factors) {
                let w = w.times(&middle.power());
                ends[j] = pack_word(w.low, w.high);
            } else {
                ends[j] = writers[j];
            }
        }
    }
    let row = share.first + comptime!(i as u32);
    let tile = to + row * 128u32 + ((share.lane ^ row) % 8u32) * 16u32;
    let wide = comptime!(plan.panels() * PANEL);
    store_u32_four(tile, 0usize, queries[0], queries[1], queries[2], queries[3]);
    store_u32_four(tile, wide, keys[0], keys[1], keys[2], keys[3]);
    store_u32_four(tile, comptime!(2 * wide), readers[0], readers[1], readers[2], readers[3]);
    store_u32_four(tile, comptime!(3 * wide), writers[0], writers[1], writers[2], writers[3]);
    if comptime!(decays != Decays::None) {
        store_global_four(rows.second, comptime!(2 * i * plan.padded()), ends[0], ends[1], ends[2], ends[3]);
    }
}

/// Writes the tiles of a chunk's tokens, with the factors of their decays, and B̂. Returns whether they have such factors, that
/// is, whether no channel decays by more than `range`; if not, what was written is garbage.
///
/// `to`: the warpgroup's panel of queries. `totals`: room for four rows of f32, that the team's units share, and behind them
/// one for half a chunk's decay. The team meets at the named barrier `id`.
#[cube]
pub(crate) fn write_tokens(
    share: &Share,
    rows: &Rows,
    gates: &[u32],
    strengths: &[f32],
    heads: u32,
    to: u32,
    totals: u32,
    decays: &mut [f32],
    range: f32,
    out_scale: f32,
    id: u32,
    #[comptime] plan: KeyPlan,
) -> bool {
    let mut words = Array::<u32>::new(comptime!(ahead(plan) * TOKEN_WORDS));
    let mut strength = Array::<f32>::new(comptime!(ahead(plan)));
    let mut found = Array::<u32>::new(comptime!(RUN * gate_words(plan)));
    let mut logs = Array::<f32>::new(comptime!(RUN * OCTET));
    let mut starts = Array::<f32>::new(OCTET);
    let mut middles = Array::<f32>::new(OCTET);
    let mut soon = Array::<f32>::new(OCTET);
    load_gates(share, gates, heads, &mut found, plan);
    #[unroll]
    for i in 0..comptime!(ahead(plan)) {
        load_token(share, rows, strengths, heads, &mut words, &mut strength, i, plan);
    }
    sum_gates(share, &found, &mut logs, &mut starts, plan);
    share_totals(share, totals, &logs, &starts, plan);
    sync_warpgroup(id, comptime!(128 * plan.panels() as u32));
    let fast = narrower(share, totals, range, plan);
    centre(share, totals, &mut logs, &mut starts, &mut middles, plan);
    if share.first == 0u32 {
        write_factors(share, totals, decays, &middles, fast, plan);
    }
    #[unroll]
    for i in 0..RUN {
        write_token(
            share,
            rows,
            to,
            &words,
            strength[comptime!(i % ahead(plan))],
            &logs,
            &starts,
            &middles,
            &mut soon,
            out_scale,
            i,
            Decays::Factors,
            plan,
        );
        if comptime!(i + ahead(plan) < RUN) {
            load_token(share, rows, strengths, heads, &mut words, &mut strength, comptime!(i + ahead(plan)), plan);
        }
    }
    fast
}

/// The decay over the chunk, and half of it, which is 1 where tiles have no factors.
#[cube]
fn write_factors(
    share: &Share,
    totals: u32,
    decays: &mut [f32],
    middles: &Array<f32>,
    fast: bool,
    #[comptime] plan: KeyPlan,
) {
    let factors = totals + comptime!(16 * plan.padded() as u32) + share.channel * 4u32;
    let all = address_again::<f32>(decays.as_ptr())
        + u64::cast_from((share.block * comptime!(plan.padded() as u32) + share.channel) * 4u32);
    #[unroll]
    for half in 0..2usize {
        let mut factor = Array::<u32>::new(4usize);
        let mut whole = Array::<u32>::new(4usize);
        #[unroll]
        for e in 0..4usize {
            let middle = middles[comptime!(4 * half + e)];
            factor[e] = u32::reinterpret(select(fast, exp2(middle), 1.0f32));
            whole[e] = u32::reinterpret(exp2(2.0f32 * middle));
        }
        store_u32_four(factors, comptime!(16 * half), factor[0], factor[1], factor[2], factor[3]);
        store_global_four(all, comptime!(16 * half), whole[0], whole[1], whole[2], whole[3]);
    }
}

/// Writes the tiles anew, with other decays, after [`write_tokens`] had its totals. With [`Decays::None`] also the sums of log
/// decays as panels of f32, from `sums` on; with [`Decays::Whole`] also B̂.
#[cube]
pub(crate) fn write_again(
    share: &Share,
    rows: &Rows,
    gates: &[u32],
    strengths: &[f32],
    heads: u32,
    to: u32,
    totals: u32,
    sums: u32,
    out_scale: f32,
    #[comptime] decays: Decays,
    #[comptime] plan: KeyPlan,
) {
    let mut words = Array::<u32>::new(comptime!(ahead(plan) * TOKEN_WORDS));
    let mut strength = Array::<f32>::new(comptime!(ahead(plan)));
    let mut found = Array::<u32>::new(comptime!(RUN * gate_words(plan)));
    let mut logs = Array::<f32>::new(comptime!(RUN * OCTET));
    let mut starts = Array::<f32>::new(OCTET);
    let mut middles = Array::<f32>::new(OCTET);
    let mut soon = Array::<f32>::new(OCTET);
    load_gates(share, gates, heads, &mut found, plan);
    sum_gates(share, &found, &mut logs, &mut starts, plan);
    centre(share, totals, &mut logs, &mut starts, &mut middles, plan);
    #[unroll]
    for i in 0..RUN {
        load_token(share, rows, strengths, heads, &mut words, &mut strength, i, plan);
        write_token(
            share,
            rows,
            to,
            &words,
            strength[comptime!(i % ahead(plan))],
            &logs,
            &starts,
            &middles,
            &mut soon,
            out_scale,
            i,
            decays,
            plan,
        );
        if comptime!(decays == Decays::None) {
            let panel = sums + share.channel / 64u32 * comptime!(2 * PANEL as u32);
            #[unroll]
            for j in 0..4usize {
                let log = pair(&logs, comptime!(4 * i + j));
                let first = share.channel % 64u32 / 2u32 + comptime!(j as u32);
                store_f32_pair(staged(panel, share.first + comptime!(i as u32), first), log.low, log.high);
            }
        }
    }
}
