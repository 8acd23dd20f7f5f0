//! The softmax between the two passes on devices with kernels: a row of slots a unit, nothing saved besides the scores.
//! Burn's own softmax keeps and moves several f32 tensors of this size: between two passes on the tensor cores of an H200,
//! gsa took 9.4 ms forward and backward with it, and 4.5 with this kernel (8 × 2048 × 32 × 128 × 128, 64 slots).

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{MAX_CUBES, UNITS, address, grid, vector_size};

/// The largest number of a row, and the sum of `e^{x − largest}` over it.
#[cube]
fn row_terms<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    row: usize,
    #[comptime] width: usize,
    #[comptime] vector: usize,
) -> (f32, f32) {
    let mut largest = Vector::<f32, N>::cast_from(x[row * width]);
    for i in 1..width {
        largest = max(largest, Vector::cast_from(x[row * width + i]));
    }
    let mut most = largest.extract(0usize);
    #[unroll]
    for i in 1..vector {
        most = f32::max(most, largest.extract(i));
    }
    let mut sums = Vector::<f32, N>::new(0.0f32);
    for i in 0..width {
        let value = Vector::<f32, N>::cast_from(x[row * width + i]) - Vector::<f32, N>::new(most);
        sums += value.exp();
    }
    (most, total::<N>(sums, vector))
}

#[cube]
fn total<N: Size>(sums: Vector<f32, N>, #[comptime] vector: usize) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..vector {
        sum += sums.extract(i);
    }
    sum
}

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    y: &mut Tensor<Vector<E, N>>,
    rows: usize,
    #[comptime] width: usize,
    #[comptime] vector: usize,
    #[define(E)] _element: ElemType,
) {
    let mut row = ABSOLUTE_POS;
    while row < rows {
        let (most, sum) = row_terms::<E, N>(x, row, width, vector);
        for i in 0..width {
            let value = Vector::<f32, N>::cast_from(x[row * width + i]) - Vector::<f32, N>::new(most);
            y[row * width + i] = Vector::cast_from(value.exp() / Vector::<f32, N>::new(sum));
        }
        row += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    dy: &Tensor<Vector<E, N>>,
    dx: &mut Tensor<Vector<E, N>>,
    rows: usize,
    #[comptime] width: usize,
    #[comptime] vector: usize,
    #[define(E)] _element: ElemType,
) {
    let mut row = ABSOLUTE_POS;
    while row < rows {
        let (most, sum) = row_terms::<E, N>(x, row, width, vector);
        let most = Vector::<f32, N>::new(most);
        let mut products = Vector::<f32, N>::new(0.0f32);
        for i in 0..width {
            let value = Vector::<f32, N>::cast_from(x[row * width + i]) - most;
            products += value.exp() * Vector::<f32, N>::cast_from(dy[row * width + i]);
        }
        let mean = Vector::<f32, N>::new(total::<N>(products, vector) / sum);
        for i in 0..width {
            let value = Vector::<f32, N>::cast_from(x[row * width + i]) - most;
            let p = value.exp() / Vector::<f32, N>::new(sum);
            let grad = Vector::<f32, N>::cast_from(dy[row * width + i]) - mean;
            dx[row * width + i] = Vector::cast_from(p * grad);
        }
        row += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

/// The softmax over the last of four dimensions. Input and output: `[B, T, H, M]` of one dtype.
#[derive(Clone, Debug)]
pub(super) struct Softmax;

impl Softmax {
    /// Rows, vectors a row, elements a vector.
    fn sizes(x: &CubeTensor) -> (usize, usize, usize) {
        let [b, t, h, m] = x.meta.shape().dims::<4>();
        let vector = vector_size(m);
        (b * t * h, m / vector, vector)
    }
}

impl Operator for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let x = contiguous(inputs.into_iter().next().expect("one input"));
        let (rows, width, vector) = Self::sizes(&x);
        let y = alloc(&x, x.meta.shape().dims::<4>(), x.dtype);
        let dtype: DType = x.dtype;
        forward_kernel::launch(
            &y.client,
            grid(rows.div_ceil(UNITS).min(MAX_CUBES)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x]),
            vector,
            x.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            rows,
            width,
            vector,
            storage(dtype),
        );
        vec![y]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let x = contiguous(inputs.into_iter().next().expect("one input"));
        let dy = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let (rows, width, vector) = Self::sizes(&x);
        let dx = alloc(&x, x.meta.shape().dims::<4>(), x.dtype);
        let dtype = x.dtype;
        backward_kernel::launch(
            &dx.client,
            grid(rows.div_ceil(UNITS).min(MAX_CUBES)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x]),
            vector,
            x.into_tensor_arg(),
            dy.into_tensor_arg(),
            dx.clone().into_tensor_arg(),
            rows,
            width,
            vector,
            storage(dtype),
        );
        vec![Some(dx)]
    }
}
