//! The vocabulary of kernels for Hopper (compute capability 9.0): tensor memory copies, barriers in shared memory, and
//! products of a warpgroup (`wgmma`) whose accumulators are registers with names.
//!
//! CubeCL has no words for these, so each is one block of inline PTX; an operator's kernel calls them by their meaning.
//!
//! - **Tiles.** An operand tile is `rows` × 64 bf16: rows of 128 bytes, in the 128-byte swizzle that tensor maps write
//!   and `wgmma` reads. A wider tile is several such panels, one after the other, `rows · 128` bytes each. A tile is named
//!   by its address in shared memory, a multiple of 1024.
//! - **Accumulators** ([`Acc`]) are declared once, at the top of a kernel, and then named by every block that uses them:
//!   the compiler allocates them like other registers, and a product stays in flight between blocks.
//! - **Rings** ([`Ring`]): a producer fills stages, consumers release them; two barriers a stage.
//!
//! Two rules of `gpu_asm!` that are easy to break: an operand that is a `let mut` variable goes in as its *address*, so
//! the functions here copy what they are given; and an operand must be named in the text.

// For each public function `#[cube]` makes a public module, which cannot be given a comment.
#![allow(missing_docs)]

mod copy;
mod ring;
mod roles;
mod triangle;
mod wgmma;

pub use super::global::{address_of, address_of_mut, load_global, load_global_pair, store_global, unit_again};
pub use super::layout::{
    bf16_high, bf16_low, exp2, f16_high, f16_low, load_f32, load_f32_four, load_f32_pair, load_transposed, load_u32,
    load_u32_four, reciprocal, store_f32, store_f32_pair, store_transposed, store_u32, store_u32_four, swizzled,
};
pub use super::registers::{
    Acc, Frag, column_of, declare, declare_fragment, next, pack, pack_half_word, pack_pair, pack_word, put, read,
    row_of, scale, scale_columns, scale_rows, store_columns, word, write, zero,
};
pub use copy::{
    add_3d, commit_stores, fence_shared, fetch, load_2d, load_3d, panel_map, readable, store_3d, wait_stores,
    wait_stores_read, words,
};
pub use ring::{Ring, barrier_arrive, barrier_expect, barrier_fence, barrier_init, barrier_wait};
pub use roles::{arrive, give_registers, sync_warpgroup, take_registers, warpgroup};
pub use triangle::{TRIANGLE_COLUMN, TRIANGLE_ROW, declare_triangle, invert_triangle, invert_triangle_by};
pub use wgmma::{commit, fence, k_major, mma_registers, mma_shared, mn_major, wait};

/// Whether this device has what this module needs: the instructions of `sm_90a` exist on compute capability 9.0 alone.
pub fn supported(client: &cubecl::prelude::Client) -> bool {
    let properties = client.properties();
    properties.identity.fingerprint == "ptx_sm90" && !properties.features.tma.is_empty()
}
