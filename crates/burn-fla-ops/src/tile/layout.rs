//! Plain accesses to swizzled tiles.

use cubecl::prelude::*;

/// The address of byte `byte` (under 128) of row `row` of a panel: its 16-byte pieces are swapped by the row's number.
///
/// For a fixed row, the address of another piece differs by an exclusive or: `swizzled(p, r, b) ^ c` is that of byte
/// `b ^ c`, for `c` a multiple of 16.
#[cube]
pub fn swizzled(panel: u32, row: u32, byte: u32) -> u32 {
    panel + row * 128u32 + (byte ^ ((row % 8u32) * 16u32))
}

/// Stores a word to shared memory.
#[cube]
pub fn store_u32(address: u32, value: u32) {
    gpu_asm!("st.shared.b32 [{a}], {v};", a = in(_) address + 0u32, v = in(_) value + 0u32);
}

/// Stores four words to shared memory, at a multiple of 16 bytes, `offset` bytes after `address`.
#[cube]
pub fn store_u32_four(address: u32, #[comptime] offset: usize, first: u32, second: u32, third: u32, fourth: u32) {
    gpu_asm!(
        "st.shared.v4.b32 [{a} + {offset}], {{{w}, {x}, {y}, {z}}};",
        a = in(_) address + 0u32, w = in(_) first + 0u32, x = in(_) second + 0u32, y = in(_) third + 0u32, z = in(_) fourth + 0u32
    );
}

/// Loads four words from shared memory, at a multiple of 16 bytes, `offset` bytes after `address`.
#[cube]
pub fn load_u32_four(address: u32, #[comptime] offset: usize) -> Vector<u32, Const<4>> {
    let out: Vector<u32, Const<4>>;
    gpu_asm!("ld.shared.v4.b32 {d}, [{a} + {offset}];", d = out(_) out, a = in(_) address + 0u32);
    out
}

/// Stores two f32 to shared memory, at a multiple of 8 bytes.
#[cube]
pub fn store_f32_pair(address: u32, first: f32, second: f32) {
    gpu_asm!("st.shared.v2.f32 [{a}], {{{x}, {y}}};", a = in(_) address + 0u32, x = in(_) first * 1.0f32, y = in(_) second * 1.0f32);
}

/// Loads a word from shared memory.
#[cube]
pub fn load_u32(address: u32) -> u32 {
    let out: u32;
    gpu_asm!("ld.shared.b32 {d}, [{a}];", d = out(_) out, a = in(_) address + 0u32);
    out + 0u32
}

/// Stores an f32 to shared memory.
#[cube]
pub fn store_f32(address: u32, value: f32) {
    gpu_asm!("st.shared.f32 [{a}], {v};", a = in(_) address + 0u32, v = in(_) value * 1.0f32);
}

/// Loads an f32 from shared memory.
#[cube]
pub fn load_f32(address: u32) -> f32 {
    let out: f32;
    gpu_asm!("ld.shared.f32 {d}, [{a}];", d = out(_) out, a = in(_) address + 0u32);
    out * 1.0f32
}

/// Loads four f32 from shared memory, at a multiple of 16 bytes.
#[cube]
pub fn load_f32_four(address: u32) -> Vector<f32, Const<4>> {
    let out: Vector<f32, Const<4>>;
    gpu_asm!("ld.shared.v4.f32 {d}, [{a}];", d = out(_) out, a = in(_) address + 0u32);
    out
}

/// Loads two f32 from shared memory, at a multiple of 8 bytes.
#[cube]
pub fn load_f32_pair(address: u32) -> Vector<f32, Const<2>> {
    let out: Vector<f32, Const<2>>;
    gpu_asm!("ld.shared.v2.f32 {d}, [{a}];", d = out(_) out, a = in(_) address + 0u32);
    out
}

/// Stores four 8 × 8 blocks of bf16 transposed, two numbers a word: what [`load_transposed`] reads with the same addresses.
#[cube]
pub fn store_transposed(address: u32, first: u32, second: u32, third: u32, fourth: u32) {
    gpu_asm!(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [{a}], {{{w}, {x}, {y}, {z}}};",
        a = in(_) address + 0u32, w = in(_) first + 0u32, x = in(_) second + 0u32, y = in(_) third + 0u32, z = in(_) fourth + 0u32
    );
}

/// Loads four transposed 8 × 8 blocks of bf16, two numbers a word: lane `l` gives the address of row `l % 8` of block
/// `l / 8`, and receives rows `2 (l % 4)` and the next of column `l / 4` of each block.
#[cube]
pub fn load_transposed(address: u32) -> Vector<u32, Const<4>> {
    let out: Vector<u32, Const<4>>;
    gpu_asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {d}, [{a}];", d = out(_) out, a = in(_) address + 0u32);
    out
}

/// The number in the low half of a word.
#[cube]
pub fn bf16_low(word: u32) -> f32 {
    f32::reinterpret(word << 16u32)
}

/// The number in the high half of a word.
#[cube]
pub fn bf16_high(word: u32) -> f32 {
    f32::reinterpret(word & 0xFFFF0000u32)
}

/// The f16 in the low half of a word.
#[cube]
pub fn f16_low(word: u32) -> f32 {
    let out: f32;
    gpu_asm!("{{ .reg .b16 l, h; mov.b32 {{l, h}}, {w}; cvt.f32.f16 {d}, l; }}", d = out(_) out, w = in(_) word + 0u32, options(nomem));
    out * 1.0f32
}

/// The f16 in the high half of a word.
#[cube]
pub fn f16_high(word: u32) -> f32 {
    f16_low(word >> 16u32)
}

/// `1 / x`, to one unit in the last place.
#[cube]
pub fn reciprocal(x: f32) -> f32 {
    let out: f32;
    gpu_asm!("rcp.approx.ftz.f32 {d}, {x};", d = out(_) out, x = in(_) x * 1.0f32, options(nomem));
    out * 1.0f32
}

/// `2^x`, to two units in the last place; 0 where it would be denormal.
#[cube]
pub fn exp2(x: f32) -> f32 {
    let out: f32;
    gpu_asm!("ex2.approx.ftz.f32 {d}, {x};", d = out(_) out, x = in(_) x * 1.0f32, options(nomem));
    out * 1.0f32
}
