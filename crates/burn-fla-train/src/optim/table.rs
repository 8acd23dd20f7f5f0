//! The parameters of a module in a fixed order, and what can be gathered from or laid over them.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Tensor};

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

    /// Replaces every parameter of a model without autodiff by what `update` makes of it, flattened.
    ///
    /// The tensor is moved into `update`, so that an operation on it may work in place.
    pub fn map<M: Module>(&self, model: M, update: &mut dyn FnMut(usize, Tensor<1>) -> Tensor<1>) -> M {
        struct Update<'a> {
            table: &'a ParamTable,
            update: &'a mut dyn FnMut(usize, Tensor<1>) -> Tensor<1>,
        }
        impl ModuleMapper for Update<'_> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some(&at) = self.table.index.get(&param.id) else { return param };
                param.map(|value| {
                    let shape = value.shape();
                    let n = self.table.entries[at].len();
                    (self.update)(at, value.reshape([n])).reshape(shape)
                })
            }
        }
        model.map(&mut Update { table: self, update })
    }
}
