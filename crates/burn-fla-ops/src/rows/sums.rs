//! The second stage of sums over rows, and sums over everything.

use burn::tensor::DType;
use cubecl::prelude::*;

use super::walk::row_sum;
use super::{RowPlan, SHARED, UNITS, address, grid};
use crate::bridge::{CubeTensor, alloc};

/// Columns of a cube in [`sum_rows`]: what one access to memory brings.
const COLUMNS: usize = 8;
/// Rows that a unit of it loads before it adds them: one after the other, each would wait for memory.
const BATCH: usize = 4;

#[cube(launch, address_type = "dynamic")]
fn sum_rows_kernel(partial: &Tensor<f32>, sum: &mut Tensor<f32>, rows: u32, stride: u32, first: u32, columns: u32) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(UNITS));
    let rows = rows as usize;
    let unit = UNIT_POS as usize;
    let column = CUBE_POS_X as usize * comptime!(COLUMNS) + unit % comptime!(COLUMNS);
    let inside = min(column, columns as usize - 1) + first as usize;
    let mut row = unit / comptime!(COLUMNS);
    let mut total = 0.0f32;
    while row < rows {
        let mut kept = Array::<f32>::new(comptime!(BATCH));
        #[unroll]
        for i in 0..comptime!(BATCH) {
            kept[i] = partial[min(row + comptime!(i * UNITS / COLUMNS), rows - 1) * stride as usize + inside];
        }
        #[unroll]
        for i in 0..comptime!(BATCH) {
            total += select(row + comptime!(i * UNITS / COLUMNS) < rows, kept[i], 0.0f32);
        }
        row += comptime!(BATCH * UNITS / COLUMNS);
    }
    shared[unit] = total;
    sync_cube();
    if unit < comptime!(COLUMNS) && column < columns as usize {
        let mut all = 0.0f32;
        #[unroll]
        for other in 0..comptime!(UNITS / COLUMNS) {
            all += shared[unit + other * comptime!(COLUMNS)];
        }
        sum[column] = all;
    }
}

/// The sum over the rows of `partial`, `[rows, stride]`, of the columns from `first` on that `shape` holds, always in the
/// same order.
pub(crate) fn sum_rows<const D: usize>(partial: &CubeTensor, first: usize, shape: [usize; D]) -> CubeTensor {
    let [rows, stride] = partial.meta.shape().dims();
    let columns = shape.iter().product::<usize>();
    let sum = alloc(partial, shape, DType::F32);
    sum_rows_kernel::launch(
        &partial.client,
        grid(columns.div_ceil(COLUMNS)),
        CubeDim::new_1d(UNITS as u32),
        address(&[partial]),
        partial.clone().into_tensor_arg(),
        sum.clone().into_tensor_arg(),
        rows as u32,
        stride as u32,
        first as u32,
        columns as u32,
    );
    sum
}

#[cube(launch, address_type = "dynamic")]
fn sum_all_kernel(x: &Tensor<f32>, sum: &mut Tensor<f32>, #[comptime] plan: RowPlan) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(SHARED));
    let mut total = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < x.len() {
        total += x[at];
        at += comptime!(UNITS);
    }
    let total = row_sum::<Const<1>>(Vector::new(total), &mut shared, 0usize, plan);
    if UNIT_POS == 0 {
        sum[0] = total.extract(0usize);
    }
}

/// The sum of all elements, `[1]`, always in the same order: by one cube, so for what is not large.
pub(crate) fn sum_all(x: CubeTensor) -> CubeTensor {
    let sum = alloc(&x, [1], DType::F32);
    sum_all_kernel::launch(
        &sum.client,
        grid(1),
        CubeDim::new_1d(UNITS as u32),
        address(&[&x]),
        x.clone().into_tensor_arg(),
        sum.clone().into_tensor_arg(),
        RowPlan::whole_cube(&x),
    );
    sum
}
