//! The launches, forward and backward, as the bridge calls them.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Shape};
use cubecl::prelude::{BufferArg, CubeCount, CubeDim, TensorMapArg, Tiled};

use super::plan::{BORDER_WORDS, Borders, Roles, WalkPlan};
use super::table::{ITEM_WORDS, SEQUENCE_WORDS};
use super::{FORWARD, KEYS, QUERIES, VALUES, gate, segments, walk};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, zeros};
use crate::tile::hopper::panel_map;

/// Units of a cube of the scan over segments.
const SCAN_UNITS: usize = 256;

/// A linear recurrence with a scalar decay. Inputs: q, k, v, g and, with `has_state`, the initial state.
#[derive(Debug)]
pub(super) struct ScalarWalk {
    pub(super) name: &'static str,
    pub(super) per_head: bool,
    pub(super) has_state: bool,
    pub(super) scale: f32,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) sequences: usize,
    pub(super) items: usize,
    pub(super) chunks: usize,
}

/// Multiprocessors of a device.
pub(super) fn processors(device: &Device) -> usize {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device) => {
            device.client().properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize
        }
        _ => 132,
    }
}

/// One walk's tensors: tokens are compared along `q` and `k`, the output is of the channels of `v`.
struct Walk<'a> {
    roles: Roles,
    q: &'a CubeTensor,
    k: &'a CubeTensor,
    v: &'a CubeTensor,
    /// The state where the walk enters a sequence, and what to multiply it and the last one with.
    initial: Option<&'a CubeTensor>,
    in_factor: f32,
    last_factor: f32,
    /// Whether the last state is wanted.
    last: bool,
}

/// What the gate's gradient takes from two walks.
struct Gate<'a> {
    /// What the output is multiplied with.
    x: &'a CubeTensor,
    /// Its products, `[panels, tokens, H]`.
    dots: CubeTensor,
    states: CubeTensor,
    ends: CubeTensor,
}

impl ScalarWalk {
    fn state_shape(&self) -> [usize; 4] {
        [self.sequences, self.heads, self.keys, self.values]
    }

    fn plan(&self, roles: Roles) -> WalkPlan {
        let plan = WalkPlan::new(roles, self.keys, self.values, self.per_head);
        let plan = plan.expect("the engine was chosen by the size");
        WalkPlan { segmented: self.items > self.sequences, ..plan }
    }

    /// A map of `[tokens, H, channels]` in boxes of 64 tokens of one head.
    fn map(&self, x: &CubeTensor) -> TensorMapArg<Tiled> {
        let channels = x.meta.shape().dims::<4>()[3];
        let strides = [self.heads * channels, channels, 1];
        panel_map(x, [self.tokens, self.heads, channels], strides, [64, 1, 64])
    }

    /// Runs a walk: its output, and the state that it arrives at.
    fn walk(&self, w: &Walk<'_>, g: &CubeTensor, table: &CubeTensor, gate: Option<&Gate<'_>>) -> [CubeTensor; 2] {
        let client = g.client.clone();
        let plan = WalkPlan { initial: w.initial.is_some(), last: w.last, ..self.plan(w.roles) };
        let work = self.items * self.heads * plan.slices();
        let processors = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize;
        let cubes = CubeCount::new_1d(work.min(processors) as u32);
        let units = CubeDim::new_1d(plan.units() as u32);
        let unused = alloc(g, [32], DType::F32);
        let initial = w.initial.unwrap_or(&unused);
        let blobs = if plan.segmented { self.segment_states(w, g, table, plan) } else { unused.clone() };
        let out = alloc(w.v, w.v.meta.shape().dims::<4>(), w.v.dtype);
        let last = if w.last { alloc(g, self.state_shape(), DType::F32) } else { unused.clone() };
        let ends = gate.map_or(&unused, |gate| &gate.ends).clone();
        let dots = gate.map_or(&unused, |gate| &gate.dots).clone();
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
                self.map(&out),
                BufferArg::from_raw_parts(out.handle.clone(), out.meta.shape().num_elements() / 2),
                g.clone().into_buffer_arg(),
                table.clone().into_buffer_arg(),
                initial.clone().into_buffer_arg(),
                last.clone().into_buffer_arg(),
                blobs.into_buffer_arg(),
                gate.map_or_else(
                    || unused.clone().into_buffer_arg(),
                    |gate| {
                        let states = &gate.states;
                        BufferArg::from_raw_parts(states.handle.clone(), states.meta.shape().num_elements() / 2)
                    },
                ),
                ends.into_buffer_arg(),
                dots.into_buffer_arg(),
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
    fn segment_states(&self, w: &Walk<'_>, g: &CubeTensor, table: &CubeTensor, plan: WalkPlan) -> CubeTensor {
        let client = g.client.clone();
        let blobs = alloc(g, [self.items, self.heads, plan.blob()], DType::F32);
        let totals = alloc(g, [self.items, self.heads], DType::F32);
        let initial = w.initial.cloned().unwrap_or_else(|| alloc(g, [32], DType::F32));
        let work = self.items * self.heads * plan.slices();
        let processors = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize;
        // SAFETY: as in `walk`.
        unsafe {
            segments::segment_states::launch_unchecked(
                &client,
                CubeCount::new_1d(work.min(processors) as u32),
                CubeDim::new_1d(plan.units() as u32),
                self.map(w.k),
                self.map(w.v),
                g.clone().into_buffer_arg(),
                table.clone().into_buffer_arg(),
                initial.into_buffer_arg(),
                blobs.clone().into_buffer_arg(),
                totals.clone().into_buffer_arg(),
                self.heads as u32,
                self.items as u32,
                w.in_factor,
                plan,
            );
        }
        let count = self.sequences * self.heads * plan.blob();
        segments::pass_states::launch(
            &client,
            CubeCount::new_1d(count.div_ceil(SCAN_UNITS) as u32),
            CubeDim::new_1d(SCAN_UNITS as u32),
            blobs.clone().into_buffer_arg(),
            totals.into_buffer_arg(),
            table.clone().into_buffer_arg(),
            self.heads as u32,
            self.items as u32,
            count as u32,
            w.roles.against_time,
            plan.blob() as u32,
        );
        blobs
    }

    fn gate_gradient(&self, queries: &Gate<'_>, keys: &Gate<'_>, table: &CubeTensor, like: &CubeTensor) -> CubeTensor {
        let dg = alloc(like, like.meta.shape().dims::<3>(), DType::F32);
        let warps = self.chunks * self.heads;
        let panels = queries.dots.meta.shape().dims::<3>()[0];
        gate::gate_gradient::launch(
            &like.client,
            CubeCount::new_1d(warps.div_ceil(gate::WARPS) as u32),
            CubeDim::new_1d(32 * gate::WARPS as u32),
            queries.dots.clone().into_buffer_arg(),
            keys.dots.clone().into_buffer_arg(),
            keys.ends.clone().into_buffer_arg(),
            table.clone().into_buffer_arg(),
            dg.clone().into_buffer_arg(),
            self.heads as u32,
            self.chunks as u32,
            (ITEM_WORDS * self.items + SEQUENCE_WORDS * self.sequences) as u32,
            self.tokens as u32,
            panels as u32,
        );
        burn_cubecl::kernel::cast(dg, like.dtype)
    }
}

impl Operator for ScalarWalk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[2].clone(), TensorSpec::new(Shape::from(self.state_shape()), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        let [q, k, v, g] = operands(&inputs);
        let table = contiguous(ints[0].clone());
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
        self.walk(&w, &g, &table, None).to_vec()
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        _saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [q, k, v, g] = operands(&inputs);
        let table = contiguous(ints[0].clone());
        let initial = inputs.get(4).cloned().map(contiguous);
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let grad_o = grad_o.map_or_else(|| zeros(&v, v.meta.shape().dims::<4>(), v.dtype), readable);
        let grad_state = grad_state.map(contiguous);

        let with_gate = wanted[3] && !self.per_head;
        let with_state = wanted.get(4).copied().unwrap_or(false);
        // The walk for dk gives two products a token: that with all of dk, and that with what later chunks contribute.
        let gate = |x, states: Option<&CubeTensor>, products: usize| {
            let plan = self.plan(Roles { borders: Borders::Write, ..QUERIES });
            let words = plan.outer_panels() * plan.panels() * BORDER_WORDS;
            let dots = alloc(&g, [products * plan.outer_panels(), self.tokens, self.heads], DType::F32);
            let states = states.cloned();
            let states = states.unwrap_or_else(|| alloc(&v, [self.chunks, self.heads, 2 * words], DType::BF16));
            let ends = alloc(&g, [self.chunks, self.heads, 4 * plan.outer_panels()], DType::F32);
            Gate { x, dots, states, ends }
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
            self.walk(&w, &g, &table, of_queries.as_ref())
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
            self.walk(&w, &g, &table, of_keys.as_ref())
        });
        let dv = with_dv.then(|| {
            let w = against(VALUES, &k, &q, &grad_o, with_state);
            self.walk(&w, &g, &table, None)
        });
        let dg = of_queries.as_ref().zip(of_keys.as_ref());
        let dg = dg.map(|(queries, keys)| self.gate_gradient(queries, keys, &table, &inputs[3]));
        let first = dv.as_ref().or(dk.as_ref()).filter(|_| with_state).map(|[_, state]| state.clone());
        let output = |walked: Option<[CubeTensor; 2]>| walked.map(|[out, _]| out);
        let mut result = vec![output(dq), output(dk), output(dv), dg];
        if self.has_state {
            result.push(first);
        }
        result
    }
}

/// q, k, v, g as the kernels read them.
fn operands(inputs: &[CubeTensor]) -> [CubeTensor; 4] {
    let g = contiguous(burn_cubecl::kernel::cast(inputs[3].clone(), DType::F32));
    [readable(inputs[0].clone()), readable(inputs[1].clone()), readable(inputs[2].clone()), g]
}

/// A tensor with its rows one after the other, at an address that a tensor map takes.
fn readable(x: CubeTensor) -> CubeTensor {
    let x = contiguous(x);
    let aligned = x.handle.offset_start.unwrap_or(0).is_multiple_of(16);
    if aligned { x } else { x.copy() }
}
