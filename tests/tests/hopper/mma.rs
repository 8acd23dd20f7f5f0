//! Each word of `tile::mma` against plain arithmetic.

// `x + 0u32` copies a variable: a block of PTX takes one that is mutable by its address.
#![allow(clippy::identity_op)]

use burn_fla_ops::tile::mma::*;
use burn_fla_tests::uniform;
use cubecl::cuda::CudaDevice;
use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;
use half::bf16;

/// Contraction of the products under test: one panel and a step of the next.
const DEPTH: usize = 80;
/// Columns of the products under test.
const COLUMNS: usize = 32;
/// Rows of a tile.
const ROWS: usize = 96;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layouts {
    left_transposed: bool,
    right_transposed: bool,
}

/// Copies `rows × columns` numbers into panels of [`ROWS`] rows; rows from `valid` on become zero.
#[cube]
fn fill(tile: u32, from: u64, valid: u32, #[comptime] rows: usize, #[comptime] columns: usize) {
    let lane = UNIT_POS % 32u32;
    #[unroll]
    for piece in 0..comptime!(columns / 8) {
        #[unroll]
        for block in 0..comptime!(rows.div_ceil(32)) {
            let row = lane + comptime!(block as u32 * 32);
            if row < comptime!(rows as u32) {
                let panel = tile + comptime!((piece / 8 * ROWS * 128) as u32);
                let source = from + u64::cast_from(row * comptime!(columns as u32 * 2) + comptime!(piece as u32 * 16));
                copy_16(
                    swizzled(panel, row, comptime!((piece % 8 * 16) as u32)),
                    0usize,
                    source,
                    select(row < valid, 16u32, 0u32),
                );
            }
        }
    }
}

/// One 16 × [`COLUMNS`] product by one warp: copies, loads, products, and the places of accumulators.
#[cube(launch_unchecked)]
fn product(a: &[u32], b: &[u32], out: &mut [f32], words: &mut [u32], valid: u32, #[comptime] layouts: Layouts) {
    let acc = comptime!(Acc::new("acc", COLUMNS));
    let left = comptime!(Frag::new("left", 16));
    let right = comptime!(Frag::new("right", 16));
    let packed = comptime!(Frag::new("packed", 16));
    let shared = Shared::<[u32]>::new_aligned_slice(comptime!(4 * ROWS * 32), 1024usize);
    let tile_a = generic_to_shared::<u32>(shared.as_ptr());
    let tile_b = tile_a + comptime!(2 * ROWS as u32 * 128);
    declare(acc);
    declare_fragment(left);
    declare_fragment(right);
    declare_fragment(packed);
    let lane = UNIT_POS % 32u32;
    if comptime!(layouts.left_transposed) {
        fill(tile_a, address_of(a), valid, DEPTH, 16usize);
    } else {
        fill(tile_a, address_of(a), 16u32, 16usize, DEPTH);
    }
    commit_copies();
    if comptime!(layouts.right_transposed) {
        fill(tile_b, address_of(b), valid, DEPTH, COLUMNS);
    } else {
        fill(tile_b, address_of(b), comptime!(COLUMNS as u32), COLUMNS, DEPTH);
    }
    commit_copies();
    wait_copies(0u32);
    sync_cube();
    zero(acc);
    #[unroll]
    for step in 0..comptime!(DEPTH / 16) {
        let down = comptime!(step * 2048);
        let piece = comptime!((step % 4 * 32) as u32);
        let panel = comptime!(step / 4 * ROWS * 128);
        if comptime!(layouts.left_transposed) {
            load(left, 0usize, across_first(tile_a, lane), down, true);
        } else {
            load(left, 0usize, down_first(tile_a, lane) ^ piece, panel, false);
        }
        #[unroll]
        for c in 0..comptime!(COLUMNS / 16) {
            if comptime!(layouts.right_transposed) {
                load(right, 0usize, down_first(tile_b, lane) ^ comptime!(c as u32 * 32), down, true);
            } else {
                load(right, 0usize, across_first(tile_b, lane) ^ piece, comptime!(panel + c * 2048), false);
            }
            multiply(acc, comptime!(2 * c), left, 0usize, right, 0usize, 0usize);
            multiply(acc, comptime!(2 * c + 1), left, 0usize, right, 0usize, 1usize);
        }
    }
    #[unroll]
    for i in 0..comptime!(acc.len()) {
        out[(row_of(0u32, lane, i) * comptime!(COLUMNS as u32) + column_of(lane, i)) as usize] = read(acc, i);
    }
    // The first 16 columns as a left operand, and their first block transposed.
    pack_step(packed, 0usize, acc, 0usize);
    #[unroll]
    for i in 0..4usize {
        words[(lane * 8u32 + comptime!(i as u32)) as usize] = word(packed, i);
    }
    words[(lane * 8u32 + 4u32) as usize] = transpose(word(packed, 0usize));
    let to = address_of_mut(words) + u64::cast_from(lane * 32u32 + 24u32);
    store_global_pair(to, lane + 0u32, lane + 100u32, true);
    store_global_pair(to, 7u32, 7u32, lane == 40u32);
}

/// Small whole numbers: their products, less than 2^8, are exact in bf16 and f32.
fn whole(seed: u64, count: usize) -> Vec<f64> {
    uniform(seed, count, (-1.5, 1.5)).into_iter().map(f64::round).collect()
}

#[test]
fn products_of_a_warp_are_exact() {
    if super::device_for(burn_fla_ops::Engine::Mma).is_none() {
        return;
    }
    let client = cubecl::Device::Cuda(CudaDevice::new(0)).client();
    let upload = |values: &[f64]| {
        let numbers: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
        client.create_from_slice(bf16::as_bytes(&numbers))
    };
    for (left_transposed, right_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
        // Rows of the contraction that are not copied, where both operands are stored so.
        let valid = if left_transposed && right_transposed { 77 } else { DEPTH };
        let (a, b) = (whole(1, 16 * DEPTH), whole(2, COLUMNS * DEPTH));
        let at = |x: &[f64], transposed: bool, rows: usize, row: usize, k: usize| {
            if transposed { x[k * rows + row] } else { x[row * DEPTH + k] }
        };
        let (out, words) = (client.empty(16 * COLUMNS * 4), client.empty(32 * 8 * 4));
        // SAFETY: the buffers hold as many numbers as the kernel reads and writes.
        unsafe {
            product::launch_unchecked(
                &client,
                CubeCount::new_1d(1),
                CubeDim::new_1d(32),
                BufferArg::from_raw_parts(upload(&a), 8 * DEPTH),
                BufferArg::from_raw_parts(upload(&b), COLUMNS * DEPTH / 2),
                BufferArg::from_raw_parts(out.clone(), 16 * COLUMNS),
                BufferArg::from_raw_parts(words.clone(), 32 * 8),
                valid as u32,
                Layouts { left_transposed, right_transposed },
            );
        }
        let found = client.read_one(out).unwrap();
        let found = f32::from_bytes(&found);
        let expected: Vec<f32> = (0..16 * COLUMNS)
            .map(|i| {
                let term = |k: usize| {
                    at(&a, left_transposed, 16, i / COLUMNS, k) * at(&b, right_transposed, COLUMNS, i % COLUMNS, k)
                };
                (0..valid).map(term).sum::<f64>() as f32
            })
            .collect();
        assert_eq!(found, expected, "left transposed: {left_transposed}, right transposed: {right_transposed}");
        let words = client.read_one(words).unwrap();
        let words = u32::from_bytes(&words);
        let pair = |row: usize, column: usize| {
            let bits = |c: usize| u32::from(bf16::from_f32(expected[row * COLUMNS + c]).to_bits());
            bits(column) | bits(column + 1) << 16
        };
        for lane in 0..32 {
            let (row, column) = (lane / 4, lane % 4 * 2);
            for (i, (down, across)) in [(0, 0), (8, 0), (0, 8), (8, 8)].into_iter().enumerate() {
                assert_eq!(words[lane * 8 + i], pair(row + down, column + across), "word {i} of lane {lane}");
            }
            let bits = |row: usize| u32::from(bf16::from_f32(expected[row * COLUMNS + lane / 4]).to_bits());
            assert_eq!(words[lane * 8 + 4], bits(column) | bits(column + 1) << 16, "transposed, lane {lane}");
            assert_eq!(words[lane * 8 + 6..lane * 8 + 8], [lane as u32, lane as u32 + 100]);
        }
    }
}
