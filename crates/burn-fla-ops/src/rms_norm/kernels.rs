//! The RMS norm on devices with kernels.
//!
//! Nothing is saved besides the inputs: backward takes both sums over a row that it needs, `Σ x²` and `Σ x ∘ w ∘ dy`, in
//! one pass, and with them `dx = rstd · (w ∘ dy − x · rstd² · Σ(x ∘ w ∘ dy) / D)`.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{RowPlan, UNITS, address, grid, pair, row_sum, store_partial, sum_rows, unused};

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
                let value = Vector::<f32, N>::cast_from(x[start + column]);
                kept[step] = value;
                squares += value * value;
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
                let value = Vector::<f32, N>::cast_from(x[start + column]);
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
                let value = kept[step];
                let grad = grads[step];
                let inner = grad * weight[column] - value * Vector::new(along);
                dx[start + column] = Vector::cast_from(inner * Vector::new(rstd));
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

/// Inputs: `x` `[rows, D]`, `weight` f32 `[D]`. Output: `y` `[rows, D]`.
#[derive(Clone, Debug)]
pub(super) struct RmsNorm {
    pub(super) eps: f64,
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
        let cubes = plan.partials(rows);
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
