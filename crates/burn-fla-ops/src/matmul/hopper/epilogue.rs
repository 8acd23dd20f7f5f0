//! What a linear layer does with its product before it is rounded: bias, activation, residual.
//!
//! ```text
//! y = act(x Wᵀ + b) + r
//! ```
//!
//! All of it is done to the f32 accumulators, and y is rounded once. Backward needs `dz = dy ∘ act'(z)`, `z = x Wᵀ + b`.
//! Most activations tell their slope by their own value, which is y where nothing is added to it; the kernel writes a
//! second result where that is not so: z for the SiLU, `act(z)` beside a residual.

use cubecl::prelude::*;
use half::bf16;

use super::plan::VECTOR;
use crate::matmul::Activation;
use crate::rows::{RowPlan, first_row, group, load, row_stride, sigmoid, store, store_partial, widen, zeros};
use crate::tile::hopper::{Acc, exp2, read, reciprocal, write};

/// What a kernel does after the product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(in crate::matmul) struct Epilogue {
    /// Adds a bias of the columns.
    pub(in crate::matmul) bias: bool,
    /// What follows it.
    pub(in crate::matmul) activation: Activation,
    /// Adds a matrix of the result's shape.
    pub(in crate::matmul) residual: bool,
    /// Whether the kernel writes what backward needs as a second result.
    pub(in crate::matmul) keeps: bool,
}

impl Epilogue {
    /// Whether a slope needs a second result beside y.
    pub(super) fn second(&self) -> bool {
        match self.activation {
            Activation::Identity => false,
            Activation::Silu => true,
            _ => self.residual,
        }
    }

    /// Whether the activation comes before this result is written: `kept` is the second one, which is written first.
    pub(in crate::matmul) fn activates(&self, kept: bool) -> bool {
        self.activation != Activation::Identity && (kept != self.keeps_z() || !self.keeps)
    }

    /// Whether the second result is z, and not `act(z)`.
    pub(super) fn keeps_z(&self) -> bool {
        self.keeps && self.activation == Activation::Silu
    }
}

/// `act(x)`.
#[cube]
pub(super) fn activate(x: f32, #[comptime] activation: Activation) -> f32 {
    if comptime!(activation == Activation::Relu) {
        f32::max(x, 0.0f32)
    } else if comptime!(activation == Activation::ReluSquared) {
        let positive = f32::max(x, 0.0f32);
        positive * positive
    } else if comptime!(activation == Activation::Sigmoid) {
        logistic(x)
    } else if comptime!(activation == Activation::Tanh) {
        f32::tanh(x)
    } else if comptime!(activation == Activation::Silu) {
        x * logistic(x)
    } else {
        x
    }
}

/// `1 / (1 + e^{−x})`.
#[cube]
fn logistic(x: f32) -> f32 {
    reciprocal(1.0f32 + exp2(x * -core::f32::consts::LOG2_E))
}

/// [`activate`] for each element.
#[cube]
pub(super) fn activate_vector<N: Size>(x: Vector<f32, N>, #[comptime] activation: Activation) -> Vector<f32, N> {
    let mut y = x;
    #[unroll]
    for i in 0..comptime!(VECTOR) {
        y.insert(i, activate(x.extract(i), activation));
    }
    y
}

/// Adds the bias to registers `first / 2` and on of an accumulator, which stand at `column` and on of the result.
#[cube]
pub(in crate::matmul) fn add_bias(
    #[comptime] acc: Acc,
    #[comptime] first: usize,
    #[comptime] count: usize,
    bias: &OwnedTensor<Vector<f32, Const<2>>>,
    column: u32,
    lane: u32,
) {
    let last = bias.len() - 1;
    let start = (column / 2u32 + lane % 4u32) as usize;
    #[unroll]
    for j in 0..comptime!(count / 8) {
        // Past the last column nothing is written: any number will do.
        let pair = bias[usize::min(start + comptime!(4 * j), last)];
        #[unroll]
        for half in 0..2usize {
            let i = comptime!(first / 2 + j * 4 + 2 * half);
            write(acc, i, read(acc, i) + pair.extract(0usize));
            write(acc, comptime!(i + 1), read(acc, comptime!(i + 1)) + pair.extract(1usize));
        }
    }
}

/// Applies the activation to registers `first / 2` and on.
#[cube]
pub(in crate::matmul) fn activate_columns(
    #[comptime] acc: Acc,
    #[comptime] first: usize,
    #[comptime] count: usize,
    #[comptime] activation: Activation,
) {
    #[unroll]
    for i in 0..comptime!(count / 2) {
        let at = comptime!(first / 2 + i);
        write(acc, at, activate(read(acc, at), activation));
    }
}

/// Adds the residual `[m, n]` to registers `first / 2` and on, whose upper rows are `row` of the result.
#[cube]
pub(in crate::matmul) fn add_residual(
    #[comptime] acc: Acc,
    #[comptime] first: usize,
    #[comptime] count: usize,
    residual: &OwnedTensor<Vector<bf16, Const<2>>>,
    row: u32,
    column: u32,
    lane: u32,
) {
    let last = residual.len() - 1;
    let words = residual.shape(1) / 2;
    let start = (column / 2u32 + lane % 4u32) as usize;
    #[unroll]
    for j in 0..comptime!(count / 8) {
        #[unroll]
        for half in 0..2usize {
            let at = (row as usize + comptime!(8 * half)) * words + start + comptime!(4 * j);
            let pair = Vector::<f32, Const<2>>::cast_from(residual[usize::min(at, last)]);
            let i = comptime!(first / 2 + j * 4 + 2 * half);
            write(acc, i, read(acc, i) + pair.extract(0usize));
            write(acc, comptime!(i + 1), read(acc, comptime!(i + 1)) + pair.extract(1usize));
        }
    }
}

/// `act'(z)`, told by what backward keeps: z for the SiLU, `act(z)` for the others.
#[cube]
fn slope<N: Size>(kept: Vector<f32, N>, #[comptime] activation: Activation) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    let zero = Vector::<f32, N>::new(0.0f32);
    if comptime!(activation == Activation::Relu) {
        select_many(kept.greater_than(&zero), one, zero)
    } else if comptime!(activation == Activation::ReluSquared) {
        Vector::new(2.0f32) * kept.sqrt()
    } else if comptime!(activation == Activation::Sigmoid) {
        kept * (one - kept)
    } else if comptime!(activation == Activation::Tanh) {
        one - kept * kept
    } else {
        let s = sigmoid::<N>(kept, true);
        s * (one + kept * (one - s))
    }
}

/// `dz = dy ∘ act'(z)`, and of each cube the sum of its rows.
#[cube(launch, address_type = "dynamic")]
pub(super) fn backward_kernel<N: Size>(
    kept: &Tensor<Vector<bf16, N>>,
    dy: &Tensor<Vector<bf16, N>>,
    dz: &mut Tensor<Vector<bf16, N>>,
    partial: &mut Tensor<Vector<f32, N>>,
    rows: u32,
    #[comptime] plan: RowPlan,
    #[comptime] activation: Activation,
    #[comptime] bias_grad: bool,
) {
    let rows = rows as usize;
    let mut sums = zeros::<N>(plan);
    let mut row = first_row(plan) + group(plan);
    while row < rows {
        let kept_row = load::<bf16, N>(kept, row, rows, plan);
        let mut grads = widen::<bf16, N>(&load::<bf16, N>(dy, row, rows, plan), plan);
        let values = widen::<bf16, N>(&kept_row, plan);
        #[unroll]
        for step in 0..comptime!(plan.steps) {
            grads[step] *= slope::<N>(values[step], activation);
            if comptime!(bias_grad) {
                sums[step] += grads[step];
            }
        }
        store::<bf16, N>(&grads, dz, row, rows, plan);
        row += row_stride(plan);
    }
    if comptime!(bias_grad) {
        store_partial::<N>(&sums, partial, plan);
    }
}
