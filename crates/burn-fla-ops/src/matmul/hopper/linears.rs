//! Several linear layers of one input: what projects to queries, keys, values and gates, or to a gate and what it gates.

use burn::tensor::{DType, Shape, Tensor};

use super::epilogue::Epilogue;
use super::{Extras, Joined, Operand, Target, launch_pairs, launch_with, readable};
use crate::bridge::{CubeTensor, Operator, TensorSpec, apply, contiguous};
use crate::hopper_walk::Cores;
use crate::matmul::bias::column_sums;

/// The most weights: the bridge takes eight inputs.
pub(crate) const MOST: usize = 7;

/// `yᵢ = x Wᵢᵀ`: one kernel forward, and in the backward pass one for `dx = Σ dyᵢ Wᵢ`, which is summed in registers, and
/// one for all `dWᵢ = dyᵢᵀ x`.
///
/// # Shapes
/// - `x`: `[m, k]` bf16; weights `[nᵢ, k]`, bf16 or f32 (rounded here, their gradients are f32)
/// - `biases`: f32 `[nᵢ]`, one for each weight, or none at all
/// - returns `[m, nᵢ]`, bf16
pub(crate) fn linears(x: Tensor<2>, weights: Vec<Tensor<2>>, biases: Vec<Tensor<1>>, cores: Cores) -> Vec<Tensor<2>> {
    let operator = Linears { count: weights.len(), cores };
    let floats = std::iter::once(x).chain(weights).map(Tensor::into_dispatch);
    let floats = floats.chain(biases.into_iter().map(Tensor::into_dispatch)).collect();
    apply(operator, floats, Vec::new()).into_iter().map(Tensor::from_dispatch).collect()
}

/// Inputs: x, then `count` weights, then as many biases or none.
#[derive(Debug)]
struct Linears {
    count: usize,
    cores: Cores,
}

impl Operator for Linears {
    fn name(&self) -> &'static str {
        "hopper_linears"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let rows = inputs[0].shape.dims::<2>()[0];
        let shape = |weight: &TensorSpec| Shape::from([rows, weight.shape.dims::<2>()[0]]);
        inputs[1..=self.count].iter().map(|weight| TensorSpec::new(shape(weight), DType::BF16)).collect()
    }

    /// The weights that were rounded for the product: backward reads them again.
    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let rounded = inputs[1..=self.count].iter().filter(|weight| weight.dtype != DType::BF16);
        rounded.map(|weight| TensorSpec::new(weight.shape.clone(), DType::BF16)).collect()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let mut inputs = inputs.into_iter();
        let x = readable(inputs.next().expect("an input"));
        let (mut weights, mut saved) = (Vec::new(), Vec::new());
        for weight in inputs.by_ref().take(self.count) {
            let rounded = weight.dtype != DType::BF16;
            let weight = readable(weight);
            saved.extend((save && rounded).then(|| weight.clone()));
            weights.push(weight);
        }
        let pairs: Vec<_> = weights.iter().map(|weight| (Operand::plain(&x), Operand::plain(weight))).collect();
        let biases: Vec<CubeTensor> = inputs.map(contiguous).collect();
        let epilogue = Epilogue { bias: !biases.is_empty(), ..Default::default() };
        let extras = Extras { biases: &biases, residual: None, epilogue };
        let mut outputs = launch_with(&pairs, Joined::No, Target::New(DType::BF16), &extras, self.cores);
        outputs.extend(saved);
        outputs
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let mut saved = saved.into_iter();
        let mut inputs = inputs.into_iter();
        let x = readable(inputs.next().expect("an input"));
        // A weight whose output the loss does not use has no gradient from here.
        let (mut present, mut weight_dtypes) = (Vec::new(), Vec::new());
        let biases = inputs.len() - self.count;
        for (at, (weight, grad)) in inputs.take(self.count).zip(grads).enumerate() {
            let dtype = weight.dtype;
            let rounded = if dtype == DType::BF16 { readable(weight) } else { saved.next().expect("a rounded weight") };
            weight_dtypes.push((dtype, rounded.meta.shape().dims::<2>()));
            present.extend(grad.map(|grad| (at, readable(rounded), readable(grad))));
        }
        let dx = wanted[0].then(|| {
            let pairs: Vec<_> = present
                .iter()
                .map(|(_, weight, grad)| (Operand::plain(grad), Operand { tensor: weight, rows: true }))
                .collect();
            launch_pairs(&pairs, Joined::Yes, Target::New(x.dtype), self.cores).remove(0)
        });
        let mut result = vec![dx];
        result.resize(weight_dtypes.len() + 1, None);
        for dtype in [DType::F32, DType::BF16] {
            let of_dtype: Vec<_> =
                present.iter().filter(|(at, ..)| wanted[at + 1] && weight_dtypes[*at].0 == dtype).collect();
            if of_dtype.is_empty() {
                continue;
            }
            let pairs: Vec<_> = of_dtype
                .iter()
                .map(|(_, _, grad)| (Operand { tensor: grad, rows: true }, Operand { tensor: &x, rows: true }))
                .collect();
            let gradients = launch_pairs(&pairs, Joined::No, Target::New(dtype), self.cores);
            for ((at, ..), gradient) in of_dtype.into_iter().zip(gradients) {
                result[at + 1] = Some(gradient);
            }
        }
        // The bridge asks for every gradient that is wanted, also where no output was used.
        for (at, (dtype, shape)) in weight_dtypes.into_iter().enumerate() {
            if wanted[at + 1] && result[at + 1].is_none() {
                result[at + 1] = Some(crate::bridge::zeros(&x, shape, dtype));
            }
            if biases > 0 {
                let grad = present.iter().find(|(used, ..)| *used == at).map(|(_, _, grad)| grad.clone());
                let sum = |grad: Option<CubeTensor>| match grad {
                    Some(grad) => column_sums(grad),
                    None => crate::bridge::zeros(&x, [shape[0]], DType::F32),
                };
                result.push(wanted[1 + self.count + at].then(|| sum(grad)));
            }
        }
        result
    }
}
