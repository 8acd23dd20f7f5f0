//! The one extension trait through which every operator reaches a backend.

use std::sync::Arc;

use burn::backend::fusion::custom::{CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr};
use burn::backend::fusion::{Fusion, FusionBackend, FusionRuntime};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, ExtensionType,
    backend_extension,
};
use burn::tensor::Tensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

pub use burn::backend::fusion::custom::TensorSpec;

use super::tables::Table;

/// An operator with kernels and a handwritten gradient.
///
/// `outputs` must say exactly what `forward` returns: Fusion lays out what follows by it. The bridge checks it at every
/// launch.
pub trait Operator: core::fmt::Debug + Send + Sync + 'static {
    /// The name under which Fusion and error messages know it.
    fn name(&self) -> &'static str;

    /// Shapes and dtypes of the differentiable outputs.
    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec>;

    /// Shapes and dtypes of what `forward` saves for `backward` besides the inputs.
    fn saved(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let _ = inputs;
        Vec::new()
    }

    /// Launches the forward kernels: the outputs, followed by the saved tensors where `save` asks for them.
    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, save: bool) -> Vec<CubeTensor>;

    /// Launches the backward kernels: one gradient for each input, in its shape and dtype, where `wanted`.
    ///
    /// `grads` holds one gradient for each output, `None` where the loss does not use it.
    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>>;
}

/// One launch of an operator, forward or backward.
#[derive(Clone, Debug)]
pub struct Call {
    pub(super) operator: Arc<dyn Operator>,
    pub(super) stage: Stage,
    /// What the operator's integer tensors end with.
    pub(super) tables: Vec<Table>,
}

#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// Inputs are the operator's; outputs its outputs, then (with `save`) what it saves.
    Forward { save: bool },
    /// Inputs are the operator's, then what it saved, then the gradients that are present; outputs the wanted ones.
    Backward { inputs: usize, present: Vec<bool>, wanted: Vec<bool> },
}

impl Call {
    fn id(&self) -> String {
        match self.stage {
            Stage::Forward { .. } => self.operator.name().to_string(),
            Stage::Backward { .. } => format!("{}_backward", self.operator.name()),
        }
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        match &self.stage {
            Stage::Forward { save } => {
                let mut specs = self.operator.outputs(inputs);
                if *save {
                    specs.extend(self.operator.saved(inputs));
                }
                specs
            }
            Stage::Backward { wanted, .. } => {
                let wanted = inputs.iter().zip(wanted).filter(|(_, wanted)| **wanted);
                wanted.map(|(spec, _)| spec.clone()).collect()
            }
        }
    }

    fn launch(&self, mut floats: Vec<CubeTensor>, ints: Vec<CubeTensor>) -> Vec<CubeTensor> {
        match &self.stage {
            Stage::Forward { save } => self.operator.forward(floats, ints, *save),
            Stage::Backward { inputs, present, wanted } => {
                let count = present.iter().filter(|p| **p).count();
                let mut grads = floats.split_off(floats.len() - count).into_iter();
                let saved = floats.split_off(*inputs);
                let grads = present.iter().map(|p| if *p { grads.next() } else { None }).collect();
                let found = self.operator.backward(floats, ints, saved, grads, wanted);
                let found = found.into_iter().zip(wanted).filter(|(_, wanted)| **wanted);
                found.map(|(grad, _)| grad.expect("an operator returns every gradient that is wanted")).collect()
            }
        }
    }
}

/// The tensors of one launch.
pub struct Bundle<B: Backend> {
    pub(super) floats: Vec<FloatTensor<B>>,
    pub(super) ints: Vec<IntTensor<B>>,
}

impl<B: Backend> Clone for Bundle<B> {
    fn clone(&self) -> Self {
        Self { floats: self.floats.clone(), ints: self.ints.clone() }
    }
}

impl<B: Backend> core::fmt::Debug for Bundle<B> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Bundle({} floats, {} ints)", self.floats.len(), self.ints.len())
    }
}

impl<B: Backend> ExtensionType<B> for Bundle<B> {
    type Target = Bundle<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let wrap = |tensor| DispatchTensor { kind: map_kind(tensor), autodiff };
        Bundle {
            floats: self.floats.into_iter().map(|t| wrap(BackendTensor::Float(t))).collect(),
            ints: self.ints.into_iter().map(|t| wrap(BackendTensor::Int(t))).collect(),
        }
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        Self {
            floats: target.floats.into_iter().map(|t| unwrap_kind(t).float()).collect(),
            ints: target.ints.into_iter().map(|t| unwrap_kind(t).int()).collect(),
        }
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.floats.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.floats.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let contexts = target.floats.iter().chain(&target.ints).map(|t| t.autodiff);
        contexts.fold(DispatchAutodiffContext::Disabled, DispatchAutodiffContext::merge)
    }
}

/// A backend that can launch an operator.
#[backend_extension(Cube, Autodiff)]
pub trait KernelBackend: Backend {
    /// Launches `call` on the tensors of `bundle`.
    fn launch(#[extension_type] bundle: Bundle<Self>, call: Call) -> Bundle<Self>;
}

impl KernelBackend for CubeBackend {
    fn launch(bundle: Bundle<Self>, call: Call) -> Bundle<Self> {
        let specs: Vec<_> = bundle.floats.iter().map(spec).collect();
        let expected = call.outputs(&specs);
        let mut ints = bundle.ints;
        ints.extend(call.tables.iter().map(|table| super::tables::on_device(table, &bundle.floats[0])));
        let floats = call.launch(bundle.floats, ints);
        let same = |(found, expected): (&CubeTensor, &TensorSpec)| {
            found.meta.shape() == &expected.shape && found.dtype == expected.dtype
        };
        assert!(
            floats.len() == expected.len() && floats.iter().zip(&expected).all(same),
            "{}: outputs {:?} are not as announced, {expected:?}",
            call.id(),
            floats.iter().map(spec).collect::<Vec<_>>()
        );
        floats.first().into_iter().for_each(super::memory::count_bytes);
        Bundle { floats, ints: Vec::new() }
    }
}

fn spec(tensor: &CubeTensor) -> TensorSpec {
    TensorSpec::new(tensor.meta.shape().clone(), tensor.dtype)
}

// Written by hand and not by the macro's `Fusion` selector, because the number of tensors is known at run time only.
impl<B: FusionBackend + KernelBackend> KernelBackend for Fusion<B> {
    fn launch(bundle: Bundle<Self>, call: Call) -> Bundle<Self> {
        let client = bundle.floats[0].client.clone();
        let specs: Vec<_> = bundle.floats.iter().map(|t| TensorSpec::new(t.shape.clone(), t.dtype)).collect();
        let outputs: Vec<_> = call
            .outputs(&specs)
            .into_iter()
            .map(|spec| TensorIr::uninit(client.create_empty_handle(), spec.shape, spec.dtype))
            .collect();
        let floats: Vec<_> = bundle.floats.into_iter().map(|t| t.into_ir()).collect();
        let ints: Vec<_> = bundle.ints.into_iter().map(|t| t.into_ir()).collect();
        let description = CustomOpIr {
            id: call.id(),
            inputs: floats.iter().chain(&ints).cloned().collect(),
            outputs: outputs.clone(),
            scalars: Vec::new(),
        };
        let run = move |handles: &mut HandleContainer<<B::FusionRuntime as FusionRuntime>::FusionHandle>| {
            // Each input is fetched once and in the order of the description: its last use frees it.
            let inner = Bundle::<B> {
                floats: floats.iter().map(|t| handles.get_float_tensor::<B>(t)).collect(),
                ints: ints.iter().map(|t| handles.get_int_tensor::<B>(t)).collect(),
            };
            let found = B::launch(inner, call.clone());
            for (ir, tensor) in outputs.iter().zip(found.floats) {
                handles.register_float_tensor::<B>(&ir.id, tensor);
            }
            Ok(())
        };
        let operation = OperationIr::Custom(description);
        Bundle { floats: client.register(StreamId::current(), operation, OperationFn(run)), ints: Vec::new() }
    }
}

/// An operator and its inputs, before it runs: another operator may run it as a part of itself.
pub(crate) struct Planned {
    pub(crate) operator: Arc<dyn Operator>,
    pub(crate) floats: Vec<DispatchTensor>,
    pub(crate) ints: Vec<DispatchTensor>,
    /// What the integer tensors end with.
    pub(crate) tables: Vec<Table>,
}

impl Planned {
    /// Runs it: its differentiable outputs, tracked where an input is.
    pub(crate) fn run(self) -> Vec<DispatchTensor> {
        let call = Call { operator: self.operator, stage: Stage::Forward { save: false }, tables: self.tables };
        Dispatch::launch(Bundle { floats: self.floats, ints: self.ints }, call).floats
    }

    /// The outputs of a recurrence, and its last state.
    pub(crate) fn run_recurrence(self) -> (Tensor<4>, Tensor<4>) {
        let mut outputs = self.run().into_iter();
        let mut next = || Tensor::from_dispatch(outputs.next().expect("an output and a state"));
        (next(), next())
    }
}

/// Runs an operator: its differentiable outputs, tracked where an input is.
pub fn apply(operator: impl Operator, floats: Vec<DispatchTensor>, ints: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
    Planned { operator: Arc::new(operator), floats, ints, tables: Vec::new() }.run()
}

/// The same for an operator whose integer inputs are lists.
pub(crate) fn apply_with(
    operator: impl Operator,
    floats: Vec<DispatchTensor>,
    tables: Vec<Table>,
) -> Vec<DispatchTensor> {
    Planned { operator: Arc::new(operator), floats, ints: Vec::new(), tables }.run()
}
