//! The launches, forward and backward, as the bridge calls them.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Shape};
use cubecl::prelude::{CubeCount, CubeDim, TensorMapArg, Tiled};

use super::engine::{Cores, Engine};
use super::plan::{Axis, BORDER_WORDS, Borders, CHUNK, END_SUMS, Roles, WalkPlan};
use super::table::{ITEM_WORDS, SEQUENCE_WORDS};
use super::{FORWARD, KEYS, QUERIES, VALUES, gate, prepare, segments, walk};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, zeros};
use crate::mma_walk::plan::MmaPlan;
use crate::tile::hopper::{panel_map, readable, words};

/// Units of a cube of the scan over segments.
const SCAN_UNITS: usize = 256;

/// A linear recurrence. Inputs: q, k, v, g and, with `has_state`, the initial state.
#[derive(Debug)]
pub(crate) struct HopperWalk {
    pub(crate) name: &'static str,
    pub(crate) engine: Engine,
    pub(crate) axis: Axis,
    pub(crate) has_state: bool,
    pub(crate) scale: f32,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
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
}

/// The decays as the kernels read them.
pub(crate) struct Decays {
    /// Log decays, f32 or, by key, also bf16.
    pub(crate) g: CubeTensor,
    /// By key: what [`prepare`] made of them.
    pub(crate) factors: CubeTensor,
    pub(crate) vectors: CubeTensor,
    pub(crate) levels: CubeTensor,
    pub(crate) table: CubeTensor,
}

/// What the gate's gradient takes from two walks.
pub(crate) struct Gate<'a> {
    /// What the output is multiplied with.
    pub(crate) x: &'a CubeTensor,
    /// Its products: summed over channels, `[panels, tokens, H]`, or by key like the output.
    pub(crate) products: CubeTensor,
    /// By key: what they are to be multiplied with, `[chunks, H, panels, 64]` at the first token of each group.
    pub(crate) scales: CubeTensor,
    pub(crate) states: CubeTensor,
    pub(crate) ends: CubeTensor,
}

impl HopperWalk {
    pub(crate) fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    fn plan(&self, roles: Roles) -> WalkPlan {
        let plan = self.engine.plan(roles, self.keys, self.values, self.axis);
        WalkPlan { segmented: self.items > self.sequences, ..plan }
    }

    /// Where the table has its chunks.
    fn chunks_at(&self) -> u32 {
        (ITEM_WORDS * self.items + SEQUENCE_WORDS * self.sequences) as u32
    }

    /// q, k, v and the decays as the walks read them; `with_factors` where a walk's outputs are by key.
    fn operands(&self, inputs: &[CubeTensor], ints: &[CubeTensor], with_factors: bool) -> ([CubeTensor; 3], Decays) {
        let [q, k, v] = [0, 1, 2].map(|i| readable(inputs[i].clone()));
        let table = contiguous(ints[0].clone());
        if self.axis != Axis::Key {
            let g = contiguous(burn_cubecl::kernel::cast(inputs[3].clone(), DType::F32));
            let unused = alloc(&g, [32], DType::F32);
            let (factors, vectors, levels) = (unused.clone(), unused.clone(), unused);
            return ([q, k, v], Decays { g, factors, vectors, levels, table });
        }
        let wide = inputs[3].dtype != DType::BF16;
        let g = if wide { burn_cubecl::kernel::cast(inputs[3].clone(), DType::F32) } else { inputs[3].clone() };
        let g = readable(g);
        let shape = q.meta.shape().dims::<4>();
        let like = |x: &CubeTensor| alloc(x, shape, DType::BF16);
        let (q_out, k_out) = (like(&q), like(&k));
        let factors = if with_factors { like(&q) } else { alloc(&q, [32], DType::BF16) };
        let vectors = alloc(&g, [self.chunks, self.heads, 2, self.keys], DType::F32);
        let levels = alloc(&g, [self.chunks, self.heads], DType::U32);
        if self.chunks > 0 {
            // SAFETY: the table has `chunks` chunks of tokens inside of the tensors, and the buffers above have one
            // number for each of what a cube writes.
            unsafe {
                prepare::prepare::launch_unchecked(
                    &g.client,
                    CubeCount::new_1d((self.chunks * self.heads) as u32),
                    CubeDim::new_1d((self.keys / 2).next_multiple_of(32) as u32),
                    words(&q),
                    words(&k),
                    words(&g),
                    table.clone().into_buffer_arg(),
                    words(&q_out),
                    words(&k_out),
                    words(&factors),
                    vectors.clone().into_buffer_arg(),
                    levels.clone().into_buffer_arg(),
                    self.heads as u32,
                    self.chunks_at(),
                    self.keys as u32,
                    wide,
                    with_factors,
                );
            }
        }
        ([q_out, k_out, v], Decays { g, factors, vectors, levels, table })
    }

    /// A map of `[tokens, H, channels]` in boxes of 64 tokens of one head.
    fn map(&self, x: &CubeTensor) -> TensorMapArg<Tiled> {
        let channels = x.meta.shape().dims::<4>()[3];
        let strides = [self.heads * channels, channels, 1];
        panel_map(x, [self.tokens, self.heads, channels], strides, [64, 1, 64])
    }

    /// Runs a walk: its output, and the state that it arrives at.
    fn walk(&self, w: &Walk<'_>, decays: &Decays, gate: Option<&Gate<'_>>) -> [CubeTensor; 2] {
        let g = &decays.g;
        let client = g.client.clone();
        let wide_gates = g.dtype != DType::BF16;
        let plan = WalkPlan { initial: w.initial.is_some(), last: w.last, wide_gates, ..self.plan(w.roles) };
        if self.engine.cores == Cores::Mma {
            return self.mma_walk(w, decays, gate, plan);
        }
        let work = self.items * self.heads * plan.slices();
        let cubes = CubeCount::new_1d(work.min(self.engine.processors) as u32);
        let units = CubeDim::new_1d(plan.units() as u32);
        let unused = alloc(g, [32], DType::F32);
        let initial = w.initial.unwrap_or(&unused);
        let blobs = if plan.segmented { self.segment_states(w, decays, plan, None) } else { unused.clone() };
        // Somewhere to map f16 where there are no products.
        let spare = alloc(g, [1, 1, 1, 64], DType::F16);
        let out = alloc(w.v, w.v.meta.shape().dims::<4>(), w.v.dtype);
        let last = if w.last { alloc(g, self.state_shape(), DType::F32) } else { unused.clone() };
        let ends = gate.map_or(&unused, |gate| &gate.ends).clone();
        // Products by key are bf16 and copied like the output, sums over channels are f32.
        let products = gate.map_or(&unused, |gate| &gate.products);
        let by_key = gate.is_some() && plan.by_key();
        // SAFETY: rows, states and products are indexed inside of what the table and the shapes, checked by the public
        // function, say; the buffers above have these sizes.
        unsafe {
            walk::walk::launch_unchecked(
                &client,
                cubes,
                units,
                self.map(w.q),
                self.map(w.k),
                self.map(w.v),
                self.map(gate.map_or(w.v, |gate| gate.x)),
                self.map(if plan.factors() { &decays.factors } else { w.v }),
                self.map(&out),
                self.map(if by_key { products } else { &spare }),
                words(&out),
                words(if by_key { products } else { &unused }),
                gate.map_or(&unused, |gate| &gate.scales).clone().into_buffer_arg(),
                if plan.by_key() { unused.clone() } else { g.clone() }.into_buffer_arg(),
                words(g),
                decays.vectors.clone().into_buffer_arg(),
                decays.levels.clone().into_buffer_arg(),
                decays.table.clone().into_buffer_arg(),
                initial.clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                blobs.into_buffer_arg(),
                words(gate.map_or(&unused, |gate| &gate.states)),
                ends.into_buffer_arg(),
                if by_key { &unused } else { products }.clone().into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                self.tokens as u32,
                self.scale,
                w.in_factor,
                w.last_factor,
                plan,
            );
        }
        [out, last]
    }

    /// The states from which segments are walked.
    pub(crate) fn segment_states(
        &self,
        w: &Walk<'_>,
        decays: &Decays,
        plan: WalkPlan,
        mma: Option<MmaPlan>,
    ) -> CubeTensor {
        let g = &decays.g;
        let client = g.client.clone();
        let blobs = alloc(g, [self.items, self.heads, plan.blob()], DType::F32);
        let per_head = if plan.by_key() { plan.decay_channels() } else { 1 };
        let totals = alloc(g, [self.items, self.heads, per_head], DType::F32);
        let unused = alloc(g, [32], DType::F32);
        let initial = w.initial.cloned().unwrap_or_else(|| alloc(g, [32], DType::F32));
        let work = self.items * self.heads * plan.slices();
        if let Some(mma) = mma {
            self.mma_segment_states(w, decays, [&initial, &blobs, &totals], mma);
        } else {
            // SAFETY: as in `walk`.
            unsafe {
                segments::segment_states::launch_unchecked(
                    &client,
                    CubeCount::new_1d(work.min(self.engine.processors) as u32),
                    CubeDim::new_1d(plan.units() as u32),
                    self.map(w.k),
                    self.map(w.v),
                    if plan.by_key() { unused } else { g.clone() }.into_buffer_arg(),
                    words(g),
                    decays.vectors.clone().into_buffer_arg(),
                    decays.levels.clone().into_buffer_arg(),
                    decays.table.clone().into_buffer_arg(),
                    initial.into_buffer_arg(),
                    blobs.clone().into_buffer_arg(),
                    totals.clone().into_buffer_arg(),
                    self.heads as u32,
                    self.items as u32,
                    w.in_factor,
                    plan,
                );
            }
        }
        let count = self.sequences * self.heads * plan.blob();
        segments::pass_states::launch(
            &client,
            CubeCount::new_1d(count.div_ceil(SCAN_UNITS) as u32),
            CubeDim::new_1d(SCAN_UNITS as u32),
            blobs.clone().into_buffer_arg(),
            totals.into_buffer_arg(),
            decays.table.clone().into_buffer_arg(),
            self.heads as u32,
            self.items as u32,
            count as u32,
            plan,
        );
        blobs
    }

    fn gate_gradient(&self, queries: &Gate<'_>, keys: &Gate<'_>, decays: &Decays, like: &CubeTensor) -> CubeTensor {
        let table = &decays.table;
        if self.axis == Axis::Key {
            return self.key_gate_gradient(queries, keys, decays, like);
        }
        let dg = alloc(like, like.meta.shape().dims::<3>(), DType::F32);
        let warps = self.chunks * self.heads;
        let parts = queries.products.meta.shape().dims::<3>()[0];
        let ends = keys.ends.meta.shape().dims::<3>()[2];
        gate::gate_gradient::launch(
            &like.client,
            CubeCount::new_1d(warps.div_ceil(gate::WARPS) as u32),
            CubeDim::new_1d(32 * gate::WARPS as u32),
            queries.products.clone().into_buffer_arg(),
            keys.products.clone().into_buffer_arg(),
            keys.ends.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            dg.clone().into_buffer_arg(),
            self.heads as u32,
            self.chunks as u32,
            self.chunks_at(),
            self.tokens as u32,
            parts as u32,
            ends as u32,
        );
        burn_cubecl::kernel::cast(dg, like.dtype)
    }

    fn key_gate_gradient(&self, queries: &Gate<'_>, keys: &Gate<'_>, decays: &Decays, like: &CubeTensor) -> CubeTensor {
        let Decays { table, levels, .. } = decays;
        let wide = like.dtype != DType::BF16;
        let dg = alloc(like, like.meta.shape().dims::<4>(), if wide { DType::F32 } else { DType::BF16 });
        let padded = keys.ends.meta.shape().dims::<3>()[2] / END_SUMS;
        let share = padded / keys.scales.meta.shape().dims::<4>()[2];
        let roles = Roles { borders: Borders::Multiply, ..KEYS };
        let sums = match self.engine.cores {
            Cores::Hopper => END_SUMS,
            Cores::Mma => self.engine.mma_plan(roles, self.keys, self.values, self.axis).end_sums(),
        };
        if self.chunks > 0 {
            // SAFETY: the table has `chunks` chunks of tokens inside of the tensors.
            unsafe {
                gate::key_gate_gradient::launch_unchecked(
                    &like.client,
                    CubeCount::new_1d((self.chunks * self.heads) as u32),
                    CubeDim::new_1d((self.keys / 2).next_multiple_of(32) as u32),
                    words(&queries.products),
                    words(&keys.products),
                    queries.scales.clone().into_buffer_arg(),
                    keys.scales.clone().into_buffer_arg(),
                    levels.clone().into_buffer_arg(),
                    keys.ends.clone().into_buffer_arg(),
                    table.clone().into_buffer_arg(),
                    words(&dg),
                    self.heads as u32,
                    self.chunks_at(),
                    self.keys as u32,
                    padded as u32,
                    share as u32,
                    sums,
                    wide,
                );
            }
        }
        burn_cubecl::kernel::cast(dg, like.dtype)
    }
}

impl Operator for HopperWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), TensorSpec::new(Shape::from(self.state_shape()), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        let ([q, k, v], decays) = self.operands(&inputs, &ints, false);
        let initial = inputs.get(4).cloned().map(contiguous);
        let w = Walk {
            roles: FORWARD,
            q: &q,
            k: &k,
            v: &v,
            initial: initial.as_ref(),
            in_factor: 1.0,
            last_factor: 1.0,
            last: true,
        };
        self.walk(&w, &decays, None).to_vec()
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        _saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let with_gate = wanted[3] && self.axis != Axis::Head;
        let by_key = self.axis == Axis::Key;
        let ([q, k, v], decays) = self.operands(&inputs, &ints, wanted[0] || wanted[1] || with_gate);
        let initial = inputs.get(4).cloned().map(contiguous);
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), readable);
        let grad_state = grad_state.map(contiguous);

        let with_state = wanted.get(4).copied().unwrap_or(false);
        // The walk for dk gives two products a token: that with all of dk, and that with what later chunks contribute.
        let gate = |x, states: Option<&CubeTensor>, products: usize| {
            let plan = self.plan(Roles { borders: Borders::Write, ..QUERIES });
            let words = plan.outer_panels() * plan.panels() * BORDER_WORDS;
            let g = &decays.g;
            let products = if by_key {
                alloc(&q, q.meta.shape().dims::<4>(), DType::F16)
            } else {
                alloc(g, [products * self.engine.channel_groups(&plan), self.tokens, self.heads], DType::F32)
            };
            let states = states.cloned();
            let states = states.unwrap_or_else(|| alloc(&v, [self.chunks, self.heads, 2 * words], DType::BF16));
            let sums = if by_key { 64 * END_SUMS } else { 4 };
            let scales = if by_key { self.chunks } else { 1 };
            let groups = self.engine.channel_groups(&plan);
            let scales = alloc(g, [scales, self.heads, groups, CHUNK], DType::F32);
            let ends = alloc(g, [self.chunks, self.heads, sums * plan.outer_panels()], DType::F32);
            Gate { x, products, scales, states, ends }
        };
        let of_queries = with_gate.then(|| gate(&q, None, 1));
        let of_keys = of_queries.as_ref().map(|first| gate(&k, Some(&first.states), 2));
        let borders = |borders| if with_gate { borders } else { Borders::None };
        // `scale` is on the output of a walk: the states of those against time are gradients divided by it.
        let (to, from) = (self.scale.recip(), self.scale);

        let dq = (wanted[0] || with_gate).then(|| {
            let roles = Roles { borders: borders(Borders::Write), ..QUERIES };
            let (in_factor, last_factor) = (1.0, 1.0);
            let initial = initial.as_ref();
            let w = Walk { roles, q: &grad_o, k: &v, v: &k, initial, in_factor, last_factor, last: false };
            self.walk(&w, &decays, of_queries.as_ref())
        });
        let against = |roles, q, k, v, last| Walk {
            roles,
            q,
            k,
            v,
            initial: grad_state.as_ref(),
            in_factor: to,
            last_factor: from,
            last,
        };
        let with_dk = wanted[1] || with_gate;
        let with_dv = wanted[2] || (with_state && !with_dk);
        let dk = with_dk.then(|| {
            let roles = Roles { borders: borders(Borders::Multiply), ..KEYS };
            let w = against(roles, &v, &grad_o, &q, with_state && !with_dv);
            self.walk(&w, &decays, of_keys.as_ref())
        });
        let dv = with_dv.then(|| {
            let w = against(VALUES, &k, &q, &grad_o, with_state);
            self.walk(&w, &decays, None)
        });
        let dg = of_queries.as_ref().zip(of_keys.as_ref());
        let dg = dg.map(|(queries, keys)| self.gate_gradient(queries, keys, &decays, &inputs[3]));
        let first = dv.as_ref().or(dk.as_ref()).filter(|_| with_state).map(|[_, state]| state.clone());
        let output = |walked: Option<[CubeTensor; 2]>| walked.map(|[out, _]| out);
        let mut result = vec![output(dq), output(dk), output(dv), dg];
        if self.has_state {
            result.push(first);
        }
        result
    }
}
