//! Gradients through the bridge.
//!
//! Burn's autodiff graph has one output a node. An operator with outputs `y1 … ym` becomes a *root* node that owns the
//! saved tensors, and `m` small *output* nodes whose only parent is the root. Backward visits the output nodes first:
//! each hands its gradient to a carrier, an untracked leaf that serves as a mailbox. The root then collects what is in
//! the mailboxes (an output that the loss did not use left nothing) and launches the operator's backward once.

use burn::backend::Autodiff;
use burn::backend::tensor::FloatTensor;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};

use super::backend::{Bundle, Call, KernelBackend, Stage};

/// The most float inputs an operator may have.
const MAX_INPUTS: usize = 8;

impl<B: KernelBackend, C: CheckpointStrategy> KernelBackend for Autodiff<B, C> {
    fn launch(bundle: Bundle<Self>, call: Call) -> Bundle<Self> {
        match bundle.floats.len() {
            1 => tracked::<B, C, 1>(bundle, call),
            2 => tracked::<B, C, 2>(bundle, call),
            3 => tracked::<B, C, 3>(bundle, call),
            4 => tracked::<B, C, 4>(bundle, call),
            5 => tracked::<B, C, 5>(bundle, call),
            6 => tracked::<B, C, 6>(bundle, call),
            7 => tracked::<B, C, 7>(bundle, call),
            8 => tracked::<B, C, 8>(bundle, call),
            n => unreachable!("an operator has 1 to {MAX_INPUTS} float inputs, not {n}"),
        }
    }
}

/// Hands the gradient of one output to its carrier.
#[derive(Debug)]
struct Output;

impl<B: KernelBackend> Backward<B, 1> for Output {
    type State = NodeId;

    fn backward(self, ops: Ops<NodeId, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        grads.register::<B>(ops.state, grad);
    }
}

/// Launches the operator's backward once, with the gradients that its carriers hold.
#[derive(Debug)]
struct Root;

#[derive(Clone, Debug)]
struct Saved<B: KernelBackend> {
    inputs: Bundle<B>,
    saved: Vec<FloatTensor<B>>,
    carriers: Vec<FloatTensor<Autodiff<B>>>,
    call: Call,
}

impl<B: KernelBackend, const N: usize> Backward<B, N> for Root {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Saved { inputs: mut bundle, saved, carriers, call } = ops.state;
        let found: Vec<_> = carriers.iter().map(|c| grads.remove::<B>(c)).collect();
        let wanted: Vec<_> = ops.parents.iter().map(|p| p.is_some()).collect();
        let call = Call {
            operator: call.operator,
            stage: Stage::Backward { inputs: N, present: found.iter().map(|g| g.is_some()).collect(), wanted },
            tables: call.tables,
        };
        bundle.floats.extend(saved);
        bundle.floats.extend(found.into_iter().flatten());
        let mut results = B::launch(bundle, call).floats.into_iter();
        for parent in ops.parents.into_iter().flatten() {
            let grad = results.next().expect("one gradient for each wanted input");
            grads.register::<B>(parent.id, grad);
        }
    }
}

fn tracked<B: KernelBackend, C: CheckpointStrategy, const N: usize>(
    bundle: Bundle<Autodiff<B, C>>,
    call: Call,
) -> Bundle<Autodiff<B, C>> {
    let (floats, guards): (Vec<_>, Vec<NodeGuard>) = bundle.floats.into_iter().map(|t| t.into_parts()).unzip();
    let guards: [NodeGuard; N] = guards.try_into().expect("as many nodes as inputs");
    let inputs = Bundle::<B> { floats, ints: bundle.ints };
    let floats = match Backward::<B, N>::prepare::<C>(Root, guards).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let saving = Call { stage: Stage::Forward { save: true }, ..call.clone() };
            // A mailbox needs a node of its own, but no buffer: it borrows one that is saved anyway.
            let mailbox = inputs.floats[0].clone();
            let mut outputs = B::launch(inputs.clone(), saving).floats;
            let count = output_count(&call, &inputs);
            let saved = outputs.split_off(count);
            let carriers: Vec<_> = (0..count).map(|_| FloatTensor::<Autodiff<B>>::new(mailbox.clone())).collect();
            let ids: Vec<_> = carriers.iter().map(|c| c.id()).collect();
            let state = Saved { inputs, saved, carriers, call };
            let root = prep.finish(state, mailbox);
            let output =
                |(id, value): (NodeId, FloatTensor<B>)| match Backward::<B, 1>::prepare::<C>(Output, [root.node()])
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish(id, value),
                    OpsKind::UnTracked(prep) => prep.finish(value),
                };
            ids.into_iter().zip(outputs).map(output).collect()
        }
        OpsKind::UnTracked(prep) => {
            let mut outputs = B::launch(inputs, call).floats.into_iter();
            let first = outputs.next().map(|first| prep.finish(first));
            let rest = outputs.map(FloatTensor::<Autodiff<B, C>>::new);
            first.into_iter().chain(rest).collect()
        }
    };
    Bundle { floats, ints: Vec::new() }
}

fn output_count<B: KernelBackend>(call: &Call, inputs: &Bundle<B>) -> usize {
    use burn::backend::TensorMetadata;
    let specs: Vec<_> = inputs.floats.iter().map(|t| super::TensorSpec::new(t.shape(), t.dtype())).collect();
    call.operator.outputs(&specs).len()
}
