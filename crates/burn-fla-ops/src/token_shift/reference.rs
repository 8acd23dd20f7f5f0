//! The token shift in plain tensor operations: a concatenation and a difference.

use burn::tensor::{Int, Tensor, TensorData};

use crate::CuSeqlens;

/// `δ_t = x_{t−1} − x_t` and the last token of each sequence.
///
/// Shapes as [`token_shift`](crate::token_shift()), with at least one token; `initial` is `[N, D]` in `x`'s dtype.
pub fn token_shift(x: Tensor<3>, initial: Tensor<2>, packed: Option<&CuSeqlens>) -> (Tensor<3>, Tensor<2>) {
    let [b, t, d] = x.dims();
    let Some(packed) = packed else {
        let last = x.clone().narrow(1, t - 1, 1).reshape([b, d]);
        let shifted = Tensor::cat(vec![initial.reshape([b, 1, d]), x.clone()], 1).narrow(1, 0, t);
        return (shifted - x, last);
    };
    // The initial tokens stand in front of the row, and each token takes the one before it from there.
    let n = packed.num_sequences();
    let rows = Tensor::cat(vec![initial.reshape([1, n, d]), x.clone()], 1);
    let (before, last) = predecessors(packed);
    let device = x.device().inner();
    let indices = |list: Vec<i32>| {
        let count = list.len();
        Tensor::<1, Int>::from_data(TensorData::new(list, [count]), &device)
    };
    let shifted = rows.clone().select(1, indices(before));
    (shifted - x, rows.select(1, indices(last)).reshape([n, d]))
}

/// In a row of the `N` initial tokens followed by the packed ones: where the token before each token stands, and the
/// last one of each sequence.
fn predecessors(packed: &CuSeqlens) -> (Vec<i32>, Vec<i32>) {
    let n = packed.num_sequences();
    let mut before = Vec::with_capacity(packed.total());
    let mut last = Vec::with_capacity(n);
    for (i, window) in packed.offsets().windows(2).enumerate() {
        let mut previous = i;
        for token in window[0]..window[1] {
            before.push(previous as i32);
            previous = n + token;
        }
        last.push(previous as i32);
    }
    (before, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_finds_the_one_before() {
        let packed = CuSeqlens::new(vec![0, 1, 1, 4]).unwrap();
        let (before, last) = predecessors(&packed);
        assert_eq!(before, [0, 2, 4, 5]);
        assert_eq!(last, [3, 1, 6]);
    }
}
