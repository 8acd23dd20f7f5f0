//! A gradient of one's own for what is computed in tensor operations, on every device that a build of this crate names.
//!
//! Burn differentiates what tensor operations compute. Where another gradient is cheaper, as that of a linear system's
//! solution is, which solves a second time and keeps none of the steps, a node is set whose backward pass is a function of
//! tensors. And where a graph is built in parts, the gradients of one part's inputs are given to the part before.

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, DispatchTensor, backend_extension};
use burn::tensor::{Device, Tensor};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

/// What makes the gradient of the input of that of the output. Both are without autodiff.
#[derive(Clone)]
pub(crate) struct OwnGradient(Arc<dyn Fn(DispatchTensor) -> DispatchTensor + Send + Sync>);

impl core::fmt::Debug for OwnGradient {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("OwnGradient")
    }
}

/// A backend on which a value can have a gradient of its own.
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), Autodiff)]
pub(crate) trait OwnGradientBackend: Backend {
    /// `value`, as a function of `input`.
    fn with_gradient(input: FloatTensor<Self>, value: FloatTensor<Self>, gradient: OwnGradient) -> FloatTensor<Self>;

    /// `value`, as a function of `a`, `b` and `c`, whose gradients are those of `given`.
    fn pulled(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        value: FloatTensor<Self>,
        given: Given,
    ) -> FloatTensor<Self>;
}

/// The gradient of each input of a node; none for one that is not to receive any. They are without autodiff.
#[derive(Clone)]
pub(crate) struct Given([Option<DispatchTensor>; MOST_PULLED]);

impl core::fmt::Debug for Given {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Given")
    }
}

/// How many tensors [`pull`] takes.
const MOST_PULLED: usize = 3;

/// A backend whose tensors stand as tensors of the user's interface.
trait Interface: Backend {
    fn wrap(x: FloatTensor<Self>) -> DispatchTensor;
    fn unwrap(x: DispatchTensor) -> FloatTensor<Self>;
}

macro_rules! own_gradient {
    ($feature:literal, $backend:ident) => {
        #[cfg(feature = $feature)]
        impl OwnGradientBackend for burn::backend::$backend {
            fn with_gradient(_: FloatTensor<Self>, value: FloatTensor<Self>, _: OwnGradient) -> FloatTensor<Self> {
                value
            }

            fn pulled(
                _: FloatTensor<Self>,
                _: FloatTensor<Self>,
                _: FloatTensor<Self>,
                value: FloatTensor<Self>,
                _: Given,
            ) -> FloatTensor<Self> {
                value
            }
        }

        #[cfg(feature = $feature)]
        impl Interface for burn::backend::$backend {
            fn wrap(x: FloatTensor<Self>) -> DispatchTensor {
                use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensorKind};
                let kind = DispatchTensorKind::$backend(BackendTensor::Float(x));
                DispatchTensor { kind, autodiff: DispatchAutodiffContext::Disabled }
            }

            fn unwrap(x: DispatchTensor) -> FloatTensor<Self> {
                match x.kind {
                    burn::backend::DispatchTensorKind::$backend(x) => x.float(),
                    _ => unreachable!("a gradient is on the device of its output, without autodiff"),
                }
            }
        }
    };
}

own_gradient!("cube", Cube);
own_gradient!("flex", Flex);

#[derive(Debug)]
struct Node;

impl<B: Interface> Backward<B, 1> for Node {
    type State = OwnGradient;

    fn backward(self, ops: Ops<OwnGradient, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::unwrap((ops.state.0)(B::wrap(gradient))));
        }
    }
}

impl<B: OwnGradientBackend + Interface, C: CheckpointStrategy> OwnGradientBackend for Autodiff<B, C> {
    fn with_gradient(input: FloatTensor<Self>, value: FloatTensor<Self>, gradient: OwnGradient) -> FloatTensor<Self> {
        let (_, guard) = input.into_parts();
        let value = value.into_primitive();
        match Backward::<B, 1>::prepare::<C>(Node, [guard]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(gradient, value),
            OpsKind::UnTracked(prep) => prep.finish(value),
        }
    }

    fn pulled(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        value: FloatTensor<Self>,
        given: Given,
    ) -> FloatTensor<Self> {
        let guards = [a, b, c].map(|x| x.into_parts().1);
        let value = value.into_primitive();
        match Backward::<B, MOST_PULLED>::prepare::<C>(Pulled, guards).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(given, value),
            OpsKind::UnTracked(prep) => prep.finish(value),
        }
    }
}

#[derive(Debug)]
struct Pulled;

impl<B: Interface> Backward<B, MOST_PULLED> for Pulled {
    type State = Given;

    fn backward(self, ops: Ops<Given, MOST_PULLED>, grads: &mut Gradients, _: &mut Checkpointer) {
        // The gradient of the value itself is of no interest.
        grads.consume::<B>(&ops.node);
        for (parent, given) in ops.parents.into_iter().zip(ops.state.0) {
            if let (Some(parent), Some(given)) = (parent, given) {
                grads.register::<B>(parent.id, B::unwrap(given));
            }
        }
    }
}

/// A number, `[1]`, with which a backward pass begins at `outputs` instead of at a loss: each tensor has the gradient that
/// stands beside it, which is without autodiff and of its shape and dtype.
///
/// The gradients arrive before those of anything the outputs themselves go into, as they would from what comes after them
/// in a larger graph: a tensor that is part of both gets its sum in the same order, to the last bit.
///
/// # Panics
/// Without outputs or with more than 3.
pub fn pull<const D: usize>(outputs: Vec<(Tensor<D>, Tensor<D>)>) -> Tensor<1> {
    assert!((1..=MOST_PULLED).contains(&outputs.len()), "1 to {MOST_PULLED} outputs, not {}", outputs.len());
    let first = outputs[0].0.clone();
    let value = Tensor::<1>::zeros([1], &first.device());
    let (mut inputs, mut given) = ([(); MOST_PULLED].map(|()| first.clone()), [const { None }; MOST_PULLED]);
    for (at, (output, gradient)) in outputs.into_iter().enumerate() {
        inputs[at] = output;
        given[at] = Some(gradient.into_dispatch());
    }
    let [a, b, c] = inputs.map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::pulled(a, b, c, value.into_dispatch(), Given(given)))
}

/// Whether [`with_gradient`] and [`pull`] are known on this device.
pub fn takes_own_gradients(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
    match device.clone().inner().as_dispatch() {
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(_) => true,
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[allow(unreachable_patterns)]
        _ => false,
    }
}

/// `value`; the gradient of `input` is `gradient` of its own. The device is one that [`takes_own_gradients`].
pub(crate) fn with_gradient<const D: usize>(
    input: Tensor<D>,
    value: Tensor<D>,
    gradient: impl Fn(Tensor<D>) -> Tensor<D> + Send + Sync + 'static,
) -> Tensor<D> {
    let gradient = move |x| gradient(Tensor::from_dispatch(x)).inner().into_dispatch();
    let out = Dispatch::with_gradient(input.into_dispatch(), value.into_dispatch(), OwnGradient(Arc::new(gradient)));
    Tensor::from_dispatch(out)
}
