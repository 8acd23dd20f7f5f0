//! The kernels: tiles of 128 rows by one producer and two consumer warpgroups, and the sum over split contractions.

// `x + 0u32` copies a variable, as elsewhere in kernels.
#![allow(clippy::identity_op)]

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::epilogue::{activate_columns, activate_vector, add_bias, add_residual};
use super::plan::{DEPTH, Plan, ROWS, STAGING};
use crate::matmul::Activation;
use crate::tile::hopper::{
    Acc, Ring, add_3d, barrier_expect, barrier_fence, commit, commit_stores, declare, fence, fence_shared,
    give_registers, k_major, load_2d, mma_shared, mn_major, next, read, row_of, store_3d, store_columns,
    store_f32_pair, swizzled, sync_warpgroup, take_registers, wait, wait_stores_read,
};

/// Units of a cube: two consumer warpgroups and the producer's.
pub(super) const UNITS: u32 = 384;
/// Tile rows that are worked on together, so that what they share stays in L2.
const GROUP: u32 = 16;
/// Bytes of 64 rows of a panel.
const BLOCK: usize = 64 * 128;

/// One item of work: a tile of a pair's result and a part of the contraction.
#[derive(CubeType, Clone, Copy)]
pub(in crate::matmul) struct Item {
    pub(in crate::matmul) pair: u32,
    pub(in crate::matmul) tile_m: u32,
    pub(in crate::matmul) tile_n: u32,
    pub(in crate::matmul) split: u32,
    pub(in crate::matmul) first: u32,
    pub(in crate::matmul) last: u32,
}

/// How many tiles and stages of contraction each pair of operands has. Joined pairs share their tiles.
#[derive(CubeType, CubeLaunch)]
pub(in crate::matmul) struct Sizes {
    pub(in crate::matmul) tiles_m: Sequence<u32>,
    pub(in crate::matmul) tiles_n: Sequence<u32>,
    pub(in crate::matmul) steps: Sequence<u32>,
    /// Parts of each contraction: a number at run time, so that all have one kernel.
    pub(in crate::matmul) splits: u32,
    /// Whether tiles of f32 are added to what is there: at run time for the same reason.
    pub(in crate::matmul) adds: u32,
}

/// Items in all.
#[cube]
fn items(sizes: &Sizes, #[comptime] plan: Plan) -> u32 {
    let mut sum = 0u32;
    #[unroll]
    for pair in 0..comptime!(plan.results()) {
        sum += *sizes.tiles_m.index(pair) * *sizes.tiles_n.index(pair);
    }
    sum * sizes.splits
}

#[cube]
pub(in crate::matmul) fn item_at(index: u32, sizes: &Sizes, #[comptime] plan: Plan) -> Item {
    let splits = sizes.splits;
    let mut at = index;
    let mut pair = 0u32;
    let mut tiles_m = *sizes.tiles_m.index(0usize);
    let mut tiles_n = *sizes.tiles_n.index(0usize);
    let mut steps = *sizes.steps.index(0usize);
    if comptime!(plan.joined) {
        #[unroll]
        for next in 1..comptime!(plan.pairs) {
            steps += *sizes.steps.index(next);
        }
    } else {
        #[unroll]
        for next in 1..comptime!(plan.pairs) {
            let before = tiles_m * tiles_n * splits;
            if pair == comptime!(next as u32 - 1) && at >= before {
                at -= before;
                pair = comptime!(next as u32);
                tiles_m = *sizes.tiles_m.index(next);
                tiles_n = *sizes.tiles_n.index(next);
                steps = *sizes.steps.index(next);
            }
        }
    }
    let tiles = tiles_m * tiles_n;
    let split = at / tiles;
    let tile = at % tiles;
    let per_group = comptime!(GROUP) * tiles_n;
    let start = tile / per_group * comptime!(GROUP);
    let rows = u32::min(tiles_m - start, comptime!(GROUP));
    let within = tile % per_group;
    Item {
        pair,
        tile_m: start + within % rows,
        tile_n: within / rows,
        split,
        first: steps * split / splits,
        last: steps * (split + 1u32) / splits,
    }
}

/// `c[m, n] = Σ_k a(m, k) b(n, k)` for each pair of operands, or for all of them together (`Σ` over the pairs too, one
/// result): a persistent cube takes every `CUBE_COUNT`-th item.
///
/// The producer fills a ring of stages; each consumer warpgroup multiplies 64 rows and writes them through shared memory
/// by asynchronous stores, which go on while the next tile is multiplied. The two warpgroups wait for each other nowhere,
/// so one multiplies while the other writes. The epilogue changes the accumulators before they are written; with
/// `residuals` and `kept` there is one pair, `biases` has one for each.
#[cube(launch_unchecked)]
pub(super) fn product<E: Float>(
    a: &Sequence<TensorMap<bf16, Tiled>>,
    b: &Sequence<TensorMap<bf16, Tiled>>,
    c: &Sequence<TensorMap<E, Tiled>>,
    kept: &Sequence<TensorMap<E, Tiled>>,
    biases: &Sequence<OwnedTensor<Vector<f32, Const<2>>>>,
    residuals: &Sequence<OwnedTensor<Vector<bf16, Const<2>>>>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
    #[define(E)] _out: ElemType,
) {
    let stages = comptime!(plan.stages());
    let columns = comptime!(plan.columns);
    let a_bytes = comptime!((ROWS * DEPTH * 2) as u32);
    let b_bytes = comptime!((plan.columns * DEPTH * 2) as u32);
    let acc = comptime!(Acc::new("acc", plan.columns));
    let shared_a = Shared::<[bf16]>::new_aligned_slice(comptime!(stages * ROWS * DEPTH), 1024usize);
    let shared_b = Shared::<[bf16]>::new_aligned_slice(comptime!(stages * columns * DEPTH), 1024usize);
    let shared_c = Shared::<[bf16]>::new_aligned_slice(comptime!(STAGING), 1024usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages));
    let tiles_a = generic_to_shared::<bf16>(shared_a.as_ptr());
    let tiles_b = generic_to_shared::<bf16>(shared_b.as_ptr());
    let staging = generic_to_shared::<bf16>(shared_c.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), comptime!(stages as u32));
    declare(acc);
    if UNIT_POS == 0 {
        ring.init(1u32, 2u32);
        barrier_fence();
    }
    sync_cube();

    let items = items(sizes, plan);
    let warpgroup = UNIT_POS / 128u32;
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    if warpgroup == 2u32 {
        give_registers(40u32);
        if UNIT_POS % 128u32 == 0 {
            while index < items {
                let item = item_at(index, sizes, plan);
                let row = item.tile_m * comptime!(ROWS as u32);
                let column = item.tile_n * comptime!(columns as u32);
                // Those of one pair, or of all where pairs are joined: `before` are the stages of the pairs before.
                let mut pair = item.pair + 0u32;
                let mut last = item.pair + 1u32;
                if comptime!(plan.joined) {
                    last = u32::new(comptime!(plan.pairs as i64));
                }
                let mut before = 0u32;
                while pair < last {
                    let mut map_a = tensor_map_address(a.index(0usize));
                    let mut map_b = tensor_map_address(b.index(0usize));
                    let mut steps = *sizes.steps.index(0usize);
                    #[unroll]
                    for other in 1..comptime!(plan.pairs) {
                        if pair == comptime!(other as u32) {
                            map_a = tensor_map_address(a.index(other));
                            map_b = tensor_map_address(b.index(other));
                            steps = *sizes.steps.index(other);
                        }
                    }
                    let mut part = item.first + 0u32;
                    let mut to = item.last + 0u32;
                    if comptime!(plan.joined) {
                        part = u32::max(part, before) - before;
                        to = u32::min(u32::max(to, before) - before, steps);
                        before += steps;
                    }
                    while part < to {
                        ring.wait_room(step);
                        let full = ring.full(step);
                        let stage = ring.stage(step);
                        barrier_expect(full, comptime!(a_bytes + b_bytes));
                        let depth = part * comptime!(DEPTH as u32);
                        load_operand(tiles_a + stage * a_bytes, map_a, row, depth, full, ROWS, plan.a_rows);
                        load_operand(tiles_b + stage * b_bytes, map_b, column, depth, full, columns, plan.b_rows);
                        step += 1u32;
                        part = next(part);
                    }
                    pair = next(pair);
                }
                index += CUBE_COUNT_X;
            }
        }
    } else {
        take_registers(232u32);
        let lane = UNIT_POS % 32u32;
        let row = row_of((UNIT_POS % 128u32) / 32u32, lane, 0usize);
        let elected = UNIT_POS % 128u32 == 0;
        let out = staging + warpgroup * comptime!(STAGING as u32);
        while index < items {
            let item = item_at(index, sizes, plan);
            let mut map_c = tensor_map_address(c.index(0usize));
            #[unroll]
            for pair in 1..comptime!(plan.results()) {
                if item.pair == comptime!(pair as u32) {
                    map_c = tensor_map_address(c.index(pair));
                }
            }
            let mut part = item.first + 0u32;
            while part < item.last {
                ring.wait_full(step);
                let stage = ring.stage(step);
                let tile_a = tiles_a + stage * a_bytes + warpgroup * comptime!(BLOCK as u32);
                let tile_b = tiles_b + stage * b_bytes;
                fence();
                #[unroll]
                for k in 0..comptime!(DEPTH / 16) {
                    let left =
                        if comptime!(plan.a_rows) { mn_major(tile_a, DEPTH, k) } else { k_major(tile_a, ROWS, k) };
                    let right =
                        if comptime!(plan.b_rows) { mn_major(tile_b, DEPTH, k) } else { k_major(tile_b, columns, k) };
                    let keep = part - item.first + comptime!(k as u32);
                    mma_shared(acc, left, right, keep, plan.a_rows, plan.b_rows);
                }
                commit();
                // The products of the step before are done: its stage is free.
                wait(1u32);
                if part > item.first {
                    if elected {
                        ring.release(step - 1u32);
                    }
                }
                step += 1u32;
                part = next(part);
            }
            wait(0u32);
            if elected {
                ring.release(step - 1u32);
            }
            let first_row = item.tile_m * comptime!(ROWS as u32) + warpgroup * 64u32;
            let width = comptime!(plan.panel_columns());
            let epilogue = comptime!(plan.tile_epilogue());
            let matrices = comptime!(if epilogue.keeps { 2usize } else { 1usize });
            #[unroll]
            for panel in 0..comptime!(columns / width) {
                let first = comptime!(panel * width);
                if comptime!(epilogue.bias) {
                    let column = item.tile_n * comptime!(columns as u32) + comptime!(first as u32);
                    #[unroll]
                    for pair in 0..comptime!(plan.results()) {
                        if item.pair == comptime!(pair as u32) {
                            add_bias(acc, first, width, biases.index(pair), column, lane);
                        }
                    }
                }
                if comptime!(epilogue.keeps) {
                    if comptime!(epilogue.activates(true)) {
                        activate_columns(acc, first, width, epilogue.activation);
                    }
                    let to = out + comptime!((panel * matrices % 2 * BLOCK) as u32);
                    stage_panel(acc, first, to, row, lane, elected, warpgroup, plan.f32_out);
                    if elected {
                        let column = item.tile_n * comptime!(columns as u32) + comptime!(first as u32);
                        store_3d(to, tensor_map_address(kept.index(0usize)), column, first_row, item.split);
                        commit_stores();
                    }
                }
                if comptime!(epilogue.activates(false)) {
                    activate_columns(acc, first, width, epilogue.activation);
                }
                if comptime!(epilogue.residual) {
                    let column = item.tile_n * comptime!(columns as u32) + comptime!(first as u32);
                    add_residual(acc, first, width, residuals.index(0usize), first_row + row, column, lane);
                }
                let to = out + comptime!(((panel * matrices + matrices - 1) % 2 * BLOCK) as u32);
                stage_panel(acc, first, to, row, lane, elected, warpgroup, plan.f32_out);
                if elected {
                    let column = item.tile_n * comptime!(columns as u32) + comptime!(first as u32);
                    if comptime!(plan.f32_out) {
                        if sizes.adds != 0u32 {
                            add_3d(to, map_c, column, first_row, item.split);
                        } else {
                            store_3d(to, map_c, column, first_row, item.split);
                        }
                    } else {
                        store_3d(to, map_c, column, first_row, item.split);
                    }
                    commit_stores();
                }
            }
            index += CUBE_COUNT_X;
        }
        if elected {
            wait_stores_read(0u32);
        }
    }
}

/// Loads the stage of an operand: `width` rows or columns of it from `at` on, the contraction from `depth` on.
#[cube]
fn load_operand(
    to: u32,
    map: u64,
    at: u32,
    depth: u32,
    full: u32,
    #[comptime] width: usize,
    #[comptime] contraction_in_rows: bool,
) {
    if comptime!(contraction_in_rows) {
        #[unroll]
        for panel in 0..comptime!(width / 64) {
            load_2d(to + comptime!((panel * BLOCK) as u32), map, at + comptime!(64 * panel as u32), depth, full);
        }
    } else {
        load_2d(to, map, depth, at, full);
    }
}

/// Brings a panel of an accumulator to shared memory, ready for a store.
#[cube]
fn stage_panel(
    #[comptime] acc: Acc,
    #[comptime] first: usize,
    to: u32,
    row: u32,
    lane: u32,
    elected: bool,
    warpgroup: u32,
    #[comptime] f32_out: bool,
) {
    // The store of two panels ago has left the buffer.
    if elected {
        wait_stores_read(1u32);
    }
    sync_warpgroup(warpgroup + 1u32, 128u32);
    write_panel(acc, first, to, row, lane, f32_out);
    fence_shared();
    sync_warpgroup(warpgroup + 1u32, 128u32);
}

/// Writes 128 bytes of each of 64 rows of an accumulator, from column `first` on, into a swizzled panel.
#[cube]
fn write_panel(
    #[comptime] acc: Acc,
    #[comptime] first: usize,
    panel: u32,
    row: u32,
    lane: u32,
    #[comptime] f32_out: bool,
) {
    if comptime!(f32_out) {
        let base = swizzled(panel, row, (lane % 4u32) * 8u32);
        #[unroll]
        for j in 0..4usize {
            #[unroll]
            for half in 0..2usize {
                let i = comptime!(first / 2 + j * 4 + 2 * half);
                let to = (base ^ comptime!(32 * j as u32)) + comptime!(1024 * half as u32);
                store_f32_pair(to, read(acc, i), read(acc, comptime!(i + 1)));
            }
        }
    } else {
        let base = swizzled(panel, row, (lane % 4u32) * 4u32);
        #[unroll]
        for j in 0..8usize {
            store_columns(acc, comptime!(first / 8 + j), base ^ comptime!(16 * j as u32), 0u32);
        }
    }
}

/// Adds up the results of split contractions, in their order; with `add` to what is there. `CUBE_POS_Y` is the result. What
/// follows a product follows its sum.
#[cube(launch, address_type = "dynamic")]
pub(super) fn sum_splits<E: Float, N: Size>(
    parts: &Sequence<OwnedTensor<Vector<f32, N>>>,
    out: &mut Sequence<OwnedTensor<Vector<E, N>>>,
    kept: &mut Sequence<OwnedTensor<Vector<E, N>>>,
    biases: &Sequence<OwnedTensor<Vector<f32, N>>>,
    residuals: &Sequence<OwnedTensor<Vector<E, N>>>,
    #[comptime] plan: Plan,
    #[define(E)] _element: ElemType,
) {
    let at = CUBE_POS_X as usize * CUBE_DIM as usize + UNIT_POS as usize;
    let epilogue = comptime!(plan.epilogue);
    #[unroll]
    for pair in 0..comptime!(plan.results()) {
        if CUBE_POS_Y == comptime!(pair as u32) {
            let out = out.index_mut(pair);
            if at < out.len() {
                let parts = parts.index(pair);
                let mut sum = parts[at];
                #[unroll]
                for split in 1..comptime!(plan.splits) {
                    sum += parts[at + split * out.len()];
                }
                if comptime!(plan.add) {
                    sum += Vector::cast_from(out[at]);
                }
                if comptime!(epilogue.bias) {
                    let bias = biases.index(pair);
                    sum += bias[at % bias.len()];
                }
                if comptime!(epilogue.keeps_z()) {
                    kept.index_mut(0usize)[at] = Vector::cast_from(sum);
                }
                if comptime!(epilogue.activation != Activation::Identity) {
                    sum = activate_vector::<N>(sum, epilogue.activation);
                }
                if comptime!(epilogue.keeps && !epilogue.keeps_z()) {
                    kept.index_mut(0usize)[at] = Vector::cast_from(sum);
                }
                if comptime!(epilogue.residual) {
                    sum += Vector::cast_from(residuals.index(0usize)[at]);
                }
                out[at] = Vector::cast_from(sum);
            }
        }
    }
}
