//! The gate on devices with kernels: one pass forward, one backward.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{
    RowPlan, UNITS, address, first_row, grid, group, load, row_stride, sigmoid, store, store_partial, sum_rows, unused,
    widen, zeros,
};

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    a: &Tensor<Vector<E, N>>,
    bias: &Tensor<Vector<f32, N>>,
    g: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    factor: f32,
    #[comptime] plan: RowPlan,
    #[comptime] has_bias: bool,
    #[define(E)] _element: ElemType,
) {
    let zero = Vector::<f32, N>::new(0.0f32);
    let rows = rows as usize;
    let mut row = first_row(plan) + group(plan);
    while row < rows {
        let mut values = widen::<E, N>(&load::<E, N>(a, row, rows, plan), plan);
        if comptime!(has_bias) {
            let biases = load::<f32, N>(bias, 0usize, 1usize, plan);
            #[unroll]
            for step in 0..comptime!(plan.steps) {
                values[step] += biases[step];
            }
        }
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let tail = (zero - values[step].abs()).exp().log1p();
            values[step] = (min(values[step], zero) - tail) * Vector::new(factor);
        }
        store::<f32, N>(&values, g, row, rows, plan);
        row += row_stride(plan);
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    a: &Tensor<Vector<E, N>>,
    bias: &Tensor<Vector<f32, N>>,
    dg: &Tensor<Vector<f32, N>>,
    da: &mut Tensor<Vector<E, N>>,
    partial: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    factor: f32,
    #[comptime] plan: RowPlan,
    #[comptime] has_bias: bool,
    #[comptime] bias_grad: bool,
    #[define(E)] _element: ElemType,
) {
    let zero = Vector::<f32, N>::new(0.0f32);
    let rows = rows as usize;
    let mut biases = zeros::<N>(plan);
    if comptime!(has_bias) {
        biases = load::<f32, N>(bias, 0usize, 1usize, plan);
    }
    let mut sums = zeros::<N>(plan);
    let mut row = first_row(plan) + group(plan);
    while row < rows {
        let a_row = load::<E, N>(a, row, rows, plan);
        let mut grads = widen::<f32, N>(&load::<f32, N>(dg, row, rows, plan), plan);
        let values = widen::<E, N>(&a_row, plan);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            grads[step] *= sigmoid::<N>(zero - (values[step] + biases[step]), plan.approximate) * Vector::new(factor);
            if comptime!(bias_grad) {
                sums[step] += grads[step];
            }
        }
        store::<E, N>(&grads, da, row, rows, plan);
        row += row_stride(plan);
    }
    if comptime!(bias_grad) {
        store_partial::<N>(&sums, partial, plan);
    }
}

/// Inputs: `a` `[rows, D]` and, with `has_bias`, `bias` f32 `[D]`. Output: `g` f32 `[rows, D]`.
#[derive(Clone, Debug)]
pub(super) struct LogGate {
    pub(super) normalizer: f64,
    pub(super) has_bias: bool,
}

impl LogGate {
    /// `a`, and the bias or what stands for it.
    fn operands(&self, inputs: Vec<CubeTensor>) -> [CubeTensor; 2] {
        let mut inputs = inputs.into_iter().map(contiguous);
        let a = inputs.next().expect("an input");
        let [_, dim] = a.meta.shape().dims();
        let bias = inputs.next().unwrap_or_else(|| unused(&a, RowPlan::new(&a, dim).1));
        [a, bias]
    }

    fn factor(&self) -> f32 {
        self.normalizer.recip() as f32
    }
}

impl Operator for LogGate {
    fn name(&self) -> &'static str {
        "log_gate"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(inputs[0].shape.clone(), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let [a, bias] = self.operands(inputs);
        let [rows, dim] = a.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&a, dim);
        let g = alloc(&a, [rows, dim], DType::F32);
        forward_kernel::launch(
            &a.client.clone(),
            grid(plan.cubes(rows)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&g]),
            vector,
            a.clone().into_tensor_arg(),
            bias.into_tensor_arg(),
            g.clone().into_tensor_arg(),
            rows as u32,
            self.factor(),
            plan,
            self.has_bias,
            storage(a.dtype),
        );
        vec![g]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [a, bias] = self.operands(inputs);
        let dg = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let [rows, dim] = a.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&a, dim);
        let bias_grad = wanted.get(1).copied().unwrap_or(false);
        let cubes = plan.partials(&a, rows, false);
        let da = alloc(&a, [rows, dim], a.dtype);
        let partial = if bias_grad { alloc(&a, [cubes, dim], DType::F32) } else { unused(&a, vector) };
        backward_kernel::launch(
            &a.client.clone(),
            grid(cubes),
            CubeDim::new_1d(UNITS as u32),
            address(&[&dg]),
            vector,
            a.clone().into_tensor_arg(),
            bias.into_tensor_arg(),
            dg.into_tensor_arg(),
            da.clone().into_tensor_arg(),
            partial.clone().into_tensor_arg(),
            rows as u32,
            self.factor(),
            plan,
            self.has_bias,
            bias_grad,
            storage(a.dtype),
        );
        let db = bias_grad.then(|| sum_rows(&partial, 0, [dim]));
        if self.has_bias { vec![Some(da), db] } else { vec![Some(da)] }
    }
}
