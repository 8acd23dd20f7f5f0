//! Each word of `tile::hopper` against plain arithmetic.

use burn::tensor::{DType, Shape};
use burn_fla_ops::bridge::CubeTensor;
use burn_fla_ops::tile::hopper::*;
use burn_fla_tests::{assert_close, uniform};
use cubecl::cuda::CudaDevice;
use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

/// Contraction of the products under test: two panels.
const DEPTH: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layouts {
    columns: usize,
    a_rows: bool,
    b_rows: bool,
    a_in_registers: bool,
}

/// One 64 × `columns` product by one warpgroup: loads, layouts, products and the places of accumulators.
#[cube(launch_unchecked)]
fn multiply(
    a: &TensorMap<bf16, Tiled>,
    b: &TensorMap<bf16, Tiled>,
    out: &mut [f32],
    factor: f32,
    #[comptime] layouts: Layouts,
) {
    let columns = comptime!(layouts.columns);
    let acc = comptime!(Acc::new("acc", layouts.columns));
    let frag = comptime!(Frag::new("frag", DEPTH));
    let shared_a = Shared::<[bf16]>::new_aligned_slice(comptime!(64 * DEPTH), 1024usize);
    let shared_b = Shared::<[bf16]>::new_aligned_slice(comptime!(layouts.columns * DEPTH), 1024usize);
    let barriers = Shared::<[u64]>::new_slice(2usize);
    let tile_a = generic_to_shared::<bf16>(shared_a.as_ptr());
    let tile_b = generic_to_shared::<bf16>(shared_b.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), 1u32);
    declare(acc);
    declare_fragment(frag);
    if UNIT_POS == 0 {
        ring.init(1u32, 1u32);
        barrier_fence();
    }
    sync_cube();
    if UNIT_POS == 0 {
        let map_a = tensor_map_address(a);
        let map_b = tensor_map_address(b);
        let full = ring.full(0u32);
        ring.wait_room(0u32);
        barrier_expect(full, comptime!(((64 + layouts.columns) * DEPTH * 2) as u32));
        if comptime!(layouts.a_rows) {
            load_2d(tile_a, map_a, 0u32, 0u32, full);
        } else {
            load_2d(tile_a, map_a, 0u32, 0u32, full);
            load_2d(tile_a + 8192u32, map_a, 64u32, 0u32, full);
        }
        if comptime!(layouts.b_rows) {
            #[unroll]
            for panel in 0..comptime!(layouts.columns / 64) {
                let to = tile_b + comptime!((panel * DEPTH * 128) as u32);
                load_2d(to, map_b, comptime!(panel as u32 * 64), 0u32, full);
            }
        } else {
            load_2d(tile_b, map_b, 0u32, 0u32, full);
            load_2d(tile_b + comptime!((layouts.columns * 128) as u32), map_b, 64u32, 0u32, full);
        }
    }
    ring.wait_full(0u32);
    let lane = UNIT_POS % 32u32;
    let warp = UNIT_POS / 32u32;
    if comptime!(layouts.a_in_registers) {
        #[unroll]
        for step in 0..comptime!(DEPTH / 16) {
            #[unroll]
            for i in 0..4usize {
                let row = row_of(warp, lane, 0usize) + comptime!((i % 2 * 8) as u32);
                let byte = comptime!((step % 4 * 32 + i / 2 * 16) as u32) + (lane % 4u32) * 4u32;
                let word = load_u32(swizzled(tile_a + comptime!((step / 4 * 8192) as u32), row, byte));
                pack(frag, comptime!(step * 4 + i), bf16_low(word), bf16_high(word));
            }
        }
    }
    fence();
    #[unroll]
    for step in 0..comptime!(DEPTH / 16) {
        let keep = comptime!(step as u32);
        let right =
            if comptime!(layouts.b_rows) { mn_major(tile_b, DEPTH, step) } else { k_major(tile_b, columns, step) };
        if comptime!(layouts.a_in_registers) {
            mma_registers(acc, frag, step, right, keep, layouts.b_rows);
        } else {
            let left =
                if comptime!(layouts.a_rows) { mn_major(tile_a, DEPTH, step) } else { k_major(tile_a, 64usize, step) };
            mma_shared(acc, left, right, keep, layouts.a_rows, layouts.b_rows);
        }
    }
    commit();
    wait(0u32);
    #[unroll]
    for i in 0..comptime!(acc.len()) {
        scale(acc, i, factor);
        let at = row_of(warp, lane, i) * comptime!(layouts.columns as u32) + column_of(lane, i);
        out[at as usize] = read(acc, i);
    }
}

/// Copies one box through shared memory, and its first 16 × 16 numbers through a transposing load.
#[cube(launch_unchecked)]
fn move_box(
    from: &TensorMap<bf16, Tiled>,
    to: &TensorMap<bf16, Tiled>,
    words: &mut [u32],
    #[comptime] source: [u32; 3],
    #[comptime] target: [u32; 3],
) {
    let shared = Shared::<[bf16]>::new_aligned_slice(4096usize, 1024usize);
    let barriers = Shared::<[u64]>::new_slice(2usize);
    let panel = generic_to_shared::<bf16>(shared.as_ptr());
    let ring = Ring::new(generic_to_shared::<u64>(barriers.as_ptr()), 1u32);
    if UNIT_POS == 0 {
        ring.init(1u32, 1u32);
        barrier_fence();
    }
    sync_cube();
    if UNIT_POS == 0 {
        barrier_expect(ring.full(0u32), 8192u32);
        let map = tensor_map_address(from);
        load_3d(panel, map, source[0], source[1], source[2], ring.full(0u32));
    }
    ring.wait_full(0u32);
    let lane = UNIT_POS % 32u32;
    let block = lane / 8u32;
    let found = load_transposed(swizzled(panel, (block % 2u32) * 8u32 + lane % 8u32, (block / 2u32) * 16u32));
    #[unroll]
    for i in 0..4usize {
        words[(lane * 4u32 + comptime!(i as u32)) as usize] = found.extract(i);
    }
    if UNIT_POS == 0 {
        let map = tensor_map_address(to);
        store_3d(panel, map, target[0], target[1], target[2]);
        commit_stores();
        wait_stores(0u32);
    }
}

struct Gpu {
    device: cubecl::Device,
}

impl Gpu {
    fn tensor(&self, values: &[f64], shape: &[usize]) -> CubeTensor {
        let numbers: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
        let client = self.device.client();
        let handle = client.create_from_slice(bf16::as_bytes(&numbers));
        CubeTensor::new_contiguous(client, self.device.clone(), Shape::from(shape.to_vec()), handle, DType::BF16)
    }

    fn read(&self, tensor: &CubeTensor) -> Vec<f64> {
        let bytes = self.device.client().read_one(tensor.handle.clone()).unwrap();
        bf16::from_bytes(&bytes).iter().map(|x| x.to_f64()).collect()
    }
}

fn gpu() -> Option<Gpu> {
    super::hopper().map(|_| Gpu { device: cubecl::Device::Cuda(CudaDevice::new(0)) })
}

/// Small whole numbers: their products are exact in bf16 and f32.
fn whole(seed: u64, count: usize) -> Vec<f64> {
    uniform(seed, count, (-8.0, 8.0)).into_iter().map(f64::round).collect()
}

#[test]
fn products_in_every_layout_are_exact() {
    let Some(gpu) = gpu() else { return };
    let client = gpu.device.client();
    for columns in [64, 128, 192, 256] {
        for (a_rows, b_rows, a_in_registers) in [
            (false, false, false),
            (false, true, false),
            (true, false, false),
            (true, true, false),
            (false, false, true),
            (false, true, true),
        ] {
            let (a, b) = (whole(1, 64 * DEPTH), whole(2, columns * DEPTH));
            let a_shape = if a_rows { [DEPTH, 64] } else { [64, DEPTH] };
            let b_shape = if b_rows { [DEPTH, columns] } else { [columns, DEPTH] };
            let (ta, tb) = (gpu.tensor(&a, &a_shape), gpu.tensor(&b, &b_shape));
            let out = client.empty(64 * columns * 4);
            let layouts = Layouts { columns, a_rows, b_rows, a_in_registers };
            let map = |t: &CubeTensor, [rows, width]: [usize; 2]| panel_map(t, [rows, width], [width, 1], [rows, 64]);
            // SAFETY: the output holds 64 × columns numbers, and the maps describe their tensors.
            unsafe {
                multiply::launch_unchecked(
                    &client,
                    CubeCount::new_1d(1),
                    CubeDim::new_1d(128),
                    map(&ta, a_shape),
                    map(&tb, b_shape),
                    BufferArg::from_raw_parts(out.clone(), 64 * columns),
                    0.5,
                    layouts,
                );
            }
            let bytes = client.read_one(out).unwrap();
            let found: Vec<f64> = f32::from_bytes(&bytes).iter().map(|x| f64::from(*x)).collect();
            let at = |x: &[f64], i: usize, k: usize, width: usize, rows: bool| {
                if rows { x[k * width + i] } else { x[i * DEPTH + k] }
            };
            let expected: Vec<f64> = (0..64 * columns)
                .map(|e| {
                    let (i, j) = (e / columns, e % columns);
                    0.5 * (0..DEPTH).map(|k| at(&a, i, k, 64, a_rows) * at(&b, j, k, columns, b_rows)).sum::<f64>()
                })
                .collect();
            assert_close(&format!("{layouts:?}"), &found, &expected, 0.0);
        }
    }
}

#[test]
fn boxes_are_filled_with_zeros_and_clipped() {
    let Some(gpu) = gpu() else { return };
    let client = gpu.device.client();
    let (from_shape, to_shape) = ([3, 50, 40], [2, 70, 72]);
    let from_values = whole(3, from_shape.iter().product());
    let before = whole(4, to_shape.iter().product());
    let (from, to) = (gpu.tensor(&from_values, &from_shape), gpu.tensor(&before, &to_shape));
    let words = client.empty(128 * 4);
    let map = |t: &CubeTensor, s: [usize; 3]| panel_map(t, s, [s[1] * s[2], s[2], 1], [1, 64, 64]);
    // Coordinates count the last dimension first.
    let (source, target) = ([8u32, 5, 2], [16u32, 20, 1]);
    // SAFETY: 32 lanes write four words each, and the maps describe their tensors.
    unsafe {
        move_box::launch_unchecked(
            &client,
            CubeCount::new_1d(1),
            CubeDim::new_1d(32),
            map(&from, from_shape),
            map(&to, to_shape),
            BufferArg::from_raw_parts(words.clone(), 128),
            source,
            target,
        );
    }
    let inside = |y: usize, x: usize| {
        let (row, column) = (y + source[1] as usize, x + source[0] as usize);
        if row < from_shape[1] && column < from_shape[2] {
            from_values[(source[2] as usize * from_shape[1] + row) * from_shape[2] + column]
        } else {
            0.0
        }
    };
    let mut expected = before.clone();
    for y in 0..64 {
        for x in 0..64 {
            let (row, column) = (y + target[1] as usize, x + target[0] as usize);
            if row < to_shape[1] && column < to_shape[2] {
                expected[(target[2] as usize * to_shape[1] + row) * to_shape[2] + column] = inside(y, x);
            }
        }
    }
    assert_close("the box", &gpu.read(&to), &expected, 0.0);
    let bytes = client.read_one(words).unwrap();
    let words = u32::from_bytes(&bytes);
    for lane in 0..32 {
        for block in 0..4 {
            let (row, column) = (block % 2 * 8 + lane % 4 * 2, block / 2 * 8 + lane / 4);
            let word = words[lane * 4 + block];
            let half = |bits: u32| bf16::from_bits(bits as u16).to_f64();
            assert_eq!([half(word & 0xFFFF), half(word >> 16)], [inside(row, column), inside(row + 1, column)]);
        }
    }
}

#[cube(launch_unchecked)]
fn invert(a: &[f32], out: &mut [f32]) {
    let shared_a = Shared::<[f32]>::new_aligned_slice(comptime!(64 * TRIANGLE_COLUMN), 128usize);
    let shared_x = Shared::<[f32]>::new_aligned_slice(comptime!(64 * TRIANGLE_ROW), 128usize);
    let left = generic_to_shared::<f32>(shared_a.as_ptr());
    let x = generic_to_shared::<f32>(shared_x.as_ptr());
    for i in 0..32u32 {
        let at = i * 128u32 + UNIT_POS;
        let to = left + (at % 64u32 * comptime!(TRIANGLE_COLUMN as u32) + at / 64u32) * 4u32;
        store_f32(to, a[at as usize]);
        // What is above the diagonal must not be read before it is written.
        store_f32(x + (at / 64u32 * comptime!(TRIANGLE_ROW as u32) + at % 64u32) * 4u32, f32::new(f32::NAN));
    }
    sync_cube();
    invert_triangle(left, x);
    for i in 0..32u32 {
        let at = i * 128u32 + UNIT_POS;
        out[at as usize] = load_f32(x + (at / 64u32 * comptime!(TRIANGLE_ROW as u32) + at % 64u32) * 4u32);
    }
}

/// Against forward substitution in f64; matrices of numbers of one size are those of keys that repeat.
#[test]
fn triangles_are_inverted() {
    if super::hopper().is_none() {
        return;
    }
    let client = cubecl::Device::from(CudaDevice::new(0)).client();
    let random = uniform(3, 4096, (-0.5, 0.5));
    for (name, matrix) in [("random", random), ("ones", vec![1.0; 4096]), ("twos", vec![2.0; 4096])] {
        let a: Vec<f64> = (0..4096).map(|i| if i % 64 < i / 64 { matrix[i] as f32 as f64 } else { 0.0 }).collect();
        let mut exact = vec![0.0; 4096];
        for column in 0..64 {
            for row in column..64 {
                let sum: f64 = (column..row).map(|k| a[row * 64 + k] * exact[k * 64 + column]).sum();
                exact[row * 64 + column] = if row == column { 1.0 } else { 0.0 } - sum;
            }
        }
        let narrow: Vec<f32> = a.iter().map(|x| *x as f32).collect();
        let input = client.create_from_slice(f32::as_bytes(&narrow));
        let output = client.empty(4096 * 4);
        // SAFETY: both have 4096 numbers, as the kernel takes it.
        unsafe {
            invert::launch_unchecked(
                &client,
                CubeCount::new_1d(1),
                CubeDim::new_1d(128),
                BufferArg::from_raw_parts(input, 4096),
                BufferArg::from_raw_parts(output.clone(), 4096),
            );
        }
        let bytes = client.read_one(output).expect("its numbers");
        let found = f32::from_bytes(&bytes).iter().enumerate();
        let found: Vec<f64> = found.map(|(i, x)| if i % 64 <= i / 64 { f64::from(*x) } else { 0.0 }).collect();
        // f32 against f64: random matrices of this size are well conditioned.
        assert_close(name, &found, &exact, 1e-5);
    }
}
