//! The residual addition with the norm after it, on devices with kernels.
//!
//! Saved: the sum `s`, which is an output anyway. Backward reads it instead of `x` and `residual`:
//! `ds' = ds + rstd · (w ∘ dy − s · rstd² · Σ(s ∘ w ∘ dy) / D)` is the gradient of both.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage, zeros};
use crate::rows::{RowPlan, UNITS, address, grid, pair, row_sum, store_partial, sum_rows, unused};

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
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(UNITS));
    let lane = UNIT_POS as usize % comptime!(plan.lanes);
    let group = UNIT_POS as usize / comptime!(plan.lanes);
    let mut first = CUBE_POS_X as usize * comptime!(plan.groups());
    while first < rows as usize {
        let row = first + group;
        let live = row < rows as usize;
        let start = row * comptime!(plan.width);
        let mut kept = Array::<Vector<f32, N>>::new(comptime!(plan.steps));
        let mut squares = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let column = lane + step * comptime!(plan.lanes);
            kept[step] = Vector::<f32, N>::new(0.0f32);
            if live && column < comptime!(plan.width) {
                let at = start + column;
                let value = Vector::<f32, N>::cast_from(x[at]) + Vector::<f32, N>::cast_from(residual[at]);
                kept[step] = value;
                squares += value * value;
                sum[at] = Vector::cast_from(value);
            }
        }
        let total = row_sum::<Const<1>>(Vector::new(squares.vector_sum()), &mut shared, plan);
        let rstd = f32::inverse_sqrt(total.extract(0usize) / comptime!(dim as f32) + eps);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let column = lane + step * comptime!(plan.lanes);
            if live && column < comptime!(plan.width) {
                y[start + column] = Vector::cast_from(kept[step] * Vector::new(rstd) * weight[column]);
            }
        }
        first += CUBE_COUNT_X as usize * comptime!(plan.groups());
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
    #[comptime] both: bool,
    #[comptime] weight_grad: bool,
    #[define(E, R)] _elements: [ElemType; 2],
) {
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(UNITS));
    let lane = UNIT_POS as usize % comptime!(plan.lanes);
    let group = UNIT_POS as usize / comptime!(plan.lanes);
    let mut dw = Array::<Vector<f32, N>>::new(comptime!(plan.steps));
    #[unroll]
    for step in 0..comptime!(plan.steps) {
        dw[step] = Vector::<f32, N>::new(0.0f32);
    }
    let mut first = CUBE_POS_X as usize * comptime!(plan.groups());
    while first < rows as usize {
        let row = first + group;
        let live = row < rows as usize;
        let start = row * comptime!(plan.width);
        let mut kept = Array::<Vector<f32, N>>::new(comptime!(plan.steps));
        let mut grads = Array::<Vector<f32, N>>::new(comptime!(plan.steps));
        let mut squares = Vector::<f32, N>::new(0.0f32);
        let mut products = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let column = lane + step * comptime!(plan.lanes);
            kept[step] = Vector::<f32, N>::new(0.0f32);
            grads[step] = Vector::<f32, N>::new(0.0f32);
            if live && column < comptime!(plan.width) {
                let value = Vector::<f32, N>::cast_from(sum[start + column]);
                let grad = Vector::<f32, N>::cast_from(dy[start + column]);
                kept[step] = value;
                grads[step] = grad;
                squares += value * value;
                products += value * grad * weight[column];
            }
        }
        let sums = pair(squares.vector_sum(), products.vector_sum());
        let sums = row_sum::<Const<2>>(sums, &mut shared, plan);
        let rstd = f32::inverse_sqrt(sums.extract(0usize) / comptime!(dim as f32) + eps);
        let along = rstd * rstd * sums.extract(1usize) / comptime!(dim as f32);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let column = lane + step * comptime!(plan.lanes);
            if live && column < comptime!(plan.width) {
                let at = start + column;
                let value = kept[step];
                let grad = grads[step];
                let inner = grad * weight[column] - value * Vector::new(along);
                let total = inner * Vector::new(rstd) + Vector::<f32, N>::cast_from(ds[at]);
                dr[at] = Vector::cast_from(total);
                if comptime!(both) {
                    dx[at] = Vector::cast_from(total);
                }
                if comptime!(weight_grad) {
                    dw[step] += grad * value * Vector::new(rstd);
                }
            }
        }
        first += CUBE_COUNT_X as usize * comptime!(plan.groups());
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
        let or_zeros = |grad: Option<CubeTensor>, dtype| match grad {
            Some(grad) => contiguous(grad),
            None => zeros(&sum, [rows, dim], dtype),
        };
        let (dy, ds) = (or_zeros(dy, x.dtype), or_zeros(ds, sum.dtype));
        let (plan, vector) = RowPlan::new(&sum, dim);
        let cubes = plan.partials(rows);
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
            both,
            wanted[2],
            [storage(x.dtype), storage(sum.dtype)],
        );
        let dw = wanted[2].then(|| sum_rows(&partial, 0, [dim]));
        let dx = if both { dx } else { dr.clone() };
        vec![Some(dx), Some(dr), dw]
    }
}
