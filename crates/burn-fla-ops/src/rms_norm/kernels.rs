//! The RMS norm on devices with kernels.
//!
//! Nothing is saved besides the inputs: backward takes both sums over a row that it needs, `Σ x²` and `Σ x ∘ w ∘ dy`, in
//! one pass, and with them `dx = rstd · (w ∘ dy − x · rstd² · Σ(x ∘ w ∘ dy) / D)`.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{
    RowPlan, SHARED, UNITS, address, first_row, grid, group, load, pair, row_stride, row_sum, store, store_partial,
    sum_rows, unused, widen, zeros,
};

/// `(mean(x²) + eps)^(−1/2)` of the row that these units hold.
#[cube]
pub(crate) fn inverse_rms<N: Size>(
    values: &Array<Vector<f32, N>>,
    shared: &mut Shared<[Vector<f32, Const<1>>]>,
    turn: usize,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
) -> f32 {
    let mut squares = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for step in 0..comptime!(plan.steps) {
        squares += values[step] * values[step];
    }
    let total = row_sum::<Const<1>>(Vector::new(squares.vector_sum()), shared, turn, plan);
    f32::inverse_sqrt(total.extract(0usize) / comptime!(dim as f32) + eps)
}

/// `rstd` and `rstd² · Σ(x ∘ w ∘ m) / D`, where m is the gradient of `x · rstd ∘ w`. Of a row that there is not, zeros.
#[cube]
pub(crate) fn gradient_factors<N: Size>(
    values: &Array<Vector<f32, N>>,
    grads: &Array<Vector<f32, N>>,
    weights: &Array<Vector<f32, N>>,
    shared: &mut Shared<[Vector<f32, Const<2>>]>,
    turn: usize,
    live: bool,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
) -> Vector<f32, Const<2>> {
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut products = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for step in 0..comptime!(plan.steps) {
        squares += values[step] * values[step];
        products += values[step] * (grads[step] * weights[step]);
    }
    let sums = row_sum::<Const<2>>(pair(squares.vector_sum(), products.vector_sum()), shared, turn, plan);
    let rstd = f32::inverse_sqrt(sums.extract(0usize) / comptime!(dim as f32) + eps);
    let rstd = select(live, rstd, 0.0f32);
    pair(rstd, rstd * rstd * sums.extract(1usize) / comptime!(dim as f32))
}

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    weight: &Tensor<Vector<f32, N>>,
    y: &mut Tensor<Vector<E, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
    #[define(E)] _element: ElemType,
) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(SHARED));
    let rows = rows as usize;
    let mut turn = 0usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let mut values = widen::<E, N>(&load::<E, N>(x, row, rows, plan), plan);
        let weights = load::<f32, N>(weight, 0usize, 1usize, plan);
        let rstd = inverse_rms::<N>(&values, &mut shared, turn, eps, plan, dim);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            values[step] = values[step] * Vector::new(rstd) * weights[step];
        }
        store::<E, N>(&values, y, row, rows, plan);
        turn = 1 - turn;
        first += row_stride(plan);
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    weight: &Tensor<Vector<f32, N>>,
    dy: &Tensor<Vector<E, N>>,
    dx: &mut Tensor<Vector<E, N>>,
    partial: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
    #[comptime] weight_grad: bool,
    #[define(E)] _element: ElemType,
) {
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(SHARED));
    let rows = rows as usize;
    let weights = load::<f32, N>(weight, 0usize, 1usize, plan);
    let mut dw = zeros::<N>(plan);
    let mut turn = 0usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let x_row = load::<E, N>(x, row, rows, plan);
        let dy_row = load::<E, N>(dy, row, rows, plan);
        let values = widen::<E, N>(&x_row, plan);
        let mut grads = widen::<E, N>(&dy_row, plan);
        let live = row < rows;
        let factors = gradient_factors::<N>(&values, &grads, &weights, &mut shared, turn, live, eps, plan, dim);
        let rstd = Vector::<f32, N>::new(factors.extract(0usize));
        let along = Vector::<f32, N>::new(factors.extract(1usize));
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            if comptime!(weight_grad) {
                dw[step] += grads[step] * (values[step] * rstd);
            }
            grads[step] = (grads[step] * weights[step] - values[step] * along) * rstd;
        }
        store::<E, N>(&grads, dx, row, rows, plan);
        turn = 1 - turn;
        first += row_stride(plan);
    }
    if comptime!(weight_grad) {
        store_partial::<N>(&dw, partial, plan);
    }
}

/// Inputs: `x` `[rows, D]`, `weight` f32 `[D]`. Output: `y` `[rows, D]`.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) eps: f64,
}

impl Operator for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let [x, weight] = inputs.try_into().expect("two inputs");
        let (x, weight) = (contiguous(x), contiguous(weight));
        let [rows, dim] = x.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&x, dim);
        let y = alloc(&x, [rows, dim], x.dtype);
        forward_kernel::launch(
            &x.client.clone(),
            grid(plan.cubes(rows)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x]),
            vector,
            x.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            rows as u32,
            self.eps as f32,
            plan,
            dim,
            storage(x.dtype),
        );
        vec![y]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [x, weight] = inputs.try_into().expect("two inputs");
        let (x, weight) = (contiguous(x), contiguous(weight));
        let dy = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let [rows, dim] = x.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&x, dim);
        let cubes = plan.partials(&x, rows, true);
        let dx = alloc(&x, [rows, dim], x.dtype);
        let partial = if wanted[1] { alloc(&x, [cubes, dim], DType::F32) } else { unused(&x, vector) };
        backward_kernel::launch(
            &x.client.clone(),
            grid(cubes),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x]),
            vector,
            x.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            dy.into_tensor_arg(),
            dx.clone().into_tensor_arg(),
            partial.clone().into_tensor_arg(),
            rows as u32,
            self.eps as f32,
            plan,
            dim,
            wanted[1],
            storage(x.dtype),
        );
        let dw = wanted[1].then(|| sum_rows(&partial, 0, [dim]));
        vec![Some(dx), dw]
    }
}
