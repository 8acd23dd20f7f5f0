//! The gate on devices with kernels: one pass forward, one backward.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{
    RowPlan, UNITS, address, first_row, grid, group, load, row_stride, sigmoid, store, store_partial, sum_rows, unused,
    widen, zeros,
};

/// `a + b`, of which the softplus is taken.
#[cube]
fn steps<E: Float, N: Size>(
    a: &Tensor<Vector<E, N>>,
    biases: &Array<Vector<f32, N>>,
    row: usize,
    rows: usize,
    #[comptime] plan: RowPlan,
) -> Array<Vector<f32, N>> {
    let mut values = widen::<E, N>(&load::<E, N>(a, row, rows, plan), plan);
    #[unroll]
    for step in 0..comptime!(plan.steps) {
        values[step] += biases[step];
    }
    values
}

#[cube]
fn softplus<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let zero = Vector::<f32, N>::new(0.0f32);
    max(x, zero) + (zero - x.abs()).exp().log1p()
}

/// The bias, zero where there is none.
#[cube]
fn biases_of<N: Size>(
    bias: &Tensor<Vector<f32, N>>,
    #[comptime] plan: RowPlan,
    #[comptime] has_bias: bool,
) -> Array<Vector<f32, N>> {
    let mut biases = zeros::<N>(plan);
    if comptime!(has_bias) {
        biases = load::<f32, N>(bias, 0usize, 1usize, plan);
    }
    biases
}

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    a: &Tensor<Vector<E, N>>,
    a_log: &Tensor<Vector<f32, N>>,
    bias: &Tensor<Vector<f32, N>>,
    g: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    #[comptime] plan: RowPlan,
    #[comptime] has_bias: bool,
    #[define(E)] _element: ElemType,
) {
    let zero = Vector::<f32, N>::new(0.0f32);
    let rows = rows as usize;
    let rates = load::<f32, N>(a_log, 0usize, 1usize, plan);
    let biases = biases_of::<N>(bias, plan, has_bias);
    let mut row = first_row(plan) + group(plan);
    while row < rows {
        let mut values = steps::<E, N>(a, &biases, row, rows, plan);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            values[step] = (zero - rates[step].exp()) * softplus::<N>(values[step]);
        }
        store::<f32, N>(&values, g, row, rows, plan);
        row += row_stride(plan);
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    a: &Tensor<Vector<E, N>>,
    a_log: &Tensor<Vector<f32, N>>,
    bias: &Tensor<Vector<f32, N>>,
    dg: &Tensor<Vector<f32, N>>,
    da: &mut Tensor<Vector<E, N>>,
    rates_partial: &mut Tensor<Vector<f32, N>>,
    bias_partial: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    #[comptime] plan: RowPlan,
    #[comptime] has_bias: bool,
    #[comptime] bias_grad: bool,
    #[comptime] rate_grad: bool,
    #[define(E)] _element: ElemType,
) {
    let zero = Vector::<f32, N>::new(0.0f32);
    let rows = rows as usize;
    let rates = load::<f32, N>(a_log, 0usize, 1usize, plan);
    let biases = biases_of::<N>(bias, plan, has_bias);
    let mut rate_sums = zeros::<N>(plan);
    let mut bias_sums = zeros::<N>(plan);
    let mut row = first_row(plan) + group(plan);
    while row < rows {
        let mut grads = widen::<f32, N>(&load::<f32, N>(dg, row, rows, plan), plan);
        let values = steps::<E, N>(a, &biases, row, rows, plan);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            let scaled = (zero - rates[step].exp()) * grads[step];
            if comptime!(rate_grad) {
                rate_sums[step] += scaled * softplus::<N>(values[step]);
            }
            grads[step] = scaled * sigmoid::<N>(values[step], plan.approximate);
            if comptime!(bias_grad) {
                bias_sums[step] += grads[step];
            }
        }
        store::<E, N>(&grads, da, row, rows, plan);
        row += row_stride(plan);
    }
    if comptime!(rate_grad) {
        store_partial::<N>(&rate_sums, rates_partial, plan);
    }
    if comptime!(bias_grad) {
        store_partial::<N>(&bias_sums, bias_partial, plan);
    }
}

/// Inputs: `a` `[rows, D]`, A f32 `[D]` and, with `has_bias`, b f32 `[D]`. Output: `g` f32 `[rows, D]`.
#[derive(Clone, Debug)]
pub(super) struct DecayGate {
    pub(super) has_bias: bool,
}

impl DecayGate {
    /// `a`, A, and b or what stands for it.
    fn operands(&self, inputs: Vec<CubeTensor>) -> [CubeTensor; 3] {
        let mut inputs = inputs.into_iter().map(contiguous);
        let mut next = || inputs.next().expect("two inputs");
        let (a, a_log) = (next(), next());
        let [_, dim] = a.meta.shape().dims();
        let bias = inputs.next().unwrap_or_else(|| unused(&a, RowPlan::new(&a, dim).1));
        [a, a_log, bias]
    }
}

impl Operator for DecayGate {
    fn name(&self) -> &'static str {
        "decay_gate"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(inputs[0].shape.clone(), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let [a, a_log, bias] = self.operands(inputs);
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
            a_log.into_tensor_arg(),
            bias.into_tensor_arg(),
            g.clone().into_tensor_arg(),
            rows as u32,
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
        let [a, a_log, bias] = self.operands(inputs);
        let dg = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let [rows, dim] = a.meta.shape().dims();
        let (plan, vector) = RowPlan::new(&a, dim);
        let [rate_grad, bias_grad] = [1, 2].map(|i| wanted.get(i).copied().unwrap_or(false));
        let cubes = plan.partials(&a, rows, true);
        let da = alloc(&a, [rows, dim], a.dtype);
        let partial = |wanted| if wanted { alloc(&a, [cubes, dim], DType::F32) } else { unused(&a, vector) };
        let [rates, biases] = [rate_grad, bias_grad].map(partial);
        backward_kernel::launch(
            &a.client.clone(),
            grid(cubes),
            CubeDim::new_1d(UNITS as u32),
            address(&[&dg]),
            vector,
            a.clone().into_tensor_arg(),
            a_log.into_tensor_arg(),
            bias.into_tensor_arg(),
            dg.into_tensor_arg(),
            da.clone().into_tensor_arg(),
            rates.clone().into_tensor_arg(),
            biases.clone().into_tensor_arg(),
            rows as u32,
            plan,
            self.has_bias,
            bias_grad,
            rate_grad,
            storage(a.dtype),
        );
        let d_a_log = rate_grad.then(|| sum_rows(&rates, 0, [dim]));
        let db = bias_grad.then(|| sum_rows(&biases, 0, [dim]));
        [Some(da), d_a_log].into_iter().chain(self.has_bias.then_some(db)).collect()
    }
}
