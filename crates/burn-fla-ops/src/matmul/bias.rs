//! The bias of a linear layer, whose gradient is a sum over all rows.
//!
//! Burn's reduction over the first dimension took 3.1 ms for 16,384 rows of 512 on an H100, where reading them once would take 6 µs; here
//! each cube adds up some of the rows, and a second kernel the sums of the cubes, in a fixed order.

use burn::tensor::{DType, Shape, Tensor};
use cubecl::prelude::CubeDim;

use crate::bridge::own_gradient::with_gradient;
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, contiguous, storage};
use crate::rows::{RowPlan, UNITS, address, fits, grid, sum_rows};

/// The bias beside rows of this shape and dtype, without a copy of it for each; `None` where its gradient is Burn's.
pub(super) fn rows<const D: usize>(bias: &Tensor<1>, dims: [usize; D], dtype: DType) -> Option<Tensor<D>> {
    let taken = matches!(bias.dtype(), DType::F32 | DType::BF16) && fits(dims[D - 1]) && dims.iter().all(|n| *n > 0);
    if !taken || !crate::bridge::has_kernels(&bias.device(), crate::Engine::Auto) {
        return None;
    }
    let bias_dtype = bias.dtype();
    let input = bias.clone().unsqueeze::<D>();
    let value = input.clone().detach().cast(dtype).expand(dims);
    Some(with_gradient(input, value, move |grad: Tensor<D>| -> Tensor<D> {
        let columns = dims[D - 1];
        let grad = grad.reshape([dims[..D - 1].iter().product(), columns]);
        let sums = Tensor::<1>::from_dispatch(apply(ColumnSums, vec![grad.into_dispatch()], Vec::new()).remove(0));
        sums.cast(bias_dtype).unsqueeze::<D>()
    }))
}

/// Input: `x` `[rows, D]`. Output: the sum of its rows, f32 `[D]`.
#[derive(Debug)]
struct ColumnSums;

impl Operator for ColumnSums {
    fn name(&self) -> &'static str {
        "column_sums"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(Shape::from([inputs[0].shape.dims::<2>()[1]]), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        vec![column_sums(inputs.into_iter().next().expect("an input"))]
    }

    fn backward(
        &self,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        unreachable!("it is part of a gradient, which has none itself")
    }
}

/// The sum of the rows of a matrix, f32.
pub(super) fn column_sums(x: CubeTensor) -> CubeTensor {
    let x = contiguous(x);
    let [rows, dim] = x.meta.shape().dims();
    let (plan, vector) = RowPlan::new(&x, dim);
    let cubes = plan.partials(&x, rows, false);
    let partial = alloc(&x, [cubes, dim], DType::F32);
    kernel::column_sums::launch(
        &x.client.clone(),
        grid(cubes),
        CubeDim::new_1d(UNITS as u32),
        address(&[&x]),
        vector,
        x.clone().into_tensor_arg(),
        partial.clone().into_tensor_arg(),
        rows as u32,
        plan,
        storage(x.dtype),
    );
    sum_rows(&partial, 0, [dim])
}

mod kernel {
    use cubecl::prelude::*;

    use crate::rows::{RowPlan, first_row, group, load, row_stride, store_partial, widen, zeros};

    #[cube(launch, address_type = "dynamic")]
    pub(super) fn column_sums<E: Float, N: Size>(
        x: &Tensor<Vector<E, N>>,
        partial: &mut Tensor<Vector<f32, N>>,
        rows: u32,
        #[comptime] plan: RowPlan,
        #[define(E)] _element: ElemType,
    ) {
        let rows = rows as usize;
        let mut sums = zeros::<N>(plan);
        let mut row = first_row(plan) + group(plan);
        while row < rows {
            let values = widen::<E, N>(&load::<E, N>(x, row, rows, plan), plan);
            #[unroll]
            for step in 0..comptime!(plan.steps) {
                sums[step] += values[step];
            }
            row += row_stride(plan);
        }
        store_partial::<N>(&sums, partial, plan);
    }
}
