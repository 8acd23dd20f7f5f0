//! The operator on devices with kernels: the recurrence, and what stands before and after it, in one. `Δ x` and `Δ A` are
//! made again in backward, so that nothing is saved but what the recurrence itself saves (on Hopper: nothing).
//!
//! Passes over tensors of the size of x, with one group of B and C and the recurrence on Hopper:
//!
//! | pass | reads | writes | |
//! |---|---|---|---|
//! | steps | x | Δ x | |
//! | recurrence | Δ x | o | |
//! | skip | o, x | y | forward: 7 |
//! | steps | x | Δ x | |
//! | gradients of C, B and Δ x | Δ x, dy; Δ x, dy; dy | one each, a head | 8, with K = P |
//! | states between chunks | K P / 32 bytes a token and head | the same | 4, with K = P = 128 |
//! | sums over the heads of a group | both | | 2, with K = P |
//! | inputs | x, dΔx, dy | dx | backward: 20 |
//!
//! What has a number a token and head (Δ, Δ A, their gradients, the sums of a row) is 4 of a row's 2 P bytes. The
//! gradients of A and D are sums of such numbers over tokens, by [`kernels::heads`] and a second stage. As operators of
//! their own, with `Δ A` and the sums in Burn's operations, it was 25 passes, o and Δ x were saved (16,512 bytes a token
//! with 32 heads of 128), and the sum over tokens in the gradient of A was left to a single warp: 3 ms of 5.3 at
//! 8 × 2048 × 32 × 128 × 128 on an H100, and as much at an eighth of that size.
//!
//! Known to be left: the walks could multiply by Δ (a factor of the score's column, and of the state's token) and add
//! `D ∘ x` themselves: 6 of the 7 passes forward are then 2, and 5 of those backward fewer.

use std::sync::Arc;

use burn::backend::DispatchTensor;
use burn::tensor::DType;

use super::kernels::{self, Grads, Skip};
use crate::bridge::{CubeTensor, Operator, Planned, TensorSpec, contiguous, zeros};

/// Inputs: those of the recurrence, with x and Δ in the places of `Δ x` and `Δ A`; A, and D where there is one.
#[derive(Debug)]
struct Ssd {
    recurrence: Arc<dyn Operator>,
    /// How many inputs it has.
    inputs: usize,
    skip: Skip,
}

/// `recurrence` was planned with x and Δ as values and decay; `skip` is `[H]` or `[H·P]`, as `by` says.
pub(super) fn planned(recurrence: Planned, a: DispatchTensor, skip: Option<DispatchTensor>, by: Skip) -> Planned {
    let Planned { operator, mut floats, ints, tables } = recurrence;
    let operator = Ssd { recurrence: operator, inputs: floats.len(), skip: by };
    floats.push(a);
    floats.extend(skip);
    Planned { operator: Arc::new(operator), floats, ints, tables }
}

impl Operator for Ssd {
    fn name(&self) -> &'static str {
        "ssd"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        self.recurrence.outputs(&inputs[..self.inputs])
    }

    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        self.recurrence.saved(&inputs[..self.inputs])
    }

    fn forward(&self, mut inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor> {
        let mut parameters = inputs.split_off(self.inputs).into_iter().map(contiguous);
        let a = parameters.next().expect("A is always there");
        let x = contiguous(inputs[2].clone());
        let [v, g] = kernels::steps(&x, &contiguous(inputs[3].clone()), &a);
        (inputs[2], inputs[3]) = (v, g);
        let mut outputs = self.recurrence.forward(inputs, ints, save);
        if let Some(skip) = parameters.next() {
            outputs[0] = kernels::skipped(&outputs[0], &x, &skip, self.skip);
        }
        outputs
    }

    fn backward(
        &self,
        mut inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let mut parameters = inputs.split_off(self.inputs).into_iter().map(contiguous);
        let (a, skip) = (parameters.next().expect("A is always there"), parameters.next());
        let [x, delta] = [2, 3].map(|i| contiguous(inputs[i].clone()));
        let dy = grads[0].clone().map(contiguous);
        let (of_input, of_delta, of_rate) = (wanted[2], wanted[3], wanted[self.inputs]);
        let of_skip = skip.is_some() && wanted[self.inputs + 1];
        let mut inner = wanted[..self.inputs].to_vec();
        inner[2] = of_input || of_delta;
        inner[3] = of_delta || of_rate;
        let mut found = vec![None; self.inputs];
        if inner.contains(&true) {
            let [v, g] = kernels::steps(&x, &delta, &a);
            (inputs[2], inputs[3]) = (v, g);
            found = self.recurrence.backward(inputs, ints, saved, grads, &inner);
        }
        let dv = found[2].take().map(contiguous);
        let dg = found[3].take().map(contiguous);
        let by_head = self.skip == Skip::Head && of_skip && dy.is_some();
        let mut sums = None;
        if of_input || of_delta || by_head {
            let grads = Grads { values: dv.as_ref(), outputs: dy.as_ref(), skip: skip.as_ref(), by: self.skip };
            let [dx, found_sums] = kernels::inputs(&x, &delta, &grads);
            (found[2], sums) = (Some(dx), Some(found_sums));
        }
        let mut of_weight = None;
        found.push(None);
        if of_delta || of_rate || by_head {
            let wanted = [of_delta, by_head];
            let [steps, rate, weight] = kernels::heads(sums.as_ref(), dg.as_ref(), [&delta, &a], wanted);
            (found[3], found[self.inputs], of_weight) = (steps, rate, weight);
        }
        if let Some(skip) = skip.filter(|_| of_skip) {
            let by_channel = || dy.as_ref().map(|dy| kernels::channels(&x, dy));
            let zero = || zeros(&x, skip.meta.shape().dims::<1>(), DType::F32);
            found.push(Some(of_weight.or_else(by_channel).unwrap_or_else(zero)));
        } else if wanted.len() > found.len() {
            found.push(None);
        }
        found
    }
}
