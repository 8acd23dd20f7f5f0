//! The residual addition with the norm after it, on devices with kernels.
//!
//! Saved: the sum `s`, which is an output anyway. Backward reads it instead of `x` and `residual`:
//! `ds' = ds + rstd · (w ∘ dy − s · rstd² · Σ(s ∘ w ∘ dy) / D)` is the gradient of both.

use burn::tensor::DType;
use cubecl::prelude::*;

use super::kernels::{gradient_factors, inverse_rms};
use crate::bridge::{self, CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{
    RowPlan, SHARED, UNITS, address, first_row, grid, group, load, row_stride, store, store_partial, sum_rows, unused,
    widen, zeros,
};

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, R: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    residual: &Tensor<Vector<R, N>>,
    weight: &Tensor<Vector<f32, N>>,
    y: &mut Tensor<Vector<E, N>>,
    sum: &mut Tensor<Vector<R, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
    #[define(E, R)] _elements: [ElemType; 2],
) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(SHARED));
    let rows = rows as usize;
    let mut turn = 0usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let mut values = widen::<E, N>(&load::<E, N>(x, row, rows, plan), plan);
        let others = widen::<R, N>(&load::<R, N>(residual, row, rows, plan), plan);
        let weights = load::<f32, N>(weight, 0usize, 1usize, plan);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            values[step] += others[step];
        }
        store::<R, N>(&values, sum, row, rows, plan);
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
fn backward_kernel<E: Float, R: Float, N: Size>(
    sum: &Tensor<Vector<R, N>>,
    weight: &Tensor<Vector<f32, N>>,
    dy: &Tensor<Vector<E, N>>,
    ds: &Tensor<Vector<R, N>>,
    dx: &mut Tensor<Vector<E, N>>,
    dr: &mut Tensor<Vector<R, N>>,
    partial: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
    #[comptime] with_ds: bool,
    #[comptime] both: bool,
    #[comptime] weight_grad: bool,
    #[define(E, R)] _elements: [ElemType; 2],
) {
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(SHARED));
    let rows = rows as usize;
    let weights = load::<f32, N>(weight, 0usize, 1usize, plan);
    let mut dw = zeros::<N>(plan);
    let mut turn = 0usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let sum_row = load::<R, N>(sum, row, rows, plan);
        let dy_row = load::<E, N>(dy, row, rows, plan);
        let values = widen::<R, N>(&sum_row, plan);
        let mut grads = widen::<E, N>(&dy_row, plan);
        let mut added = zeros::<N>(plan);
        if comptime!(with_ds) {
            added = widen::<R, N>(&load::<R, N>(ds, row, rows, plan), plan);
        }
        let live = row < rows;
        let factors = gradient_factors::<N>(&values, &grads, &weights, &mut shared, turn, live, eps, plan, dim);
        let rstd = Vector::<f32, N>::new(factors.extract(0usize));
        let along = Vector::<f32, N>::new(factors.extract(1usize));
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            if comptime!(weight_grad) {
                dw[step] += grads[step] * (values[step] * rstd);
            }
            grads[step] = (grads[step] * weights[step] - values[step] * along) * rstd + added[step];
        }
        store::<R, N>(&grads, dr, row, rows, plan);
        if comptime!(both) {
            store::<E, N>(&grads, dx, row, rows, plan);
        }
        turn = 1 - turn;
        first += row_stride(plan);
    }
    if comptime!(weight_grad) {
        store_partial::<N>(&dw, partial, plan);
    }
}

/// Inputs: `x` `[rows, D]`, `residual` `[rows, D]`, `weight` f32 `[D]`. Outputs: `y` as `x`, `s` as `residual`.
#[derive(Clone, Debug)]
pub(super) struct AddRmsNorm {
    pub(super) eps: f64,
}

impl Operator for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone(), inputs[1].clone()]
    }

    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[1].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let [x, residual, weight] = inputs.try_into().expect("three inputs");
        let (x, residual, weight) = (contiguous(x), contiguous(residual), contiguous(weight));
        let [rows, dim] = x.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&x, dim);
        let y = alloc(&x, [rows, dim], x.dtype);
        let sum = alloc(&x, [rows, dim], residual.dtype);
        forward_kernel::launch(
            &x.client.clone(),
            grid(plan.cubes(rows)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x, &residual]),
            vector,
            x.clone().into_tensor_arg(),
            residual.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            sum.clone().into_tensor_arg(),
            rows as u32,
            self.eps as f32,
            plan,
            dim,
            [storage(x.dtype), storage(residual.dtype)],
        );
        let mut outputs = vec![y, sum.clone()];
        if save {
            outputs.push(sum);
        }
        outputs
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [x, _, weight] = inputs.try_into().expect("three inputs");
        let [sum] = saved.try_into().expect("the saved sum");
        let [dy, ds] = grads.try_into().expect("two gradients");
        let (sum, weight) = (contiguous(sum), contiguous(weight));
        let [rows, dim] = sum.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&sum, dim);
        // Where the loss uses the sum alone, the norm's part of the gradient is none.
        let dy = dy.map_or_else(|| bridge::zeros(&sum, [rows, dim], x.dtype), contiguous);
        // Where it uses the norm alone, a small buffer stands for the gradient of the sum, which is not read.
        let with_ds = ds.is_some();
        let ds = ds.map_or_else(|| alloc(&sum, [vector], sum.dtype), contiguous);
        let cubes = plan.partials(&sum, rows, true);
        // One buffer is the gradient of both where both are of one dtype.
        let both = x.dtype != sum.dtype;
        let dr = alloc(&sum, [rows, dim], sum.dtype);
        let dx = if both { alloc(&sum, [rows, dim], x.dtype) } else { alloc(&sum, [vector], x.dtype) };
        let partial = if wanted[2] { alloc(&sum, [cubes, dim], DType::F32) } else { unused(&sum, vector) };
        backward_kernel::launch(
            &sum.client.clone(),
            grid(cubes),
            CubeDim::new_1d(UNITS as u32),
            address(&[&sum, &dy]),
            vector,
            sum.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            dy.into_tensor_arg(),
            ds.into_tensor_arg(),
            dx.clone().into_tensor_arg(),
            dr.clone().into_tensor_arg(),
            partial.clone().into_tensor_arg(),
            rows as u32,
            self.eps as f32,
            plan,
            dim,
            with_ds,
            both,
            wanted[2],
            [storage(x.dtype), storage(sum.dtype)],
        );
        let dw = wanted[2].then(|| sum_rows(&partial, 0, [dim]));
        let dx = if both { dx } else { dr.clone() };
        vec![Some(dx), Some(dr), dw]
    }
}
