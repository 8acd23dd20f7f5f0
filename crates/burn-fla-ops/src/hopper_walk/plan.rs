//! What a walk is specialised on, and how it is chosen.

use crate::ssd::Skip;
use crate::tile::hopper::{Acc, Frag};

/// Tokens a chunk.
pub(crate) const CHUNK: usize = 64;
/// Bytes of one panel of 64 rows.
pub(crate) const PANEL: usize = 64 * 128;
/// Shared memory a cube may use, less what barriers and decays take.
const SHARED: usize = 232_448 - 4_096;
/// Words of registers that the state before a chunk keeps for each panel of 64 state columns, a warpgroup: two bf16 a word.
pub(crate) const BORDER_WORDS: usize = 16 * 128;

/// Rows of values that are loaded beside a chunk's: a multiple of 8, as the swizzle repeats.
pub(crate) const BESIDE: usize = 8;

/// Tiles that a walk for all gradients has of each head, in each of its stages and beside them: see [`super::all`].
pub(crate) const ALL_TILES: usize = 5;
const ALL_FIXED: usize = 3;

/// Whether two narrow heads are walked side by side: see [`WalkPlan::paired`].
const PAIRS: bool = true;

/// Sums that a chunk's end has for each key channel: one of the state, and two of each warp's tokens.
pub(crate) const END_SUMS: usize = 9;

/// The scores of a chunk.
pub(crate) const SCORES: Acc = Acc::new("a", 64);
/// The outputs of a chunk.
pub(crate) const OUT: Acc = Acc::new("o", 64);
/// Decayed scores as a left operand.
pub(crate) const DECAYED: Frag = Frag::new("p", 64);
/// Transposed, decayed values as a left operand.
pub(crate) const VALUES: Frag = Frag::new("u", 64);

/// What the log decay depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Axis {
    /// Nothing: there is none.
    None,
    /// The head alone.
    Head,
    /// The token: one number for all channels.
    Token,
    /// The token and the key channel.
    Key,
    /// The token and the value channel.
    Value,
}

impl Axis {
    /// Whether each channel of keys or values has a decay of its own.
    pub(crate) fn by_channel(self) -> bool {
        matches!(self, Self::Key | Self::Value)
    }
}

/// Which of the heads of queries and keys a head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum KeyHeads {
    /// Its own.
    Own,
    /// One of so many, those that share it side by side.
    Contiguous(usize),
    /// One of so many, in turn.
    Tiled(usize),
}

/// What a walk does with the states between chunks, for the gate's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Borders {
    None,
    /// Writes them: the one before each chunk, or before its last span.
    Write,
    /// Multiplies what was written with its own state, the gradient of that after the chunk.
    Multiply,
}

/// Which roles the tensors play.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Roles {
    /// Values are the outer channels (they are walked by rows of the transposed state), keys the inner ones; or the
    /// other way round.
    pub(crate) outer_is_value: bool,
    /// From the last token to the first.
    pub(crate) against_time: bool,
    pub(crate) borders: Borders,
}

/// One walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WalkPlan {
    pub(crate) roles: Roles,
    /// Inner channels: along which tokens are compared.
    pub(crate) inner: usize,
    /// Outer channels: of which the output is.
    pub(crate) outer: usize,
    /// Warpgroups that walk, 64 outer channels each.
    pub(crate) warpgroups: usize,
    /// Heads that they walk side by side.
    pub(crate) heads: usize,
    /// The gradient of the values comes with that of the keys, without the gate's: see [`super::both`].
    pub(crate) both: bool,
    pub(crate) stages: usize,
    pub(crate) axis: Axis,
    /// The state is read before a token (with a decay by key alone), and its own value comes with a weight of its own: see
    /// [`super::shift`].
    pub(crate) exclusive: bool,
    /// Which queries and keys a head has.
    pub(crate) key_heads: KeyHeads,
    /// Log decays are f32, not bf16 (with a decay by channel alone).
    pub(crate) wide_gates: bool,
    /// There is a state before the first token.
    pub(crate) initial: bool,
    /// The sequence is cut into segments whose states were computed before.
    pub(crate) segmented: bool,
    /// The state at the end is wanted.
    pub(crate) last: bool,
    /// Of [`ssd`](crate::ssd()): what decays by token are is Δ, and values come without it; and what is added to the
    /// outputs. See [`super::steps`].
    pub(crate) steps: Option<Skip>,
}

impl WalkPlan {
    /// One head at a time by one warpgroup without stages, and nothing but the outputs.
    pub(crate) fn of_sizes(roles: Roles, inner: usize, outer: usize, axis: Axis) -> Self {
        Self {
            roles,
            inner,
            outer,
            warpgroups: 1,
            heads: 1,
            both: false,
            stages: 0,
            axis,
            exclusive: false,
            key_heads: KeyHeads::Own,
            wide_gates: true,
            initial: false,
            segmented: false,
            last: false,
            steps: None,
        }
    }

    /// A plan that fits into shared memory, where there is one.
    pub(crate) fn new(roles: Roles, keys: usize, values: usize, axis: Axis, exclusive: bool) -> Option<Self> {
        let (inner, outer) = if roles.outer_is_value { (keys, values) } else { (values, keys) };
        if inner > 256 || inner == 0 || outer == 0 {
            return None;
        }
        let most = if outer > 64 && inner <= 192 { 2 } else { 1 };
        (1..=most).rev().find_map(|warpgroups| {
            let plan = Self { warpgroups, exclusive, ..Self::of_sizes(roles, inner, outer, axis) };
            (plan.most_stages() >= 2).then_some(Self { stages: plan.most_stages().min(4), ..plan })
        })
    }

    /// The stages that there is shared memory for.
    fn most_stages(&self) -> usize {
        SHARED.saturating_sub(self.fixed_bytes()) / (self.stage_bytes() + self.vector_bytes())
    }

    /// The same for two heads side by side, where one has so few channels that a single warpgroup would walk on a
    /// processor. A chunk is a chain of products and barriers of one warpgroup: with K = V = 64 the walks moved 2.4 TB/s
    /// on an H100, and those for the gate's gradient 1.9, where two warpgroups with K = V = 128 moved 2.7 and 2.6.
    ///
    /// `heads` of them, `items` times, must be more than the `processors` take at once: fewer have one each.
    pub(crate) fn paired(self, heads: usize, items: usize, processors: usize) -> Self {
        let narrow = self.warpgroups == 1 && self.outer <= 64 && self.inner <= 64 && !self.by_channel();
        if !(PAIRS && narrow && heads.is_multiple_of(2) && heads * items > processors) {
            return self;
        }
        let pair = Self { warpgroups: 2, heads: 2, ..self };
        Self { stages: pair.most_stages().min(4), ..pair }
    }

    /// The same, with the gradient of the values beside that of the keys.
    pub(crate) fn with_both(self) -> Self {
        let plan = Self { both: true, ..self };
        Self { stages: plan.most_stages().min(4), ..plan }
    }

    /// The same for all gradients in one walk, whose stages have other tiles: see [`super::all`].
    pub(crate) fn with_all(self) -> Self {
        let fixed = self.heads * ALL_FIXED * PANEL;
        Self { stages: ((SHARED - fixed) / (self.heads * ALL_TILES * PANEL)).min(4), ..self }
    }

    /// The plan of a walk whose outputs are of this one's inner channels.
    pub(crate) fn turned(&self) -> Self {
        Self { inner: self.outer, outer: self.inner, ..*self }
    }

    /// Whether there is a tensor of the outputs' channels beside the others: what they are multiplied with, the keys.
    pub(crate) fn beside(&self) -> bool {
        self.dots() || self.both
    }

    /// Tiles of outputs that each warpgroup writes.
    pub(crate) fn out_panels(&self) -> usize {
        1 + self.both as usize
    }

    /// Warpgroups of each head.
    pub(crate) fn groups(&self) -> usize {
        self.warpgroups / self.heads
    }

    /// Panels of 64 inner channels.
    pub(crate) fn panels(&self) -> usize {
        self.inner.div_ceil(64)
    }

    /// Cubes that share the outer channels of a head.
    pub(crate) fn slices(&self) -> usize {
        self.outer.div_ceil(64 * self.groups())
    }

    /// Panels of 64 outer channels, whole slices counted.
    pub(crate) fn outer_panels(&self) -> usize {
        self.slices() * self.groups()
    }

    /// Whether every place of the state's panels is a channel's, so that none needs a check.
    pub(crate) fn fills_panels(&self) -> bool {
        self.inner.is_multiple_of(64) && self.outer == 64 * self.outer_panels()
    }

    /// Bytes that copies bring to a stage.
    pub(crate) fn stage_bytes(&self) -> usize {
        2 * self.heads * self.panels() * PANEL + self.warpgroups * self.value_panel()
    }

    /// Bytes of a panel of values: with weights of their own, those of the rows beside the chunk's are there too.
    pub(crate) fn value_panel(&self) -> usize {
        PANEL + if self.owns() { 128 * BESIDE } else { 0 }
    }

    /// Rows of such a panel before those of the chunk: against time a token's own value stands in the row before.
    pub(crate) fn rows_before(&self) -> usize {
        if self.owns() && self.roles.against_time { BESIDE } else { 0 }
    }

    /// Numbers of a stage's decays: the running sum at each token of each head (with steps, one more less the step's logarithm), or two
    /// vectors of factors of the state's channels, and after them the weights of the tokens' own values.
    pub(crate) fn decays(&self) -> usize {
        if self.by_channel() {
            2 * self.decay_channels() + if self.owns() { CHUNK } else { 0 }
        } else {
            self.heads * CHUNK * (1 + usize::from(self.steps.is_some()))
        }
    }

    /// Whether a token's own value has a weight of its own in the output.
    pub(crate) fn owns(&self) -> bool {
        self.exclusive && !self.factors()
    }

    fn vector_bytes(&self) -> usize {
        if self.by_channel() { 4 * self.decays() } else { 0 }
    }

    /// Channels that decay, whole panels counted: what one factor vector has.
    pub(crate) fn decay_channels(&self) -> usize {
        64 * if self.factors() { self.outer_panels() } else { self.panels() }
    }

    /// Whether each channel of one side of the state has a decay of its own.
    pub(crate) fn by_channel(&self) -> bool {
        self.axis.by_channel()
    }

    /// Whether it is the outer channels that decay, those of the output: it is multiplied with factors of its own.
    pub(crate) fn factors(&self) -> bool {
        self.by_channel() && self.roles.outer_is_value == (self.axis == Axis::Value)
    }

    /// Panels beside those of the ring, for each warpgroup: what the output is multiplied with, and the products.
    pub(crate) fn extra_panels(&self) -> usize {
        match (self.factors(), self.dots()) {
            (false, _) => self.beside() as usize,
            (true, dots) => 1 + 2 * dots as usize,
        }
    }

    /// Bytes of them that copies bring.
    pub(crate) fn extra_bytes(&self) -> usize {
        self.warpgroups * (self.factors() as usize + self.beside() as usize) * PANEL
    }

    /// Channels that decay, where it is by channel.
    pub(crate) fn decaying(&self) -> usize {
        if self.factors() { self.outer } else { self.inner }
    }

    /// Value channels.
    pub(crate) fn values(&self) -> usize {
        if self.roles.outer_is_value { self.outer } else { self.inner }
    }

    fn fixed_bytes(&self) -> usize {
        self.warpgroups * (self.panels() + self.out_panels() + self.extra_panels()) * PANEL
    }

    /// Whether the products of the output with another tensor are wanted.
    pub(crate) fn dots(&self) -> bool {
        self.roles.borders != Borders::None
    }

    /// The state, transposed: 64 outer rows, all inner columns.
    pub(crate) fn state(&self) -> Acc {
        Acc::new("s", 64 * self.panels())
    }

    /// The accumulator of the outputs: a wide state leaves no registers beside it but those of the scores.
    pub(crate) fn out(&self) -> Acc {
        if self.shares_registers() { SCORES } else { OUT }
    }

    /// The accumulator of the outputs times another tensor: that of the scores, which are no longer needed then, or one
    /// more.
    pub(crate) fn products(&self) -> Acc {
        if self.shares_registers() { OUT } else { SCORES }
    }

    /// Whether scores and outputs are in the same registers, one after the other.
    pub(crate) fn shares_registers(&self) -> bool {
        self.panels() == 4
    }

    /// Registers of a unit that walks: 65,536 of a processor beside those of the loader's warpgroup, and at most what the cube's
    /// units may have when they start.
    pub(crate) fn registers(&self) -> u32 {
        if self.warpgroups == 1 { 248 } else { 232 }
    }

    /// Units of a cube: the walkers' and the loader's warpgroup.
    pub(crate) fn units(&self) -> usize {
        128 * (self.warpgroups + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_heads_are_walked_in_pairs_where_there_are_many() {
        for borders in [Borders::None, Borders::Multiply] {
            let roles = Roles { outer_is_value: false, against_time: true, borders };
            let plan = |keys, axis| WalkPlan::new(roles, keys, 64, axis, false).unwrap();
            for one in [plan(64, Axis::Token), plan(64, Axis::Token).with_both()] {
                let pair = one.paired(16, 16, 132);
                assert_eq!((pair.heads, pair.warpgroups, pair.slices(), pair.outer_panels()), (2, 2, 1, 1));
                assert!(pair.stages >= 3 && pair.fixed_bytes() + pair.stages * pair.stage_bytes() <= SHARED);
                // With steps decays are twice as many, for which there is room, beside the gate's sums and barriers.
                let steps = WalkPlan { steps: Some(Skip::None), ..pair };
                let all = steps.with_all();
                let others = |plan: WalkPlan| 4 * (plan.stages * plan.decays() + 400) + 16 * (plan.stages + 1);
                let tiles = steps.fixed_bytes() + steps.stages * steps.stage_bytes();
                assert!(tiles + others(steps) <= SHARED + 4_096);
                assert!(all.heads * (ALL_FIXED + all.stages * ALL_TILES) * PANEL + others(all) <= SHARED + 4_096);
                for all in [one.with_all(), pair.with_all()] {
                    let tiles = all.heads * (ALL_FIXED + all.stages * ALL_TILES);
                    assert!(all.stages >= 2 && tiles * PANEL <= SHARED);
                }
                // An odd number of heads, and as many heads as there are processors.
                assert_eq!((one.paired(15, 16, 132), one.paired(132, 1, 132)), (one, one));
            }
            let others = [plan(128, Axis::Token), plan(64, Axis::Key)];
            assert!(others.into_iter().all(|plan| plan.paired(16, 16, 132) == plan));
        }
    }

    #[test]
    fn every_size_that_is_promised_has_a_plan() {
        for keys in (16..=256).step_by(16) {
            for values in (16..=256).step_by(16) {
                for borders in [Borders::None, Borders::Write] {
                    for outer_is_value in [false, true] {
                        let roles = Roles { outer_is_value, against_time: false, borders };
                        for axis in [Axis::Token, Axis::Key, Axis::Value] {
                            let plan = WalkPlan::new(roles, keys, values, axis, axis == Axis::Key).unwrap();
                            let stage = plan.stage_bytes() + plan.vector_bytes();
                            assert!(plan.stages >= 2 && plan.fixed_bytes() + plan.stages * stage <= SHARED);
                        }
                    }
                }
            }
        }
    }
}
