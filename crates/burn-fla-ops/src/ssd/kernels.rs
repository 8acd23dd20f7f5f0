//! What stands before and after the recurrence on devices with kernels.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, alloc, storage};
use crate::rows::{
    MAX_CUBES, RowPlan, SHARED, UNITS, address, first_row, grid, group, lane, load, pair, resident, row_stride,
    row_sum, store, sum_rows, unused, vector_size, widen,
};

/// Rows of the batch whose gradients of a D by channel one unit adds up.
const TOKENS: usize = 64;
/// The least rows that a unit adds up of the gradients of A and of a D by head.
const ADDED: usize = 8;

/// What D has a number for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Skip {
    /// There is none.
    None,
    /// `[H]`.
    Head,
    /// `[H·P]`.
    Channel,
}

impl Skip {
    /// Of `numbers` numbers for `heads` heads.
    pub(super) fn of(numbers: Option<usize>, heads: usize) -> Self {
        match numbers {
            None => Self::None,
            Some(numbers) if numbers == heads => Self::Head,
            Some(_) => Self::Channel,
        }
    }
}

/// A step of zero counts as this where something is divided by it, or its logarithm taken: what it adds to a state is
/// nothing beside anything else.
pub(crate) const LEAST_STEP: f32 = 1e-30;

/// What the gradient of Δ has beside that of the decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sums {
    /// `dv · x`, with `v = Δ x`.
    OfInputs,
    /// The same times Δ: `B · dB`.
    OfKeys,
}

/// D at the channels of a vector of a row.
#[cube]
fn skip_at<N: Size>(
    skip: &Tensor<f32>,
    head: usize,
    step: usize,
    #[comptime] by: Skip,
    #[comptime] plan: RowPlan,
) -> Vector<f32, N> {
    let mut weights = Vector::<f32, N>::new(0.0f32);
    if comptime!(by == Skip::Channel) {
        // Past the row the nearest place inside: nothing is stored there.
        let column = min(lane(plan) + step * comptime!(plan.lanes), comptime!(plan.width - 1));
        let first = (head * comptime!(plan.width) + column) * weights.vector_size();
        #[unroll]
        for i in 0..weights.vector_size() {
            weights.insert(i, skip[first + i]);
        }
    } else {
        weights = Vector::<f32, N>::new(skip[head]);
    }
    weights
}

/// `v = Δ x` and `g = Δ A`, with Δ a number a row and A one a head.
#[cube(launch, address_type = "dynamic")]
fn steps_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    delta: &Tensor<f32>,
    a: &Tensor<f32>,
    v: &mut Tensor<Vector<E, N>>,
    g: &mut Tensor<f32>,
    rows: u32,
    heads: u32,
    #[comptime] plan: RowPlan,
    #[define(E)] _element: ElemType,
) {
    let rows = rows as usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let found = load::<E, N>(x, row, rows, plan);
        let delta = delta[min(row, rows - 1)];
        let mut values = widen::<E, N>(&found, plan);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            values[step] *= Vector::new(delta);
        }
        store::<E, N>(&values, v, row, rows, plan);
        if lane(plan) == 0usize && row < rows {
            g[row] = delta * a[row % heads as usize];
        }
        first += row_stride(plan);
    }
}

pub(super) fn steps(x: &CubeTensor, delta: &CubeTensor, a: &CubeTensor) -> [CubeTensor; 2] {
    let [b, t, h, p] = x.meta.shape().dims::<4>();
    let (v, g) = (alloc(x, [b, t, h, p], x.dtype), alloc(x, [b, t, h], DType::F32));
    let (plan, vector) = RowPlan::new(x, p);
    steps_kernel::launch(
        &x.client,
        grid(plan.cubes(b * t * h)),
        CubeDim::new_1d(UNITS as u32),
        address(&[x]),
        vector,
        x.clone().into_tensor_arg(),
        delta.clone().into_tensor_arg(),
        a.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
        g.clone().into_tensor_arg(),
        (b * t * h) as u32,
        h as u32,
        plan,
        storage(x.dtype),
    );
    [v, g]
}

/// `y = o + D ∘ x`.
#[cube(launch, address_type = "dynamic")]
fn skip_kernel<E: Float, N: Size>(
    o: &Tensor<Vector<E, N>>,
    x: &Tensor<Vector<E, N>>,
    skip: &Tensor<f32>,
    y: &mut Tensor<Vector<E, N>>,
    rows: u32,
    heads: u32,
    #[comptime] by: Skip,
    #[comptime] plan: RowPlan,
    #[define(E)] _element: ElemType,
) {
    let rows = rows as usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let outputs = load::<E, N>(o, row, rows, plan);
        let inputs = load::<E, N>(x, row, rows, plan);
        let mut outputs = widen::<E, N>(&outputs, plan);
        let inputs = widen::<E, N>(&inputs, plan);
        let head = row % heads as usize;
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            outputs[step] += inputs[step] * skip_at::<N>(skip, head, step, by, plan);
        }
        store::<E, N>(&outputs, y, row, rows, plan);
        first += row_stride(plan);
    }
}

pub(super) fn skipped(o: &CubeTensor, x: &CubeTensor, skip: &CubeTensor, by: Skip) -> CubeTensor {
    let [b, t, h, p] = x.meta.shape().dims::<4>();
    let y = alloc(x, [b, t, h, p], x.dtype);
    let (plan, vector) = RowPlan::new(x, p);
    skip_kernel::launch(
        &x.client,
        grid(plan.cubes(b * t * h)),
        CubeDim::new_1d(UNITS as u32),
        address(&[x]),
        vector,
        o.clone().into_tensor_arg(),
        x.clone().into_tensor_arg(),
        skip.clone().into_tensor_arg(),
        y.clone().into_tensor_arg(),
        (b * t * h) as u32,
        h as u32,
        by,
        plan,
        storage(x.dtype),
    );
    y
}

/// `dx = Δ dv + D ∘ dy`, and for each row `dv · x` and, with a D by head, `dy · x`, into the halves of `sums`.
#[cube(launch, address_type = "dynamic")]
fn inputs_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    dv: &Tensor<Vector<E, N>>,
    dy: &Tensor<Vector<E, N>>,
    delta: &Tensor<f32>,
    skip: &Tensor<f32>,
    dx: &mut Tensor<Vector<E, N>>,
    sums: &mut Tensor<f32>,
    rows: u32,
    heads: u32,
    #[comptime] values: bool,
    #[comptime] by: Skip,
    #[comptime] plan: RowPlan,
    #[define(E)] _element: ElemType,
) {
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(SHARED));
    let rows = rows as usize;
    let mut turn = 0usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let inputs = load::<E, N>(x, row, rows, plan);
        // What is not there is bound as another tensor, and not loaded.
        let of_values =
            if comptime!(values) { load::<E, N>(dv, row, rows, plan) } else { load::<E, N>(x, row, rows, plan) };
        let of_outputs = if comptime!(by != Skip::None) {
            load::<E, N>(dy, row, rows, plan)
        } else {
            load::<E, N>(x, row, rows, plan)
        };
        let inputs = widen::<E, N>(&inputs, plan);
        let mut grads = widen::<E, N>(&of_values, plan);
        let outputs = widen::<E, N>(&of_outputs, plan);
        let delta = Vector::<f32, N>::new(delta[min(row, rows - 1)]);
        let head = row % heads as usize;
        let mut with_values = Vector::<f32, N>::new(0.0f32);
        let mut with_outputs = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            if comptime!(values) {
                with_values += grads[step] * inputs[step];
                grads[step] *= delta;
            } else {
                grads[step] = Vector::<f32, N>::new(0.0f32);
            }
            if comptime!(by != Skip::None) {
                with_outputs += outputs[step] * inputs[step];
                grads[step] += outputs[step] * skip_at::<N>(skip, head, step, by, plan);
            }
        }
        store::<E, N>(&grads, dx, row, rows, plan);
        let products = pair(with_values.vector_sum(), with_outputs.vector_sum());
        let products = row_sum::<Const<2>>(products, &mut shared, turn, plan);
        if lane(plan) == 0usize && row < rows {
            if comptime!(values) {
                sums[row] = products.extract(0usize);
            }
            if comptime!(by == Skip::Head) {
                sums[rows + row] = products.extract(1usize);
            }
        }
        turn = 1 - turn;
        first += row_stride(plan);
    }
}

/// What a backward pass has for [`inputs`]: the gradients of `v = Δ x` and of the outputs, and D.
pub(super) struct Grads<'a> {
    pub(super) values: Option<&'a CubeTensor>,
    pub(super) outputs: Option<&'a CubeTensor>,
    pub(super) skip: Option<&'a CubeTensor>,
    pub(super) by: Skip,
}

/// `dx`, and for each row its sums `dv · x` and, with a D by head, `dy · x`: `[2, B, T, H]`.
pub(super) fn inputs(x: &CubeTensor, delta: &CubeTensor, grads: &Grads<'_>) -> [CubeTensor; 2] {
    let [b, t, h, p] = x.meta.shape().dims::<4>();
    let (plan, vector) = RowPlan::new(x, p);
    let by = if grads.outputs.is_some() { grads.by } else { Skip::None };
    let dx = alloc(x, [b, t, h, p], x.dtype);
    let sums = alloc(x, [2, b, t, h], DType::F32);
    inputs_kernel::launch(
        &x.client,
        grid(plan.cubes(b * t * h)),
        CubeDim::new_1d(UNITS as u32),
        address(&[x]),
        vector,
        x.clone().into_tensor_arg(),
        grads.values.unwrap_or(x).clone().into_tensor_arg(),
        grads.outputs.unwrap_or(x).clone().into_tensor_arg(),
        delta.clone().into_tensor_arg(),
        grads.skip.unwrap_or(delta).clone().into_tensor_arg(),
        dx.clone().into_tensor_arg(),
        sums.clone().into_tensor_arg(),
        (b * t * h) as u32,
        h as u32,
        grads.values.is_some(),
        by,
        plan,
        storage(x.dtype),
    );
    [dx, sums]
}

/// `dΔ = dv · x + A dg`; and of each head the sums of `Δ dg` and `dy · x` over the rows
/// of a cube, `[parts, 2 H]`. A cube takes up to [`UNITS`] heads.
#[cube(launch, address_type = "dynamic")]
fn heads_kernel(
    sums: &Tensor<f32>,
    dg: &Tensor<f32>,
    delta: &Tensor<f32>,
    a: &Tensor<f32>,
    ddelta: &mut Tensor<f32>,
    partial: &mut Tensor<f32>,
    rows: u32,
    heads: u32,
    columns: u32,
    #[comptime] steps: bool,
    #[comptime] decays: bool,
    #[comptime] skips: bool,
    #[comptime] of: Sums,
) {
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(UNITS));
    let (rows, heads, columns) = (rows as usize, heads as usize, columns as usize);
    let unit = UNIT_POS as usize;
    let blocks = heads.div_ceil(columns);
    let part = CUBE_POS_X as usize / blocks;
    let stride = CUBE_COUNT_X as usize / blocks * (comptime!(UNITS) / columns);
    let head = CUBE_POS_X as usize % blocks * columns + unit % columns;
    let inside = unit / columns < comptime!(UNITS) / columns && head < heads;
    let rate = a[min(head, heads - 1)];
    let mut of_rate = 0.0f32;
    let mut of_weight = 0.0f32;
    let mut row = part * (comptime!(UNITS) / columns) + unit / columns;
    while row < rows {
        if inside {
            let at = row * heads + head;
            if comptime!(decays) {
                let slope = dg[at];
                of_rate += delta[at] * slope;
                if comptime!(steps) {
                    let mut own = sums[at];
                    if comptime!(of == Sums::OfKeys) {
                        own /= max(delta[at], LEAST_STEP);
                    }
                    ddelta[at] = own + rate * slope;
                }
            }
            if comptime!(skips) {
                of_weight += sums[rows * heads + at];
            }
        }
        row += stride;
    }
    shared[unit] = pair(of_rate, of_weight);
    sync_cube();
    if unit < columns && head < heads {
        let mut total = Vector::<f32, Const<2>>::new(0.0f32);
        for i in 0..comptime!(UNITS) / columns {
            total += shared[unit + i * columns];
        }
        partial[part * 2 * heads + head] = total.extract(0usize);
        partial[(part * 2 + 1) * heads + head] = total.extract(1usize);
    }
}

/// The gradients of Δ, A and a D by head: the first where `steps` and `dg` is there, the second where that is, the third where
/// `skips`. `sums` are those of [`inputs`], where one of the first and the last is wanted.
pub(super) fn heads(
    sums: Option<&CubeTensor>,
    dg: Option<&CubeTensor>,
    [delta, a]: [&CubeTensor; 2],
    [steps, skips]: [bool; 2],
    of: Sums,
) -> [Option<CubeTensor>; 3] {
    let [b, t, heads] = delta.meta.shape().dims::<3>();
    let columns = heads.min(UNITS);
    let each = UNITS / columns;
    let parts = (b * t).div_ceil(each * ADDED).min(resident(delta, 4)).max(1);
    let partial = alloc(delta, [parts, 2 * heads], DType::F32);
    let ddelta = (steps && dg.is_some()).then(|| alloc(delta, [b, t, heads], DType::F32));
    heads_kernel::launch(
        &delta.client,
        grid(parts * heads.div_ceil(columns)),
        CubeDim::new_1d(UNITS as u32),
        address(&[sums.unwrap_or(delta)]),
        sums.unwrap_or(delta).clone().into_tensor_arg(),
        dg.unwrap_or(delta).clone().into_tensor_arg(),
        delta.clone().into_tensor_arg(),
        a.clone().into_tensor_arg(),
        ddelta.clone().unwrap_or_else(|| unused(delta, 1)).into_tensor_arg(),
        partial.clone().into_tensor_arg(),
        (b * t) as u32,
        heads as u32,
        columns as u32,
        ddelta.is_some(),
        dg.is_some(),
        skips,
        of,
    );
    let sum = |there: bool, first| there.then(|| sum_rows(&partial, first, [heads]));
    [ddelta, sum(dg.is_some(), 0), sum(skips, heads)]
}

/// `Σ x ∘ dy` over [`TOKENS`] rows of `[B·T, H·P]`: one unit a group of rows and vector.
#[cube(launch, address_type = "dynamic")]
fn channels_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    dy: &Tensor<Vector<E, N>>,
    sums: &mut Tensor<Vector<f32, N>>,
    rows: usize,
    #[comptime] width: usize,
    #[define(E)] _element: ElemType,
) {
    let mut at = ABSOLUTE_POS;
    while at < sums.len() {
        let first = at / width * comptime!(TOKENS);
        let mut sum = Vector::<f32, N>::new(0.0f32);
        for row in first..min(first + comptime!(TOKENS), rows) {
            let from = row * width + at % width;
            sum += Vector::<f32, N>::cast_from(x[from]) * Vector::<f32, N>::cast_from(dy[from]);
        }
        sums[at] = sum;
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

/// The gradient of a D by channel, `Σ x ∘ dy`, `[H·P]`.
pub(super) fn channels(x: &CubeTensor, dy: &CubeTensor) -> CubeTensor {
    let [b, t, h, p] = x.meta.shape().dims::<4>();
    let (rows, vector) = (b * t, vector_size(p));
    let groups = rows.div_ceil(TOKENS);
    let sums = alloc(x, [groups, h * p], DType::F32);
    channels_kernel::launch(
        &x.client,
        grid((groups * h * p / vector).div_ceil(UNITS).min(MAX_CUBES)),
        CubeDim::new_1d(UNITS as u32),
        address(&[x]),
        vector,
        x.clone().into_tensor_arg(),
        dy.clone().into_tensor_arg(),
        sums.clone().into_tensor_arg(),
        rows,
        h * p / vector,
        storage(x.dtype),
    );
    sum_rows(&sums, 0, [h * p])
}

/// Sums over the channels of each head: `[H·P]` to `[H]`.
#[cfg(feature = "cuda")]
#[cube(launch, address_type = "dynamic")]
fn over_channels_kernel(x: &Tensor<f32>, sums: &mut Tensor<f32>, width: usize) {
    if ABSOLUTE_POS < sums.len() {
        let mut sum = 0.0f32;
        for i in 0..width {
            sum += x[ABSOLUTE_POS * width + i];
        }
        sums[ABSOLUTE_POS] = sum;
    }
}

#[cfg(feature = "cuda")]
pub(super) fn over_channels(x: &CubeTensor, heads: usize) -> CubeTensor {
    let sums = alloc(x, [heads], DType::F32);
    over_channels_kernel::launch(
        &x.client,
        grid(heads.div_ceil(UNITS)),
        CubeDim::new_1d(UNITS as u32),
        address(&[x]),
        x.clone().into_tensor_arg(),
        sums.clone().into_tensor_arg(),
        x.meta.shape().dims::<1>()[0] / heads,
    );
    sums
}
