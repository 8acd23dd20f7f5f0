//! A chunk's tokens as plain units hold them: a unit has two key channels of each panel, at some tokens in a row; a warp has
//! all channels of these tokens.

use cubecl::prelude::*;

use super::plan::{CHUNK, Form, KeyPlan, RANGE};
use crate::hopper_walk::parts::LOG2_E;
use crate::hopper_walk::table::CHUNK_WORDS;
use crate::tile::hopper::{bf16_high, bf16_low, exp2};

/// Tokens that are loaded before the first of them is used.
pub(crate) const BATCH: usize = 8;

/// A chunk of one head, and the part of it that a unit has.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) head: u32,
    /// The head of its keys, and how many there are.
    pub(crate) key_head: u32,
    pub(crate) key_heads: u32,
    /// The chunk's first token, and how many it has.
    pub(crate) start: u32,
    pub(crate) length: u32,
    /// The chunk and head among all.
    pub(crate) block: u32,
    /// The unit's first token inside the chunk; its warp's number among those that share the chunk.
    pub(crate) first: u32,
    pub(crate) warp: u32,
    /// The unit's pair of channels in a panel.
    pub(crate) pair: u32,
}

/// The part of `unit`, where `tokens` tokens are a warp's.
#[cube]
pub(crate) fn part_of(
    block: u32,
    table: &[i32],
    table_at: u32,
    heads: u32,
    groups: u32,
    unit: u32,
    #[comptime] tokens: usize,
) -> Part {
    let at = (table_at + block / heads * comptime!(CHUNK_WORDS as u32)) as usize;
    let warp = unit / 32u32;
    Part {
        head: block % heads,
        key_head: block % heads / groups,
        key_heads: heads / groups,
        start: table[at] as u32,
        length: table[at + 1] as u32,
        block,
        first: warp * comptime!(tokens as u32),
        warp,
        pair: unit % 32u32,
    }
}

/// Two numbers that stand side by side.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Two {
    pub(crate) low: f32,
    pub(crate) high: f32,
}

#[cube]
impl Two {
    pub(crate) fn of(word: u32) -> Two {
        Two { low: bf16_low(word), high: bf16_high(word) }
    }

    /// Both as powers of two.
    pub(crate) fn power(&self) -> Two {
        Two { low: exp2(self.low), high: exp2(self.high) }
    }

    /// Both sums as powers of two.
    pub(crate) fn grown(&self, by: &Two) -> Two {
        Two { low: exp2(self.low + by.low), high: exp2(self.high + by.high) }
    }

    pub(crate) fn scaled(&self, by: f32) -> Two {
        Two { low: self.low * by, high: self.high * by }
    }

    pub(crate) fn times(&self, by: &Two) -> Two {
        Two { low: self.low * by.low, high: self.high * by.high }
    }

    pub(crate) fn negated(&self) -> Two {
        Two { low: -self.low, high: -self.high }
    }

    /// Both, or zeros.
    pub(crate) fn kept(&self, keep: bool) -> Two {
        Two { low: select(keep, self.low, 0.0f32), high: select(keep, self.high, 0.0f32) }
    }
}

#[cube]
impl Part {
    /// Whether token `i` of the unit and its channels of a panel exist.
    pub(crate) fn inside(&self, i: u32, #[comptime] panel: usize, #[comptime] plan: KeyPlan) -> bool {
        self.first + i < self.length && self.channel(panel) < comptime!(plan.keys as u32)
    }

    /// The first of its two channels.
    pub(crate) fn channel(&self, #[comptime] panel: usize) -> u32 {
        comptime!(64 * panel as u32) + 2u32 * self.pair
    }

    /// The unit's token `i` among all; where there is none, one that there is.
    fn token(&self, i: u32) -> u32 {
        self.start + u32::min(self.first + i, self.length - 1u32)
    }

    /// The pair of a row `[tokens, heads, K]` at the unit's token `i`, counted in pairs. Where there is none, one that there is.
    pub(crate) fn pair_at(&self, i: u32, heads: u32, #[comptime] panel: usize, #[comptime] plan: KeyPlan) -> u32 {
        let channel = u32::min(self.channel(panel), comptime!(plan.keys as u32 - 2));
        ((self.token(i) * heads + self.head) * comptime!(plan.keys as u32) + channel) / 2u32
    }

    /// The same of a row `[tokens, key heads, K]`.
    pub(crate) fn key_pair_at(&self, i: u32, #[comptime] panel: usize, #[comptime] plan: KeyPlan) -> u32 {
        let channel = u32::min(self.channel(panel), comptime!(plan.keys as u32 - 2));
        ((self.token(i) * self.key_heads + self.key_head) * comptime!(plan.keys as u32) + channel) / 2u32
    }
}

/// The log decays of a pair of channels, as powers of two.
#[cube]
fn gates_at(gates: &[u32], pair: u32, #[comptime] plan: KeyPlan) -> Two {
    let found = if comptime!(plan.wide) {
        Two {
            low: f32::reinterpret(gates[(2u32 * pair) as usize]),
            high: f32::reinterpret(gates[(2u32 * pair + 1u32) as usize]),
        }
    } else {
        Two::of(gates[pair as usize])
    };
    found.scaled(LOG2_E)
}

/// A unit's running sums of log decays over its own tokens, and these tokens' totals, `[warps, channels]`, to `totals[room..]`; a synchronisation
/// must follow.
#[cube]
pub(crate) fn sum_decays(
    part: &Part,
    gates: &[u32],
    heads: u32,
    totals: &mut [f32],
    room: usize,
    logs: &mut Array<f32>,
    #[comptime] tokens: usize,
    #[comptime] plan: KeyPlan,
) {
    #[unroll]
    for panel in 0..comptime!(plan.panels()) {
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        #[unroll]
        for i in 0..tokens {
            let token = comptime!(i as u32);
            let g = gates_at(gates, part.pair_at(token, heads, panel, plan), plan);
            let g = g.kept(part.inside(token, panel, plan));
            low += g.low;
            high += g.high;
            logs[comptime!(2 * (panel * tokens + i))] = low;
            logs[comptime!(2 * (panel * tokens + i) + 1)] = high;
        }
        let at = room + (part.warp * comptime!(plan.padded() as u32) + part.channel(panel)) as usize;
        totals[at] = low;
        totals[at + 1] = high;
    }
}

/// Makes the running sums those of the chunk, counted from the middle of its decay. Returns whether no channel decays by more
/// than [`RANGE`].
///
/// `middles` gets half a chunk's decay, `befores` the sum before the unit's first token, counted alike.
#[cube]
pub(crate) fn centre_decays(
    part: &Part,
    totals: &[f32],
    room: usize,
    logs: &mut Array<f32>,
    middles: &mut Array<f32>,
    befores: &mut Array<f32>,
    #[comptime] tokens: usize,
    #[comptime] plan: KeyPlan,
) -> bool {
    let mut widest = f32::new(0.0);
    #[unroll]
    for panel in 0..comptime!(plan.panels()) {
        #[unroll]
        for e in 0..2usize {
            let mut before = f32::new(0.0);
            let mut total = f32::new(0.0);
            #[unroll]
            for warp in 0..comptime!(CHUNK / tokens) {
                let at = comptime!(warp as u32 * plan.padded() as u32) + part.channel(panel) + comptime!(e as u32);
                let found = totals[room + at as usize];
                total += found;
                before += select(comptime!(warp as u32) < part.warp, found, 0.0f32);
            }
            let middle = total * 0.5f32;
            widest = f32::max(widest, -total);
            middles[comptime!(2 * panel + e)] = middle;
            befores[comptime!(2 * panel + e)] = before - middle;
            #[unroll]
            for i in 0..tokens {
                logs[comptime!(2 * (panel * tokens + i) + e)] += before - middle;
            }
        }
    }
    plane_max(widest) <= RANGE
}

/// The running sums of a unit's token `i`.
#[cube]
pub(crate) fn logs_at(
    logs: &Array<f32>,
    #[comptime] i: usize,
    #[comptime] panel: usize,
    #[comptime] tokens: usize,
) -> Two {
    Two { low: logs[comptime!(2 * (panel * tokens + i))], high: logs[comptime!(2 * (panel * tokens + i) + 1)] }
}

/// Those before it.
#[cube]
pub(crate) fn logs_before(
    logs: &Array<f32>,
    befores: &Array<f32>,
    #[comptime] i: usize,
    #[comptime] panel: usize,
    #[comptime] tokens: usize,
) -> Two {
    if comptime!(i == 0) {
        two_of(befores, panel)
    } else {
        logs_at(logs, comptime!(i.saturating_sub(1)), panel, tokens)
    }
}

/// Those up to which the state that token `i` reads has decayed.
#[cube]
pub(crate) fn logs_read(
    logs: &Array<f32>,
    befores: &Array<f32>,
    #[comptime] i: usize,
    #[comptime] panel: usize,
    #[comptime] tokens: usize,
    #[comptime] plan: KeyPlan,
) -> Two {
    if comptime!(plan.form.reads_decayed()) {
        logs_at(logs, i, panel, tokens)
    } else {
        logs_before(logs, befores, i, panel, tokens)
    }
}

/// A panel's two numbers.
#[cube]
pub(crate) fn two_of(x: &Array<f32>, #[comptime] panel: usize) -> Two {
    Two { low: x[comptime!(2 * panel)], high: x[comptime!(2 * panel + 1)] }
}

/// The words of `BATCH` of a unit's tokens from `first` on, in a panel: all are on their way before one is used.
#[cube]
pub(crate) fn load_words(
    part: &Part,
    from: &[u32],
    words: &mut Array<u32>,
    #[comptime] first: usize,
    #[comptime] panel: usize,
    #[comptime] plan: KeyPlan,
) {
    #[unroll]
    for i in 0..BATCH {
        words[i] = from[part.key_pair_at(comptime!((first + i) as u32), panel, plan) as usize];
    }
}

/// The writing strengths of these tokens, where the form has any.
#[cube]
pub(crate) fn load_strengths(
    part: &Part,
    strengths: &[f32],
    heads: u32,
    found: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] plan: KeyPlan,
) {
    #[unroll]
    for i in 0..BATCH {
        found[i] = if comptime!(plan.form == Form::Key) {
            strengths[(part.token(comptime!((first + i) as u32)) * heads + part.head) as usize]
        } else {
            f32::new(1.0)
        };
    }
}

/// The vector that values are added with.
#[cube]
pub(crate) fn added(k: u32, strength: f32, #[comptime] plan: KeyPlan) -> Two {
    let found = Two::of(k);
    if comptime!(plan.form == Form::Key) { found.scaled(strength) } else { found }
}

/// The vector that reads.
#[cube]
pub(crate) fn reader(a: u32, #[comptime] plan: KeyPlan) -> Two {
    let found = Two::of(a);
    if comptime!(plan.form == Form::Free) { found } else { found.negated() }
}

/// The vector that what was read is written with.
#[cube]
pub(crate) fn writer(a: u32, b: u32, strength: f32, #[comptime] plan: KeyPlan) -> Two {
    let found = Two::of(b);
    if comptime!(plan.form == Form::Removal) {
        found.times(&Two::of(a))
    } else if comptime!(plan.form == Form::Key) {
        found.scaled(strength)
    } else {
        found
    }
}
