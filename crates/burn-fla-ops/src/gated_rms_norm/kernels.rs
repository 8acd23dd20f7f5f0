//! The gated RMS norm on devices with kernels.
//!
//! Nothing is saved besides the inputs; the normalised value is made again in backward.

use burn::tensor::DType;
use cubecl::prelude::*;

use super::GateActivation;
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rms_norm::kernels::{gradient_factors, inverse_rms};
use crate::rows::{
    RowPlan, SHARED, UNITS, address, first_row, grid, group, load, row_stride, sigmoid, store, store_partial, sum_rows,
    unused, widen, zeros,
};

/// `act(g)`.
#[cube]
fn open<N: Size>(gate: Vector<f32, N>, #[comptime] act: GateActivation, #[comptime] plan: RowPlan) -> Vector<f32, N> {
    let s = sigmoid::<N>(gate, plan.approximate);
    if comptime!(act == GateActivation::Silu) { gate * s } else { s }
}

/// `act'(g)`.
#[cube]
fn slope<N: Size>(gate: Vector<f32, N>, #[comptime] act: GateActivation, #[comptime] plan: RowPlan) -> Vector<f32, N> {
    let s = sigmoid::<N>(gate, plan.approximate);
    let one = Vector::<f32, N>::new(1.0f32);
    if comptime!(act == GateActivation::Silu) { s * (one + gate * (one - s)) } else { s * (one - s) }
}

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    gate: &Tensor<Vector<E, N>>,
    weight: &Tensor<Vector<f32, N>>,
    y: &mut Tensor<Vector<E, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
    #[comptime] act: GateActivation,
    #[define(E)] _element: ElemType,
) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(SHARED));
    let rows = rows as usize;
    let mut turn = 0usize;
    let mut first = first_row(plan);
    while first < rows {
        let row = first + group(plan);
        let x_row = load::<E, N>(x, row, rows, plan);
        let gates = load::<E, N>(gate, row, rows, plan);
        let weights = load::<f32, N>(weight, 0usize, 1usize, plan);
        let mut values = widen::<E, N>(&x_row, plan);
        let gates = widen::<E, N>(&gates, plan);
        let rstd = inverse_rms::<N>(&values, &mut shared, turn, eps, plan, dim);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            values[step] = values[step] * Vector::new(rstd) * weights[step] * open::<N>(gates[step], act, plan);
        }
        store::<E, N>(&values, y, row, rows, plan);
        turn = 1 - turn;
        first += row_stride(plan);
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    gate: &Tensor<Vector<E, N>>,
    weight: &Tensor<Vector<f32, N>>,
    dy: &Tensor<Vector<E, N>>,
    dx: &mut Tensor<Vector<E, N>>,
    dg: &mut Tensor<Vector<E, N>>,
    partial: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] dim: usize,
    #[comptime] act: GateActivation,
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
        let gate_row = load::<E, N>(gate, row, rows, plan);
        let dy_row = load::<E, N>(dy, row, rows, plan);
        let values = widen::<E, N>(&x_row, plan);
        let mut slopes = widen::<E, N>(&gate_row, plan);
        let mut grads = widen::<E, N>(&dy_row, plan);
        // What the sums over the row do not change: dg but for rstd, and m = dy ∘ act(g).
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let gate = slopes[step];
            slopes[step] = grads[step] * values[step] * weights[step] * slope::<N>(gate, act, plan);
            grads[step] *= open::<N>(gate, act, plan);
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
            grads[step] = (grads[step] * weights[step] - values[step] * along) * rstd;
            slopes[step] *= rstd;
        }
        store::<E, N>(&grads, dx, row, rows, plan);
        store::<E, N>(&slopes, dg, row, rows, plan);
        turn = 1 - turn;
        first += row_stride(plan);
    }
    if comptime!(weight_grad) {
        store_partial::<N>(&dw, partial, plan);
    }
}

/// Inputs: `x` and `gate` `[rows, D]`, `weight` f32 `[D]`. Output: `y` `[rows, D]`.
#[derive(Clone, Debug)]
pub(super) struct GatedRmsNorm {
    pub(super) eps: f64,
    pub(super) act: GateActivation,
}

impl Operator for GatedRmsNorm {
    fn name(&self) -> &'static str {
        "gated_rms_norm"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let [x, gate, weight] = inputs.try_into().expect("three inputs");
        let (x, gate, weight) = (contiguous(x), contiguous(gate), contiguous(weight));
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
            gate.into_tensor_arg(),
            weight.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            rows as u32,
            self.eps as f32,
            plan,
            dim,
            self.act,
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
        let [x, gate, weight] = inputs.try_into().expect("three inputs");
        let (x, gate, weight) = (contiguous(x), contiguous(gate), contiguous(weight));
        let dy = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let [rows, dim] = x.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&x, dim);
        let cubes = plan.partials(&x, rows, true);
        let dx = alloc(&x, [rows, dim], x.dtype);
        let dg = alloc(&x, [rows, dim], x.dtype);
        let partial = if wanted[2] { alloc(&x, [cubes, dim], DType::F32) } else { unused(&x, vector) };
        backward_kernel::launch(
            &x.client.clone(),
            grid(cubes),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x]),
            vector,
            x.clone().into_tensor_arg(),
            gate.into_tensor_arg(),
            weight.into_tensor_arg(),
            dy.into_tensor_arg(),
            dx.clone().into_tensor_arg(),
            dg.clone().into_tensor_arg(),
            partial.clone().into_tensor_arg(),
            rows as u32,
            self.eps as f32,
            plan,
            dim,
            self.act,
            wanted[2],
            storage(x.dtype),
        );
        let dw = wanted[2].then(|| sum_rows(&partial, 0, [dim]));
        vec![Some(dx), Some(dg), dw]
    }
}
