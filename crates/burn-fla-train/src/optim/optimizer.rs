//! The optimiser that a recipe names.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{AdamW, AdamWState, COUNTER_NAMES, Muon, ParamEntry, ParamTable, StepReport};
use crate::TrainError;
use crate::recipe::{OptimizerName, OptimizerSection, TrainingSection};

/// A tensor of an optimiser's state: its name in a checkpoint, its shape, its values.
pub type StateTensor = (String, Vec<usize>, Tensor<1>);

/// Gives a tensor of a saved state by name and shape, flattened.
pub type ReadState<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor<1>, TrainError> + 'a;

/// What a checkpoint keeps of an optimiser.
pub trait OptimizerState {
    /// Every tensor of the state.
    fn tensors(&self) -> Vec<StateTensor>;

    /// Continues from the tensors that `read` gives by the names and shapes of [`tensors`](Self::tensors).
    ///
    /// # Errors
    /// Those of `read`; nothing has changed then.
    fn restore(&mut self, read: &mut ReadState<'_>) -> Result<(), TrainError>;
}

/// AdamW or Muon.
#[derive(Clone, Debug)]
pub enum Optimizer {
    /// AdamW for every parameter.
    AdamW(Box<AdamW>),
    /// Muon for the matrices of the layers, AdamW for the others.
    Muon(Box<Muon>),
}

impl Optimizer {
    /// The optimiser of a recipe, with zero moments on `device`, which must have no autodiff.
    ///
    /// # Errors
    /// A group whose pattern is no regular expression.
    pub fn new(
        table: ParamTable,
        optimizer: &OptimizerSection,
        training: &TrainingSection,
        device: &Device,
    ) -> Result<Optimizer, TrainError> {
        Ok(match optimizer.name {
            OptimizerName::Adamw => Optimizer::AdamW(Box::new(AdamW::new(table, optimizer, training, device)?)),
            OptimizerName::Muon => Optimizer::Muon(Box::new(Muon::new(table, optimizer, training, device)?)),
        })
    }

    /// The parameters it updates.
    pub fn table(&self) -> &ParamTable {
        match self {
            Optimizer::AdamW(adamw) => adamw.table(),
            Optimizer::Muon(muon) => muon.table(),
        }
    }

    /// One update of `model` (without autodiff) with gradients in the table's order and learning rate `lr`.
    ///
    /// # Errors
    /// Gradients of other sizes or on another device than the parameters.
    pub fn step<M: Module>(
        &mut self,
        model: M,
        grads: Vec<Option<Tensor<1>>>,
        lr: f64,
    ) -> Result<(M, StepReport), TrainError> {
        match self {
            Optimizer::AdamW(adamw) => adamw.step(model, grads, lr),
            Optimizer::Muon(muon) => muon.step(model, grads, lr),
        }
    }
}

fn named(kind: &str, entry: &ParamEntry) -> String {
    format!("{kind}.{}", entry.name)
}

/// The moments as `exp_avg.NAME` and `exp_avg_sq.NAME` in the parameters' shapes, and the counters.
impl OptimizerState for AdamW {
    fn tensors(&self) -> Vec<StateTensor> {
        let state = self.state();
        let mut tensors = Vec::new();
        for (at, entry) in self.table().entries().iter().enumerate() {
            for (kind, moments) in [("exp_avg", &state.first), ("exp_avg_sq", &state.second)] {
                tensors.push((named(kind, entry), entry.shape.clone(), moments[at].clone()));
            }
        }
        for (at, name) in COUNTER_NAMES.iter().enumerate() {
            tensors.push((name.to_string(), vec![1], state.counters.clone().narrow(0, at, 1)));
        }
        tensors
    }

    fn restore(&mut self, read: &mut ReadState<'_>) -> Result<(), TrainError> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for entry in self.table().entries() {
            first.push(read(&named("exp_avg", entry), &entry.shape)?);
            second.push(read(&named("exp_avg_sq", entry), &entry.shape)?);
        }
        let counters: Result<Vec<_>, _> = COUNTER_NAMES.iter().map(|name| read(name, &[1])).collect();
        self.set_state(AdamWState { first, second, counters: Tensor::cat(counters?, 0) });
        Ok(())
    }
}

/// The moments of the matrices as `momentum.NAME`, and the state of AdamW.
impl OptimizerState for Muon {
    fn tensors(&self) -> Vec<StateTensor> {
        let (table, moments) = self.moments();
        let moment = |(entry, moment): (&ParamEntry, &Tensor<1>)| {
            (named("momentum", entry), entry.shape.clone(), moment.clone())
        };
        let mut tensors: Vec<StateTensor> = table.entries().iter().zip(moments).map(moment).collect();
        tensors.extend(self.others().tensors());
        tensors
    }

    fn restore(&mut self, read: &mut ReadState<'_>) -> Result<(), TrainError> {
        let entries = self.moments().0.entries().to_vec();
        let moments: Result<Vec<_>, _> =
            entries.iter().map(|entry| read(&named("momentum", entry), &entry.shape)).collect();
        let moments = moments?;
        self.others_mut().restore(read)?;
        self.set_moments(moments);
        Ok(())
    }
}

impl OptimizerState for Optimizer {
    fn tensors(&self) -> Vec<StateTensor> {
        match self {
            Optimizer::AdamW(adamw) => adamw.tensors(),
            Optimizer::Muon(muon) => muon.tensors(),
        }
    }

    fn restore(&mut self, read: &mut ReadState<'_>) -> Result<(), TrainError> {
        match self {
            Optimizer::AdamW(adamw) => adamw.restore(read),
            Optimizer::Muon(muon) => muon.restore(read),
        }
    }
}
