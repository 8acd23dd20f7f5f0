//! What a walk is specialised on, and how it is chosen.

use cubecl::prelude::CubeCount;

/// Tokens a chunk: long enough that the states at chunk borders are few, short enough that chunks fill a GPU.
pub(super) const CHUNK: usize = 64;

/// Floats of shared memory a cube may use: 16 KiB, what every WebGPU device has.
const SHARED_FLOATS: usize = 4096;
/// Units a cube may have at most, as every WebGPU device allows.
const MAX_UNITS: usize = 256;
/// Elements of the state that one unit keeps in registers.
const PER_UNIT: usize = 64;
/// Units of the kernels that are one element a unit.
pub(crate) const FLAT_UNITS: u32 = 128;

/// What the log decay depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DecayKind {
    /// A constant for each head, `[H]`.
    Head,
    /// A number for each token and head.
    Token,
    /// A number for each token, head and key channel.
    Key,
    /// A number for each token, head and value channel.
    Value,
}

/// Where a decay acts on the walked state `X[row, inner]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DecayAxis {
    /// One number for the head.
    Head,
    /// One number for the token and head.
    Token,
    /// One for each row.
    Row,
    /// One for each inner channel.
    Inner,
}

/// One walk: `X[row, :]` is kept by `parts` units, `tile` rows a cube.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WalkPlan {
    /// Rows of the state that units own.
    pub(super) rows: usize,
    /// Channels along which a row is added to and read out.
    pub(super) inner: usize,
    /// Whether rows are value channels (and inner ones key channels) or the other way round.
    pub(super) rows_are_values: bool,
    /// Against time: add, read out, then decay. Otherwise decay, add, then read out.
    pub(super) against_time: bool,
    /// Read out before decaying and adding, with a bonus for what is added.
    pub(super) exclusive: bool,
    /// Beside it: outputs without the token's own part, and without that of the token just before it in a chunk, which has
    /// not decayed either. It is added after that one was read past.
    pub(super) delayed: bool,
    pub(super) axis: DecayAxis,
    /// Rows a cube.
    pub(super) tile: usize,
    /// Units that share a row.
    pub(super) parts: usize,
    /// Inner channels a unit.
    pub(super) per_unit: usize,
    /// Tokens whose inner vectors are in shared memory at a time.
    pub(super) block: usize,
}

impl WalkPlan {
    pub(super) fn new(decay: DecayKind, keys: usize, values: usize, rows_are_values: bool, against_time: bool) -> Self {
        let (rows, inner) = if rows_are_values { (values, keys) } else { (keys, values) };
        let axis = match decay {
            DecayKind::Head => DecayAxis::Head,
            DecayKind::Token => DecayAxis::Token,
            DecayKind::Key if rows_are_values => DecayAxis::Inner,
            DecayKind::Value if !rows_are_values => DecayAxis::Inner,
            DecayKind::Key | DecayKind::Value => DecayAxis::Row,
        };
        let parts = inner.div_ceil(PER_UNIT).min(MAX_UNITS);
        let per_unit = inner.div_ceil(parts);
        let tile = rows.min(MAX_UNITS / parts).clamp(1, 128);
        let stride = parts * per_unit;
        let block = SHARED_FLOATS / (3 * stride + parts * tile);
        let (block, exclusive, delayed) = (block.clamp(1, 32), false, false);
        Self { rows, inner, rows_are_values, against_time, exclusive, delayed, axis, tile, parts, per_unit, block }
    }

    /// Distance of two tokens' inner vectors in shared memory: filled up so that every unit has `per_unit` channels.
    pub(super) fn stride(&self) -> usize {
        self.parts * self.per_unit
    }

    pub(super) fn units(&self) -> usize {
        self.tile * self.parts
    }

    pub(super) fn row_tiles(&self) -> usize {
        self.rows.div_ceil(self.tile)
    }
}

/// Cubes in a grid whose dimensions stay under WebGPU's 65,535.
pub(crate) fn grid(cubes: usize) -> CubeCount {
    const WIDTH: usize = 32_768;
    if cubes <= WIDTH {
        CubeCount::new_1d(cubes as u32)
    } else {
        CubeCount::new_2d(WIDTH as u32, cubes.div_ceil(WIDTH) as u32)
    }
}

/// A grid of [`FLAT_UNITS`] units a cube over `count` elements.
pub(crate) fn flat(count: usize) -> CubeCount {
    grid(count.div_ceil(FLAT_UNITS as usize))
}
