//! A product that is added to what is there.

use burn::tensor::Tensor;

use super::{Operand, Target, cores, launch_into, readable};
use crate::Engine;
use crate::bridge::{CubeTensor, Operator, TensorSpec, apply, owned};
use crate::hopper_walk::Cores;

/// `sum + a · b` in f32, with operands as in [`product`](super::product): in place where nobody else holds `sum`, without a second pass over
/// it. Not differentiable.
///
/// # Shapes
/// `sum`: f32 `[m, n]`, without autodiff like the others
pub fn accumulate(sum: Tensor<2>, a: Tensor<2>, b: Tensor<2>, a_rows: bool, b_rows: bool, engine: Engine) -> Tensor<2> {
    let cores = cores(&a, &b, engine).expect("operands that are taken");
    let floats = [sum, a, b].map(Tensor::into_dispatch).to_vec();
    Tensor::from_dispatch(apply(Accumulate { a_rows, b_rows, cores }, floats, Vec::new()).remove(0))
}

#[derive(Debug)]
struct Accumulate {
    a_rows: bool,
    b_rows: bool,
    cores: Cores,
}

impl Operator for Accumulate {
    fn name(&self) -> &'static str {
        "hopper_accumulate"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        let [sum, a, b] = inputs.try_into().expect("a sum and two operands");
        let (sum, a, b) = (owned(sum), readable(a), readable(b));
        let a = Operand { tensor: &a, rows: self.a_rows };
        let b = Operand { tensor: &b, rows: self.b_rows };
        vec![launch_into(a, b, Target::Sum(sum), self.cores)]
    }

    fn backward(
        &self,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        unreachable!("its tensors are without autodiff")
    }
}
