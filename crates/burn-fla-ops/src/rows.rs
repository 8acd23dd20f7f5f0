//! What the row-wise kernels share: how rows are laid over cubes, the sum over a row, and the second stage of sums over
//! rows.
//!
//! A cube has 256 units. A row of `width` vectors is worked on by `lanes` of them (a power of two), so that a cube holds
//! `256 / lanes` rows at a time; each unit owns `steps` vectors of its row and keeps them in registers.

use burn::tensor::DType;
use cubecl::ir::features::Plane;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, alloc};

/// Units of a cube.
pub(crate) const UNITS: usize = 256;
/// Vectors that a unit may keep: what is more would leave the registers.
const MAX_STEPS: usize = 32;
/// The most cubes that write partial sums: enough to fill a large GPU twice, few enough for a short second stage.
const MAX_PARTIALS: usize = 512;
/// The most cubes of one launch in the first dimension that every device allows.
pub(crate) const MAX_CUBES: usize = 65_535;
/// Columns of a cube in [`sum_rows`].
const COLUMNS: usize = 32;

/// How one row is laid over units: what the kernels are specialised on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowPlan {
    /// Vectors of a row.
    pub(crate) width: usize,
    /// Units of a row, a power of two.
    pub(crate) lanes: usize,
    /// Vectors of a unit.
    pub(crate) steps: usize,
    /// Whether units exchange values inside planes of 32 or through shared memory.
    pub(crate) planes: bool,
}

/// The widest vector of f32 that divides `size`, up to four elements.
pub(crate) fn vector_size(size: usize) -> usize {
    [4, 2].into_iter().find(|n| size.is_multiple_of(*n)).unwrap_or(1)
}

/// Whether a row of `dim` elements fits the kernels.
pub(crate) fn fits(dim: usize) -> bool {
    dim > 0 && (dim / vector_size(dim)).div_ceil(UNITS) <= MAX_STEPS
}

impl RowPlan {
    /// The plan for rows of `dim` elements on the device of `like`, and the size of its vectors.
    pub(crate) fn new(like: &CubeTensor, dim: usize) -> (Self, usize) {
        let vector = vector_size(dim);
        let width = dim / vector;
        // Two vectors a unit: the norms of [32768, 2048] and of its heads then move 2.4 to 2.8 TB/s on an H100.
        let lanes = width.div_ceil(2).next_power_of_two().min(UNITS);
        let plan = Self { width, lanes, steps: width.div_ceil(lanes), planes: planes_of_32(like) };
        (plan, vector)
    }

    /// The plan for one number a unit, of which [`row_sum`] makes one over the cube.
    pub(crate) fn whole_cube(like: &CubeTensor) -> Self {
        Self { width: UNITS, lanes: UNITS, steps: 1, planes: planes_of_32(like) }
    }

    /// Rows of a cube.
    pub(crate) fn groups(&self) -> usize {
        UNITS / self.lanes
    }

    /// Cubes of a launch over `rows` rows.
    pub(crate) fn cubes(&self, rows: usize) -> usize {
        rows.div_ceil(self.groups()).min(MAX_CUBES)
    }

    /// Cubes of a launch over `rows` rows in which each cube writes a partial sum over its rows.
    pub(crate) fn partials(&self, rows: usize) -> usize {
        rows.div_ceil(self.groups()).min(MAX_PARTIALS)
    }
}

/// Whether units can exchange values inside planes of exactly 32.
pub(crate) fn planes_of_32(like: &CubeTensor) -> bool {
    let properties = like.client.properties();
    let hardware = &properties.hardware;
    properties.features.plane.contains(Plane::Ops) && hardware.plane_size_min == 32 && hardware.plane_size_max == 32
}

/// The address type that reaches every element of `tensors`.
pub(crate) fn address(tensors: &[&CubeTensor]) -> AddressType {
    let types = tensors.iter().map(|t| t.required_address_type());
    types.max().unwrap_or_default()
}

/// A one-dimensional grid.
pub(crate) fn grid(cubes: usize) -> CubeCount {
    CubeCount::Static(cubes as u32, 1, 1)
}

/// A buffer to bind where a kernel's specialisation reads or writes none.
pub(crate) fn unused(like: &CubeTensor, vector: usize) -> CubeTensor {
    alloc(like, [vector], DType::F32)
}

/// The sum of `value` over the units of a row, on each of them. All units of the cube must come here.
#[cube]
pub(crate) fn row_sum<N: Size>(
    value: Vector<f32, N>,
    shared: &mut Shared<[Vector<f32, N>]>,
    #[comptime] plan: RowPlan,
) -> Vector<f32, N> {
    let unit = UNIT_POS as usize;
    if comptime!(plan.planes) {
        let mut total = value;
        #[unroll]
        for bit in 0..comptime!(plan.lanes.min(32).ilog2()) {
            total += plane_shuffle_xor(total, comptime!(1u32 << bit));
        }
        if comptime!(plan.lanes > 32) {
            if unit % 32 == 0 {
                shared[unit / 32] = total;
            }
            sync_cube();
            let first = unit / comptime!(plan.lanes) * comptime!(plan.lanes / 32);
            total = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for plane in 0..comptime!(plan.lanes / 32) {
                total += shared[first + plane];
            }
            sync_cube();
        }
        total
    } else {
        shared[unit] = value;
        sync_cube();
        #[unroll]
        for bit in 0..comptime!(plan.lanes.ilog2()) {
            let stride = comptime!(plan.lanes >> (bit + 1));
            if unit % comptime!(plan.lanes) < stride {
                let other = shared[unit + stride];
                shared[unit] += other;
            }
            sync_cube();
        }
        let total = shared[unit / comptime!(plan.lanes) * comptime!(plan.lanes)];
        sync_cube();
        total
    }
}

/// `1 / (1 + e^{−x})`.
#[cube]
pub(crate) fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    // Held below where the exponential would leave f32: not every device has infinities.
    let exponent = min(Vector::<f32, N>::new(0.0f32) - x, Vector::<f32, N>::new(80.0f32));
    one / (one + exponent.exp())
}

/// Two numbers side by side.
#[cube]
pub(crate) fn pair(a: f32, b: f32) -> Vector<f32, Const<2>> {
    let mut both = Vector::<f32, Const<2>>::new(a);
    both.insert(1usize, b);
    both
}

/// Writes the sum over the rows of a cube of what each unit accumulated: row `CUBE_POS_X` of `partial`.
#[cube]
pub(crate) fn store_partial<N: Size>(
    sums: &Array<Vector<f32, N>>,
    partial: &mut Tensor<Vector<f32, N>>,
    #[comptime] plan: RowPlan,
) {
    let mut shared = Shared::<[Vector<f32, N>]>::new_slice(comptime!(UNITS));
    let unit = UNIT_POS as usize;
    #[unroll]
    for step in 0..comptime!(plan.steps) {
        shared[unit] = sums[step];
        sync_cube();
        let column = unit + step * comptime!(plan.lanes);
        if unit < comptime!(plan.lanes) && column < comptime!(plan.width) {
            let mut total = Vector::<f32, N>::new(0.0f32);
            for group in 0..comptime!(plan.groups()) {
                total += shared[unit + group * comptime!(plan.lanes)];
            }
            partial[CUBE_POS_X as usize * comptime!(plan.width) + column] = total;
        }
        sync_cube();
    }
}

#[cube(launch, address_type = "dynamic")]
fn sum_rows_kernel(partial: &Tensor<f32>, sum: &mut Tensor<f32>, rows: u32, stride: u32, first: u32, columns: u32) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(UNITS));
    let unit = UNIT_POS as usize;
    let column = CUBE_POS_X as usize * comptime!(COLUMNS) + unit % comptime!(COLUMNS);
    let lane = unit / comptime!(COLUMNS);
    let mut total = 0.0f32;
    if column < columns as usize {
        let mut row = lane;
        while row < rows as usize {
            total += partial[row * stride as usize + first as usize + column];
            row += comptime!(UNITS / COLUMNS);
        }
    }
    shared[unit] = total;
    sync_cube();
    if lane == 0 && column < columns as usize {
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
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(UNITS));
    let mut total = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < x.len() {
        total += x[at];
        at += comptime!(UNITS);
    }
    let total = row_sum::<Const<1>>(Vector::new(total), &mut shared, plan);
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
