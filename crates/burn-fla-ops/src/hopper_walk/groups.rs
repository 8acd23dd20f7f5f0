//! The gradients of queries and keys that several heads share.

use burn::tensor::DType;
use cubecl::prelude::*;

use super::launch::{HopperWalk, SCAN_UNITS};
use super::plan::KeyHeads;
use crate::bridge::{CubeTensor, alloc};
use crate::tile::hopper::{bf16_high, bf16_low, pack_word, words};

/// Sums `[tokens, H, words]` over the heads that share one of `count`, two channels a word: one unit a word of the sum,
/// `[tokens, count, words]`.
#[cube(launch)]
pub(super) fn sum_heads(
    x: &[u32],
    out: &mut [u32],
    total: u32,
    heads: u32,
    count: u32,
    #[comptime] words: u32,
    #[comptime] tiled: bool,
) {
    let at = ABSOLUTE_POS as u32;
    if at >= total {
        terminate!();
    }
    let word = at % words;
    let group = (at / words) % count;
    let token = at / words / count;
    let each = heads / count;
    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    for i in 0..each {
        let head = if comptime!(tiled) { group + i * count } else { group * each + i };
        let found = x[((token * heads + head) * words + word) as usize];
        low += bf16_low(found);
        high += bf16_high(found);
    }
    out[at as usize] = pack_word(low, high);
}

impl HopperWalk {
    /// The sum of a gradient over the heads that share a tensor like `like`.
    pub(super) fn over_groups(&self, x: CubeTensor, like: &CubeTensor) -> CubeTensor {
        let (count, tiled) = match self.key_heads {
            KeyHeads::Own => return x,
            KeyHeads::Contiguous(count) => (count, false),
            KeyHeads::Tiled(count) => (count, true),
        };
        let out = alloc(like, like.meta.shape().dims::<4>(), DType::BF16);
        let total = self.tokens * count * self.keys / 2;
        sum_heads::launch(
            &x.client,
            CubeCount::new_1d(total.div_ceil(SCAN_UNITS) as u32),
            CubeDim::new_1d(SCAN_UNITS as u32),
            words(&x),
            words(&out),
            total as u32,
            self.heads as u32,
            count as u32,
            self.keys as u32 / 2,
            tiled,
        );
        out
    }
}
