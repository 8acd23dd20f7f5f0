//! The operator on devices with kernels: the recurrence, and what stands before and after it, in one. Nothing is saved but
//! what the recurrence itself saves (on matrix units: nothing).
//!
//! On matrix units the walks take Δ, A, x and D themselves (`hopper_walk::steps`): decays of what a token writes have its Δ,
//! and `D ∘ x` and `D ∘ dy` are added to outputs. Elsewhere `Δ x` and `Δ A` are made before the recurrence, and again in backward.
//! Passes over tensors of the size of x, with one group of B and C:
//!
//! | pass | reads | writes | on matrix units | elsewhere |
//! |---|---|---|---|---|
//! | steps | x | Δ x | – | 2 |
//! | recurrence | x or Δ x | y or o | 2 | 2 |
//! | skip | o, x | y | – | 3: forward 7 |
//! | steps | x | Δ x | – | 2 |
//! | gradients of C, B and x or Δ x | x, dy; x, dy; dy | one each, a head | 8, with K = P | 8 |
//! | states between chunks | K P / 32 bytes a token and head | the same | 4, with K = P = 128 | 4 |
//! | sums over the heads of a group | both | | 2, with K = P | 2 |
//! | gradient of D | x, dy | | 2 | – |
//! | inputs | x, dΔx, dy | dx | – | 4: backward 20, on matrix units 16 |
//!
//! What has a number a token and head (Δ, the gradients of Δ and of the decay, the sums of a row) is 4 of a row's 2 P bytes. The
//! gradients of A and D are sums of such numbers over tokens, by [`kernels::heads`] and a second stage. As operators of
//! their own, with `Δ A` and the sums in Burn's operations, it was 25 passes, o and Δ x were saved (16,512 bytes a token
//! with 32 heads of 128), and the sum over tokens in the gradient of A was left to a single warp: 3 ms of 5.3 at
//! 8 × 2048 × 32 × 128 × 128 on an H100, and as much at an eighth of that size.
//!
//! With the passes of the last column on matrix units too, forward / both took 0.323 / 1.243 ms at 8 × 2048 × 32 × 128 × 128 on
//! an H200, now 0.183 / 1.011; outputs were off by 3.5e-3, now 2.5e-3 (`benches/results/95-ssd-steps.json`).
//!
//! Known to be left: the gradient of D by head is on the diagonal of the products `dy · x` that the walk for dC makes anyway.

use std::sync::Arc;

use burn::backend::DispatchTensor;
use burn::tensor::DType;

use super::kernels::{self, Grads, Skip, Sums};
use crate::bridge::{CubeTensor, Operator, Planned, TensorSpec, contiguous, zeros};
#[cfg(feature = "cuda")]
use crate::hopper_walk::HopperWalk;
use crate::recurrence::Problem;

/// Inputs: those of the recurrence, with x and Δ in the places of `Δ x` and `Δ A`; A, and D where there is one.
#[derive(Debug)]
struct Ssd {
    recurrence: Arc<dyn Operator>,
    /// The recurrence, where it takes Δ, A and D itself.
    #[cfg(feature = "cuda")]
    walk: Option<Arc<HopperWalk>>,
    /// How many inputs it has.
    inputs: usize,
    skip: Skip,
}

/// `problem` has x and Δ as values and decay; `skip` is `[H]` or `[H·P]`, as `by` says. `tracked` says whether A or D is
/// differentiated.
pub(super) fn planned(
    problem: Problem,
    tracked: bool,
    a: DispatchTensor,
    skip: Option<DispatchTensor>,
    by: Skip,
) -> Result<Planned, Box<Problem>> {
    #[cfg(feature = "cuda")]
    let (walk, recurrence) = problem.planned_with_steps(tracked)?;
    #[cfg(not(feature = "cuda"))]
    let recurrence = problem.planned(tracked)?;
    let Planned { operator, mut floats, ints, tables } = recurrence;
    let operator = Ssd {
        recurrence: operator,
        #[cfg(feature = "cuda")]
        walk,
        inputs: floats.len(),
        skip: by,
    };
    floats.push(a);
    floats.extend(skip);
    Ok(Planned { operator: Arc::new(operator), floats, ints, tables })
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
        #[cfg(feature = "cuda")]
        if let Some(walk) = &self.walk {
            let skip = parameters.next().unwrap_or_else(|| a.clone());
            return walk.forward_of_steps(&inputs, &ints[0], [&a, &skip], self.skip);
        }
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
        #[cfg(feature = "cuda")]
        if let Some(walk) = &self.walk {
            return self.backward_by_walk(walk, &inputs, &ints[0], [&a, skip.as_ref().unwrap_or(&a)], grads, wanted);
        }
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
            let [steps, rate, weight] =
                kernels::heads(sums.as_ref(), dg.as_ref(), [&delta, &a], wanted, Sums::OfInputs);
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

#[cfg(feature = "cuda")]
impl Ssd {
    /// Backward where the walk has Δ, A and D itself. `skip` is D, or anything where there is none.
    fn backward_by_walk(
        &self,
        walk: &HopperWalk,
        inputs: &[CubeTensor],
        table: &CubeTensor,
        [a, skip]: [&CubeTensor; 2],
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [grad_o, grad_state] = grads.try_into().expect("two outputs");
        let (of_delta, of_rate) = (wanted[3], wanted[self.inputs]);
        let of_skip = self.skip != Skip::None && wanted[self.inputs + 1];
        let of_state = self.inputs > 4 && wanted[4];
        let inner = [wanted[0], wanted[1], wanted[2], of_delta || of_rate, of_state];
        let mut found = vec![None; wanted.len()];
        if inner.contains(&true) {
            let grads = [grad_o.clone(), grad_state];
            let [dc, db, dx, dg, key_sums, dstate] =
                walk.backward_of_steps(inputs, table, [a, skip], self.skip, grads, inner);
            if dg.is_some() {
                let delta = contiguous(inputs[3].clone());
                let wanted = [of_delta, false];
                let [steps, rate, _] =
                    kernels::heads(key_sums.as_ref(), dg.as_ref(), [&delta, a], wanted, Sums::OfKeys);
                (found[3], found[self.inputs]) = (steps, rate.filter(|_| of_rate));
            }
            (found[0], found[1], found[2]) = (dc, db, dx);
            if of_state {
                found[4] = dstate;
            }
        }
        if of_skip {
            let x = contiguous(inputs[2].clone());
            found[self.inputs + 1] = Some(match grad_o.map(contiguous) {
                None => zeros(&x, skip.meta.shape().dims::<1>(), DType::F32),
                Some(dy) if self.skip == Skip::Head => kernels::over_channels(&kernels::channels(&x, &dy), walk.heads),
                Some(dy) => kernels::channels(&x, &dy),
            });
        }
        found
    }
}
