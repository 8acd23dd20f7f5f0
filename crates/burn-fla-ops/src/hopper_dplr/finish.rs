//! The end of [`super::gradients`]: from sums in registers to the gradients of the inputs, by plain units.

use cubecl::prelude::*;

use super::exact::tile_pair;
use super::gradient_parts::Room;
use super::gradients::TOKENS_OF_WARP;
use super::parts::{stage_panel, staged_pair};
use super::plan::{Form, GradientPlan, PANEL, TEAM};
use super::tokens::{BATCH, Part, Two, load_words, logs_at, logs_before, logs_read, two_of};
use crate::tile::hopper::{exp2, pack_word, sync_warpgroup};

/// Warps of a team.
const WARPS: usize = TEAM / 32;

/// Below this log decay, as a power of two, a decay's gradient is less than the rounding of the sums it is the end of.
const FORGOTTEN: f32 = -24.5;

/// Where a team's sums are, of warps by key channel: of decays, later of what counts for the tokens up to a warp's; of the
/// products of both states; of what counts for the tokens after a warp's; and once a channel, the half chunk's decay and its
/// logarithm.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Sums {
    pub(crate) decays: usize,
    pub(crate) ends: usize,
    pub(crate) inters: usize,
    pub(crate) factors: usize,
    pub(crate) middles: usize,
}

#[cube]
impl Sums {
    pub(crate) fn of(#[comptime] plan: GradientPlan) -> Sums {
        let decays = 0usize.runtime();
        let all = comptime!(WARPS * plan.key.padded());
        let ends = decays + all;
        let inters = ends + all;
        let factors = inters + all;
        Sums { decays, ends, inters, factors, middles: factors + comptime!(plan.key.padded()) }
    }
}

/// The gradients of a panel of key channels.
#[cube]
pub(crate) fn finish_panel(
    t: &Room,
    part: &Part,
    sums: &mut [f32],
    at: &Sums,
    logs: &Array<f32>,
    befores: &Array<f32>,
    middles: &Array<f32>,
    strength: &Array<f32>,
    of_strength: &mut Array<f32>,
    a: &[u32],
    b: &[u32],
    dq: &mut [u32],
    dk: &mut [u32],
    da: &mut [u32],
    db: &mut [u32],
    dg: &mut [u32],
    fast: bool,
    reads: bool,
    row: u32,
    lane: u32,
    id: u32,
    heads: u32,
    out_scale: f32,
    #[comptime] panel: usize,
    #[comptime] plan: GradientPlan,
) {
    let key = comptime!(plan.key);
    let tile = comptime!((panel * PANEL) as u32);
    let first = t.stage + 0u32;
    let second = first + comptime!(2 * PANEL as u32);
    let third = if comptime!(plan.parks) {
        t.inter + comptime!((2 * panel * PANEL) as u32)
    } else {
        second + comptime!(2 * PANEL as u32)
    };
    let mut removal = Array::<u32>::new(BATCH);
    let mut rate = Array::<u32>::new(BATCH);
    if comptime!(key.form != Form::Free) {
        load_words(part, a, &mut removal, 0usize, panel, key);
    }
    if comptime!(key.form == Form::Removal) {
        load_words(part, b, &mut rate, 0usize, panel, key);
    }
    // What writes.
    if !reads {
        stage_panel(first, comptime!(plan.outer()), panel, row, lane);
        stage_panel(second, comptime!(plan.inner()), panel, row, lane);
        if comptime!(!plan.parks) {
            stage_panel(third, comptime!(plan.inter()), panel, row, lane);
        }
    }
    sync_warpgroup(id, comptime!(TEAM as u32));
    let mut terms = Array::<f32>::new(comptime!(2 * TOKENS_OF_WARP));
    let mut inters = Array::<f32>::new(comptime!(2 * TOKENS_OF_WARP));
    let mut removed = Array::<f32>::new(comptime!(2 * TOKENS_OF_WARP));
    #[unroll]
    for i in 0..TOKENS_OF_WARP {
        let token = comptime!(i as u32);
        let line = part.first + token;
        let to = part.pair_at(token, heads, panel, key) as usize;
        let inside = part.inside(token, panel, key);
        let left = logs_at(logs, i, panel, TOKENS_OF_WARP).kept(fast).negated().power();
        let of_key = staged_pair(first, line, part.pair);
        let of_writer = staged_pair(second, line, part.pair);
        let inter = staged_pair(third, line, part.pair);
        let by_key = tile_pair(t.k + tile, line, part.pair).times(&of_key);
        let by_writer = tile_pair(t.b + tile, line, part.pair).times(&of_writer);
        terms[comptime!(2 * i)] = inter.low - by_key.low - by_writer.low;
        terms[comptime!(2 * i + 1)] = inter.high - by_key.high - by_writer.high;
        inters[comptime!(2 * i)] = inter.low;
        inters[comptime!(2 * i + 1)] = inter.high;
        let of_key = of_key.times(&left);
        let of_writer = of_writer.times(&left);
        if comptime!(key.form == Form::Key) {
            // Both are β k; what reads adds to its gradient below.
            let all = Two { low: of_key.low + of_writer.low, high: of_key.high + of_writer.high };
            let product = Two::of(removal[i]).times(&all).kept(inside);
            let sum = product.low + product.high;
            of_strength[i] = if comptime!(panel == 0) { sum } else { of_strength[i] + sum };
            removed[comptime!(2 * i)] = all.low * strength[i];
            removed[comptime!(2 * i + 1)] = all.high * strength[i];
        } else if inside {
            dk[to] = pack_word(of_key.low, of_key.high);
            if comptime!(key.form == Form::Removal) {
                let of_rate = Two::of(removal[i]).times(&of_writer);
                db[to] = pack_word(of_rate.low, of_rate.high);
            } else {
                db[to] = pack_word(of_writer.low, of_writer.high);
            }
        }
        if comptime!(key.form == Form::Removal) {
            let rate = Two::of(rate[i]);
            removed[comptime!(2 * i)] = rate.low * of_writer.low;
            removed[comptime!(2 * i + 1)] = rate.high * of_writer.high;
        }
    }
    sync_warpgroup(id, comptime!(TEAM as u32));
    // What reads.
    if reads {
        stage_panel(first, comptime!(plan.outer()), panel, row, lane);
        stage_panel(second, comptime!(plan.inner()), panel, row, lane);
    }
    sync_warpgroup(id, comptime!(TEAM as u32));
    let mut after_low = f32::new(0.0);
    let mut after_high = f32::new(0.0);
    #[unroll]
    for back in 0..TOKENS_OF_WARP {
        let i = comptime!(TOKENS_OF_WARP - 1 - back);
        let token = comptime!(i as u32);
        let line = part.first + token;
        let to = part.pair_at(token, heads, panel, key) as usize;
        let of_query = staged_pair(first, line, part.pair);
        let of_reader = staged_pair(second, line, part.pair);
        let by_query = tile_pair(t.q + tile, line, part.pair).times(&of_query);
        let by_reader = tile_pair(t.a + tile, line, part.pair).times(&of_reader);
        let low = terms[comptime!(2 * i)] + by_query.low;
        let high = terms[comptime!(2 * i + 1)] + by_query.high;
        if comptime!(key.form.reads_decayed()) {
            after_low += low + by_reader.low;
            after_high += high + by_reader.high;
            terms[comptime!(2 * i)] = after_low;
            terms[comptime!(2 * i + 1)] = after_high;
        } else {
            terms[comptime!(2 * i)] = after_low + low;
            terms[comptime!(2 * i + 1)] = after_high + high;
            after_low += low + by_reader.low;
            after_high += high + by_reader.high;
        }
        let of_query = of_query.times(&logs_at(logs, i, panel, TOKENS_OF_WARP).kept(fast).power()).scaled(out_scale);
        let before = logs_read(logs, befores, i, panel, TOKENS_OF_WARP, key).kept(fast).power();
        let of_reader = of_reader.times(&before);
        if part.inside(token, panel, key) {
            dq[to] = pack_word(of_query.low, of_query.high);
            if comptime!(key.form != Form::Free) {
                let low = removed[comptime!(2 * i)] - of_reader.low;
                let high = removed[comptime!(2 * i + 1)] - of_reader.high;
                if comptime!(key.form == Form::Key) {
                    dk[to] = pack_word(low, high);
                } else {
                    da[to] = pack_word(low, high);
                }
            } else {
                da[to] = pack_word(of_reader.low, of_reader.high);
            }
        }
    }
    let mut before_low = f32::new(0.0);
    let mut before_high = f32::new(0.0);
    #[unroll]
    for i in 0..TOKENS_OF_WARP {
        terms[comptime!(2 * i)] += before_low;
        terms[comptime!(2 * i + 1)] += before_high;
        before_low += inters[comptime!(2 * i)];
        before_high += inters[comptime!(2 * i + 1)];
    }
    let padded = comptime!(plan.key.padded() as u32);
    let channel = part.channel(panel);
    let own = (part.warp * padded + channel) as usize;
    sums[at.decays + own] = after_low;
    sums[at.decays + own + 1] = after_high;
    sums[at.inters + own] = before_low;
    sums[at.inters + own + 1] = before_high;
    sync_warpgroup(id, comptime!(TEAM as u32));
    let middle = two_of(middles, panel);
    let mut ends_low = f32::new(0.0);
    let mut ends_high = f32::new(0.0);
    let mut rest_low = f32::new(0.0);
    let mut rest_high = f32::new(0.0);
    #[unroll]
    for warp in 0..WARPS {
        let from = (comptime!(warp as u32) * padded + channel) as usize;
        let later = comptime!(warp as u32) > part.warp;
        let sooner = comptime!(warp as u32) < part.warp;
        ends_low += sums[at.ends + from];
        ends_high += sums[at.ends + from + 1];
        rest_low += select(later, sums[at.decays + from], select(sooner, sums[at.inters + from], 0.0f32));
        rest_high += select(later, sums[at.decays + from + 1], select(sooner, sums[at.inters + from + 1], 0.0f32));
    }
    rest_low += ends_low * exp2(2.0f32 * middle.low);
    rest_high += ends_high * exp2(2.0f32 * middle.high);
    #[unroll]
    for i in 0..TOKENS_OF_WARP {
        let token = comptime!(i as u32);
        let to = part.pair_at(token, heads, panel, key) as usize;
        let log = logs_at(logs, i, panel, TOKENS_OF_WARP);
        let before = logs_before(logs, befores, i, panel, TOKENS_OF_WARP);
        if part.inside(token, panel, key) {
            let low = select(log.low - before.low > FORGOTTEN, terms[comptime!(2 * i)] + rest_low, 0.0f32);
            let high = select(log.high - before.high > FORGOTTEN, terms[comptime!(2 * i + 1)] + rest_high, 0.0f32);
            if comptime!(key.wide) {
                dg[2 * to] = u32::reinterpret(low);
                dg[2 * to + 1] = u32::reinterpret(high);
            } else {
                dg[to] = pack_word(low, high);
            }
        }
    }
}

/// The gradients of the writing strengths of a warp's tokens, from a unit's own channels.
#[cube]
pub(crate) fn store_strengths(part: &Part, of_strength: &Array<f32>, dbeta: &mut [f32], heads: u32) {
    #[unroll]
    for i in 0..TOKENS_OF_WARP {
        let row = part.first + comptime!(i as u32);
        let sum = plane_sum(of_strength[i]);
        if row < part.length && part.pair == 0u32 {
            dbeta[((part.start + row) * heads + part.head) as usize] = sum;
        }
    }
}
