//! The launches of the short convolution, as the bridge calls them, and how a history reaches them.

use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use cubecl::prelude::{CubeCount, CubeDim};

use super::kernels::{self, ConvPlan, RUN_WORDS};
use super::step::Step;
use crate::CuSeqlens;
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, apply_with, contiguous, storage, zeros};
use crate::rows::{MAX_CUBES, UNITS, address, approximates, grid, resident, sum_rows, unused, vector_size};

type Tensor2 = burn::tensor::Tensor<2>;

/// Tokens of a run, the longest first: `W − 1` of them are read twice, and in backward as many more again. The longest is
/// taken that gives a large GPU enough units.
const RUNS: [usize; 4] = [128, 64, 32, 16];
/// Pieces of a run, forward and backward: forward reads one tensor, and has room for more units than there are runs.
const PIECES: [usize; 2] = [2, 1];
/// Units that are enough: as many as an H100 runs at a time.
const ENOUGH: usize = 1 << 17;
/// Tokens that a unit loads at once.
const BATCH: [usize; 2] = [8, 4];
/// Cubes of the backward pass that a processor runs at a time: it has 126 registers a unit.
const RESIDENT: usize = 2;

/// How many tokens of `d` channels a run has, where there are `tokens`.
fn run_length(tokens: usize, d: usize) -> usize {
    let units = |run: &usize| tokens.div_ceil(*run) * (d / vector_size(d));
    RUNS.into_iter().find(|run| units(run) >= ENOUGH).unwrap_or(RUNS[RUNS.len() - 1])
}

/// A convolution from zero histories. Inputs: `x` `[tokens, D]`, `weight` f32 `[D, W]`, with `bias` also f32 `[D]`; with
/// `packed` the table of runs. Outputs: `y` as `x` and the cache `[N, W, D]`.
#[derive(Clone, Debug)]
struct ShortConv {
    silu: bool,
    bias: bool,
    packed: bool,
    sequences: usize,
    runs: usize,
    /// Tokens of a run.
    run: usize,
    /// Tokens of a sequence, where it is not packed.
    tokens: usize,
}

impl ShortConv {
    fn plan(&self, x: &CubeTensor, weight: &CubeTensor, batch: usize, pieces: usize) -> ConvPlan {
        let [_, dim] = x.meta.shape().dims();
        let [_, taps] = weight.meta.shape().dims();
        let vector = vector_size(dim);
        let (silu, bias, packed) = (self.silu, self.bias, self.packed);
        ConvPlan {
            vector,
            width: dim / vector,
            taps,
            run: self.run,
            pieces,
            batch,
            silu,
            bias,
            packed,
            approximate: approximates(x),
        }
    }

    fn flat(&self, plan: &ConvPlan) -> CubeCount {
        grid((self.runs * plan.pieces * plan.width).div_ceil(UNITS).min(MAX_CUBES))
    }
}

/// `x`, `weight` and the bias or a placeholder.
fn inputs_of(inputs: Vec<CubeTensor>) -> (CubeTensor, CubeTensor, CubeTensor) {
    let mut inputs = inputs.into_iter().map(contiguous);
    let x = inputs.next().expect("x");
    let weight = inputs.next().expect("a weight");
    let bias = inputs.next().unwrap_or_else(|| unused(&x, 1));
    (x, weight, bias)
}

fn table_of(ints: Vec<CubeTensor>, like: &CubeTensor) -> CubeTensor {
    ints.into_iter().next().map_or_else(|| unused(like, 1), contiguous)
}

impl Operator for ShortConv {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let [_, dim] = inputs[0].shape.dims();
        let [_, taps] = inputs[1].shape.dims();
        let cache = TensorSpec::new(Shape::from([self.sequences, taps, dim]), inputs[0].dtype);
        vec![inputs[0].clone(), cache]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let (x, weight, bias) = inputs_of(inputs);
        let table = table_of(ints, &x);
        let [tokens, dim] = x.meta.shape().dims();
        let plan = self.plan(&x, &weight, BATCH[0], PIECES[0]);
        let y = alloc(&x, [tokens, dim], x.dtype);
        let cache = alloc(&x, [self.sequences, plan.taps, dim], x.dtype);
        kernels::forward_kernel::launch(
            &x.client.clone(),
            self.flat(&plan),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x, &cache]),
            plan.vector,
            plan.word(),
            x.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            bias.into_tensor_arg(),
            table.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            cache.clone().into_tensor_arg(),
            (self.runs * plan.pieces) as u32,
            self.tokens as u32,
            plan,
            storage(x.dtype),
        );
        vec![y, cache]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let (x, weight, bias) = inputs_of(inputs);
        let table = table_of(ints, &x);
        let [dy, dcache] = grads.try_into().expect("two gradients");
        let [tokens, dim] = x.meta.shape().dims();
        let plan = self.plan(&x, &weight, BATCH[1], PIECES[1]);
        let dy = dy.map_or_else(|| zeros(&x, [tokens, dim], x.dtype), contiguous);
        let dx = alloc(&x, [tokens, dim], x.dtype);
        let partials = (resident(&x, RESIDENT) * UNITS / plan.width).clamp(1, self.runs);
        let weight_grad = wanted[1..].contains(&true);
        let columns = dim * (plan.taps + usize::from(self.bias));
        let partial = if weight_grad { alloc(&x, [partials, columns], DType::F32) } else { unused(&x, 1) };
        kernels::backward_kernel::launch(
            &x.client.clone(),
            grid((partials * plan.width).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x, &partial]),
            plan.vector,
            plan.word(),
            x.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            bias.into_tensor_arg(),
            table.clone().into_tensor_arg(),
            dy.into_tensor_arg(),
            dx.clone().into_tensor_arg(),
            partial.clone().into_tensor_arg(),
            self.runs as u32,
            self.tokens as u32,
            partials as u32,
            plan,
            weight_grad,
            storage(x.dtype),
        );
        if let Some(dcache) = dcache {
            let dcache = contiguous(dcache);
            kernels::add_cache_gradient::launch(
                &x.client.clone(),
                self.flat(&plan),
                CubeDim::new_1d(UNITS as u32),
                address(&[&x, &dcache]),
                plan.vector,
                dcache.clone().into_tensor_arg(),
                table.into_tensor_arg(),
                dx.clone().into_tensor_arg(),
                self.runs as u32,
                self.tokens as u32,
                plan,
                storage(x.dtype),
            );
        }
        let dw = wanted[1].then(|| sum_rows(&partial, 0, [dim, plan.taps]));
        let mut found = vec![Some(dx), dw];
        if self.bias {
            found.push(wanted[2].then(|| sum_rows(&partial, dim * plan.taps, [dim])));
        }
        found
    }
}

/// A checked convolution on the kernels: `x` `[B, T, D]`, the history `[N, D, W]` in its dtype.
pub(super) fn run(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    silu: bool,
    history: Option<Tensor<3>>,
    packed: Option<&CuSeqlens>,
) -> (Tensor<3>, Tensor<3>) {
    let [b, t, d] = x.dims();
    let weight = weight.cast(DType::F32);
    let bias = bias.map(|bias| bias.cast(DType::F32));
    let Some(history) = history else {
        return from_zero(x, weight, bias, silu, packed);
    };
    let tracked =
        x.is_tracked() || weight.is_tracked() || history.is_tracked() || bias.as_ref().is_some_and(Tensor::is_tracked);
    if t == 1 && packed.is_none() && !tracked {
        let operator = Step { silu, bias: bias.is_some() };
        let mut inputs = vec![x.reshape([b, d]).into_dispatch(), weight.into_dispatch(), history.into_dispatch()];
        inputs.extend(bias.map(Tensor::into_dispatch));
        let mut outputs = apply(operator, inputs, Vec::new()).into_iter();
        let y = Tensor2::from_dispatch(outputs.next().expect("two outputs"));
        let cache = Tensor::from_dispatch(outputs.next().expect("two outputs"));
        return (y.reshape([b, 1, d]), cache);
    }
    // The history is W more tokens in front of each sequence, whose outputs are dropped.
    let [n, _, width] = history.dims();
    let history = history.swap_dims(1, 2);
    let Some(packed) = packed else {
        let rows = Tensor::cat(vec![history, x], 1);
        let (y, cache) = from_zero(rows, weight, bias, silu, None);
        return (y.narrow(1, width, t), cache);
    };
    let (longer, take, keep) = extend(packed, width);
    let indices = |list: Vec<i32>| {
        let size = list.len();
        Tensor::<1, Int>::from_data(TensorData::new(list, [size]), &x.device().inner())
    };
    let (take, keep) = (indices(take), indices(keep));
    let rows = Tensor::cat(vec![history.reshape([1, n * width, d]), x], 1).select(1, take);
    let (y, cache) = from_zero(rows, weight, bias, silu, Some(&longer));
    (y.select(1, keep), cache)
}

/// Packed sequences with `width` tokens in front of each: their offsets, where each token comes from (the histories in a
/// row, then the tokens), and where the tokens themselves end up.
fn extend(packed: &CuSeqlens, width: usize) -> (CuSeqlens, Vec<i32>, Vec<i32>) {
    let n = packed.num_sequences();
    let mut offsets = vec![0];
    let (mut take, mut keep) = (Vec::new(), Vec::new());
    for (i, window) in packed.offsets().windows(2).enumerate() {
        take.extend((i * width..(i + 1) * width).map(|row| row as i32));
        keep.extend((window[0]..window[1]).map(|token| (token + (i + 1) * width) as i32));
        take.extend((window[0]..window[1]).map(|token| (n * width + token) as i32));
        offsets.push(take.len());
    }
    let longer = CuSeqlens::new(offsets).expect("offsets that only grow");
    (longer, take, keep)
}

/// The table of runs of packed sequences, and how many there are. A sequence without tokens has one empty run, which
/// writes its cache.
fn runs_of(packed: &CuSeqlens, run: usize) -> (Vec<i32>, usize) {
    let mut table = Vec::new();
    for (sequence, window) in packed.offsets().windows(2).enumerate() {
        let (start, end) = (window[0], window[1]);
        let mut first = start;
        loop {
            table.extend([sequence, start, first, end].map(|n| n as i32));
            first += run;
            if first >= end {
                break;
            }
        }
    }
    let runs = table.len() / RUN_WORDS;
    (table, runs)
}

fn from_zero(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    silu: bool,
    packed: Option<&CuSeqlens>,
) -> (Tensor<3>, Tensor<3>) {
    let [b, t, d] = x.dims();
    let run = run_length(b * t, d);
    let mut operator = ShortConv {
        silu,
        bias: bias.is_some(),
        packed: packed.is_some(),
        sequences: b,
        runs: b * t.div_ceil(run),
        run,
        tokens: t,
    };
    let mut tables = Vec::new();
    if let Some(packed) = packed {
        let (table, runs) = runs_of(packed, run);
        operator.sequences = packed.num_sequences();
        operator.runs = runs;
        tables.push(table.into());
    }
    let mut inputs = vec![x.reshape([b * t, d]).into_dispatch(), weight.into_dispatch()];
    inputs.extend(bias.map(Tensor::into_dispatch));
    let mut outputs = apply_with(operator, inputs, tables).into_iter();
    let y = Tensor2::from_dispatch(outputs.next().expect("two outputs"));
    let cache = Tensor::<3>::from_dispatch(outputs.next().expect("two outputs"));
    (y.reshape([b, t, d]), cache.swap_dims(1, 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_has_a_run() {
        let packed = CuSeqlens::new(vec![0, 0, 33, 34]).unwrap();
        let (table, runs) = runs_of(&packed, 32);
        assert_eq!(runs, 4);
        assert_eq!(table, [0, 0, 0, 0, 1, 0, 0, 33, 1, 0, 32, 33, 2, 33, 33, 34]);
    }

    #[test]
    fn histories_stand_in_front() {
        let packed = CuSeqlens::new(vec![0, 1, 1, 3]).unwrap();
        let (longer, take, keep) = extend(&packed, 2);
        assert_eq!(longer.offsets(), [0, 3, 5, 9]);
        assert_eq!(take, [0, 1, 6, 2, 3, 4, 5, 7, 8]);
        assert_eq!(keep, [2, 7, 8]);
    }
}
