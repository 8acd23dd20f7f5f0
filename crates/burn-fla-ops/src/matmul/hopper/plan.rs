//! What a product is specialised on, and how it is chosen: no tuning at run time, no shape that waits.

use super::epilogue::Epilogue;

/// Rows of a tile: 64 for each of two warpgroups.
pub(in crate::matmul) const ROWS: usize = 128;
/// Contraction of a stage.
pub(in crate::matmul) const DEPTH: usize = 64;
/// Elements of a vector of the kernel that adds up.
pub(in crate::matmul) const VECTOR: usize = 4;
/// Bytes of a panel row, which is the width of the swizzle.
const PANEL: usize = 128;
/// Bytes in which one warpgroup stages its outputs: two panels of 64 rows.
pub(in crate::matmul) const STAGING: usize = 2 * 64 * PANEL;
/// Bytes of shared memory for operands: what is left of 227 KiB beside outputs and barriers.
const OPERANDS: usize = 196_608;

/// Multiply-adds of one processor's tensor cores in a clock.
const RATE: f64 = 2048.0 * 0.9;

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::matmul) struct Plan {
    /// The left operand is stored with the contraction along its rows.
    pub(in crate::matmul) a_rows: bool,
    /// The right operand is stored with the contraction along its rows.
    pub(in crate::matmul) b_rows: bool,
    /// Columns of a tile, 128 or 256.
    pub(in crate::matmul) columns: usize,
    /// Parts into which the contraction is cut, each with an f32 result of its own that a second kernel adds up.
    pub(in crate::matmul) splits: usize,
    /// Whether tiles are written as f32.
    pub(in crate::matmul) f32_out: bool,
    /// Whether the product is added to what is there, in f32.
    pub(in crate::matmul) add: bool,
    /// Pairs of operands.
    pub(in crate::matmul) pairs: usize,
    /// Whether the products of all pairs are added up, as one contraction over all of them; else each is a result.
    pub(in crate::matmul) joined: bool,
    /// What is done to a product before it is rounded.
    pub(in crate::matmul) epilogue: Epilogue,
}

impl Plan {
    /// Matrices that come out.
    pub(in crate::matmul) fn results(&self) -> usize {
        if self.joined { 1 } else { self.pairs }
    }

    /// Stages that fit.
    pub(in crate::matmul) fn stages(&self) -> usize {
        OPERANDS / self.stage_bytes()
    }

    /// Bytes a stage.
    pub(in crate::matmul) fn stage_bytes(&self) -> usize {
        (ROWS + self.columns) * DEPTH * 2
    }

    /// Columns of an output panel.
    pub(in crate::matmul) fn panel_columns(&self) -> usize {
        if self.f32_out { PANEL / 4 } else { PANEL / 2 }
    }

    /// Whether tiles are added to the result: split contractions are added up elsewhere, in their order.
    pub(in crate::matmul) fn adds_tiles(&self) -> bool {
        self.add && self.splits == 1
    }

    /// What is done to a tile before it is written: with a split contraction, what adds the parts up does it.
    pub(in crate::matmul) fn tile_epilogue(&self) -> Epilogue {
        if self.splits == 1 { self.epilogue } else { Epilogue::default() }
    }

    /// What the kernel of the tiles is specialised on: not what is done to the sum of parts after it, nor how many there are.
    pub(in crate::matmul) fn of_tiles(&self) -> Self {
        Self { splits: 1, add: self.adds_tiles(), epilogue: self.tile_epilogue(), ..*self }
    }

    /// The plan that takes the least time by a count of clocks, for results of `sizes` that contract `steps` stages each.
    pub(in crate::matmul) fn choose(
        sizes: &[[usize; 2]],
        steps: usize,
        rows: [bool; 2],
        f32_out: bool,
        processors: usize,
    ) -> Self {
        let mut best: Option<(f64, Self)> = None;
        for columns in [256, 128] {
            let tiles: usize = sizes.iter().map(|[m, n]| m.div_ceil(ROWS) * n.div_ceil(columns)).sum();
            for splits in [1, 2, 3, 4, 6, 8, 12, 16] {
                if splits > steps {
                    continue;
                }
                let plan = Self::cut(sizes.len(), rows, columns, splits, f32_out);
                let clocks = plan.clocks(sizes, steps, (tiles * splits).div_ceil(processors), RATE);
                if best.is_none_or(|(least, _)| clocks < least) {
                    best = Some((clocks, plan));
                }
            }
        }
        best.expect("an item is one step at least").1
    }

    /// A plan for `pairs` results, with tiles of so many columns and contractions in so many parts.
    pub(in crate::matmul) fn cut(pairs: usize, rows: [bool; 2], columns: usize, splits: usize, f32_out: bool) -> Self {
        let f32_out = f32_out || splits > 1;
        Self {
            a_rows: rows[0],
            b_rows: rows[1],
            columns,
            splits,
            f32_out,
            add: false,
            pairs,
            joined: false,
            epilogue: Epilogue::default(),
        }
    }

    /// An estimate of the clocks that `waves` rounds of items take, and the second kernel after them. `rate`: multiply-adds of
    /// one processor's tensor cores in a clock.
    pub(in crate::matmul) fn clocks(&self, sizes: &[[usize; 2]], steps: usize, waves: usize, rate: f64) -> f64 {
        /// Filling the ring for the first time, and the start of the kernel.
        const START: f64 = 2500.0;
        /// A second kernel: its start, and the bytes that it moves in a clock while they are in L2.
        const SECOND: f64 = 5000.0;
        const BYTES: f64 = 2000.0;
        let Self { columns, splits, .. } = *self;
        // A narrow tile reads more for each product.
        let narrow = if columns == 128 { 1.15 } else { 1.0 };
        let step = (ROWS * columns * DEPTH) as f64 / rate * narrow;
        let epilogue = (ROWS * columns) as f64 / 32.0 * if self.f32_out { 2.0 } else { 1.0 } * 0.7;
        let item = steps.div_ceil(splits) as f64 * step + epilogue;
        let numbers: usize = sizes.iter().map(|[m, n]| m * n).sum();
        let second = if splits > 1 { SECOND + (numbers * (4 * splits + 4)) as f64 / BYTES } else { 0.0 };
        START + waves as f64 * item + second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(m: usize, n: usize, k: usize) -> Plan {
        Plan::choose(&[[m, n]], k.div_ceil(DEPTH), [false, false], false, 132)
    }

    #[test]
    fn few_tiles_are_split_and_many_are_not() {
        assert_eq!(plan(8192, 8192, 8192).splits, 1);
        assert_eq!(plan(16384, 1024, 1024).splits, 1);
        assert!(plan(1024, 1024, 16384).splits >= 2);
        assert!(plan(512, 1024, 65536).splits >= 4);
    }

    #[test]
    fn no_part_is_empty_and_operands_fit() {
        for k in [8, 64, 72, 200, 1024] {
            for m in [1, 100, 4096] {
                let plan = plan(m, 64, k);
                assert!(plan.splits <= k.div_ceil(DEPTH));
                assert!(plan.stages() >= 4);
            }
        }
    }
}
