//! A gradient of one's own for what is computed in tensor operations, on every device that a build of this crate names.
//!
//! Burn differentiates what tensor operations compute. Where another gradient is cheaper, as that of a linear system's
//! solution is, which solves a second time and keeps none of the steps, a node is set whose backward pass is a function of
//! tensors.

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
}

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
}

/// Whether [`with_gradient`] is known on this device.
pub(crate) fn takes_own_gradients(device: &Device) -> bool {
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
