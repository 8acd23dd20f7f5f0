//! The optimiser of the expected loss curves: AdamW in its plainest form, on every parameter alike.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Gradients, Tensor};

use super::Moments;
use crate::CausalLm;

const RATE: f64 = 1e-3;
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPS: f64 = 1e-8;
const DECAY: f64 = 0.1;

/// p ← p (1 − η λ) − η m̂ / (√v̂ + ε), all in f32 on the device.
#[derive(Default)]
pub(super) struct AdamW {
    steps: i32,
    moments: Moments,
}

impl AdamW {
    /// The model after one step; parameters without a gradient stay as they are.
    pub fn step(&mut self, model: CausalLm, mut gradients: Gradients) -> CausalLm {
        self.steps += 1;
        model.map(&mut Update {
            correction: [BETA1, BETA2].map(|beta| 1.0 - beta.powi(self.steps)),
            moments: &mut self.moments,
            gradients: &mut gradients,
        })
    }
}

struct Update<'a> {
    correction: [f64; 2],
    moments: &'a mut Moments,
    gradients: &'a mut Gradients,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        let Some(gradient) = value.grad_remove(self.gradients) else {
            return Param::from_mapped_value(id, value, mapper);
        };
        let shape = value.dims();
        let count = shape.iter().product::<usize>();
        let gradient = gradient.reshape([count]);
        let (m, v) = self.moments.remove(&id).unwrap_or_else(|| (gradient.zeros_like(), gradient.zeros_like()));
        let m = m * BETA1 + gradient.clone() * (1.0 - BETA1);
        let v = v * BETA2 + gradient.clone() * gradient * (1.0 - BETA2);
        let denominator = v.clone().sqrt() / self.correction[1].sqrt() + EPS;
        let step = m.clone() / denominator * (RATE / self.correction[0]);
        self.moments.insert(id, (m, v));
        let value = value.inner() * (1.0 - RATE * DECAY) - step.reshape(shape);
        Param::from_mapped_value(id, Tensor::from_inner(value).require_grad(), mapper)
    }
}
