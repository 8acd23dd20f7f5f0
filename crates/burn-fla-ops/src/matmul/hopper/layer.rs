//! A linear layer and what follows it as one node of the gradient's graph.

use burn::tensor::{DType, Shape, Tensor};
use cubecl::prelude::CubeDim;

use super::epilogue::{self, Epilogue};
use super::{Extras, Joined, Operand, Target, launch, launch_with, readable};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, contiguous};
use crate::hopper_walk::Cores;
use crate::matmul::Activation;
use crate::matmul::bias::column_sums;
use crate::rows::{RowPlan, UNITS, address, grid, sum_rows, unused};

/// `y = act(x Wᵀ + bias) + residual`, where [`super::takes`] says so and [`crate::rows::fits`] of n.
///
/// # Shapes
/// - `x`: `[m, k]` bf16; `weight`: `[n, k]`, bf16 or f32 (rounded here, its gradient is f32)
/// - `bias`: f32 `[n]`; `residual`: bf16 `[m, n]`
/// - returns `[m, n]`, bf16
pub(crate) fn linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    residual: Option<Tensor<2>>,
    activation: Activation,
    cores: Cores,
) -> Tensor<2> {
    let operator = Layer { bias: bias.is_some(), residual: residual.is_some(), activation, cores };
    let mut floats = vec![x.into_dispatch(), weight.into_dispatch()];
    floats.extend(bias.map(Tensor::into_dispatch));
    floats.extend(residual.map(Tensor::into_dispatch));
    Tensor::from_dispatch(apply(operator, floats, Vec::new()).remove(0))
}

/// Inputs: x, the weight, the bias and the residual where they are. Output: y. Saved: a weight that was rounded, and with an
/// activation what tells its slope.
#[derive(Debug)]
struct Layer {
    bias: bool,
    residual: bool,
    activation: Activation,
    cores: Cores,
}

impl Layer {
    fn activates(&self) -> bool {
        self.activation != Activation::Identity
    }
}

impl Operator for Layer {
    fn name(&self) -> &'static str {
        "hopper_linear"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let ([rows, _], [columns, _]) = (inputs[0].shape.dims(), inputs[1].shape.dims());
        vec![TensorSpec::new(Shape::from([rows, columns]), DType::BF16)]
    }

    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let rounded = inputs[1].dtype != DType::BF16;
        let weight = rounded.then(|| TensorSpec::new(inputs[1].shape.clone(), DType::BF16));
        weight.into_iter().chain(self.activates().then(|| self.outputs(inputs).remove(0))).collect()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("an input of the layer");
        let (x, weight) = (next(), next());
        let biases: Vec<CubeTensor> = self.bias.then(|| contiguous(next())).into_iter().collect();
        let residual = self.residual.then(|| contiguous(next()));
        let rounded = weight.dtype != DType::BF16;
        let (x, weight) = (readable(x), readable(weight));
        let mut epilogue =
            Epilogue { bias: self.bias, activation: self.activation, residual: self.residual, keeps: false };
        epilogue.keeps = save && epilogue.second();
        let extras = Extras { biases: &biases, residual: residual.as_ref(), epilogue };
        let pairs = [(Operand::plain(&x), Operand::plain(&weight))];
        let mut results = launch_with(&pairs, Joined::No, Target::New(DType::BF16), &extras, self.cores).into_iter();
        let y = results.next().expect("the result");
        let kept = results.next().unwrap_or_else(|| y.clone());
        let saved = (save && rounded).then_some(weight).into_iter().chain((save && self.activates()).then_some(kept));
        std::iter::once(y).chain(saved).collect()
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let mut inputs = inputs.into_iter();
        let (x, weight) = (inputs.next().expect("x"), inputs.next().expect("a weight"));
        let mut saved = saved.into_iter();
        let weight_dtype = weight.dtype;
        let weight = if weight_dtype == DType::BF16 { weight } else { saved.next().expect("a rounded weight") };
        let dy = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let bias_grad = self.bias && wanted[2];
        let (dz, db) = if self.activates() {
            through(contiguous(saved.next().expect("what tells the slope")), &dy, self.activation, bias_grad)
        } else {
            (dy.clone(), bias_grad.then(|| column_sums(dy.clone())))
        };
        let dz = readable(dz);
        let dx = wanted[0].then(|| {
            let weight = readable(weight);
            launch(Operand::plain(&dz), Operand { tensor: &weight, rows: true }, x.dtype, self.cores)
        });
        let dw = wanted[1].then(|| {
            let x = readable(x.clone());
            launch(Operand { tensor: &dz, rows: true }, Operand { tensor: &x, rows: true }, weight_dtype, self.cores)
        });
        let mut found = vec![dx, dw];
        found.extend(self.bias.then_some(db));
        found.extend(self.residual.then_some(Some(dy)));
        found
    }
}

/// The gradient before the activation, and with `bias_grad` the sum of its rows.
fn through(
    kept: CubeTensor,
    dy: &CubeTensor,
    activation: Activation,
    bias_grad: bool,
) -> (CubeTensor, Option<CubeTensor>) {
    let [rows, columns] = dy.meta.shape().dims();
    let (plan, vector) = RowPlan::new(dy, columns);
    let cubes = plan.partials(dy, rows, false);
    let dz = alloc(dy, [rows, columns], DType::BF16);
    let partial = if bias_grad { alloc(dy, [cubes, columns], DType::F32) } else { unused(dy, vector) };
    epilogue::backward_kernel::launch(
        &dy.client.clone(),
        grid(cubes),
        CubeDim::new_1d(UNITS as u32),
        address(&[dy]),
        vector,
        kept.into_tensor_arg(),
        dy.clone().into_tensor_arg(),
        dz.clone().into_tensor_arg(),
        partial.clone().into_tensor_arg(),
        rows as u32,
        plan,
        activation,
        bias_grad,
    );
    (dz, bias_grad.then(|| sum_rows(&partial, 0, [columns])))
}
