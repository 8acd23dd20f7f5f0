//! A chunk's tokens as the units of [`super::prepare`] hold them: a unit has eight key channels of a panel at four tokens in
//! a row, eight lanes have a panel's channels at these tokens, and a warpgroup has all tokens. So all rows move in pieces of
//! 16 bytes, from device memory to a tile.

use cubecl::prelude::*;

use super::plan::{CHUNK, Form, KeyPlan};
use super::tokens::Two;
use crate::hopper_walk::parts::LOG2_E;
use crate::hopper_walk::table::CHUNK_WORDS;
use crate::tile::hopper::{load_f32_four, load_f32_pair, store_u32_four};
use crate::tile::mma::{address_again, load_global_four, prefetch};

/// Tokens a unit.
pub(crate) const RUN: usize = 4;
/// Channels a unit.
pub(crate) const OCTET: usize = 8;
/// Words of a token's q, k, a and b.
pub(super) const TOKEN_WORDS: usize = 4 * OCTET / 2;
/// Tokens that are on their way before the first is used: as many as there are registers for.
pub(super) fn ahead(plan: KeyPlan) -> usize {
    if plan.panels() == 1 { 2 } else { 1 }
}

/// A chunk of one head, and the part of it that a unit has.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Share {
    pub(crate) head: u32,
    /// The head of its keys, and how many there are.
    pub(crate) key_head: u32,
    pub(crate) key_heads: u32,
    /// The chunk's first token.
    pub(crate) start: u32,
    /// How many tokens it has, and those of them that have the unit's channels: all or none.
    pub(crate) length: u32,
    pub(crate) count: u32,
    /// The chunk and head among all.
    pub(crate) block: u32,
    /// The unit's first token inside of the chunk, and its first channel.
    pub(crate) first: u32,
    pub(crate) channel: u32,
    pub(crate) warp: u32,
    pub(crate) lane: u32,
}

/// The first token of a chunk, and how many it has.
#[cube]
pub(crate) fn tokens_of(block: u32, table: &[i32], table_at: u32, heads: u32) -> (u32, u32) {
    let at = (table_at + block / heads * comptime!(CHUNK_WORDS as u32)) as usize;
    (table[at] as u32, table[at + 1] as u32)
}

/// The share of a unit of warpgroup `panel`.
#[cube]
pub(crate) fn share_of(
    block: u32,
    tokens: (u32, u32),
    heads: u32,
    groups: u32,
    panel: u32,
    unit: u32,
    #[comptime] plan: KeyPlan,
) -> Share {
    let (start, length) = tokens;
    let channel = panel * 64u32 + unit % 8u32 * comptime!(OCTET as u32);
    Share {
        head: block % heads,
        key_head: block % heads / groups,
        key_heads: heads / groups,
        start,
        length,
        count: select(channel < comptime!(plan.keys as u32), length, 0u32),
        block,
        first: unit / 8u32 * comptime!(RUN as u32),
        channel,
        warp: unit / 32u32,
        lane: unit % 32u32,
    }
}

/// Brings the vectors and log decays of a chunk nearer: two units a token and panel ask for a line of each.
#[cube]
pub(crate) fn prefetch_tokens(
    share: &Share,
    q: &[u32],
    k: &[u32],
    a: &[u32],
    b: &[u32],
    gates: &[u32],
    heads: u32,
    #[comptime] plan: KeyPlan,
) {
    let unit = share.warp * 32u32 + share.lane;
    let second = unit % 2u32 == 1u32;
    let token = u64::cast_from(share.start + u32::min(unit / 2u32, share.length - 1u32));
    let channel = share.channel / 64u32 * 64u32;
    let row = token * u64::cast_from(share.key_heads) + u64::cast_from(share.key_head);
    let at = row * comptime!(2 * plan.keys as u64) + u64::cast_from(2u32 * channel);
    prefetch(select(second, address_again::<u32>(k.as_ptr()), address_again::<u32>(q.as_ptr())) + at);
    if comptime!(plan.form != Form::Key) {
        prefetch(select(second, address_again::<u32>(b.as_ptr()), address_again::<u32>(a.as_ptr())) + at);
    }
    let row = token * u64::cast_from(heads) + u64::cast_from(share.head);
    let gates = address_again::<u32>(gates.as_ptr());
    if comptime!(plan.wide) {
        let half = u32::min(channel + select(second, 32u32, 0u32), comptime!(plan.keys as u32 - 1));
        prefetch(gates + row * comptime!(4 * plan.keys as u64) + u64::cast_from(4u32 * half));
    } else if !second {
        prefetch(gates + row * comptime!(2 * plan.keys as u64) + u64::cast_from(2u32 * channel));
    }
}

#[cube]
impl Share {
    /// Whether token `i` of the unit and its channels exist.
    fn inside(&self, #[comptime] i: usize) -> bool {
        self.first + comptime!(i as u32) < self.count
    }

    /// The unit's token `i` in its chunk; where there is none, one that there is.
    fn token(&self, #[comptime] i: usize) -> u32 {
        u32::min(self.first + comptime!(i as u32), self.length - 1u32)
    }

    /// Where the unit's numbers of `bytes` bytes begin at the chunk's first token in a tensor `[tokens, heads, K]` at `from`;
    /// where there are none, some that there are.
    fn row(&self, from: u64, head: u32, heads: u32, #[comptime] bytes: usize, #[comptime] plan: KeyPlan) -> u64 {
        let row = u64::cast_from(self.start) * u64::cast_from(heads) + u64::cast_from(head);
        let channel = u32::min(self.channel, comptime!((plan.keys - OCTET) as u32));
        from + row * comptime!((plan.keys * bytes) as u64) + u64::cast_from(channel * comptime!(bytes as u32))
    }

    /// Where they begin in a block of rows of bf16 at `to`, and bytes of such a row.
    fn out_row(&self, to: u64, #[comptime] plan: KeyPlan) -> u64 {
        let row = u64::cast_from(self.block * comptime!(CHUNK as u32) + self.first);
        to + row * comptime!((2 * plan.padded()) as u64) + u64::cast_from(2u32 * self.channel)
    }
}

/// Where the vectors of a chunk's tokens are, for a unit: the rows of the chunk's first token in q, k, a and b, bytes from one
/// token to the next, and the row of its own first one in B̂.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) step: u64,
    pub(crate) second: u64,
}

#[cube]
pub(crate) fn rows_of(
    share: &Share,
    q: &[u32],
    k: &[u32],
    a: &[u32],
    b: &[u32],
    second: &mut [u32],
    #[comptime] plan: KeyPlan,
) -> Rows {
    let base = share.row(0u64, share.key_head, share.key_heads, 2usize, plan);
    Rows {
        q: address_again::<u32>(q.as_ptr()) + base,
        k: address_again::<u32>(k.as_ptr()) + base,
        a: address_again::<u32>(a.as_ptr()) + base,
        b: address_again::<u32>(b.as_ptr()) + base,
        step: u64::cast_from(share.key_heads * comptime!(2 * plan.keys as u32)),
        second: share.out_row(address_again::<u32>(second.as_ptr()), plan),
    }
}

/// Words of a token's log decays.
pub(crate) fn gate_words(plan: KeyPlan) -> usize {
    if plan.wide { OCTET } else { OCTET / 2 }
}

/// Loads the log decays of a unit's tokens.
#[cube]
pub(crate) fn load_gates(share: &Share, gates: &[u32], heads: u32, found: &mut Array<u32>, #[comptime] plan: KeyPlan) {
    let bytes = comptime!(if plan.wide { 4usize } else { 2usize });
    let from = share.row(address_again::<u32>(gates.as_ptr()), share.head, heads, bytes, plan);
    let step = u64::cast_from(heads * comptime!((plan.keys * bytes) as u32));
    #[unroll]
    for i in 0..RUN {
        let token = from + u64::cast_from(share.token(i)) * step;
        #[unroll]
        for piece in 0..comptime!(gate_words(plan) / 4) {
            let at = comptime!(i * gate_words(plan) + 4 * piece);
            load_four(found, token + comptime!(16 * piece as u64), share.inside(i), at);
        }
    }
}

/// Four words at `from`, or zeros. A load that is left out would leave its registers what they were, and so in use from one
/// chunk to the next.
#[cube]
fn load_four(to: &mut Array<u32>, from: u64, inside: bool, #[comptime] at: usize) {
    let found = load_global_four(from);
    #[unroll]
    for e in 0..4usize {
        to[comptime!(at + e)] = select(inside, found.extract(e), 0u32);
    }
}

/// Loads q, k and, where the form has them, a and b of a unit's token `i`.
#[cube]
pub(crate) fn load_token(
    share: &Share,
    rows: &Rows,
    strengths: &[f32],
    heads: u32,
    words: &mut Array<u32>,
    strength: &mut Array<f32>,
    #[comptime] i: usize,
    #[comptime] plan: KeyPlan,
) {
    let inside = share.inside(i);
    let step = u64::cast_from(share.token(i)) * rows.step;
    let at = comptime!(i % ahead(plan) * TOKEN_WORDS);
    load_four(words, rows.q + step, inside, at);
    load_four(words, rows.k + step, inside, comptime!(at + 4));
    if comptime!(plan.form == Form::Key) {
        let token = share.start + share.token(i);
        strength[comptime!(i % ahead(plan))] = strengths[(token * heads + share.head) as usize];
    } else {
        load_four(words, rows.a + step, inside, comptime!(at + 8));
        load_four(words, rows.b + step, inside, comptime!(at + 12));
    }
}

/// The sums of a unit's log decays, as powers of two: over its tokens up to each, to `logs`; over those of its warp before
/// it, to `starts`.
#[cube]
pub(crate) fn sum_gates(
    share: &Share,
    found: &Array<u32>,
    logs: &mut Array<f32>,
    starts: &mut Array<f32>,
    #[comptime] plan: KeyPlan,
) {
    #[unroll]
    for c in 0..OCTET {
        let mut sum = f32::new(0.0);
        #[unroll]
        for i in 0..RUN {
            let gate = if comptime!(plan.wide) {
                f32::reinterpret(found[comptime!(i * OCTET + c)])
            } else {
                let pair = Two::of(found[comptime!((i * OCTET + c) / 2)]);
                if comptime!(c % 2 == 0) { pair.low } else { pair.high }
            };
            sum += gate * LOG2_E;
            logs[comptime!(i * OCTET + c)] = sum;
        }
    }
    let group = share.lane / 8u32;
    #[unroll]
    for c in 0..OCTET {
        let sum = logs[comptime!((RUN - 1) * OCTET + c)];
        let mut before = f32::new(0.0);
        #[unroll]
        for back in 1..4usize {
            let found = plane_shuffle_up(sum, comptime!(8 * back as u32));
            before += select(group >= comptime!(back as u32), found, 0.0f32);
        }
        starts[c] = before;
    }
}

/// Writes what a warp's tokens sum to, `[warps, channels]`, to `totals`; a synchronisation must follow.
#[cube]
pub(crate) fn share_totals(
    share: &Share,
    totals: u32,
    logs: &Array<f32>,
    starts: &Array<f32>,
    #[comptime] plan: KeyPlan,
) {
    if share.lane >= 24u32 {
        let at = totals + (share.warp * comptime!(plan.padded() as u32) + share.channel) * 4u32;
        #[unroll]
        for half in 0..2usize {
            let mut sum = Array::<u32>::new(4usize);
            #[unroll]
            for e in 0..4usize {
                let c = comptime!(4 * half + e);
                sum[e] = u32::reinterpret(starts[c] + logs[comptime!((RUN - 1) * OCTET + c)]);
            }
            store_u32_four(at, comptime!(16 * half), sum[0], sum[1], sum[2], sum[3]);
        }
    }
}

/// Whether no channel decays by more than `range` over the chunk; the same for all units.
#[cube]
pub(crate) fn narrower(share: &Share, totals: u32, range: f32, #[comptime] plan: KeyPlan) -> bool {
    let channels = comptime!(plan.padded() / 32);
    let mut total = Array::<f32>::new(channels);
    #[unroll]
    for warp in 0..4usize {
        let at = totals + comptime!((4 * warp * plan.padded()) as u32) + share.lane * comptime!(4 * channels as u32);
        #[unroll]
        for part in 0..comptime!(channels / 2) {
            let found = load_f32_pair(at + comptime!(8 * part as u32));
            #[unroll]
            for e in 0..2usize {
                let c = comptime!(2 * part + e);
                total[c] = if comptime!(warp == 0) { found.extract(e) } else { total[c] + found.extract(e) };
            }
        }
    }
    let mut widest = f32::new(0.0);
    #[unroll]
    for c in 0..channels {
        widest = f32::max(widest, -total[c]);
    }
    plane_max(widest) <= range
}

/// Makes the sums those of the chunk, counted from the middle of its decay: `starts` gets that before the unit's first token,
/// and `middles` half a chunk's decay.
#[cube]
pub(crate) fn centre(
    share: &Share,
    totals: u32,
    logs: &mut Array<f32>,
    starts: &mut Array<f32>,
    middles: &mut Array<f32>,
    #[comptime] plan: KeyPlan,
) {
    #[unroll]
    for half in 0..2usize {
        #[unroll]
        for warp in 0..4usize {
            let row = comptime!((4 * warp * plan.padded() + 16 * half) as u32);
            let found = load_f32_four(totals + row + share.channel * 4u32);
            let earlier = comptime!(warp as u32) < share.warp;
            #[unroll]
            for e in 0..4usize {
                let c = comptime!(4 * half + e);
                let sum = found.extract(e);
                middles[c] = if comptime!(warp == 0) { sum + 0.0f32 } else { middles[c] + sum };
                starts[c] += select(earlier, sum, 0.0f32);
            }
        }
    }
    #[unroll]
    for c in 0..OCTET {
        middles[c] *= 0.5f32;
        starts[c] -= middles[c];
        #[unroll]
        for i in 0..RUN {
            logs[comptime!(i * OCTET + c)] += starts[c];
        }
    }
}
