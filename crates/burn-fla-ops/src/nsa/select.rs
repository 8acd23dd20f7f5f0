//! Which blocks a query attends to.
//!
//! The blocks are sorted by weight in a bitonic network over tiles as wide as a block has tokens. Where all three
//! preferred blocks are among those taken, the network is a sort like any other, for equal weights among the rest are an
//! accident. Where only one or two are taken, the preferred blocks tie at the cut, and which of them is taken follows from
//! the network alone: the other weights, all smaller, have no say.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// A column of the network: the weight of a block and its number; −1 where there is no block.
pub type Column = (f64, i64);

/// The column of block `block` for a query in block `current`: a preferred block has the largest weight there is.
fn column(block: usize, current: usize, weight: &impl Fn(usize) -> f64) -> Column {
    let preferred = block == 0 || block == current || block + 1 == current;
    match block <= current {
        true if preferred => (f64::INFINITY, block as i64),
        true => (weight(block), block as i64),
        false => (0.0, -1),
    }
}

/// Compares over halving distances from `2^(stage − 1)`; `down` tells the direction at a column. A comparison downwards
/// swaps equal columns, one upwards does not.
fn merge(columns: &mut [Column], stage: u32, down: impl Fn(usize) -> bool) {
    for distance in (0..stage).rev().map(|bit| 1 << bit) {
        for a in (0..columns.len()).filter(|a| a & distance == 0) {
            if (columns[a].0 > columns[a + distance].0) != down(a) {
                columns.swap(a, a + distance);
            }
        }
    }
}

/// The first `take` blocks of the network for a query in block `current`, best first; `weight` tells the weight of a
/// block that is neither preferred nor later. −1 where the blocks do not suffice.
pub fn network(current: usize, tile: usize, take: usize, weight: impl Fn(usize) -> f64) -> Vec<i64> {
    let stages = tile.trailing_zeros();
    let mut running: Vec<Column> = Vec::new();
    for start in (0..=current).step_by(tile) {
        let mut columns: Vec<Column> = (start..start + tile).map(|block| column(block, current, &weight)).collect();
        for stage in 1..stages {
            merge(&mut columns, stage, |a| a & (1 << stage) != 0);
        }
        if start > 0 {
            merge(&mut columns, stages, |_| false);
            columns[..tile / 2].copy_from_slice(&running[..tile / 2]);
        }
        merge(&mut columns, stages, |_| true);
        running = columns;
    }
    running.into_iter().take(take).map(|(_, block)| block).collect()
}

/// 1 for the chosen blocks of each query, and of those the ones through which keys and values get gradients.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// `[1 or B, 1 or G, T, C]`
    pub(crate) chosen: Tensor<4>,
    /// As `chosen`; `None`: the same.
    pub(crate) with_gradient: Option<Tensor<4>>,
}

/// Chooses `counts` blocks, rounded up, for queries at the places from `first` on.
///
/// `weights` `[B, G, T, C]`: the weight of each block for each query and key head, without gradient.
pub(crate) fn select(weights: Tensor<4>, first: usize, block_size: usize, counts: usize) -> Selection {
    let [_, _, t, blocks] = weights.dims();
    let take = counts.next_power_of_two();
    let device = weights.device();
    let current = |i: usize| (first + i) / block_size;
    if take <= 2 {
        let mut chosen = vec![0f32; t * blocks];
        let mut last: Option<(usize, Vec<i64>)> = None;
        for i in 0..t {
            let at = current(i);
            if last.as_ref().is_none_or(|(known, _)| *known != at) {
                last = Some((at, network(at, block_size, take, |_| 0.0)));
            }
            for block in last.iter().flat_map(|(_, blocks)| blocks).filter(|block| **block >= 0) {
                chosen[i * blocks + *block as usize] = 1.0;
            }
        }
        return Selection { chosen: table(chosen, t, blocks, &device).cast(weights.dtype()), with_gradient: None };
    }
    let flags = |rule: &dyn Fn(usize, usize) -> bool| {
        let flags = (0..t).flat_map(|i| (0..blocks).map(move |block| (current(i), block)));
        let flags: Vec<f32> = flags.map(|(at, block)| f32::from(u8::from(rule(at, block)))).collect();
        table(flags, t, blocks, &device).cast(weights.dtype())
    };
    let preferred = flags(&|at, block| block == 0 || block == at || block + 1 == at);
    let candidate = flags(&|at, block| block > 0 && block + 1 < at);
    // Weights are at least zero, so −1 is below all.
    let mut left = (weights.clone() + 1.0) * candidate - 1.0;
    let columns = Tensor::<1, Int>::arange(0..blocks as i64, &device).reshape([1, 1, 1, blocks]);
    let mut chosen = preferred.clone().expand(weights.dims());
    let mut with_gradient = None;
    for pick in 3..take {
        if pick == counts {
            with_gradient = Some(chosen.clone());
        }
        let (best, index) = left.clone().max_dim_with_indices(3);
        let here = columns.clone().expand(weights.dims()).equal(index.expand(weights.dims()));
        // Where no candidate is left, none is taken.
        let taken = here.float().cast(weights.dtype()) * best.greater_equal_elem(0.0).float().cast(weights.dtype());
        left = left * (taken.clone().neg() + 1.0) - taken.clone();
        chosen = chosen + taken;
    }
    Selection { chosen, with_gradient }
}

fn table(values: Vec<f32>, t: usize, blocks: usize, device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values, [1, 1, t, blocks]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_are_those_that_the_network_leaves() {
        // As the kernels that trained checkpoints leave them, for 10 successive current blocks.
        let expected: [&[i64]; 10] =
            [&[0], &[0, 1], &[1, 2], &[2, 3], &[0, 3], &[0, 5], &[0, 5], &[0, 6], &[0, 7], &[0, 9]];
        for tile in [16, 32, 64] {
            for (current, expected) in expected.iter().enumerate() {
                for weight in [0.0, 0.9] {
                    let mut found = network(current, tile, 2, |block| weight / (block + 1) as f64);
                    found.retain(|block| *block >= 0);
                    found.sort_unstable();
                    assert_eq!(&found, expected, "tile {tile}, current block {current}");
                }
            }
        }
    }

    #[test]
    fn the_network_sorts() {
        for (current, tile) in [(7, 8), (15, 16), (15, 8), (40, 8), (33, 32)] {
            let weight = |block: usize| ((block * 37 + 11) % 41) as f64;
            let found = network(current, tile, 4, weight);
            let mut rest: Vec<usize> = (1..current - 1).collect();
            rest.sort_by(|a, b| weight(*b).total_cmp(&weight(*a)));
            let mut preferred = found[..3].to_vec();
            preferred.sort_unstable();
            assert_eq!(preferred, [0, current as i64 - 1, current as i64]);
            assert_eq!(found[3], rest[0] as i64);
        }
    }
}
