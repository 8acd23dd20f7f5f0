//! The strips on devices with kernels: three products each, and one pass over its logits between them.
//!
//! Saved: `dx` in the dtype of `x`, and `dW` in f32.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Int, Shape, Slice, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::cast;
use cubecl::prelude::*;

use super::{kernels, strip};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, contiguous, owned, storage};
use crate::matmul::raw::{Side, multiply, multiply_add};
use crate::rows::{MAX_CUBES, UNITS, address, grid, sum_all, vector_size};

/// Bytes that the logits of a strip may take: a share of a GPU's memory that does not count, and, where a device binds
/// less, no more than that.
const BYTES: usize = 256 << 20;
const PORTABLE_BYTES: usize = 128 << 20;

/// Inputs: `x` `[N, D]`, `weight` `[V, D]` and the number of tokens that count, `[1]`; ints: `labels` `[N]`. Output: the
/// sum of the losses, `[1]`.
#[derive(Debug)]
pub(super) struct LinearCrossEntropy {
    pub ignored: i32,
    pub l2_warp: Option<f64>,
    pub strip: Option<usize>,
}

/// What every strip reads and writes.
struct Tokens {
    labels: CubeTensor,
    count: CubeTensor,
    losses: CubeTensor,
}

impl LinearCrossEntropy {
    pub(super) fn run(self, x: Tensor<2>, weight: Tensor<2>, count: Tensor<1>, labels: Tensor<1, Int>) -> Tensor<1> {
        let labels = labels.cast(DType::I32).into_dispatch();
        let floats = vec![x.into_dispatch(), weight.into_dispatch(), count.into_dispatch()];
        Tensor::from_dispatch(apply(self, floats, vec![labels]).remove(0))
    }

    /// One pass over the logits of a strip, whose first token is `first`: losses, and with `gradient` the gradients of
    /// the logits, which are returned in their place.
    fn rows(&self, logits: CubeTensor, tokens: &Tokens, first: usize, gradient: bool) -> CubeTensor {
        let logits = owned(logits);
        let [n] = tokens.losses.meta.shape().dims();
        let [rows, vocabulary] = logits.meta.shape().dims();
        let vector = vector_size(vocabulary);
        kernels::rows::launch(
            &logits.client,
            grid(rows.min(MAX_CUBES)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&logits, &tokens.losses]),
            vector,
            logits.clone().into_tensor_arg(),
            tokens.labels.clone().into_tensor_arg(),
            tokens.count.clone().into_tensor_arg(),
            tokens.losses.clone().into_tensor_arg(),
            first as u32,
            rows as u32,
            self.ignored,
            (self.l2_warp.unwrap_or(0.0) / n as f64) as f32,
            vocabulary / vector,
            vector,
            gradient,
            self.l2_warp.is_some(),
            storage(logits.dtype),
        );
        logits
    }
}

/// `x · by`, in place where nobody else holds `x`.
fn scaled(x: CubeTensor, by: &CubeTensor) -> CubeTensor {
    let x = owned(x);
    let size = x.meta.shape().num_elements();
    let vector = vector_size(size);
    kernels::scale::launch(
        &x.client,
        grid((size / vector).div_ceil(UNITS).min(MAX_CUBES)),
        CubeDim::new_1d(UNITS as u32),
        address(&[&x]),
        vector,
        x.clone().into_tensor_arg(),
        by.clone().into_tensor_arg(),
        storage(x.dtype),
    );
    x
}

impl Operator for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn outputs(&self, _: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(Shape::from([1]), DType::F32)]
    }

    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone(), TensorSpec::new(inputs[1].shape.clone(), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let [x, weight, count] = inputs.try_into().expect("three inputs");
        let [labels] = ints.try_into().expect("labels");
        let x = contiguous(x);
        let weight = contiguous(cast(weight, x.dtype));
        let [n, _] = x.meta.shape().dims();
        let [v, _] = weight.meta.shape().dims();
        let bytes = if crate::matmul::raw::on_cuda(&x) { BYTES } else { PORTABLE_BYTES };
        let strip = self.strip.unwrap_or_else(|| strip(n, v, x.dtype.size(), bytes));
        let losses = alloc(&x, [n], DType::F32);
        let tokens = Tokens { labels: contiguous(labels), count: contiguous(count), losses };
        let mut dx = Vec::new();
        let mut dw: Option<CubeTensor> = None;
        for first in (0..n).step_by(strip) {
            let last = (first + strip).min(n);
            let rows = match last - first == n {
                true => x.clone(),
                false => CubeBackend::float_slice(x.clone(), &[Slice::from(first..last)]),
            };
            let logits = multiply(Side::plain(&rows), Side::transposed(&weight), x.dtype);
            let logits = self.rows(logits, &tokens, first, save);
            if save {
                dx.push(multiply(Side::plain(&logits), Side::plain(&weight), x.dtype));
                let (a, b) = (Side::transposed(&logits), Side::plain(&rows));
                dw = Some(match dw {
                    None => multiply(a, b, DType::F32),
                    Some(sum) => multiply_add(a, b, sum),
                });
            }
        }
        let mut outputs = vec![sum_all(tokens.losses)];
        if let Some(dw) = dw {
            let dx = if dx.len() == 1 { dx.remove(0) } else { CubeBackend::float_cat(dx, 0) };
            outputs.extend([dx, dw]);
        }
        outputs
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let dtype = inputs[1].dtype;
        let [dx, dw] = saved.try_into().expect("two gradients");
        let by = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let dx = wanted[0].then(|| scaled(dx, &by));
        let dw = wanted[1].then(|| cast(scaled(dw, &by), dtype));
        vec![dx, dw, None]
    }
}
