//! The launches over a problem: how sequences are cut, and the buffers.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Shape};
use cubecl::prelude::{AddressType, CubeCount, CubeDim};

use super::backward::{backward, pass_gradients};
use super::kernels::{ITEM_WORDS, LANES, PARTS, Plan, STEP, forward, pass_sums};
use crate::CuSeqlens;
use crate::bridge::{CubeTensor, Table, alloc, storage};
use crate::rows::{MAX_CUBES, unused};

/// Cubes that should run at a time on each processor: fewer, and sequences are cut.
const CUBES_A_PROCESSOR: usize = 4;
/// Processors of a device that does not say how many it has.
const PROCESSORS: usize = 128;
/// The shortest segment. Cutting reads everything once more.
const SHORTEST: usize = 4 * STEP;

/// Running sums over checked sequences of channels.
#[derive(Clone, Debug)]
pub(crate) struct RunningSums {
    /// Whether the normaliser itself is the output, in the place of weights and decays.
    pub(super) normaliser: bool,
    tokens: usize,
    channels: usize,
    sequences: usize,
    items: usize,
    steps: usize,
}

/// What the kernels read of the sequences.
fn build_table(sequences: &CuSeqlens, segment: usize) -> (Vec<i32>, usize, usize) {
    let (mut items, mut per_sequence, mut step) = (Vec::new(), Vec::new(), 0);
    for (i, window) in sequences.offsets().windows(2).enumerate() {
        let count = (window[1] - window[0]).div_ceil(segment).max(1);
        per_sequence.extend([(items.len() / ITEM_WORDS) as i32, count as i32]);
        for n in 0..count {
            let start = window[0] + n * segment;
            let length = segment.min(window[1] - start);
            items.extend([start as i32, length as i32, i as i32, step as i32]);
            step += length.div_ceil(STEP);
        }
    }
    let count = items.len() / ITEM_WORDS;
    items.extend(per_sequence);
    (items, count, step)
}

/// Tokens a segment: whole sequences where they fill the device.
fn segment_tokens(sequences: &CuSeqlens, groups: usize, processors: usize) -> usize {
    let longest = sequences.lengths().max().unwrap_or(0).max(1);
    let cubes = groups * sequences.lengths().filter(|length| *length > 0).count().max(1);
    let wanted = CUBES_A_PROCESSOR * processors / cubes;
    let count = wanted.min(longest / SHORTEST);
    if count < 2 { longest } else { longest.div_ceil(count).next_multiple_of(STEP) }
}

fn processors(device: &Device) -> usize {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device) => {
            device.client().properties().hardware.num_streaming_multiprocessors.map_or(PROCESSORS, |n| n as usize)
        }
        _ => PROCESSORS,
    }
}

/// Vectors of the channels: two, so that a row of a cube is whole sectors of memory.
fn vector(channels: usize) -> usize {
    if channels.is_multiple_of(2) { 2 } else { 1 }
}

/// What a forward pass gives.
pub(crate) struct Running {
    /// Nothing of use where the normaliser is the output.
    pub(crate) weights: CubeTensor,
    /// Log decays, or the normaliser.
    pub(crate) others: CubeTensor,
    pub(crate) end: CubeTensor,
    pub(crate) borders: CubeTensor,
}

/// The gradients of the outputs.
pub(crate) struct Grads<'a> {
    /// Of the weights, the sum of these.
    pub(crate) weights: &'a [CubeTensor],
    /// Of the log decays, or of the normaliser.
    pub(crate) others: Option<&'a CubeTensor>,
    pub(crate) end: Option<&'a CubeTensor>,
}

impl RunningSums {
    /// The sums over `channels` channels, and the table that the kernels read. There is a token at least.
    pub(crate) fn new(sequences: &CuSeqlens, channels: usize, normaliser: bool, device: &Device) -> (Self, Table) {
        let groups = (channels / vector(channels)).div_ceil(LANES);
        let (entries, items, steps) = build_table(sequences, segment_tokens(sequences, groups, processors(device)));
        let (tokens, count) = (sequences.total(), sequences.num_sequences());
        (Self { normaliser, tokens, channels, sequences: count, items, steps }, entries.into())
    }

    pub(crate) fn end_shape(&self) -> Shape {
        Shape::from([self.sequences, self.channels])
    }

    /// The sums before each step: `8 D / 128` bytes a token.
    pub(crate) fn borders_shape(&self) -> Shape {
        Shape::from([self.steps, 2, self.channels])
    }

    fn cut(&self) -> bool {
        self.items > self.sequences
    }

    fn plan(&self) -> Plan {
        Plan {
            vector: vector(self.channels),
            normaliser: self.normaliser,
            cut: self.cut(),
            totals: false,
            enters: false,
            leaves: false,
            weights: false,
            others: false,
        }
    }

    fn address(&self) -> AddressType {
        AddressType::from_len((self.tokens * self.channels).max(2 * self.steps * self.channels))
    }

    fn cubes(&self) -> CubeCount {
        let groups = self.width().div_ceil(LANES);
        CubeCount::Static(groups as u32, self.items.min(MAX_CUBES) as u32, 1)
    }

    /// Vectors of a row.
    fn width(&self) -> usize {
        self.channels / vector(self.channels)
    }

    fn units() -> CubeDim {
        CubeDim::new_1d((LANES * PARTS) as u32)
    }

    /// Launches what is an element of the states a unit.
    fn scan(&self) -> (CubeCount, CubeDim, usize, usize) {
        const UNITS: usize = 128;
        let count = self.sequences * self.channels;
        let cubes = CubeCount::Static(count.div_ceil(UNITS) as u32, 1, 1);
        (cubes, CubeDim::new_1d(UNITS as u32), count, self.items * ITEM_WORDS)
    }

    /// Weights in `weights`, log decays and the last normaliser; and with `save` what [`backward`](Self::backward) needs
    /// besides the scores. All tensors are contiguous.
    pub(crate) fn forward(
        &self,
        scores: &CubeTensor,
        initial: Option<&CubeTensor>,
        table: &CubeTensor,
        weights: DType,
        save: bool,
    ) -> Running {
        let plan = Plan { enters: initial.is_some(), leaves: save, ..self.plan() };
        let spare = unused(scores, plan.vector);
        let initial = initial.unwrap_or(&spare);
        let end = alloc(scores, [self.sequences, self.channels], DType::F32);
        let out = if self.normaliser { unused(scores, plan.vector) } else { like(scores, weights) };
        let others = like(scores, DType::F32);
        let borders = match save {
            true => alloc(scores, [self.steps, 2, self.channels], DType::F32),
            false => unused(scores, plan.vector),
        };
        let run = |starts: &CubeTensor, w: &CubeTensor, others: &CubeTensor, ends: &CubeTensor, plan: Plan| {
            forward::launch(
                &scores.client,
                self.cubes(),
                Self::units(),
                self.address(),
                plan.vector,
                scores.clone().into_tensor_arg(),
                table.clone().into_buffer_arg(),
                starts.clone().into_buffer_arg(),
                w.clone().into_tensor_arg(),
                others.clone().into_tensor_arg(),
                ends.clone().into_buffer_arg(),
                borders.clone().into_buffer_arg(),
                self.width(),
                self.items,
                plan,
                [storage(scores.dtype), storage(w.dtype)],
            );
        };
        if self.cut() {
            let sums = alloc(scores, [self.items, 2, self.channels], DType::F32);
            let idle = [unused(scores, plan.vector), unused(scores, plan.vector)];
            run(&spare, &idle[0], &idle[1], &sums, Plan { totals: true, ..plan });
            let (cubes, units, count, table_at) = self.scan();
            pass_sums::launch(
                &scores.client,
                cubes,
                units,
                self.address(),
                sums.clone().into_buffer_arg(),
                initial.clone().into_buffer_arg(),
                table.clone().into_buffer_arg(),
                end.clone().into_buffer_arg(),
                self.channels,
                count,
                table_at,
                plan.enters,
            );
            run(&sums, &out, &others, &spare, plan);
        } else {
            run(initial, &out, &others, &end, plan);
        }
        Running { weights: out, others, end, borders }
    }

    /// The gradient of the scores, and with `initial` that of the initial normaliser.
    pub(crate) fn backward(
        &self,
        scores: &CubeTensor,
        borders: &CubeTensor,
        table: &CubeTensor,
        grads: Grads<'_>,
        initial: bool,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let plan = Plan {
            enters: grads.end.is_some(),
            leaves: initial,
            weights: !grads.weights.is_empty(),
            others: grads.others.is_some(),
            ..self.plan()
        };
        let spare = unused(scores, plan.vector);
        let lasts = grads.end.unwrap_or(&spare);
        let others = grads.others.unwrap_or(&spare);
        let weights = if plan.weights { grads.weights } else { std::slice::from_ref(&spare) };
        let out = like(scores, scores.dtype);
        let first = initial.then(|| alloc(scores, [self.sequences, self.channels], DType::F32));
        let other = unused(scores, plan.vector);
        let firsts = first.as_ref().unwrap_or(&other);
        let run = |lasts: &CubeTensor, out: &CubeTensor, firsts: &CubeTensor, plan: Plan| {
            backward::launch(
                &scores.client,
                self.cubes(),
                Self::units(),
                self.address(),
                plan.vector,
                scores.clone().into_tensor_arg(),
                table.clone().into_buffer_arg(),
                borders.clone().into_buffer_arg(),
                weights.iter().map(|x| x.clone().into_tensor_arg()).collect(),
                others.clone().into_tensor_arg(),
                lasts.clone().into_buffer_arg(),
                out.clone().into_tensor_arg(),
                firsts.clone().into_buffer_arg(),
                self.width(),
                self.items,
                plan,
                [storage(scores.dtype), storage(weights[0].dtype)],
            );
        };
        if self.cut() {
            let segments = alloc(scores, [self.items, 2, self.channels], DType::F32);
            let idle = alloc(scores, [plan.vector], scores.dtype);
            run(&spare, &idle, &segments, Plan { totals: true, ..plan });
            let (cubes, units, count, table_at) = self.scan();
            pass_gradients::launch(
                &scores.client,
                cubes,
                units,
                self.address(),
                segments.clone().into_buffer_arg(),
                lasts.clone().into_buffer_arg(),
                table.clone().into_buffer_arg(),
                firsts.clone().into_buffer_arg(),
                self.channels,
                count,
                table_at,
                plan.enters,
                plan.leaves,
            );
            run(&segments, &out, &other, Plan { enters: true, ..plan });
        } else {
            run(lasts, &out, firsts, plan);
        }
        (out, first)
    }
}

/// A buffer of the shape of `x`, which has three or four dimensions.
fn like(x: &CubeTensor, dtype: DType) -> CubeTensor {
    match x.meta.shape().num_dims() {
        3 => alloc(x, x.meta.shape().dims::<3>(), dtype),
        _ => alloc(x, x.meta.shape().dims::<4>(), dtype),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_each_sequence() {
        let packed = CuSeqlens::new(vec![0, 5, 5, 1605]).unwrap();
        let (table, items, steps) = build_table(&packed, 1024);
        assert_eq!((items, steps), (4, 14));
        assert_eq!(table[..2 * ITEM_WORDS], [0, 5, 0, 0, 5, 0, 1, 1]);
        assert_eq!(table[2 * ITEM_WORDS..4 * ITEM_WORDS], [5, 1024, 2, 1, 1029, 576, 2, 9]);
        assert_eq!(table[4 * ITEM_WORDS..], [0, 1, 1, 1, 2, 2]);
    }

    #[test]
    fn long_sequences_of_few_channels_are_cut() {
        // 2048 channels are 64 cubes a sequence.
        assert_eq!(segment_tokens(&CuSeqlens::dense(8, 2048), 64, 132), 2048);
        assert_eq!(segment_tokens(&CuSeqlens::dense(1, 65536), 32, 132), 4096);
        assert_eq!(segment_tokens(&CuSeqlens::dense(8, 2048), 8, 132), 512);
        assert_eq!(segment_tokens(&CuSeqlens::dense(1, 700), 1, 132), 700);
    }
}
