//! Products of bf16 matrices on Hopper, with f32 accumulation.
//!
//! Tiles of 128 × 256 or 128 × 128 are multiplied by `wgmma` from a ring of stages that tensor memory copies fill. Where
//! there are few tiles, the contraction is split and the parts are added in their order, so that a run repeats to the
//! last bit. Nothing is tuned at run time: [`plan`] counts clocks.
//!
//! One launch takes several pairs of operands, for several results or for their sum: layers that share their input
//! ([`linears`]). What follows a linear layer is done before its sums are rounded ([`epilogue`]); a product without
//! anything after it has the same PTX as before there was a place for it.
//!
//! A kernel is compiled twice before its first launch, by NVRTC and by the driver, and both took longer for the copies of
//! the loops over stages than for all the rest: they are not unrolled ([`crate::tile::hopper::next`]). Unrolled by two, a
//! step of the consumers was 88 instructions where it is 95 now, beside products of 512 clocks or more that are in flight
//! meanwhile.
//!
//! Measured on an H100 with one pair (`benches/results/60-hopper-linear.json`): 0.99 of cuBLAS's speed in geometric mean
//! over 72 products, the least 0.85 (weight gradients of 1024 × 2816 over 8192 tokens, and 65,536 × 1024 × 1024; the former
//! are split in three). Not tried yet: clusters with multicast, and adding split parts through distributed shared memory.

mod accumulate;
pub(in crate::matmul) mod epilogue;
pub(in crate::matmul) mod kernel;
mod layer;
mod linears;
pub(in crate::matmul) mod plan;

use burn::tensor::{DType, Shape, Tensor};
use cubecl::prelude::{CubeCount, CubeDim, SequenceArg};

use super::mma;
use crate::Engine;
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, contiguous, storage};
use crate::hopper_walk::Cores;
use crate::tile::hopper::panel_map;
pub use accumulate::accumulate;
use epilogue::Epilogue;
use kernel::{SizesLaunch, UNITS};
pub(crate) use layer::linear;
pub(crate) use linears::{MOST as MOST_LINEARS, linears};
use plan::{DEPTH, Plan, ROWS, VECTOR};

/// Units of a cube of the kernel that adds up.
const SUM_UNITS: usize = 256;

/// Whether these operands are taken: bf16 (the right one f32 too, rounded here), on an NVIDIA GPU since Ampere, with rows of
/// whole 16 bytes and nothing empty.
pub fn takes(a: &Tensor<2>, b: &Tensor<2>) -> bool {
    cores(a, b, Engine::Auto).is_some()
}

/// The kernels that take these operands: these on a Hopper GPU, those of [`super::mma`] on another one, or where they are
/// asked for.
pub(crate) fn cores(a: &Tensor<2>, b: &Tensor<2>, engine: Engine) -> Option<Cores> {
    let [rows, inner] = a.dims();
    let [left, right] = b.dims();
    let whole = |n: usize| n > 0 && n.is_multiple_of(8);
    let taken = a.dtype() == DType::BF16
        && matches!(b.dtype(), DType::BF16 | DType::F32)
        && rows > 0
        && left > 0
        && whole(inner)
        && whole(right)
        && whole(left);
    let device = a.device();
    match engine {
        _ if !taken => None,
        Engine::Reference => None,
        Engine::Mma if crate::bridge::has_mma(&device) => Some(Cores::Mma),
        _ if crate::bridge::is_hopper(&device) => Some(Cores::Hopper),
        _ => crate::bridge::has_mma(&device).then_some(Cores::Mma),
    }
}

/// `c[m, n] = Σ_k a(m, k) b(k, n)` in bf16 with f32 accumulation, where [`takes`] says so; differentiable.
///
/// # Shapes
/// - `a`: `[m, k]`, or `[k, m]` with `a_rows` (the contraction is along its rows)
/// - `b`: `[n, k]`, or `[k, n]` with `b_rows`
/// - returns `[m, n]`, bf16 or f32 as `dtype` says; the gradients have the dtypes of their inputs
///
/// `engine` chooses between kernels as elsewhere.
pub fn product(a: Tensor<2>, b: Tensor<2>, a_rows: bool, b_rows: bool, dtype: DType, engine: Engine) -> Tensor<2> {
    let cores = cores(&a, &b, engine).expect("operands that are taken");
    let operator = Product { a_rows, b_rows, dtype, cores };
    let mut outputs = apply(operator, vec![a.into_dispatch(), b.into_dispatch()], Vec::new());
    Tensor::from_dispatch(outputs.remove(0))
}

/// What a product becomes.
// One is made for a launch: its size does not matter.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Target {
    /// A matrix of its own.
    New(DType),
    /// It is added to this f32 matrix, which nobody else holds.
    Sum(CubeTensor),
}

/// The product of two matrices, each as it is stored or transposed, where kernels take it: bf16 on an NVIDIA GPU since
/// Ampere, with rows of whole 16 bytes. Gives `into` back where they do not.
#[allow(clippy::result_large_err)]
pub(crate) fn try_multiply(
    (a, a_transposed): (&CubeTensor, bool),
    (b, b_transposed): (&CubeTensor, bool),
    into: Target,
) -> Result<CubeTensor, Target> {
    let fits = |x: &CubeTensor| {
        let [rows, columns] = x.meta.shape().dims();
        x.dtype == DType::BF16 && rows > 0 && columns > 0 && columns.is_multiple_of(8)
    };
    let cores = match &a.client {
        client if crate::tile::hopper::supported(client) => Cores::Hopper,
        client if crate::tile::mma::supported(client) => Cores::Mma,
        _ => return Err(into),
    };
    if !fits(a) || !fits(b) {
        return Err(into);
    }
    let (a, b) = (readable(a.clone()), readable(b.clone()));
    let a = Operand { tensor: &a, rows: a_transposed };
    let b = Operand { tensor: &b, rows: !b_transposed };
    if b.sizes().0.is_multiple_of(8) { Ok(launch_into(a, b, into, cores)) } else { Err(into) }
}

#[derive(Debug)]
struct Product {
    a_rows: bool,
    b_rows: bool,
    dtype: DType,
    cores: Cores,
}

/// An operand and whether the contraction is along its rows.
struct Operand<'a> {
    tensor: &'a CubeTensor,
    rows: bool,
}

impl<'a> Operand<'a> {
    /// A matrix that is contracted along its columns.
    fn plain(tensor: &'a CubeTensor) -> Self {
        Self { tensor, rows: false }
    }

    /// Its size across the contraction, and along it.
    fn sizes(&self) -> (usize, usize) {
        let [first, second] = self.tensor.meta.shape().dims::<2>();
        if self.rows { (second, first) } else { (first, second) }
    }
}

/// The operand in bf16 with rows that a tensor map can describe.
fn readable(tensor: CubeTensor) -> CubeTensor {
    let tensor = burn_cubecl::kernel::cast(tensor, DType::BF16);
    let strides = tensor.meta.strides();
    let aligned = tensor.handle.offset_start.unwrap_or(0).is_multiple_of(16);
    if strides[1] == 1 && strides[0].is_multiple_of(8) && strides[0] > 0 && aligned {
        return tensor;
    }
    contiguous(tensor)
}

fn launch(a: Operand<'_>, b: Operand<'_>, dtype: DType, cores: Cores) -> CubeTensor {
    launch_into(a, b, Target::New(dtype), cores)
}

fn launch_into(a: Operand<'_>, b: Operand<'_>, into: Target, cores: Cores) -> CubeTensor {
    launch_pairs(&[(a, b)], Joined::No, into, cores).remove(0)
}

/// Whether pairs of operands are contracted together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Joined {
    /// Each pair has a product.
    No,
    /// The products are added up, in registers.
    Yes,
}

/// What an epilogue reads: a bias for each product or none, f32 `[n]`, and for a single product a residual, bf16 `[m, n]`.
#[derive(Default)]
struct Extras<'a> {
    biases: &'a [CubeTensor],
    residual: Option<&'a CubeTensor>,
    epilogue: Epilogue,
}

/// The products of pairs of operands, which are all stored in one way, by one kernel; or, joined, their sum. With a sum to
/// add to there is one result.
fn launch_pairs(pairs: &[(Operand<'_>, Operand<'_>)], joined: Joined, into: Target, cores: Cores) -> Vec<CubeTensor> {
    launch_with(pairs, joined, into, &Extras::default(), cores)
}

/// [`launch_pairs`] with an epilogue; the second result of one that keeps what backward needs comes last.
fn launch_with(
    pairs: &[(Operand<'_>, Operand<'_>)],
    joined: Joined,
    into: Target,
    extras: &Extras<'_>,
    cores: Cores,
) -> Vec<CubeTensor> {
    let (first_a, first_b) = &pairs[0];
    let rows = [first_a.rows, first_b.rows];
    debug_assert!(pairs.iter().all(|(a, b)| [a.rows, b.rows] == rows), "one kernel reads all pairs alike");
    let steps: Vec<usize> = pairs.iter().map(|(a, _)| a.sizes().1.div_ceil(DEPTH)).collect();
    let results = if joined == Joined::Yes { 1 } else { pairs.len() };
    let sizes: Vec<[usize; 2]> = pairs[..results].iter().map(|(a, b)| [a.sizes().0, b.sizes().0]).collect();
    let (dtype, sum_of) = match into {
        Target::New(dtype) => (dtype, None),
        Target::Sum(sum) => (sum.dtype, Some(sum)),
    };
    let client = first_a.tensor.client.clone();
    let processors = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize;
    let depth = if joined == Joined::Yes { steps.iter().sum() } else { steps.iter().copied().min().unwrap_or(1) };
    let plan = match cores {
        Cores::Hopper => Plan::choose(&sizes, depth, rows, dtype == DType::F32, processors),
        Cores::Mma => {
            let shared = mma::shared(first_a.tensor);
            mma::plan::choose(&sizes, depth, rows, dtype == DType::F32, processors, shared)
        }
    };
    let plan = Plan {
        add: sum_of.is_some(),
        pairs: pairs.len(),
        joined: joined == Joined::Yes,
        epilogue: extras.epilogue,
        ..plan
    };
    let tile_dtype = if plan.f32_out { DType::F32 } else { DType::BF16 };
    let tiles: Vec<CubeTensor> = match &sum_of {
        Some(sum) if plan.adds_tiles() => vec![sum.clone()],
        _ => sizes.iter().map(|[m, n]| alloc(first_a.tensor, [plan.splits, *m, *n], tile_dtype)).collect(),
    };
    let map = |operand: &Operand<'_>, width: usize| {
        let [first, second] = operand.tensor.meta.shape().dims::<2>();
        let stride = if first == 1 { second } else { operand.tensor.meta.strides()[0] };
        let rows = if operand.rows { DEPTH } else { width };
        panel_map(operand.tensor, [first, second], [stride, 1], [rows, 64])
    };
    let tiles_m: Vec<usize> = sizes.iter().map(|[m, _]| m.div_ceil(ROWS)).collect();
    let tiles_n: Vec<usize> = sizes.iter().map(|[_, n]| n.div_ceil(plan.columns)).collect();
    let items: usize = tiles_m.iter().zip(&tiles_n).map(|(m, n)| m * n * plan.splits).sum();
    let numbers = |numbers: &[usize]| -> SequenceArg<u32> { numbers.iter().map(|n| *n as u32).collect() };
    let out_map = |(tiles, [m, n]): (&CubeTensor, &[usize; 2])| {
        panel_map(tiles, [plan.splits, *m, *n], [m * n, *n, 1], [1, 64, plan.panel_columns()])
    };
    let in_tiles = plan.tile_epilogue();
    let kept: Vec<CubeTensor> = extras
        .epilogue
        .keeps
        .then(|| alloc(first_a.tensor, [1, sizes[0][0], sizes[0][1]], dtype))
        .into_iter()
        .collect();
    let biases = if in_tiles.bias { extras.biases } else { &[] };
    let residual = extras.residual.filter(|_| in_tiles.residual);
    let argument = |tensor: &CubeTensor| tensor.clone().into_tensor_arg();
    let (splits, adds) = (plan.splits as u32, u32::from(plan.adds_tiles()));
    let counts = SizesLaunch::new(numbers(&tiles_m), numbers(&tiles_n), numbers(&steps), splits, adds);
    let kept_tiles = kept.iter().filter(|_| in_tiles.keeps);
    if cores == Cores::Mma {
        let buffers = mma::Buffers {
            a: pairs.iter().map(|(a, _)| a.tensor).collect(),
            b: pairs.iter().map(|(_, b)| b.tensor).collect(),
            c: tiles.iter().collect(),
            kept: kept_tiles.collect(),
            biases: biases.iter().collect(),
            residuals: residual.into_iter().collect(),
        };
        let depths: Vec<usize> = pairs.iter().map(|(a, _)| a.sizes().1).collect();
        mma::launch(buffers, &depths, &sizes, counts, items, plan.of_tiles());
    } else {
        // SAFETY: the kernel touches device memory through tensor maps, and these clip what is outside; of what an
        // epilogue reads it holds the places inside.
        unsafe {
            kernel::product::launch_unchecked(
                &client,
                CubeCount::new_1d(items.min(processors) as u32),
                CubeDim::new_1d(UNITS),
                pairs.iter().map(|(a, _)| map(a, ROWS)).collect(),
                pairs.iter().map(|(_, b)| map(b, plan.columns)).collect(),
                tiles.iter().zip(&sizes).map(out_map).collect(),
                kept_tiles.zip(&sizes).map(out_map).collect(),
                biases.iter().map(argument).collect(),
                residual.into_iter().map(argument).collect(),
                counts,
                Plan { add: false, ..plan.of_tiles() },
                storage(tile_dtype),
            );
        }
    }
    let kept = kept.into_iter().map(|kept| reshaped(kept, sizes[0]));
    if plan.splits == 1 {
        return tiles.into_iter().zip(&sizes).map(|(tiles, shape)| reshaped(tiles, *shape)).chain(kept).collect();
    }
    let out: Vec<CubeTensor> = match sum_of {
        Some(sum) => vec![reshaped(sum, sizes[0])],
        None => sizes.iter().map(|shape| alloc(first_a.tensor, *shape, dtype)).collect(),
    };
    let kept: Vec<CubeTensor> = kept.collect();
    sum(tiles, &out, &kept, extras, plan);
    out.into_iter().chain(kept).collect()
}

/// Adds up the parts of split contractions into `out`.
fn sum(parts: Vec<CubeTensor>, out: &[CubeTensor], kept: &[CubeTensor], extras: &Extras<'_>, plan: Plan) {
    let argument = |tensor: &CubeTensor| tensor.clone().into_tensor_arg();
    let most = out.iter().map(|out| out.meta.shape().num_elements()).max().unwrap_or(0) / VECTOR;
    kernel::sum_splits::launch(
        &out[0].client,
        CubeCount::Static(most.div_ceil(SUM_UNITS) as u32, out.len() as u32, 1),
        CubeDim::new_1d(SUM_UNITS as u32),
        crate::rows::address(&parts.iter().collect::<Vec<_>>()),
        VECTOR,
        parts.into_iter().map(|parts| parts.into_tensor_arg()).collect(),
        out.iter().map(argument).collect(),
        kept.iter().map(argument).collect(),
        extras.biases.iter().map(argument).collect(),
        extras.residual.into_iter().map(argument).collect(),
        plan,
        storage(out[0].dtype),
    );
}

fn reshaped(x: CubeTensor, shape: [usize; 2]) -> CubeTensor {
    CubeTensor::new_contiguous(x.client, x.device, Shape::from(shape), x.handle, x.dtype)
}

impl Operator for Product {
    fn name(&self) -> &'static str {
        "hopper_matmul"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let across = |spec: &TensorSpec, rows: bool| spec.shape.dims::<2>()[usize::from(rows)];
        let shape = Shape::from([across(&inputs[0], self.a_rows), across(&inputs[1], self.b_rows)]);
        vec![TensorSpec::new(shape, self.dtype)]
    }

    /// A weight that was rounded for the product: backward reads it again.
    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let weight = &inputs[1];
        let rounded = (weight.dtype != DType::BF16).then(|| TensorSpec::new(weight.shape.clone(), DType::BF16));
        rounded.into_iter().collect()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let [a, b] = inputs.try_into().expect("two operands");
        let rounded = b.dtype != DType::BF16;
        let (a, b) = (readable(a), readable(b));
        let product = {
            let a = Operand { tensor: &a, rows: self.a_rows };
            let b = Operand { tensor: &b, rows: self.b_rows };
            launch(a, b, self.dtype, self.cores)
        };
        let saved = (save && rounded).then_some(b);
        std::iter::once(product).chain(saved).collect()
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [a, b] = inputs.try_into().expect("two operands");
        let rounded = saved.into_iter().next();
        let dc = readable(grads.into_iter().flatten().next().expect("the only output's gradient"));
        // Each gradient is a product of the other operand with that of the output, in the layout of its own operand.
        let da = wanted[0].then(|| {
            let other = readable(rounded.unwrap_or_else(|| b.clone()));
            let other = Operand { tensor: &other, rows: !self.b_rows };
            let grad = Operand { tensor: &dc, rows: false };
            if self.a_rows {
                launch(other, grad, a.dtype, self.cores)
            } else {
                launch(grad, other, a.dtype, self.cores)
            }
        });
        let db = wanted[1].then(|| {
            let other = readable(a.clone());
            let other = Operand { tensor: &other, rows: !self.a_rows };
            let grad = Operand { tensor: &dc, rows: true };
            if self.b_rows {
                launch(other, grad, b.dtype, self.cores)
            } else {
                launch(grad, other, b.dtype, self.cores)
            }
        });
        vec![da, db]
    }
}
