//! AdamW over the parameters of a model: the rules of a recipe, and what a checkpoint holds.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_fla_ops::{AdamWOptions, AdamWSlot, AdamWUpdated, Engine, adamw};

use super::{ParamRule, ParamRules, ParamTable};
use crate::TrainError;
use crate::recipe::{OptimizerSection, TrainingSection};

/// AdamW over the parameters of a [`ParamTable`]: the equations are those of [`burn_fla_ops::adamw`](mod@burn_fla_ops::adamw).
///
/// When the norm of the gradient is not finite (and `skip_nan_inf` is set) the step changes neither parameters nor
/// moments nor the bias corrections. That decision, the norm and the counters stay on the device: a step never waits for
/// it.
#[derive(Clone, Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    max_norm: f64,
    skip: bool,
    engine: Engine,
    table: ParamTable,
    rules: Vec<ParamRule>,
    state: AdamWState,
}

/// What a checkpoint must hold to continue exactly.
#[derive(Clone, Debug)]
pub struct AdamWState {
    /// First moments, flattened, in the table's order.
    pub first: Vec<Tensor<1>>,
    /// Second moments.
    pub second: Vec<Tensor<1>>,
    /// 1 − β₁ᵗ, 1 − β₂ᵗ, skips in a row, the most skips in a row, skips in all: `[5]`.
    pub counters: Tensor<1>,
}

/// The names of [`AdamWState::counters`] in a checkpoint.
pub(crate) const COUNTER_NAMES: [&str; 5] =
    ["correction1", "correction2", "skipped_in_a_row", "skipped_most", "skipped"];

/// What a step leaves on the device for the log.
#[derive(Clone, Debug)]
pub struct StepReport {
    counters: Tensor<1>,
    norm: Tensor<1>,
}

/// A [`StepReport`] that has been read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepFigures {
    /// The gradient's norm before the clip.
    pub grad_norm: f64,
    /// Skips in a row up to this step.
    pub skipped_in_a_row: u64,
    /// The most skips in a row so far.
    pub skipped_most: u64,
    /// Skips in all.
    pub skipped: u64,
}

impl StepReport {
    /// Reads it from the device, which waits for the step.
    ///
    /// # Errors
    /// A device that fails.
    pub fn read(&self) -> Result<StepFigures, TrainError> {
        let figures = Tensor::cat(vec![self.norm.clone(), self.counters.clone()], 0);
        let figures = figures.try_into_vec_as::<f32>().map_err(|error| TrainError::Execution(error.to_string()))?;
        Ok(StepFigures {
            grad_norm: f64::from(figures[0]),
            skipped_in_a_row: figures[3] as u64,
            skipped_most: figures[4] as u64,
            skipped: figures[5] as u64,
        })
    }
}

impl StepReport {
    /// The same with the norm over more parameters than AdamW has.
    pub(super) fn with_norm(self, norm: Tensor<1>) -> StepReport {
        StepReport { norm, ..self }
    }
}

impl AdamW {
    /// An optimiser with zero moments on `device`, which must have no autodiff.
    ///
    /// # Errors
    /// A group whose pattern is no regular expression.
    pub fn new(
        table: ParamTable,
        optimizer: &OptimizerSection,
        training: &TrainingSection,
        device: &Device,
    ) -> Result<AdamW, TrainError> {
        let rules = ParamRules::new(optimizer)?;
        let entries = table.entries();
        let zeros = || entries.iter().map(|entry| Tensor::zeros([entry.len()], device)).collect();
        Ok(AdamW {
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.eps,
            max_norm: training.max_norm,
            skip: training.skip_nan_inf,
            engine: Engine::Auto,
            rules: entries.iter().map(|entry| rules.of(&entry.name, entry.shape.len())).collect(),
            state: AdamWState {
                first: zeros(),
                second: zeros(),
                counters: Tensor::zeros([COUNTER_NAMES.len()], device),
            },
            table,
        })
    }

    /// The same with another engine.
    pub fn with_engine(self, engine: Engine) -> AdamW {
        AdamW { engine, ..self }
    }

    /// The parameters it updates.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// Moments and counters.
    pub fn state(&self) -> &AdamWState {
        &self.state
    }

    /// Continues from saved moments and counters, which must have the shapes of [`AdamW::state`].
    pub fn set_state(&mut self, state: AdamWState) {
        self.state = state;
    }

    /// One update of `model` (without autodiff) with gradients in the table's order and learning rate `lr`. A parameter
    /// without a gradient stays as it is.
    ///
    /// # Errors
    /// Gradients of other sizes or on another device than the parameters.
    pub fn step<M: Module>(
        &mut self,
        model: M,
        mut grads: Vec<Option<Tensor<1>>>,
        lr: f64,
    ) -> Result<(M, StepReport), TrainError> {
        let options = AdamWOptions {
            lr,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            max_norm: self.max_norm,
            skip_non_finite: self.skip,
            engine: self.engine,
        };
        let table = self.table.clone();
        let mut report = None;
        // Each tensor is moved all the way, so that an update finds itself its only owner and works in place.
        let model = table.map(model, |mut values| {
            let counters = self.state.counters.clone();
            let take = |slot: &mut Tensor<1>| std::mem::replace(slot, counters.clone());
            let mut places = Vec::new();
            let mut slots = Vec::new();
            for (at, grad) in grads.iter_mut().enumerate() {
                let Some(grad) = grad.take() else { continue };
                let Some(value) = values[at].take() else { continue };
                places.push(at);
                slots.push(AdamWSlot {
                    value,
                    grad,
                    first: take(&mut self.state.first[at]),
                    second: take(&mut self.state.second[at]),
                    lr_scale: self.rules[at].lr_scale,
                    weight_decay: self.rules[at].weight_decay,
                });
            }
            let step = adamw(slots, counters, options)?;
            for (at, AdamWUpdated { value, first, second }) in places.into_iter().zip(step.updated) {
                values[at] = Some(value);
                self.state.first[at] = first;
                self.state.second[at] = second;
            }
            self.state.counters = step.counters.clone();
            report = Some(StepReport { counters: step.counters, norm: step.norm });
            Ok(values)
        })?;
        let report = report.expect("the update has run");
        Ok((model, report))
    }
}
