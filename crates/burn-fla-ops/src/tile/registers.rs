//! Accumulators and fragments: PTX registers that a kernel declares by name.
//!
//! A warp's part of an accumulator and of a fragment is the same for a product of a warpgroup (64 rows, 16 a warp) and for
//! one of a single warp (16 rows).

use cubecl::prelude::*;

/// An f32 tile of 64 rows, spread over the 128 units of a warpgroup, or of 16 rows over a warp: `columns / 2` registers a
/// unit.
///
/// Register `i` of a unit stands at row [`row_of`]`(i)` and column [`column_of`]`(i)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Acc {
    name: &'static str,
    columns: usize,
}

impl Acc {
    /// A tile of `columns` columns; `name` is the prefix of its registers, unique in a kernel.
    pub const fn new(name: &'static str, columns: usize) -> Self {
        Self { name, columns }
    }

    /// How many columns it has.
    pub const fn columns(self) -> usize {
        self.columns
    }

    /// Registers a unit.
    pub const fn len(self) -> usize {
        self.columns / 2
    }

    /// Whether it has no registers.
    pub const fn is_empty(self) -> bool {
        self.columns == 0
    }

    pub(super) fn list(self) -> String {
        names(self.name, 0, self.len())
    }

    /// One of its registers.
    fn name(self, i: usize) -> String {
        names(self.name, i, 1)
    }

    /// What `text` says of each register, by its name and number: one block of PTX where a loop would make one a register,
    /// and the compiler would take as much time for each.
    fn each(self, text: impl Fn(String, usize) -> String) -> String {
        (0..self.len()).map(|i| text(self.name(i), i)).collect::<Vec<_>>().join(" ")
    }

    /// The registers of columns `8 · tile` to `8 · tile + 7`.
    pub(super) fn tile(self, tile: usize) -> String {
        names(self.name, 4 * tile, 4)
    }
}

/// A bf16 tile of 64 or 16 rows as a left operand in registers: `columns / 4` registers a unit, two numbers each.
///
/// A step of 16 columns is four registers: rows `r` and `r + 8` of columns `c, c + 1`, then both of `c + 8, c + 9`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frag {
    name: &'static str,
    columns: usize,
}

impl Frag {
    /// A tile of `columns` columns; `name` is the prefix of its registers, unique in a kernel.
    pub const fn new(name: &'static str, columns: usize) -> Self {
        Self { name, columns }
    }

    /// How many columns it has.
    pub const fn columns(self) -> usize {
        self.columns
    }

    pub(super) fn step(self, step: usize) -> String {
        names(self.name, 4 * step, 4)
    }

    /// Half of a step's registers.
    pub(super) fn half(self, step: usize, half: usize) -> String {
        names(self.name, 4 * step + 2 * half, 2)
    }
}

fn names(prefix: &str, first: usize, count: usize) -> String {
    (first..first + count).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>().join(",")
}

/// Declares an accumulator. Call it once a kernel, outside of every branch and loop.
#[cube]
pub fn declare(#[comptime] acc: Acc) {
    let list = comptime!(acc.list());
    gpu_asm!(".reg .f32 {list};");
}

/// Declares a fragment. Call it once a kernel, outside of every branch and loop.
#[cube]
pub fn declare_fragment(#[comptime] frag: Frag) {
    let list = comptime!(names(frag.name, 0, frag.columns / 4));
    gpu_asm!(".reg .b32 {list};");
}

/// `n + 1`, which the compiler cannot see through: a loop that counts with it has as many steps as it has, and is not
/// unrolled. What waits for a barrier in each step gains nothing from that, and the compiler assembles it several times.
#[cube]
pub fn next(n: u32) -> u32 {
    let out: u32;
    gpu_asm!("add.u32 {d}, {n}, 1;", d = out(_) out, n = in(_) n + 0u32, options(nomem));
    out + 0u32
}

/// The row of register `i` for the unit at `lane` of warp `warp` of its warpgroup.
#[cube]
pub fn row_of(warp: u32, lane: u32, #[comptime] i: usize) -> u32 {
    warp * 16u32 + lane / 4u32 + comptime!((i / 2 % 2 * 8) as u32)
}

/// The column of register `i` for the unit at `lane`.
#[cube]
pub fn column_of(lane: u32, #[comptime] i: usize) -> u32 {
    (lane % 4u32) * 2u32 + comptime!((i / 4 * 8 + i % 2) as u32)
}

/// The value of register `i`.
#[cube]
pub fn read(#[comptime] acc: Acc, #[comptime] i: usize) -> f32 {
    let name = comptime!(acc.name);
    let out: f32;
    gpu_asm!("mov.f32 {d}, {name}{i};", d = out(_) out, options(nomem));
    out * 1.0f32
}

/// Sets register `i`.
#[cube]
pub fn write(#[comptime] acc: Acc, #[comptime] i: usize, value: f32) {
    let name = comptime!(acc.name);
    gpu_asm!("mov.f32 {name}{i}, {v};", v = in(_) value * 1.0f32, options(nomem));
}

/// Sets all registers to zero.
#[cube]
pub fn zero(#[comptime] acc: Acc) {
    let text = comptime!(acc.each(|name, _| format!("mov.f32 {name}, 0f00000000;")));
    gpu_asm!("{text}", options(nomem));
}

/// Multiplies all registers: those of a unit's upper row by `low`, of its lower row by `high`.
#[cube]
pub fn scale_rows(#[comptime] acc: Acc, low: f32, high: f32) {
    let text = comptime!(acc.each(|name, i| {
        let factor = if i / 2 % 2 == 0 { "low" } else { "high" };
        format!("mul.f32 {name}, {name}, {factor};")
    }));
    gpu_asm!(
        "{{ .reg .f32 low, high; mov.f32 low, {l}; mov.f32 high, {h}; {text} }}",
        l = in(_) low * 1.0f32, h = in(_) high * 1.0f32, options(nomem)
    );
}

/// Multiplies the registers of columns `8 · tile` to `8 · tile + 7`: those of a unit's even column by `even`, of its odd
/// one by `odd`.
#[cube]
pub fn scale_columns(#[comptime] acc: Acc, #[comptime] tile: usize, even: f32, odd: f32) {
    let (a, b, c, d) =
        comptime!((acc.name(4 * tile), acc.name(4 * tile + 1), acc.name(4 * tile + 2), acc.name(4 * tile + 3)));
    gpu_asm!(
        "mul.f32 {a}, {a}, {e}; mul.f32 {b}, {b}, {o}; mul.f32 {c}, {c}, {e}; mul.f32 {d}, {d}, {o};",
        e = in(_) even * 1.0f32, o = in(_) odd * 1.0f32, options(nomem)
    );
}

/// Multiplies register `i`.
#[cube]
pub fn scale(#[comptime] acc: Acc, #[comptime] i: usize, factor: f32) {
    let name = comptime!(acc.name);
    gpu_asm!("mul.f32 {name}{i}, {name}{i}, {f};", f = in(_) factor * 1.0f32, options(nomem));
}

/// Rounds two numbers to bf16 and puts them into register `i` of a fragment, `low` at the lower column.
#[cube]
pub fn pack(#[comptime] frag: Frag, #[comptime] i: usize, low: f32, high: f32) {
    let name = comptime!(frag.name);
    gpu_asm!("cvt.rn.bf16x2.f32 {name}{i}, {hi}, {lo};", hi = in(_) high * 1.0f32, lo = in(_) low * 1.0f32, options(nomem));
}

/// Sets register `i` of a fragment to a word of two bf16.
#[cube]
pub fn put(#[comptime] frag: Frag, #[comptime] i: usize, word: u32) {
    let name = comptime!(frag.name);
    gpu_asm!("mov.b32 {name}{i}, {w};", w = in(_) word + 0u32, options(nomem));
}

/// The word in register `i` of a fragment.
#[cube]
pub fn word(#[comptime] frag: Frag, #[comptime] i: usize) -> u32 {
    let name = comptime!(frag.name);
    let out: u32;
    gpu_asm!("mov.b32 {d}, {name}{i};", d = out(_) out, options(nomem));
    out + 0u32
}

/// Rounds 16 columns of an accumulator to bf16, as step `step` of a left operand.
#[cube]
pub fn pack_step(#[comptime] frag: Frag, #[comptime] step: usize, #[comptime] acc: Acc, #[comptime] columns: usize) {
    let to = comptime!(frag.name);
    let from = comptime!(acc.name);
    #[unroll]
    for i in 0..4usize {
        let register = comptime!(4 * step + i);
        let low = comptime!(8 * columns + 2 * i);
        let high = comptime!(8 * columns + 2 * i + 1);
        gpu_asm!("cvt.rn.bf16x2.f32 {to}{register}, {from}{high}, {from}{low};", options(nomem));
    }
}

/// Two numbers rounded to bf16, `low` in the low half of the word.
#[cube]
pub fn pack_word(low: f32, high: f32) -> u32 {
    let out: u32;
    gpu_asm!("cvt.rn.bf16x2.f32 {d}, {hi}, {lo};", d = out(_) out, hi = in(_) high * 1.0f32, lo = in(_) low * 1.0f32, options(nomem));
    out + 0u32
}

/// Two numbers rounded to f16, `low` in the low half of the word.
#[cube]
pub fn pack_half_word(low: f32, high: f32) -> u32 {
    let out: u32;
    gpu_asm!("cvt.rn.f16x2.f32 {d}, {hi}, {lo};", d = out(_) out, hi = in(_) high * 1.0f32, lo = in(_) low * 1.0f32, options(nomem));
    out + 0u32
}

/// Registers `i` and `i + 1` of an accumulator rounded to bf16, the first in the low half.
#[cube]
pub fn pack_pair(#[comptime] acc: Acc, #[comptime] i: usize) -> u32 {
    let name = comptime!(acc.name);
    let next = comptime!(i + 1);
    let out: u32;
    gpu_asm!("cvt.rn.bf16x2.f32 {d}, {name}{next}, {name}{i};", d = out(_) out, options(nomem));
    out + 0u32
}

/// Stores columns `8 · tile` to `8 · tile + 7` of an accumulator, rounded to bf16: those of a unit's upper row at `address`,
/// of its lower row, eight rows of 128 bytes on, 1024 bytes later. `offset` is added to both.
#[cube]
pub fn store_columns(#[comptime] acc: Acc, #[comptime] tile: usize, address: u32, #[comptime] offset: u32) {
    let (a, b, c, d) =
        comptime!((acc.name(4 * tile), acc.name(4 * tile + 1), acc.name(4 * tile + 2), acc.name(4 * tile + 3)));
    let below = comptime!(offset + 1024);
    gpu_asm!(
        "{{ .reg .b32 w; cvt.rn.bf16x2.f32 w, {b}, {a}; st.shared.b32 [{at} + {offset}], w; cvt.rn.bf16x2.f32 w, {d}, {c}; st.shared.b32 [{at} + {below}], w; }}",
        at = in(_) address + 0u32
    );
}
