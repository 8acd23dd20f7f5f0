//! The kernels as an operator.

use burn::tensor::{DType, Tensor};

use super::launch::{Grads, Running, RunningSums};
use crate::bridge::{CubeTensor, Operator, TensorSpec, apply_with, contiguous};
use crate::scan::Scan;

/// Inputs: the scores `[B, T, D]` and, with `has_state`, the initial normaliser. Outputs: weights, log decays and the last
/// normaliser; or the normaliser and the last one.
///
/// Saved besides the scores: `8 D / 128` bytes a token.
#[derive(Debug)]
struct RunningOperator {
    name: &'static str,
    sums: RunningSums,
    weights: DType,
    has_state: bool,
}

impl Operator for RunningOperator {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let shape = &inputs[0].shape;
        let others = TensorSpec::new(shape.clone(), DType::F32);
        let end = TensorSpec::new(self.sums.end_shape(), DType::F32);
        match self.sums.normaliser {
            true => vec![others, end],
            false => vec![TensorSpec::new(shape.clone(), self.weights), others, end],
        }
    }

    fn saved(&self, _: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(self.sums.borders_shape(), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let scores = contiguous(inputs[0].clone());
        let initial = self.has_state.then(|| contiguous(inputs[1].clone()));
        let table = contiguous(ints[0].clone());
        let Running { weights, others, end, borders } =
            self.sums.forward(&scores, initial.as_ref(), &table, self.weights, save);
        let mut outputs = if self.sums.normaliser { vec![others, end] } else { vec![weights, others, end] };
        if save {
            outputs.push(borders);
        }
        outputs
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let scores = contiguous(inputs[0].clone());
        let table = contiguous(ints[0].clone());
        let mut grads: Vec<_> = grads.into_iter().map(|grad| grad.map(contiguous)).collect();
        let weights: Vec<_> = if self.sums.normaliser { Vec::new() } else { grads.remove(0).into_iter().collect() };
        let given = Grads { weights: &weights, others: grads[0].as_ref(), end: grads[1].as_ref() };
        let with_state = self.has_state && wanted[1];
        let (ds, first) = self.sums.backward(&scores, &saved[0], &table, given, with_state);
        let mut result = vec![Some(ds)];
        if self.has_state {
            result.push(first);
        }
        result
    }
}

/// Runs the kernels on the scores of a scan with a token at least: weights in `weights`, or with `normaliser` none, and log
/// decays or the normaliser, and the last normaliser.
pub(crate) fn run(
    name: &'static str,
    scan: &Scan,
    scores: Tensor<3>,
    normaliser: bool,
    weights: DType,
) -> (Option<Tensor<3>>, Tensor<3>, Tensor<2>) {
    let (sums, table) = RunningSums::new(scan.sequences(), scores.dims()[2], normaliser, scan.device());
    // A sequence without tokens hands on what was before it, and that may be −∞, which kernels do not write.
    let empty = scan.sequences().lengths().any(|length| length == 0);
    let initial = scan.initial().or_else(|| empty.then(|| scan.initial_or(f64::NEG_INFINITY)));
    let operator = RunningOperator { name, sums, weights, has_state: initial.is_some() };
    let mut floats = vec![scores.into_dispatch()];
    floats.extend(initial.map(Tensor::into_dispatch));
    let mut outputs = apply_with(operator, floats, vec![table]).into_iter();
    let mut next = || outputs.next().expect("the outputs of the operator");
    let found = (!normaliser).then(|| Tensor::from_dispatch(next()));
    (found, Tensor::from_dispatch(next()), Tensor::from_dispatch(next()))
}
