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

/// [`inverse`] of square f32 or f64 matrices.
pub(crate) fn unchecked(a: Tensor<4>) -> Tensor<4> {
    let shape = a.dims();
    let size = shape[2];
    if a.shape().num_elements() == 0 {
        return a;
    }
    let (device, dtype) = (a.device(), a.dtype());
    let every = |x: Tensor<2>| x.cast(dtype).reshape([1, 1, size, size]).expand(shape);
    let identity = every(Tensor::eye(size, &device));
    let a = a.tril(-1);

    // i and j lie in one block of size 2s, and in its two halves, where s is the highest bit in which they differ.
    let highest = |i: usize, j: usize| if i > j { (i ^ j).ilog2() as i32 } else { -1 };
    let bits: Vec<i32> = (0..size * size).map(|at| highest(at / size, at % size)).collect();
    let bits = Tensor::<2, Int>::from_data(TensorData::new(bits, [size, size]), &device);
    let known = a.clone().detach().set_require_grad(false);
    let between = |bit: i32| known.clone() * every(bits.clone().equal_elem(bit).float());
    let doublings = size.next_power_of_two().ilog2() as i32;
    let mut x = identity.clone();
    for bit in 0..doublings {
        let a = between(bit);
        // Blocks of one row are their own inverses.
        x = if bit == 0 { x - a } else { x.clone() - product(product(x.clone(), a), x) };
    }
    let residual = x.clone() + product(a, x.clone()) - identity;
    x.clone() - product(x, residual)
}
