//! What the row-wise kernels share: how rows are laid over cubes, the sum over a row, and the second stage of sums over
//! rows.
//!
//! A cube has 256 units. A row of `width` vectors is worked on by `lanes` of them (a power of two), so that a cube holds
//! `256 / lanes` rows at a time; each unit owns `steps` vectors of its row and keeps them in registers.

mod sums;
mod walk;

pub(crate) use sums::{sum_all, sum_rows};
pub(crate) use walk::{SHARED, first_row, group, lane, load, row_stride, row_sum, store, store_partial, widen, zeros};

use burn::tensor::DType;
use cubecl::ir::features::Plane;
use cubecl::prelude::*;

use crate::bridge::{CubeTensor, alloc};

/// Units of a cube.
pub(crate) const UNITS: usize = 256;
/// Vectors that a unit may keep: what is more would leave the registers.
const MAX_STEPS: usize = 32;
/// The most cubes that write partial sums, where the device does not say how many cubes it runs at a time.
const MAX_PARTIALS: usize = 512;
/// The most cubes of one launch in the first dimension that every device allows.
pub(crate) const MAX_CUBES: usize = 65_535;

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
    /// Whether sigmoids are made of approximate instructions.
    pub(crate) approximate: bool,
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
        let (planes, approximate) = (planes_of_32(like), approximates(like));
        let plan = Self { width, lanes, steps: width.div_ceil(lanes), planes, approximate };
        (plan, vector)
    }

    /// The plan for one number a unit, of which [`row_sum`] makes one over the cube.
    pub(crate) fn whole_cube(like: &CubeTensor) -> Self {
        Self { width: UNITS, lanes: UNITS, steps: 1, planes: planes_of_32(like), approximate: false }
    }

    /// Rows of a cube.
    pub(crate) fn groups(&self) -> usize {
        UNITS / self.lanes
    }

    /// Cubes of a launch over `rows` rows.
    pub(crate) fn cubes(&self, rows: usize) -> usize {
        rows.div_ceil(self.groups()).min(MAX_CUBES)
    }

    /// Cubes of a launch over `rows` rows in which each cube writes a partial sum over its rows: as many as run at a
    /// time, for each walks over many rows and none should be left for a second round.
    ///
    /// A kernel of at most 64 registers a unit runs in four cubes a processor; what keeps `many` numbers of each element has
    /// twice as many registers where a unit has more than two vectors.
    pub(crate) fn partials(&self, like: &CubeTensor, rows: usize, many: bool) -> usize {
        let each = if many && self.steps > 2 { 2 } else { 4 };
        rows.div_ceil(self.groups()).min(resident(like, each))
    }

    /// Whether each unit has a vector of the row in each of its steps.
    pub(crate) fn even(&self) -> bool {
        self.lanes * self.steps == self.width
    }
}

/// Cubes that run at a time, where each processor holds `each` of them.
pub(crate) fn resident(like: &CubeTensor, each: usize) -> usize {
    let processors = like.client.properties().hardware.num_streaming_multiprocessors;
    processors.map_or(MAX_PARTIALS, |n| n as usize * each)
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

/// `1 / (1 + e^{−x})`; with `approximate` by the approximate instructions of an NVIDIA GPU, to 1e-6, in a third of the time.
#[cube]
pub(crate) fn sigmoid<N: Size>(x: Vector<f32, N>, #[comptime] approximate: bool) -> Vector<f32, N> {
    if comptime!(approximate) {
        approximate_sigmoid::<N>(x)
    } else {
        let one = Vector::<f32, N>::new(1.0f32);
        // Held below where the exponential would leave f32: not every device has infinities.
        let exponent = min(Vector::<f32, N>::new(0.0f32) - x, Vector::<f32, N>::new(80.0f32));
        // Cheaper than a division, which is a subroutine on a GPU, and as good as it here: the root's argument is above 1.
        let root = (one + exponent.exp()).inverse_sqrt();
        root * root
    }
}

#[cfg(feature = "cuda")]
#[cube]
fn approximate_sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let mut y = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for i in 0..x.vector_size() {
        let e = crate::tile::hopper::exp2(x.extract(i) * comptime!(-core::f32::consts::LOG2_E));
        y.insert(i, crate::tile::hopper::reciprocal(1.0f32 + e));
    }
    y
}

/// A build without CUDA has no such instructions, and [`approximates`] nowhere.
#[cfg(not(feature = "cuda"))]
#[cube]
fn approximate_sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    sigmoid::<N>(x, false)
}

/// Whether this device has the instructions of [`sigmoid`]'s approximation.
pub(crate) fn approximates(like: &CubeTensor) -> bool {
    #[cfg(feature = "cuda")]
    {
        crate::tile::hopper::supported(&like.client)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = like;
        false
    }
}

/// Two numbers side by side.
#[cube]
pub(crate) fn pair(a: f32, b: f32) -> Vector<f32, Const<2>> {
    let mut both = Vector::<f32, Const<2>>::new(a);
    both.insert(1usize, b);
    both
}
