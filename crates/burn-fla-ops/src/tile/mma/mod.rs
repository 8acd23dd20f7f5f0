//! The vocabulary of kernels on the tensor cores of NVIDIA GPUs since Ampere (compute capability 8.0): products of a warp
//! (`mma.sync`), operands from swizzled tiles (`ldmatrix`), and copies to shared memory that run beside it (`cp.async`).
//!
//! - **Tiles** are those of [`super::hopper`]: panels of 64 bf16 columns, rows of 128 bytes, in the 128-byte swizzle, named
//!   by their address in shared memory.
//! - **Accumulators** ([`Acc`]) and operands ([`Frag`]) are registers with names. A step of a [`Frag`] is 16 × 16 numbers:
//!   a left operand of 16 rows, or two right operands of 8 columns, for a contraction of 16.
//! - **Addresses.** A [`load`] takes one address a lane. [`down_first`] and [`across_first`] give them for the step at a
//!   tile's first row and column; for the step `16 r` rows down and `16 c` columns on, take the exclusive or with `32 c` (for
//!   `c < 4`, in the panel) and an offset of `2048 r`:
//!
//! | operand | stored as | lanes |
//! |---|---|---|
//! | left | rows × contraction | [`down_first`] |
//! | left, transposed | contraction × rows | [`across_first`] |
//! | right | columns × contraction | [`across_first`] |
//! | right, transposed | contraction × columns | [`down_first`] |

mod copy;
mod product;
mod store;

pub use super::global::{
    address_again, address_of, address_of_mut, load_global_four, prefetch, store_global_four, unit_again,
};
pub use super::layout::{bf16_high, bf16_low, exp2, f16_high, f16_low, load_u32, store_u32, swizzled};
pub use super::registers::{
    Acc, Frag, column_of, declare, declare_fragment, pack, pack_half_word, pack_pair, pack_step, pack_word, read,
    row_of, scale, word, write, zero,
};
pub use copy::{commit_copies, copy_16, store_global_pair, wait_copies};
pub use product::{across_first, down_first, load, multiply, multiply_split, split, transpose};
pub use store::{RowPair, store_rows, store_rows_f32};

/// The lowest compute capability that has these instructions, times ten.
const CAPABILITY: u32 = 80;

/// Whether this device has what this module needs.
pub fn supported(client: &cubecl::prelude::Client) -> bool {
    let found = &client.properties().identity.fingerprint;
    let digits = found.strip_prefix("ptx_sm").map(|rest| rest.trim_end_matches(|c: char| !c.is_ascii_digit()));
    digits.and_then(|digits| digits.parse::<u32>().ok()).is_some_and(|found| found >= CAPABILITY)
}
