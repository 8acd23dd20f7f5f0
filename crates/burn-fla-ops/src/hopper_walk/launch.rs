//! One launch of each kernel, with the buffers and sizes of a problem.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};
use cubecl::prelude::{CubeCount, CubeDim, TensorMapArg, Tiled};

use super::engine::{Cores, Engine};
use super::plan::{Axis, Borders, CHUNK, KeyHeads, Roles, WalkPlan};
pub(crate) use super::prepare::Factors;
use super::table::{ITEM_WORDS, SEQUENCE_WORDS};
use super::{prepare, segments, walk};
use crate::bridge::{CubeTensor, alloc, contiguous};
use crate::ssd::Skip;
use crate::tile::hopper::{panel_map, readable, words};

/// Units of a cube of what is an element a unit.
pub(crate) const SCAN_UNITS: usize = 256;

/// Whether the gradients of narrow keys and values are one walk: see [`super::both`].
const BOTH: bool = true;

/// A linear recurrence. Inputs: q, k, v, g (without decay, anything), with `has_state` the initial state and with `has_bonus`
/// the bonus, `[H, K]`.
#[derive(Debug)]
pub(crate) struct HopperWalk {
    pub(crate) name: &'static str,
    pub(crate) engine: Engine,
    pub(crate) axis: Axis,
    pub(crate) has_state: bool,
    pub(crate) has_bonus: bool,
    pub(crate) scale: f32,
    pub(crate) tokens: usize,
    /// Tokens, and with a bonus one row more for each sequence: see [`super::shift`].
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    /// Which heads of queries and keys they have.
    pub(crate) key_heads: KeyHeads,
    pub(crate) keys: usize,
    pub(crate) values: usize,
    pub(crate) sequences: usize,
    pub(crate) items: usize,
    pub(crate) chunks: usize,
}

/// Multiprocessors of a device.
pub(crate) fn processors(device: &Device) -> usize {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device) => {
            device.client().properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize
        }
        _ => 132,
    }
}

/// One walk's tensors: tokens are compared along `q` and `k`, the output is of the channels of `v`.
pub(crate) struct Walk<'a> {
    pub(crate) roles: Roles,
    pub(crate) q: &'a CubeTensor,
    pub(crate) k: &'a CubeTensor,
    pub(crate) v: &'a CubeTensor,
    /// The state where the walk enters a sequence, and what to multiply it and the last one with.
    pub(crate) initial: Option<&'a CubeTensor>,
    pub(crate) in_factor: f32,
    pub(crate) last_factor: f32,
    /// Whether the last state is wanted.
    pub(crate) last: bool,
    /// Where sequences are cut, the states between segments, if another walk has computed them.
    pub(crate) between: Option<&'a CubeTensor>,
}

/// The decays as the kernels read them.
pub(crate) struct Decays {
    /// Log decays, f32 or, by channel, also bf16.
    pub(crate) g: CubeTensor,
    /// By channel: what [`prepare`] made of them.
    pub(crate) factors: CubeTensor,
    pub(crate) vectors: CubeTensor,
    pub(crate) levels: CubeTensor,
    /// With a bonus: the weights of the tokens' own values, `[tokens, H]`.
    pub(crate) weights: CubeTensor,
    pub(crate) table: CubeTensor,
    /// Whether `g` is Δ, `vectors` A and `weights` D: see [`super::steps`].
    pub(crate) steps: Option<Skip>,
}

impl Decays {
    /// The same with Δ in the place of log decays, and A and D: see [`super::steps`].
    pub(super) fn with_steps(self, rates: &CubeTensor, skip: &CubeTensor, by: Skip) -> Self {
        Self { vectors: rates.clone(), weights: skip.clone(), steps: Some(by), ..self }
    }
}

/// What the gate's gradient takes from two walks.
pub(crate) struct Gate<'a> {
    /// What the output is multiplied with.
    pub(crate) x: &'a CubeTensor,
    /// Its products: summed over channels, `[panels, tokens, H]`, or by channel like the output.
    pub(crate) products: CubeTensor,
    /// By channel: what they are to be multiplied with, `[chunks, H, panels, 64]` at the first token of each group.
    pub(crate) scales: CubeTensor,
    pub(crate) states: CubeTensor,
    pub(crate) ends: CubeTensor,
}

impl HopperWalk {
    pub(crate) fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    pub(crate) fn plan(&self, roles: Roles) -> WalkPlan {
        let plan = self.engine.plan(roles, self.keys, self.values, self.axis, self.has_bonus);
        WalkPlan { segmented: self.is_cut(), key_heads: self.key_heads, ..plan }
    }

    /// Where the table has its chunks.
    pub(crate) fn chunks_at(&self) -> u32 {
        (ITEM_WORDS * self.items + SEQUENCE_WORDS * self.sequences) as u32
    }

    /// The channels that decay, where it is by channel.
    pub(super) fn decaying(&self) -> usize {
        if self.axis == Axis::Value { self.values } else { self.keys }
    }

    /// What reads and what writes the channels that decay, with their decays inside a chunk, and the decays; `with_factors`
    /// where a walk's outputs have such channels.
    pub(crate) fn prepared(
        &self,
        reading: Option<CubeTensor>,
        writing: CubeTensor,
        decay: &CubeTensor,
        bonus: Option<&CubeTensor>,
        table: &CubeTensor,
        with_factors: Factors,
    ) -> (Option<CubeTensor>, CubeTensor, Decays) {
        let table = contiguous(table.clone());
        if !self.axis.by_channel() {
            let unused = alloc(decay, [32], DType::F32);
            let g = match self.axis {
                Axis::None => unused.clone(),
                _ => contiguous(burn_cubecl::kernel::cast(decay.clone(), DType::F32)),
            };
            let [factors, vectors, levels, weights] = [(); 4].map(|()| unused.clone());
            return (reading, writing, Decays { g, factors, vectors, levels, weights, table, steps: None });
        }
        let wide = decay.dtype != DType::BF16;
        let g = if wide { burn_cubecl::kernel::cast(decay.clone(), DType::F32) } else { decay.clone() };
        let g = readable(g);
        let channels = self.decaying();
        let unused = alloc(&g, [32], DType::BF16);
        let like = |x: &CubeTensor| {
            let [b, t, heads, channels] = x.meta.shape().dims::<4>();
            let shape = if self.has_bonus { [1, self.rows, heads, channels] } else { [b, t, heads, channels] };
            alloc(x, shape, DType::BF16)
        };
        let reading_out = reading.as_ref().map(like);
        let writing_out = like(&writing);
        let factors = if with_factors != Factors::None { like(&writing) } else { unused.clone() };
        let weights = alloc(&g, [if bonus.is_some() { self.tokens } else { 1 }, self.heads], DType::F32);
        let vectors = alloc(&g, [self.chunks, self.heads, 2, channels], DType::F32);
        let levels = alloc(&g, [self.chunks, self.heads], DType::U32);
        if self.chunks > 0 {
            // SAFETY: the table has `chunks` chunks of tokens inside of the tensors, and the buffers above have one
            // number for each of what a cube writes.
            unsafe {
                prepare::prepare::launch_unchecked(
                    &g.client,
                    CubeCount::new_1d((self.chunks * self.heads) as u32),
                    CubeDim::new_1d((channels / 2).next_multiple_of(32) as u32),
                    words(reading.as_ref().unwrap_or(&unused)),
                    words(&writing),
                    words(&g),
                    table.clone().into_buffer_arg(),
                    words(reading_out.as_ref().unwrap_or(&unused)),
                    words(&writing_out),
                    words(&factors),
                    vectors.clone().into_buffer_arg(),
                    levels.clone().into_buffer_arg(),
                    bonus.unwrap_or(&weights).clone().into_buffer_arg(),
                    weights.clone().into_buffer_arg(),
                    self.heads as u32,
                    self.chunks_at(),
                    channels as u32,
                    wide,
                    reading.is_some(),
                    with_factors,
                    bonus.is_some(),
                );
            }
        }
        (reading_out, writing_out, Decays { g, factors, vectors, levels, weights, table, steps: None })
    }

    /// A map of `[B, T, H, channels]` in boxes of 64 tokens of one head.
    pub(super) fn map(&self, x: &CubeTensor) -> TensorMapArg<Tiled> {
        self.map_of(x, CHUNK)
    }

    /// The same in boxes of so many tokens.
    fn map_of(&self, x: &CubeTensor, rows: usize) -> TensorMapArg<Tiled> {
        let [b, t, heads, channels] = x.meta.shape().dims::<4>();
        let strides = [heads * channels, channels, 1];
        panel_map(x, [b * t, heads, channels], strides, [rows, 1, 64])
    }

    /// Runs a walk: its output, and the state that it arrives at.
    pub(crate) fn walk(&self, w: &Walk<'_>, decays: &Decays, gate: Option<&Gate<'_>>) -> [CubeTensor; 2] {
        let [out, _, last] = self.walk_with(w, decays, gate, None);
        [out, last]
    }

    /// Whether [`Self::walk_both`] takes this problem.
    pub(crate) fn takes_both_gradients(&self) -> bool {
        let narrow = self.keys <= CHUNK && self.values <= CHUNK;
        BOTH && narrow && !self.axis.by_channel() && self.engine.cores == Cores::Hopper
    }

    /// Runs the walk for the gradient of the keys, `keys`, and that for the values' beside it: both, and the state that they
    /// arrive at.
    pub(crate) fn walk_both(&self, w: &Walk<'_>, keys: &CubeTensor, decays: &Decays) -> [CubeTensor; 3] {
        self.walk_with(w, decays, None, Some(keys))
    }

    fn walk_with(
        &self,
        w: &Walk<'_>,
        decays: &Decays,
        gate: Option<&Gate<'_>>,
        keys: Option<&CubeTensor>,
    ) -> [CubeTensor; 3] {
        let g = &decays.g;
        let client = g.client.clone();
        let wide_gates = g.dtype != DType::BF16;
        // D is added where outputs have the channels of values.
        let adds = w.roles.outer_is_value || keys.is_some();
        let steps = decays.steps.map(|skip| if adds { skip } else { Skip::None });
        let initial = w.initial.is_some();
        let plan = WalkPlan { initial, last: w.last, wide_gates, steps, ..self.plan(w.roles) };
        if self.engine.cores == Cores::Mma {
            let [out, last] = self.mma_walk(w, decays, gate, plan);
            return [out.clone(), out, last];
        }
        let plan = if keys.is_some() { plan.with_both() } else { plan };
        let plan = plan.paired(self.heads, self.items, self.engine.processors);
        let work = self.items * (self.heads / plan.heads) * plan.slices();
        let cubes = CubeCount::new_1d(work.min(self.engine.processors) as u32);
        let units = CubeDim::new_1d(plan.units() as u32);
        let unused = alloc(g, [32], DType::F32);
        let initial = w.initial.unwrap_or(&unused);
        let between = self.between(w, decays, &unused);
        // Somewhere to map f16 where there are no products.
        let spare = alloc(g, [1, 1, 1, 64], DType::F16);
        let out = self.output_of(w, &plan);
        let [b, t, _, _] = out.meta.shape().dims::<4>();
        // That of the values, along which the walk for the keys compares tokens.
        let beside = keys.map_or_else(|| out.clone(), |_| alloc(w.q, [b, t, self.heads, plan.inner], w.q.dtype));
        let last = if w.last { alloc(g, self.state_shape(), DType::F32) } else { unused.clone() };
        let ends = gate.map_or(&unused, |gate| &gate.ends).clone();
        // Products by channel are f16 and copied like the output, sums over channels are f32.
        let products = gate.map_or(&unused, |gate| &gate.products);
        let by_channel = gate.is_some() && plan.by_channel();
        // SAFETY: rows, states and products are indexed inside of what the table and the shapes, checked by the public
        // function, say; the buffers above have these sizes.
        unsafe {
            walk::walk::launch_unchecked(
                &client,
                cubes,
                units,
                self.map(w.q),
                self.map(w.k),
                self.map_of(w.v, plan.value_panel() / 128),
                self.map(keys.unwrap_or_else(|| gate.map_or(w.v, |gate| gate.x))),
                self.map(if plan.factors() { &decays.factors } else { w.v }),
                self.map(&out),
                self.map(&beside),
                self.map(if by_channel { products } else { &spare }),
                words(&out),
                words(if keys.is_some() { &beside } else { &unused }),
                words(if by_channel { products } else { &unused }),
                gate.map_or(&unused, |gate| &gate.scales).clone().into_buffer_arg(),
                if plan.by_channel() { unused.clone() } else { g.clone() }.into_buffer_arg(),
                words(g),
                decays.vectors.clone().into_buffer_arg(),
                decays.levels.clone().into_buffer_arg(),
                decays.weights.clone().into_buffer_arg(),
                decays.table.clone().into_buffer_arg(),
                initial.clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                between.into_buffer_arg(),
                words(gate.map_or(&unused, |gate| &gate.states)),
                ends.into_buffer_arg(),
                if by_channel { &unused } else { products }.clone().into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                self.tokens as u32,
                self.scale,
                w.in_factor,
                w.last_factor,
                plan,
            );
        }
        [out, beside, last]
    }

    /// Room for a walk's output: gradients of what heads share come head by head; and those of queries by token where keys
    /// are by row.
    pub(crate) fn output_of(&self, w: &Walk<'_>, plan: &WalkPlan) -> CubeTensor {
        let [b, t, _, _] = if plan.values_of_other_rows() { w.q } else { w.v }.meta.shape().dims::<4>();
        alloc(w.v, [b, t, self.heads, plan.outer], w.v.dtype)
    }

    /// What a walk reads between segments.
    pub(crate) fn between(&self, w: &Walk<'_>, decays: &Decays, unused: &CubeTensor) -> CubeTensor {
        match w.between {
            Some(states) => states.clone(),
            None if self.is_cut() => self.segment_states(w, decays),
            None => unused.clone(),
        }
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.items > self.sequences
    }

    /// The states at the ends of segments, `[segments, H, K, V]`: they depend on k, v and the direction of a walk alone, and
    /// serve every walk in that direction, whichever channels its outputs have.
    pub(crate) fn segment_states(&self, w: &Walk<'_>, decays: &Decays) -> CubeTensor {
        let g = &decays.g;
        let client = g.client.clone();
        let (initial, wide_gates) = (w.initial.is_some(), g.dtype != DType::BF16);
        let roles = Roles { borders: Borders::None, ..w.roles };
        let plan = WalkPlan { initial, wide_gates, steps: decays.steps, ..self.plan(roles) };
        let ends = alloc(g, [self.items, self.heads, self.keys, self.values], DType::F32);
        let per_head = if plan.by_channel() { plan.decay_channels() } else { 1 };
        let totals = alloc(g, [self.items, self.heads, per_head], DType::F32);
        let unused = alloc(g, [32], DType::F32);
        let initial = w.initial.cloned().unwrap_or_else(|| alloc(g, [32], DType::F32));
        let work = self.items * self.heads * plan.slices();
        if self.engine.cores == Cores::Mma {
            self.mma_segment_states(w, decays, [&initial, &ends, &totals], plan);
        } else {
            // SAFETY: as in `walk`.
            unsafe {
                segments::segment_states::launch_unchecked(
                    &client,
                    CubeCount::new_1d(work.min(self.engine.processors) as u32),
                    CubeDim::new_1d(plan.units() as u32),
                    self.map(w.k),
                    self.map(w.v),
                    if plan.by_channel() { unused } else { g.clone() }.into_buffer_arg(),
                    words(g),
                    decays.vectors.clone().into_buffer_arg(),
                    decays.levels.clone().into_buffer_arg(),
                    decays.table.clone().into_buffer_arg(),
                    initial.into_buffer_arg(),
                    ends.clone().into_buffer_arg(),
                    totals.clone().into_buffer_arg(),
                    self.heads as u32,
                    self.items as u32,
                    w.in_factor,
                    plan,
                );
            }
        }
        let count = self.sequences * self.heads * self.keys * self.values;
        segments::pass_states::launch(
            &client,
            CubeCount::new_1d(count.div_ceil(SCAN_UNITS) as u32),
            CubeDim::new_1d(SCAN_UNITS as u32),
            ends.clone().into_buffer_arg(),
            totals.into_buffer_arg(),
            decays.table.clone().into_buffer_arg(),
            self.heads as u32,
            self.items as u32,
            count as u32,
            plan,
        );
        ends
    }
}
