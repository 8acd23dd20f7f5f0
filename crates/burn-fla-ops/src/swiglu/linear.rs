//! SwiGLU and the linear layer after it as one node of the gradient's graph: what is between them is made again in the
//! backward pass, in the pass over gate and up that makes their gradients.

use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::kernel::cast;

use super::kernels::{backward, forward};
use crate::bridge::{CubeTensor, Operator, TensorSpec, apply, contiguous};
use crate::matmul::raw::{Side, multiply};

/// `y = (silu(gate) ∘ up) Wᵀ`, on a device with kernels.
pub(super) fn run(gate: Tensor<2>, up: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let floats = [gate, up, weight].map(Tensor::into_dispatch).to_vec();
    Tensor::from_dispatch(apply(SwiGluLinear, floats, Vec::new()).remove(0))
}

/// Inputs: `gate` and `up`, `[m, k]`, and `weight`, `[n, k]`, of their dtype or f32. Output: `[m, n]`.
#[derive(Debug)]
struct SwiGluLinear;

impl Operator for SwiGluLinear {
    fn name(&self) -> &'static str {
        "swiglu_linear"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let ([rows, _], [columns, _]) = (inputs[0].shape.dims(), inputs[2].shape.dims());
        vec![TensorSpec::new(Shape::from([rows, columns]), inputs[0].dtype)]
    }

    /// A weight that was rounded for the product: backward reads it again.
    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let rounded = inputs[2].dtype != inputs[0].dtype;
        rounded.then(|| TensorSpec::new(inputs[2].shape.clone(), inputs[0].dtype)).into_iter().collect()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let [gate, up, weight] = inputs.try_into().expect("three inputs");
        let dtype = gate.dtype;
        let rounded = weight.dtype != dtype;
        let weight = contiguous(cast(weight, dtype));
        let hidden = forward(contiguous(gate), contiguous(up));
        let y = multiply(Side::plain(&hidden), Side::transposed(&weight), dtype);
        std::iter::once(y).chain((save && rounded).then_some(weight)).collect()
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [gate, up, weight] = inputs.try_into().expect("three inputs");
        let (dtype, weight_dtype): (DType, DType) = (gate.dtype, weight.dtype);
        let weight = contiguous(saved.into_iter().next().unwrap_or(weight));
        let dy = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let d_hidden = multiply(Side::plain(&dy), Side::plain(&weight), dtype);
        let (dgate, dup, hidden) = backward(contiguous(gate), contiguous(up), d_hidden, wanted[2]);
        let dweight = hidden.map(|hidden| multiply(Side::transposed(&dy), Side::plain(&hidden), weight_dtype));
        vec![Some(dgate), Some(dup), dweight]
    }
}
