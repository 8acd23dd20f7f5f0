//! The gradients of queries, keys, writing strengths and decays, chunk by chunk, from the states at their borders. The
//! equations, and what becomes of the products, are those of [`crate::hopper_delta::gradients`].
//!
//! Where shared memory allows, the next slice of value channels is loaded while one is multiplied. A cube takes the chunk and
//! head of its number, and where a launch has fewer cubes every one that follows at that distance, whose first slice it then
//! loads ahead too.
//!
//! Four warps compute what tokens read with, dq and the first part of dk, four others what they write with; 16 tokens each.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::parts::{COLUMNS, token_rows};
use super::plan::{GRADIENT_UNITS, GradientChunk, TOKEN_NUMBERS};
use crate::hopper_delta::gradient_parts::{Chunk, INNER, OUTER, SUMS, Tiles, chunk_of, finish_gate, reader, writer};
use crate::hopper_delta::parts::{Decays, strength};
use crate::hopper_delta::plan::{DECAYED, DECAYS, SLICE, TOKENS};
use crate::hopper_walk::plan::PANEL;
use crate::mma_walk::loads::load_tile;
use crate::mma_walk::plan::LEFT;
use crate::tile::hopper::{load_f32, store_f32};
use crate::tile::mma::{
    Acc, across_first, address_of, address_of_mut, bf16_high, bf16_low, commit_copies, declare, declare_fragment,
    down_first, exp2, load, load_u32, multiply, read, row_of, store_rows, unit_again, wait_copies, write, zero,
};

#[cube(launch_unchecked)]
pub(super) fn gradients(
    q: &[u32],
    k: &[u32],
    written: &[u32],
    grad_o: &[u32],
    grad_v: &[u32],
    states: &[u32],
    grad_states: &[u32],
    query_rows: &mut [u32],
    key_rows: &mut [u32],
    dbeta: &mut [f32],
    dg: &mut [f32],
    g: &[f32],
    beta: &[f32],
    table: &[i32],
    heads: u32,
    groups: u32,
    chunks: u32,
    table_at: u32,
    out_scale: f32,
    #[comptime] plan: GradientChunk,
) {
    let shape = comptime!(plan.shape);
    let panels = comptime!(shape.panels());
    let wide = comptime!((shape.panels() * PANEL) as u32);
    let slices = comptime!(shape.slices() as u32);
    let of_queries = comptime!(shape.of_queries());
    let of_keys = comptime!(shape.of_keys());
    let slice_bytes = comptime!(plan.slice_bytes() as u32);
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!(plan.tile_bytes() / 4), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(2 * TOKEN_NUMBERS), 128usize);
    let mut sums = Shared::<[f32]>::new_aligned_slice(comptime!(SUMS), 128usize);
    let mut across = Shared::<[f32]>::new_aligned_slice(8usize, 128usize);
    let own = generic_to_shared::<u32>(tiles.as_ptr());
    let slices0 = own + comptime!(plan.own_stages() as u32) * 2u32 * wide;
    declare(OUTER);
    declare(INNER);
    declare(of_queries);
    declare(of_keys);
    declare_fragment(TOKENS);
    declare_fragment(DECAYED);
    declare_fragment(LEFT);
    declare_fragment(COLUMNS);

    let work = chunks * heads;
    let mut index = CUBE_POS_X;
    let mut step = 0u32;
    let mut turn = 0u32;
    let first = chunk_of(index, table, table_at, heads);
    if UNIT_POS / 32u32 == 4u32 {
        write_numbers(&mut shared_g, 0usize, g, beta, &first, heads, UNIT_POS % 32u32, plan);
    }
    if comptime!(plan.stages > 1) {
        load_own(own, q, k, &first, heads, groups, plan);
        load_slice(slices0, written, grad_o, grad_v, states, grad_states, &first, index + 0u32, 0u32, heads, plan);
        commit_copies();
    }
    while index < work {
        let c = chunk_of(index, table, table_at, heads);
        let next_index = index + CUBE_COUNT_X;
        let follows = next_index < work;
        let next = chunk_of(u32::min(next_index, work - 1u32), table, table_at, heads);
        let q0 = own + (turn % comptime!(plan.own_stages() as u32)) * 2u32 * wide;
        let k0 = q0 + wide;
        let numbers = ((turn % 2u32) * comptime!(TOKEN_NUMBERS as u32)) as usize;
        zero(OUTER);
        zero(INNER);
        zero(of_queries);
        zero(of_keys);
        let mut product = f32::new(0.0);
        for slice in 0..slices {
            let at = slices0 + (step % comptime!(plan.stages as u32)) * slice_bytes;
            let last = slice + 1u32 == slices;
            if comptime!(plan.stages > 1) {
                let to = slices0 + ((step + 1u32) % comptime!(plan.stages as u32)) * slice_bytes;
                if !last || follows {
                    // The slice after this one, which may be the first one of the next chunk.
                    let ahead = Chunk {
                        head: select(last, next.head, c.head),
                        start: select(last, next.start, c.start),
                        length: select(last, next.length, c.length),
                    };
                    let border = select(last, next_index, index);
                    let later = select(last, 0u32, slice + 1u32);
                    load_slice(to, written, grad_o, grad_v, states, grad_states, &ahead, border, later, heads, plan);
                    if last {
                        let to = own + ((turn + 1u32) % comptime!(plan.own_stages() as u32)) * 2u32 * wide;
                        load_own(to, q, k, &next, heads, groups, plan);
                    }
                }
                commit_copies();
                wait_copies(1u32);
            } else {
                if slice == 0u32 {
                    load_own(q0, q, k, &c, heads, groups, plan);
                }
                load_slice(at, written, grad_o, grad_v, states, grad_states, &c, index + 0u32, slice, heads, plan);
                commit_copies();
                wait_copies(0u32);
            }
            sync_cube();
            let unit = unit_again();
            let warp = (unit % 128u32) / 32u32;
            let lane = unit % 32u32;
            if unit < 128u32 {
                read_slice(at, warp, lane, plan);
            } else {
                if warp == 0u32 && slice == 0u32 && follows {
                    let to = (((turn + 1u32) % 2u32) * comptime!(TOKEN_NUMBERS as u32)) as usize;
                    write_numbers(&mut shared_g, to, g, beta, &next, heads, lane, plan);
                }
                write_slice(at, warp, lane, plan);
            }
            if comptime!(shape.gated) {
                // Both states have the same layout, whatever it is.
                let from = at + comptime!(3 * PANEL as u32) + unit * 4u32;
                #[unroll]
                for n in 0..comptime!(panels * PANEL / 4 / GRADIENT_UNITS) {
                    let a = load_u32(from + comptime!((n * 4 * GRADIENT_UNITS) as u32));
                    let b = load_u32(from + wide + comptime!((n * 4 * GRADIENT_UNITS) as u32));
                    product += bf16_low(a) * bf16_low(b) + bf16_high(a) * bf16_high(b);
                }
            }
            sync_cube();
            step += 1u32;
        }
        // Nobody reads the last slice any more: dk is joined in its place.
        let joined = slices0 + ((step - 1u32) % comptime!(plan.stages as u32)) * slice_bytes;
        let t = Tiles { slices: slices0, q: q0, k: k0, out: joined };
        let unit = unit_again();
        let warp = (unit % 128u32) / 32u32;
        let lane = unit % 32u32;
        let chunk_numbers = &shared_g[numbers..numbers + comptime!(TOKEN_NUMBERS)];
        if comptime!(shape.gated) {
            let own = plane_sum(product) * exp2(chunk_numbers[63]);
            if lane == 0u32 {
                across[(unit / 32u32) as usize] = own;
            }
        }
        let exchange = joined + (unit % 128u32) * 4u32;
        if unit < 128u32 {
            reader(&t, chunk_numbers, &mut sums, 0usize, dbeta, &c, heads, warp, lane, out_scale, shape);
            #[unroll]
            for n in 0..comptime!(of_keys.len()) {
                store_f32(exchange + comptime!(512 * n as u32), read(of_keys, n));
            }
        } else {
            writer(&t, chunk_numbers, &mut sums, 0usize, &c, warp, lane, out_scale, shape);
        }
        sync_cube();
        let unit = unit_again();
        let warp = (unit % 128u32) / 32u32;
        let lane = unit % 32u32;
        let row = row_of(warp, lane, 0usize);
        if unit < 128u32 {
            let to = token_rows(address_of_mut(query_rows), c.start, c.length, c.head, heads, row, shape.keys);
            store_rows(of_queries, &to, lane, shape.keys);
        } else {
            let exchange = joined + (unit % 128u32) * 4u32;
            #[unroll]
            for n in 0..comptime!(of_keys.len()) {
                write(of_keys, n, read(of_keys, n) + load_f32(exchange + comptime!(512 * n as u32)));
            }
            let to = token_rows(address_of_mut(key_rows), c.start, c.length, c.head, heads, row, shape.keys);
            store_rows(of_keys, &to, lane, shape.keys);
        }
        if comptime!(shape.gated) {
            if unit / 32u32 == 0u32 {
                let mut product = f32::new(0.0);
                #[unroll]
                for n in 0..8usize {
                    product += across[n];
                }
                finish_gate(&sums, 0u32, dg, product, &c, heads, lane);
            }
        }
        sync_cube();
        turn += 1u32;
        index = next_index;
    }
}

/// One warp writes a chunk's decays and strengths to `to[at..]`.
#[cube]
fn write_numbers(
    to: &mut [f32],
    at: usize,
    g: &[f32],
    beta: &[f32],
    c: &Chunk,
    heads: u32,
    lane: u32,
    #[comptime] plan: GradientChunk,
) {
    let found = Decays::of(g, c.start, c.length, c.head, heads, lane, comptime!(plan.shape.gated));
    found.write(to, at, c.length, lane);
    let at = at + comptime!(DECAYS) + lane as usize;
    to[at] = strength(beta, c.start, c.length, lane, c.head, heads);
    to[at + 32] = strength(beta, c.start, c.length, lane + 32u32, c.head, heads);
}

/// Starts loading a chunk's queries and keys.
#[cube]
fn load_own(to: u32, q: &[u32], k: &[u32], c: &Chunk, heads: u32, groups: u32, #[comptime] plan: GradientChunk) {
    let shape = comptime!(plan.shape);
    let units = comptime!(GRADIENT_UNITS);
    let head = c.head / groups;
    let heads = heads / groups;
    load_tile(to, address_of(q), 0u32, c.start, head, heads, c.length, shape.keys, shape.panels(), units);
    let to = to + comptime!((shape.panels() * PANEL) as u32);
    load_tile(to, address_of(k), 0u32, c.start, head, heads, c.length, shape.keys, shape.panels(), units);
}

/// Starts loading a slice of value channels: W, do, dv, and the states before and after the chunk, which is the `border`-th of
/// all.
#[cube]
fn load_slice(
    to: u32,
    written: &[u32],
    grad_o: &[u32],
    grad_v: &[u32],
    states: &[u32],
    grad_states: &[u32],
    c: &Chunk,
    border: u32,
    slice: u32,
    heads: u32,
    #[comptime] plan: GradientChunk,
) {
    let shape = comptime!(plan.shape);
    let units = comptime!(GRADIENT_UNITS);
    let panel = comptime!(PANEL as u32);
    let wide = comptime!((shape.panels() * PANEL) as u32);
    let channel = slice * comptime!(SLICE as u32);
    load_tile(to, address_of(written), channel, c.start, c.head, heads, c.length, shape.values, 1usize, units);
    load_tile(to + panel, address_of(grad_o), channel, c.start, c.head, heads, c.length, shape.values, 1usize, units);
    let v0 = to + 2u32 * panel;
    load_tile(v0, address_of(grad_v), channel, c.start, c.head, heads, c.length, shape.values, 1usize, units);
    // States are rows of key channels, one after the other.
    let row = border * comptime!(shape.values as u32) + channel;
    let count = u32::min(comptime!(shape.values as u32) - channel, comptime!(SLICE as u32));
    let s0 = to + 3u32 * panel;
    load_tile(s0, address_of(states), 0u32, row, 0u32, 1u32, count, shape.keys, shape.panels(), units);
    load_tile(s0 + wide, address_of(grad_states), 0u32, row, 0u32, 1u32, count, shape.keys, shape.panels(), units);
}

/// What 16 tokens read with, over the channels of a slice: products between tokens, `do Sᵀ` and `dv Sᵀ`.
#[cube]
fn read_slice(at: u32, warp: u32, lane: u32, #[comptime] plan: GradientChunk) {
    let of_queries = comptime!(plan.shape.of_queries());
    let of_keys = comptime!(plan.shape.of_keys());
    let outputs = down_first(at + comptime!(PANEL as u32), lane) + warp * 2048u32;
    let values = outputs + comptime!(PANEL as u32);
    let written = across_first(at, lane);
    let state = down_first(at + comptime!(3 * PANEL as u32), lane);
    #[unroll]
    for step in 0..4usize {
        let piece = comptime!((step * 32) as u32);
        load(LEFT, 0usize, outputs ^ piece, 0usize, false);
        load(LEFT, 1usize, values ^ piece, 0usize, false);
        #[unroll]
        for c in 0..4usize {
            // Tokens read from those before them.
            if comptime!(c as u32) <= warp {
                load(COLUMNS, c, written ^ piece, comptime!(c * 2048), false);
                both(OUTER, INNER, c, c);
            }
        }
        #[unroll]
        for c in 0..comptime!(plan.shape.keys / 16) {
            let offset = comptime!(c / 4 * PANEL + step * 2048);
            load(COLUMNS, comptime!(c % 4), state ^ comptime!((c % 4 * 32) as u32), offset, true);
            both(of_queries, of_keys, c, comptime!(c % 4));
        }
    }
}

/// Adds to 16 columns of two accumulators the products of two left operands with one right operand.
#[cube]
fn both(#[comptime] first: Acc, #[comptime] second: Acc, #[comptime] columns: usize, #[comptime] right: usize) {
    #[unroll]
    for half in 0..2usize {
        multiply(first, comptime!(2 * columns + half), LEFT, 0usize, COLUMNS, right, half);
        multiply(second, comptime!(2 * columns + half), LEFT, 1usize, COLUMNS, right, half);
    }
}

/// What 16 tokens write with: products between tokens, transposed, and `W Zᵀ`.
#[cube]
fn write_slice(at: u32, warp: u32, lane: u32, #[comptime] plan: GradientChunk) {
    let of_keys = comptime!(plan.shape.of_keys());
    let written = down_first(at, lane) + warp * 2048u32;
    let outputs = across_first(at + comptime!(PANEL as u32), lane);
    let values = outputs + comptime!(PANEL as u32);
    let state = down_first(at + comptime!(((3 + plan.shape.panels()) * PANEL) as u32), lane);
    #[unroll]
    for step in 0..4usize {
        let piece = comptime!((step * 32) as u32);
        load(LEFT, 0usize, written ^ piece, 0usize, false);
        #[unroll]
        for c in 0..4usize {
            if comptime!(c as u32) >= warp {
                load(COLUMNS, 0usize, outputs ^ piece, comptime!(c * 2048), false);
                load(COLUMNS, 1usize, values ^ piece, comptime!(c * 2048), false);
                #[unroll]
                for half in 0..2usize {
                    multiply(OUTER, comptime!(2 * c + half), LEFT, 0usize, COLUMNS, 0usize, half);
                    multiply(INNER, comptime!(2 * c + half), LEFT, 0usize, COLUMNS, 1usize, half);
                }
            }
        }
        #[unroll]
        for c in 0..comptime!(plan.shape.keys / 16) {
            let offset = comptime!(c / 4 * PANEL + step * 2048);
            load(COLUMNS, comptime!(c % 4), state ^ comptime!((c % 4 * 32) as u32), offset, true);
            multiply(of_keys, comptime!(2 * c), LEFT, 0usize, COLUMNS, comptime!(c % 4), 0usize);
            multiply(of_keys, comptime!(2 * c + 1), LEFT, 0usize, COLUMNS, comptime!(c % 4), 1usize);
        }
    }
}
