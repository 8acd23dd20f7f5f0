//! The inverse of unit lower triangular matrices, which the delta rule needs in every chunk.

use burn::tensor::{Int, Tensor, TensorData};

use crate::OpError;
use crate::arguments::activation;
use crate::chunked::compute_dtype;
use crate::matmul::product;

/// `(I + A)⁻¹` for strictly lower triangular `A`, many at once.
///
/// The inverse is built from blocks of doubling size `s`: from the inverses `X` of the diagonal blocks of size `s`, those
/// of size `2s` are `X − X A_s X`, where `A_s` holds the entries of `A` between the two halves of each block. This is
/// substitution by blocks, as accurate as substitution by rows, in `2 log₂ C` products; the power series
/// `Π (I + (−A)^{2^i})` takes as many, but its terms grow like binomials and cancel.
///
/// That is computed without a graph. What is differentiated is one step of Newton's iteration from there,
/// `X − X ((I + A) X − I)`: at the inverse its derivative is that of the inverse, `−X dA X`, so a backward pass keeps two
/// matrices and not two for each doubling, and the step removes the rounding of the doublings besides.
///
/// # Shapes
/// - `a`: `[…, C, C]` in four dimensions, f32, bf16 or f64; what stands on and above the diagonal is not read
/// - returns the inverses, `[…, C, C]`, f32 (f64 for f64)
///
/// # Gradients
/// With respect to `a`, zero on and above the diagonal.
///
/// # Errors
/// [`OpError`] where the matrices are not square, or of another dtype.
pub fn inverse(a: Tensor<4>) -> Result<Tensor<4>, OpError> {
    const OP: &str = "triangular::inverse";
    activation(OP, "a", &a)?;
    let [rows, columns] = [a.dims()[2], a.dims()[3]];
    if rows != columns {
        return Err(OpError::Shape {
            op: OP,
            argument: "a",
            found: a.dims().to_vec(),
            expected: "[…, C, C], square matrices,".into(),
        });
    }
    let dtype = compute_dtype(a.dtype());
    Ok(unchecked(a.cast(dtype)))
}

/// Rows of a block of [`solve`].
const BLOCK: usize = 16;

/// `(I + A)⁻¹ R` for strictly lower triangular `A` `[…, C, C]` and `R` `[…, C, D]`, f32 or f64: substitution over blocks of
/// 16 rows, whose diagonal parts are inverted all at once.
///
/// Where keys repeat and β is near 2 the inverse itself is a difference of numbers a thousand times larger. What
/// substitution adds up is as large as the solution: logits of a model of two such layers, β = 2 throughout, were off by
/// 6e-4 in f32 with the inverse multiplied out at C = 64, and are off by 2e-4 this way.
pub(crate) fn solve(a: Tensor<4>, r: Tensor<4>) -> Tensor<4> {
    let [batch, chunks, size, _] = a.dims();
    let width = r.dims()[3];
    if size <= BLOCK {
        return product(diagonal_inverse(a), r);
    }
    // The last block is filled up with rows of zeros: their part of I + A is I.
    let blocks = size.div_ceil(BLOCK);
    let missing = blocks * BLOCK - size;
    let a = a.tril(-1);
    let diagonal = (0..blocks).map(|block| {
        let start = block * BLOCK;
        let rows = BLOCK.min(size - start);
        let part = a.clone().narrow(2, start, rows).narrow(3, start, rows);
        if block + 1 < blocks || missing == 0 { part } else { pad(part, missing) }
    });
    let inverses = diagonal_inverse(Tensor::cat(diagonal.collect(), 1));
    let mut solved: Vec<Tensor<4>> = Vec::with_capacity(blocks);
    for block in 0..blocks {
        let start = block * BLOCK;
        let rows = BLOCK.min(size - start);
        let mut right = r.clone().narrow(2, start, rows);
        if block > 0 {
            let earlier = a.clone().narrow(2, start, rows).narrow(3, 0, start);
            right = right - product(earlier, Tensor::cat(solved.clone(), 2));
        }
        let inverse = inverses.clone().narrow(1, block * chunks, chunks);
        let inverse = if rows < BLOCK { inverse.narrow(2, 0, rows).narrow(3, 0, rows) } else { inverse };
        solved.push(product(inverse, right));
    }
    Tensor::cat(solved, 2).reshape([batch, chunks, size, width])
}

/// `[…, C, C]` with `missing` rows and columns of zeros behind the last.
fn pad(x: Tensor<4>, missing: usize) -> Tensor<4> {
    let [batch, chunks, size, _] = x.dims();
    let zeros = |rows, columns| Tensor::zeros([batch, chunks, rows, columns], (&x.device(), x.dtype()));
    let wide = Tensor::cat(vec![x.clone(), zeros(size, missing)], 3);
    Tensor::cat(vec![wide, zeros(missing, size + missing)], 2)
}

/// [`inverse`] of small blocks: the doublings alone, to which a Newton step would add rounding. What is differentiated is a
/// term that is zero, `−X (A − A) X`, with the second A constant.
fn diagonal_inverse(a: Tensor<4>) -> Tensor<4> {
    if a.shape().num_elements() == 0 {
        return a;
    }
    let a = a.tril(-1);
    let known = constant(&a);
    let x = doublings(known.clone());
    x.clone() - product(product(x.clone(), a - known), x)
}

/// [`inverse`] of square f32 or f64 matrices.
pub(crate) fn unchecked(a: Tensor<4>) -> Tensor<4> {
    let shape = a.dims();
    if a.shape().num_elements() == 0 {
        return a;
    }
    let a = a.tril(-1);
    let x = doublings(constant(&a));
    let identity = Tensor::<2>::eye(shape[2], &a.device()).cast(a.dtype()).reshape([1, 1, shape[2], shape[2]]);
    let residual = x.clone() + product(a, x.clone()) - identity.expand(shape);
    x.clone() - product(x, residual)
}

fn constant(a: &Tensor<4>) -> Tensor<4> {
    a.clone().detach().set_require_grad(false)
}

/// The inverse by blocks of doubling size, of a strictly lower triangular matrix without a graph.
fn doublings(a: Tensor<4>) -> Tensor<4> {
    let shape = a.dims();
    let size = shape[2];
    let (device, dtype) = (a.device(), a.dtype());
    let every = |x: Tensor<2>| x.cast(dtype).reshape([1, 1, size, size]).expand(shape);
    // i and j lie in one block of size 2s, and in its two halves, where s is the highest bit in which they differ.
    let highest = |i: usize, j: usize| if i > j { (i ^ j).ilog2() as i32 } else { -1 };
    let bits: Vec<i32> = (0..size * size).map(|at| highest(at / size, at % size)).collect();
    let bits = Tensor::<2, Int>::from_data(TensorData::new(bits, [size, size]), &device);
    let mut x = every(Tensor::eye(size, &device));
    for bit in 0..size.next_power_of_two().ilog2() as i32 {
        let between = a.clone() * every(bits.clone().equal_elem(bit).float());
        // Blocks of one row are their own inverses.
        x = if bit == 0 { x - between } else { x.clone() - product(product(x.clone(), between), x) };
    }
    x
}
