//! The parameters of a module in a fixed order, and what can be gathered from or laid over them.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Shape, Tensor};

use crate::TrainError;

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamEntry {
    /// Its name in a Hugging Face folder.
    pub name: String,
    /// Its identity in Burn.
    pub id: ParamId,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl ParamEntry {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parameters of a model; everything per parameter (gradients, moments) is a list in this order.
#[derive(Clone, Debug)]
pub struct ParamTable {
    entries: Vec<ParamEntry>,
    index: HashMap<ParamId, usize>,
}

impl ParamTable {
    /// A table of these parameters, in this order.
    pub fn new(entries: Vec<ParamEntry>) -> Self {
        let index = entries.iter().enumerate().map(|(at, entry)| (entry.id, at)).collect();
        ParamTable { entries, index }
    }

    /// The parameters.
    pub fn entries(&self) -> &[ParamEntry] {
        &self.entries
    }

    /// Takes the gradients of `model` out of `grads`, flattened and without autodiff; `None` for a parameter that the
    /// loss does not depend on.
    pub fn gradients<M: Module>(&self, model: &M, grads: &mut Gradients) -> Vec<Option<Tensor<1>>> {
        struct Take<'a> {
            table: &'a ParamTable,
            grads: &'a mut Gradients,
            out: Vec<Option<Tensor<1>>>,
        }
        impl ModuleVisitor for Take<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(&at) = self.table.index.get(&param.id)
                    && let Some(grad) = param.val().grad_remove(self.grads)
                {
                    let n = self.table.entries[at].len();
                    self.out[at] = Some(grad.reshape([n]));
                }
            }
        }
        let mut take = Take { table: self, grads, out: vec![None; self.entries.len()] };
        model.visit(&mut take);
        take.out
    }

    /// The values of the parameters whose entry is `wanted`, flattened, in this order.
    pub fn values<M: Module>(&self, model: &M, wanted: impl Fn(&ParamEntry) -> bool) -> Vec<(&ParamEntry, Tensor<1>)> {
        struct Look<'a, F> {
            table: &'a ParamTable,
            wanted: F,
            out: Vec<(usize, Tensor<1>)>,
        }
        impl<F: Fn(&ParamEntry) -> bool> ModuleVisitor for Look<'_, F> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(&at) = self.table.index.get(&param.id)
                    && (self.wanted)(&self.table.entries[at])
                {
                    self.out.push((at, param.val().reshape([self.table.entries[at].len()])));
                }
            }
        }
        let mut look = Look { table: self, wanted, out: Vec::new() };
        model.visit(&mut look);
        look.out.sort_by_key(|(at, _)| *at);
        look.out.into_iter().map(|(at, value)| (&self.entries[at], value)).collect()
    }

    /// Replaces the parameters of a model without autodiff by what `update` makes of them all: flattened, in this order,
    /// `None` for one that the model lacks.
    ///
    /// The tensors are moved into `update`, so that an operation on them may work in place.
    ///
    /// # Errors
    /// Those of `update`.
    pub fn map<M: Module>(
        &self,
        model: M,
        update: impl FnOnce(Vec<Option<Tensor<1>>>) -> Result<Vec<Option<Tensor<1>>>, TrainError>,
    ) -> Result<M, TrainError> {
        /// Takes every value out, and leaves a number in its place.
        struct Take<'a> {
            table: &'a ParamTable,
            values: Vec<Option<Tensor<1>>>,
            /// The number, by rank.
            left: HashMap<usize, Box<dyn Any>>,
        }
        impl ModuleMapper for Take<'_> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some(&at) = self.table.index.get(&param.id) else { return param };
                param.map(|value| {
                    let device = value.device();
                    self.values[at] = Some(value.reshape([self.table.entries[at].len()]));
                    let left = self.left.entry(D).or_insert_with(|| Box::new(Tensor::<D>::zeros([1; D], &device)));
                    left.downcast_ref::<Tensor<D>>().expect("kept by its rank").clone()
                })
            }
        }
        struct Put<'a> {
            table: &'a ParamTable,
            values: Vec<Option<Tensor<1>>>,
        }
        impl ModuleMapper for Put<'_> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some(&at) = self.table.index.get(&param.id) else { return param };
                match self.values[at].take() {
                    Some(value) => param.map(|_| value.reshape(Shape::from(self.table.entries[at].shape.clone()))),
                    None => param,
                }
            }
        }
        let mut take = Take { table: self, values: vec![None; self.entries.len()], left: HashMap::new() };
        let model = model.map(&mut take);
        let values = update(take.values)?;
        Ok(model.map(&mut Put { table: self, values }))
    }
}
