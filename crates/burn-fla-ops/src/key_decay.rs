//! The scores of a chunk under a decay for each key channel, which several references share.

use burn::tensor::{DType, Device, Int, Tensor};

use crate::chunked::running_sum;
use crate::matmul::product;

/// Rows of a sub-block whose decays are taken pair by pair in the exact form.
pub(crate) const SUB_BLOCK: usize = 16;

/// The sum of log decays over a chunk down to which the factored form of the scores is used.
///
/// It multiplies rows by `e^{G − R}` and columns by `e^{R − G}`, `R` the sum in the middle of the chunk: exponents reach
/// at most 60 in magnitude, and what leaves f32 could stand in the masked triangle alone, where each factor is still
/// finite. Below that the exact form takes over, whose exponents are never positive.
pub(crate) const FACTORED_DOWN_TO: f64 = -60.0;

/// Which columns a row reads, and with it the decay between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// The state after the update: columns `j ≤ i`, decayed by `e^{G_i − G_j}`.
    Updated,
    /// The state before decay and update: columns `j < i`, decayed by `e^{G_{i−1} − G_j}`.
    Previous,
}

/// The decays inside each chunk: `G` is their running sum, `[B·H, n, C, K]`.
pub(crate) struct KeyDecay {
    /// `G_i`.
    updated: Tensor<4>,
    /// `G_{i−1}`, 0 in the first row.
    previous: Tensor<4>,
    /// `G` in the middle of the chunk where the factored form may be used. Any reference gives the same scores: it
    /// carries no gradient.
    middle: Option<Tensor<4>>,
}

impl KeyDecay {
    /// From log decays in chunks, `[B·H, n, C, K]`.
    pub(crate) fn new(log_decay: Tensor<4>) -> Self {
        Self::from_sum(running_sum(log_decay))
    }

    /// From their running sums.
    pub(crate) fn from_sum(updated: Tensor<4>) -> Self {
        let [bh, n, c, d] = updated.dims();
        let zeros = Tensor::zeros([bh, n, 1, d], (&updated.device(), updated.dtype()));
        // Shifted, not subtracted: G_{i−1} here is to the last bit the G of the row before, and their difference 0.
        let previous = Tensor::cat(vec![zeros, updated.clone()], 2).narrow(2, 0, c);
        // A look at the data, not at the clock: it costs a read of one number, and both forms give the same answer.
        let lowest = updated.clone().inner().narrow(2, c - 1, 1).min().into_scalar::<f64>();
        let middle = (lowest >= FACTORED_DOWN_TO).then(|| updated.clone().narrow(2, c / 2, 1).detach());
        Self { updated, previous, middle }
    }

    /// The sum before a row's read: `G_i` or `G_{i−1}`.
    pub(crate) fn sum(&self, reads: Reads) -> Tensor<4> {
        match reads {
            Reads::Updated => self.updated.clone(),
            Reads::Previous => self.previous.clone(),
        }
    }

    /// The sum over the chunk, `[B·H, n, 1, K]`.
    pub(crate) fn last(&self) -> Tensor<4> {
        self.updated.clone().narrow(2, self.updated.dims()[2] - 1, 1)
    }

    /// What remains of each row's update at the end of the chunk: `e^{G_last − G_i}`.
    pub(crate) fn to_the_end(&self) -> Tensor<4> {
        (self.last() - self.updated.clone()).exp()
    }

    /// `A_ij = Σ_c x_ic y_jc e^{R_ic − G_jc}`, `R` and the columns as `reads` says; 0 elsewhere. `[B·H, n, C, C]`.
    pub(crate) fn scores(&self, x: &Tensor<4>, y: &Tensor<4>, reads: Reads) -> Tensor<4> {
        match &self.middle {
            Some(middle) => self.factored(x, y, reads, middle),
            None => self.exact(x, y, reads),
        }
    }

    /// `A` as one product of factors around the middle of the chunk.
    fn factored(&self, x: &Tensor<4>, y: &Tensor<4>, reads: Reads, middle: &Tensor<4>) -> Tensor<4> {
        let [bh, n, c, _] = x.dims();
        let rows = x.clone() * (self.sum(reads) - middle.clone()).exp();
        let columns = y.clone() * (middle.clone() - self.updated.clone()).exp();
        // By selection: what stands in the other triangle may be huge.
        let unread = unread(c, reads, &x.device()).reshape([1, 1, c, c]).expand([bh, n, c, c]);
        product(rows, columns.swap_dims(2, 3)).mask_fill(unread, 0.0)
    }

    /// `A` in blocks of 16 rows with no exponent above zero: towards earlier blocks by factors around the block's start,
    /// inside the block pair by pair.
    fn exact(&self, x: &Tensor<4>, y: &Tensor<4>, reads: Reads) -> Tensor<4> {
        let [bh, n, c, d] = x.dims();
        let (device, dtype) = (x.device(), x.dtype());
        let sum = self.sum(reads);
        let mut rows = Vec::new();
        for start in (0..c).step_by(SUB_BLOCK) {
            let size = SUB_BLOCK.min(c - start);
            let x_a = x.clone().narrow(2, start, size);
            let row_sum = sum.clone().narrow(2, start, size);
            let mut parts = Vec::new();
            if start > 0 {
                // The sum just before the block: both exponents are at most zero.
                let reference = self.updated.clone().narrow(2, start - 1, 1);
                let before = self.updated.clone().narrow(2, 0, start);
                let columns = y.clone().narrow(2, 0, start) * (reference.clone() - before).exp();
                let block = x_a.clone() * (row_sum.clone() - reference).exp();
                parts.push(product(block, columns.swap_dims(2, 3)));
            }
            let pairs = [bh, n * size, size, d];
            let by_row = |x: Tensor<4>| x.reshape([bh, n * size, 1, d]).expand(pairs);
            let by_column = |x: Tensor<4>| {
                let x = x.reshape([bh * n, 1, size, d]).expand([bh * n, size, size, d]);
                x.reshape(pairs)
            };
            let read = read(size, reads, &device, dtype).reshape([1, size, size, 1]);
            let read = read.expand([n, size, size, 1]).reshape([1, n * size, size, 1]);
            // The exponent is set to zero where nothing is read before the exponential, the product after it.
            let column_sum = self.updated.clone().narrow(2, start, size);
            let exponent = (by_row(row_sum) - by_column(column_sum)) * read.clone();
            let pairs = by_row(x_a) * by_column(y.clone().narrow(2, start, size));
            let inside = (pairs * exponent.exp() * read).sum_dim(3);
            parts.push(inside.reshape([bh, n, size, size]));
            if start + size < c {
                parts.push(Tensor::zeros([bh, n, size, c - start - size], (&device, dtype)));
            }
            rows.push(Tensor::cat(parts, 3));
        }
        Tensor::cat(rows, 2)
    }
}

/// Whether row `i` does not read column `j`, `[C, C]`.
fn unread(size: usize, reads: Reads, device: &Device) -> Tensor<2, burn::tensor::Bool> {
    let rows = Tensor::<1, Int>::arange(0..size as i64, device).reshape([size, 1]).expand([size, size]);
    let columns = Tensor::<1, Int>::arange(0..size as i64, device).reshape([1, size]).expand([size, size]);
    match reads {
        Reads::Updated => rows.lower(columns),
        Reads::Previous => rows.lower_equal(columns),
    }
}

/// 1 where row `i` reads column `j`, 0 elsewhere, `[C, C]`.
fn read(size: usize, reads: Reads, device: &Device, dtype: DType) -> Tensor<2> {
    unread(size, reads, device).bool_not().float().cast(dtype)
}
