//! The kernel: a cube has a tile of 128 rows and 128 or 256 columns, each of its warps 64 × 64 of it.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;
use half::bf16;

use super::plan::MmaPlan;
use crate::matmul::hopper::epilogue::{activate_columns, add_bias, add_residual};
use crate::matmul::hopper::kernel::{Item, Sizes, item_at};
use crate::matmul::hopper::plan::{DEPTH, ROWS};
use crate::tile::mma::{
    Acc, Frag, RowPair, across_first, address_of, address_of_mut, commit_copies, copy_16, declare, declare_fragment,
    down_first, load, multiply, store_rows, store_rows_f32, swizzled, wait_copies, zero,
};

/// Left operands: four bands of 16 rows, of two steps of the contraction in turn.
const LEFT: Frag = Frag::new("l", 128);
/// Right operands: four groups of 16 columns, likewise.
const RIGHT: Frag = Frag::new("r", 128);
/// Bytes of 64 rows of a panel.
const BLOCK: usize = 64 * 128;

/// The sums of a warp's band of 16 rows.
fn sums(band: usize) -> Acc {
    Acc::new(["c", "d", "e", "f"][band], 64)
}

/// What the kernel must know of its operands: of each pair the contraction, and the elements from row to row; of each result
/// its rows and columns.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Shapes {
    pub(super) depth: Sequence<u32>,
    pub(super) a_stride: Sequence<u32>,
    pub(super) b_stride: Sequence<u32>,
    pub(super) rows: Sequence<u32>,
    pub(super) columns: Sequence<u32>,
}

/// `c[m, n] = Σ_k a(m, k) b(n, k)`, as [`crate::matmul::hopper::kernel::product`] has it: one cube an item.
#[cube(launch_unchecked)]
pub(super) fn product(
    a: &Sequence<OwnedTensor<u32>>,
    b: &Sequence<OwnedTensor<u32>>,
    c: &mut Sequence<OwnedTensor<u32>>,
    kept: &mut Sequence<OwnedTensor<u32>>,
    biases: &Sequence<OwnedTensor<Vector<f32, Const<2>>>>,
    residuals: &Sequence<OwnedTensor<Vector<bf16, Const<2>>>>,
    sizes: &Sizes,
    shapes: &Shapes,
    #[comptime] mma: MmaPlan,
) {
    let plan = comptime!(mma.plan);
    let stages = comptime!(mma.stages as u32);
    let stage_bytes = comptime!(plan.stage_bytes() as u32);
    let b_at = comptime!((ROWS * DEPTH * 2) as u32);
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!(mma.stages * plan.stage_bytes() / 4), 1024usize);
    let first_tile = generic_to_shared::<u32>(tiles.as_ptr());
    #[unroll]
    for band in 0..4usize {
        declare(comptime!(sums(band)));
    }
    declare_fragment(LEFT);
    declare_fragment(RIGHT);

    let item = item_at(CUBE_POS_X, sizes, plan);
    let warp = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    let warp_row = warp % 2u32;
    let warp_column = warp / 2u32;
    let mut rows = *shapes.rows.index(0usize);
    let mut columns = *shapes.columns.index(0usize);
    #[unroll]
    for pair in 1..comptime!(plan.results()) {
        if item.pair == comptime!(pair as u32) {
            rows = *shapes.rows.index(pair);
            columns = *shapes.columns.index(pair);
        }
    }
    let row = item.tile_m * comptime!(ROWS as u32);
    let column = item.tile_n * comptime!(plan.columns as u32);
    #[unroll]
    for band in 0..4usize {
        zero(comptime!(sums(band)));
    }
    #[unroll]
    for ahead in 0..comptime!(mma.stages - 1) {
        let part = item.first + comptime!(ahead as u32);
        if part < item.last {
            let to = first_tile + comptime!(ahead as u32 * stage_bytes);
            load_stage(to, a, b, sizes, shapes, &item, part, row, column, rows + 0u32, columns + 0u32, mma);
        }
        commit_copies();
    }
    let mut stage = 0u32;
    for part in item.first..item.last {
        wait_copies(comptime!(mma.stages as u32 - 2));
        sync_cube();
        let ahead = part + comptime!(stages - 1);
        if ahead < item.last {
            // The stage that was multiplied in the step before.
            let free = select(stage == 0u32, comptime!(stages - 1), stage - 1u32);
            let to = first_tile + free * stage_bytes;
            load_stage(to, a, b, sizes, shapes, &item, ahead, row, column, rows + 0u32, columns + 0u32, mma);
        }
        commit_copies();
        let at = first_tile + stage * stage_bytes;
        multiply_stage(at, at + b_at, warp_row, warp_column, lane, mma);
        stage = select(stage == comptime!(stages - 1), 0u32, stage + 1u32);
    }

    let row = row + warp_row * 64u32 + lane / 4u32;
    let column = column + warp_column * 64u32;
    let epilogue = comptime!(plan.tile_epilogue());
    let mut to = address_of_mut(c.index_mut(0usize).as_mut_slice());
    #[unroll]
    for pair in 1..comptime!(plan.results()) {
        let other = address_of_mut(c.index_mut(pair).as_mut_slice());
        to = select(item.pair == comptime!(pair as u32), other, to);
    }
    let size = comptime!(if plan.f32_out { 4u32 } else { 2u32 });
    // Parts of a contraction are f32.
    if comptime!(plan.f32_out) {
        to += u64::cast_from(item.split) * u64::cast_from(rows) * u64::cast_from(columns * size);
    }
    #[unroll]
    for band in 0..4usize {
        let acc = comptime!(sums(band));
        let row = row + comptime!(16 * band as u32);
        if comptime!(epilogue.bias) {
            #[unroll]
            for pair in 0..comptime!(plan.results()) {
                if item.pair == comptime!(pair as u32) {
                    add_bias(acc, 0usize, 64usize, biases.index(pair), column, lane);
                }
            }
        }
        if comptime!(epilogue.keeps) {
            if comptime!(epilogue.activates(true)) {
                activate_columns(acc, 0usize, 64usize, epilogue.activation);
            }
            let to = address_of_mut(kept.index_mut(0usize).as_mut_slice());
            let to = rows_at(to, row, column, rows + 0u32, columns + 0u32, size);
            store(acc, &to, lane, mma, false);
        }
        if comptime!(epilogue.activates(false)) {
            activate_columns(acc, 0usize, 64usize, epilogue.activation);
        }
        if comptime!(epilogue.residual) {
            add_residual(acc, 0usize, 64usize, residuals.index(0usize), row, column, lane);
        }
        let to = rows_at(to + 0u64, row, column, rows + 0u32, columns + 0u32, size);
        store(acc, &to, lane, mma, plan.adds_tiles());
    }
}

/// Rows of the result from `row` and `column` on.
#[cube]
fn rows_at(to: u64, row: u32, column: u32, rows: u32, columns: u32, #[comptime] size: u32) -> RowPair {
    let stride = columns * size;
    let left = columns - u32::min(column, columns);
    RowPair {
        address: to + u64::cast_from(row) * u64::cast_from(stride) + u64::cast_from(column * size),
        step: u64::cast_from(stride * 8u32),
        first_columns: select(row < rows, left, 0u32),
        second_columns: select(row + 8u32 < rows, left, 0u32),
    }
}

#[cube]
fn store(#[comptime] acc: Acc, to: &RowPair, lane: u32, #[comptime] mma: MmaPlan, #[comptime] add: bool) {
    if comptime!(mma.plan.f32_out) {
        store_rows_f32(acc, to, lane, 64usize, add);
    } else {
        store_rows(acc, to, lane, 64usize);
    }
}

/// Starts loading stage `part` of an item's contraction: of all pairs one after the other, where they are joined.
#[cube]
fn load_stage(
    to: u32,
    a: &Sequence<OwnedTensor<u32>>,
    b: &Sequence<OwnedTensor<u32>>,
    sizes: &Sizes,
    shapes: &Shapes,
    item: &Item,
    part: u32,
    row: u32,
    column: u32,
    rows: u32,
    columns: u32,
    #[comptime] mma: MmaPlan,
) {
    let plan = comptime!(mma.plan);
    let mut from_a = address_of(a.index(0usize).as_slice());
    let mut from_b = address_of(b.index(0usize).as_slice());
    let mut a_stride = *shapes.a_stride.index(0usize);
    let mut b_stride = *shapes.b_stride.index(0usize);
    let mut depth = *shapes.depth.index(0usize);
    let mut before = 0u32;
    let mut start = 0u32;
    #[unroll]
    for pair in 1..comptime!(plan.pairs) {
        before += *sizes.steps.index(comptime!(pair - 1));
        let chosen = if comptime!(plan.joined) { part >= before } else { item.pair == comptime!(pair as u32) };
        from_a = select(chosen, address_of(a.index(pair).as_slice()), from_a);
        from_b = select(chosen, address_of(b.index(pair).as_slice()), from_b);
        a_stride = select(chosen, *shapes.a_stride.index(pair), a_stride);
        b_stride = select(chosen, *shapes.b_stride.index(pair), b_stride);
        depth = select(chosen, *shapes.depth.index(pair), depth);
        if comptime!(plan.joined) {
            start = select(chosen, before, start);
        }
    }
    let at = (part - start) * comptime!(DEPTH as u32);
    let tile_b = to + comptime!((ROWS * DEPTH * 2) as u32);
    load_operand(to, from_a + 0u64, a_stride + 0u32, row, rows, at, depth + 0u32, ROWS, plan.a_rows, mma);
    load_operand(
        tile_b,
        from_b + 0u64,
        b_stride + 0u32,
        column,
        columns,
        at,
        depth + 0u32,
        plan.columns,
        plan.b_rows,
        mma,
    );
}

/// Starts loading an operand's stage: `width` rows or columns of it from `at` on, the contraction from `from_depth` on; what is
/// outside is zero.
#[cube]
fn load_operand(
    to: u32,
    from: u64,
    stride: u32,
    at: u32,
    end: u32,
    from_depth: u32,
    depth: u32,
    #[comptime] width: usize,
    #[comptime] contraction_in_rows: bool,
    #[comptime] mma: MmaPlan,
) {
    let units = comptime!(mma.units());
    let (panels, height) = comptime!(if contraction_in_rows { (width / 64, DEPTH) } else { (1, width) });
    let each = comptime!(units as u32 / 8);
    let piece = UNIT_POS % 8u32;
    let own = UNIT_POS / 8u32;
    // Rows and columns as they are stored.
    let (first_row, last_row) = if comptime!(contraction_in_rows) { (from_depth, depth) } else { (at, end) };
    let (first_column, last_column) = if comptime!(contraction_in_rows) { (at, end) } else { (from_depth, depth) };
    let column = first_column + piece * 8u32;
    let address =
        from + u64::cast_from(first_row + own) * u64::cast_from(stride * 2u32) + u64::cast_from(column) * 2u64;
    let step = u64::cast_from(each * 2u32 * stride);
    let place = swizzled(to, own, piece * 16u32);
    #[unroll]
    for panel in 0..panels {
        let inside = column + comptime!(64 * panel as u32) < last_column;
        let mut address = address + comptime!(128 * panel as u64);
        #[unroll]
        for n in 0..comptime!(height * 8 / units) {
            let there = inside && first_row + own + comptime!(n as u32) * each < last_row;
            copy_16(place, comptime!(panel * BLOCK + n * units * 16), address, select(there, 16u32, 0u32));
            address += step;
        }
    }
}

/// Multiplies a stage: this warp's 64 rows and 64 columns. Operands of a step are loaded while the one before is multiplied.
#[cube]
fn multiply_stage(a: u32, b: u32, warp_row: u32, warp_column: u32, lane: u32, #[comptime] mma: MmaPlan) {
    let (a_rows, b_rows) = comptime!((mma.plan.a_rows, mma.plan.b_rows));
    let a = a + warp_row * comptime!(BLOCK as u32);
    let b = b + warp_column * comptime!(BLOCK as u32);
    let left = if comptime!(a_rows) { across_first(a, lane) } else { down_first(a, lane) };
    let right = if comptime!(b_rows) { down_first(b, lane) } else { across_first(b, lane) };
    load_step(left, right, 0usize, a_rows, b_rows);
    #[unroll]
    for k in 0..comptime!(DEPTH / 16) {
        if comptime!(k + 1 < DEPTH / 16) {
            load_step(left, right, comptime!(k + 1), a_rows, b_rows);
        }
        let turn = comptime!(k % 2 * 4);
        #[unroll]
        for band in 0..4usize {
            #[unroll]
            for c in 0..4usize {
                multiply(comptime!(sums(band)), comptime!(2 * c), LEFT, turn + band, RIGHT, turn + c, 0usize);
                multiply(comptime!(sums(band)), comptime!(2 * c + 1), LEFT, turn + band, RIGHT, turn + c, 1usize);
            }
        }
    }
}

/// Loads the operands of step `k` of 16.
#[cube]
fn load_step(left: u32, right: u32, #[comptime] k: usize, #[comptime] a_rows: bool, #[comptime] b_rows: bool) {
    let turn = comptime!(k % 2 * 4);
    #[unroll]
    for n in 0..4usize {
        let (piece, down) = comptime!(if a_rows { (n, k) } else { (k, n) });
        load(LEFT, comptime!(turn + n), left ^ comptime!(32 * piece as u32), comptime!(2048 * down), a_rows);
    }
    #[unroll]
    for n in 0..4usize {
        let (piece, down) = comptime!(if b_rows { (n, k) } else { (k, n) });
        load(RIGHT, comptime!(turn + n), right ^ comptime!(32 * piece as u32), comptime!(2048 * down), b_rows);
    }
}
