//! Gradients with the activations of one block at a time (activation checkpoints; Chen et al. 2016).

use burn::module::Module;
use burn::tensor::{Gradients, Int, Tensor};
use burn_fla_ops::CuSeqlens;
use burn_fla_ops::bridge::{pull, takes_own_gradients};

use super::block::Stream;
use super::causal_lm::{CausalLm, same_shape};
use crate::layers::SequenceContext;
use crate::{Compute, NnError};

impl CausalLm {
    /// The sum of the cross entropy as [`loss`](Self::loss) gives it, times `scale`, and its gradients.
    ///
    /// The blocks run forward without a graph, and only what enters each is kept: `[B, T, hidden]` twice. Then, from the
    /// last to the first, each runs again with a graph of its own and goes backward at once. So the activations of one
    /// block are in memory at a time, for one more forward pass. The numbers are those of a backward pass over the whole
    /// graph, to the last bit where the device adds in a fixed order.
    ///
    /// `collect` is called after each part with the gradients it has found; a parameter may have gradients in two parts,
    /// as an embedding that is the output layer too, and they are to be added in the order in which they come.
    ///
    /// # Errors
    /// As [`loss`](Self::loss); a device of another crate's backend, on which a graph cannot be built in parts.
    pub fn backward_by_block(
        &self,
        ids: Tensor<2, Int>,
        labels: Tensor<2, Int>,
        cu: Option<&CuSeqlens>,
        compute: Compute,
        scale: f64,
        collect: &mut dyn FnMut(&mut Gradients),
    ) -> Result<Tensor<1>, NnError> {
        same_shape(&ids, &labels)?;
        if !takes_own_gradients(&ids.device()) {
            return Err(NnError::argument("ids", "activations cannot be recomputed by block on this device"));
        }
        let context = || SequenceContext::new(ids.dims(), cu, compute, &ids.device());
        // On the same backend as what follows, which may compute an operation in another way than the one below it; but
        // without anything that is tracked there is no graph.
        let mut kept = self.clone().no_grad().inputs_of_blocks(ids.clone(), context()?)?;

        let last = Leaf::of(kept.end);
        let h = last.stream().finish(&self.model.norm, &context()?)?;
        let loss = self.loss_of_hidden(h, labels, compute)?.sum * scale;
        let mut grads = loss.backward();
        collect(&mut grads);
        let mut upstream = last.gradient(&mut grads);

        let bounds = self.lower_bounds();
        let mut from_bounds: Option<Tensor<2>> = None;
        let mut from_first: Option<Tensor<3>> = None;
        for (index, block) in self.model.layers.iter().enumerate().rev() {
            let Some(entry) = kept.entries.pop() else { break };
            let entry = Leaf::of(entry);
            let bounds = bounds.as_ref().map(leaf);
            let first = kept.first.as_ref().filter(|(layer, _)| index > *layer).map(|(_, values)| leaf(values));
            let context = context()?.with_lower_bounds(bounds.clone()).with_first_values(first.clone());
            let (out, _) = block.forward(entry.stream(), None, &context)?;
            let mut outputs = pairs(out, upstream);
            if kept.first.as_ref().is_some_and(|(layer, _)| index == *layer) {
                // What the later layers took of this one's values.
                outputs.extend(context.kept_first_values().zip(from_first.take()));
            }
            let mut grads = pull(outputs).backward();
            collect(&mut grads);
            upstream = entry.gradient(&mut grads);
            add(&mut from_bounds, bounds.and_then(|bounds| bounds.grad_remove(&mut grads)));
            add(&mut from_first, first.and_then(|first| first.grad_remove(&mut grads)));
        }

        let begin = self.begin(ids.clone(), compute.dtype);
        collect(&mut pull(pairs(begin, upstream)).backward());
        if let Some(pair) = bounds.zip(from_bounds) {
            collect(&mut pull(vec![pair]).backward());
        }
        Ok(loss.inner())
    }

    /// The forward pass of a model that tracks nothing.
    fn inputs_of_blocks(&self, ids: Tensor<2, Int>, context: SequenceContext) -> Result<Kept, NnError> {
        let context = context.with_lower_bounds(self.lower_bounds());
        let mut kept = Kept { entries: Vec::new(), end: self.begin(ids, context.compute().dtype), first: None };
        for (index, block) in self.model.layers.iter().enumerate() {
            kept.entries.push(kept.end.clone());
            kept.end = block.forward(kept.end, None, &context)?.0;
            if kept.first.is_none() {
                kept.first = context.kept_first_values().map(|values| (index, values));
            }
        }
        Ok(kept)
    }
}

/// What is kept of the forward pass; nothing of it is part of a graph.
struct Kept {
    /// What enters each block.
    entries: Vec<Stream>,
    /// What leaves the last.
    end: Stream,
    /// The layer whose values later layers mix with theirs, and these values.
    first: Option<(usize, Tensor<3>)>,
}

/// A stream with which a graph begins.
struct Leaf(Stream);

impl Leaf {
    fn of(stream: Stream) -> Leaf {
        Leaf(Stream { residual: leaf(&stream.residual), update: stream.update.as_ref().map(leaf), dtype: stream.dtype })
    }

    fn stream(&self) -> Stream {
        self.0.clone()
    }

    /// The gradients of the residual and of the update.
    fn gradient(&self, grads: &mut Gradients) -> [Option<Tensor<3>>; 2] {
        let update = self.0.update.as_ref().and_then(|update| update.grad_remove(grads));
        [self.0.residual.grad_remove(grads), update]
    }
}

fn leaf<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    x.clone().inner().autodiff().require_grad()
}

/// The tensors of a stream, each with its gradient.
fn pairs(stream: Stream, [residual, update]: [Option<Tensor<3>>; 2]) -> Vec<(Tensor<3>, Tensor<3>)> {
    let residual = residual.map(|gradient| (stream.residual, gradient));
    residual.into_iter().chain(stream.update.zip(update)).collect()
}

fn add<const D: usize>(sum: &mut Option<Tensor<D>>, more: Option<Tensor<D>>) {
    *sum = match (sum.take(), more) {
        (Some(sum), Some(more)) => Some(sum + more),
        (sum, more) => sum.or(more),
    };
}
