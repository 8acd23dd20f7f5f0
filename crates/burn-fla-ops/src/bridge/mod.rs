//! What every operator needs to reach a backend, written once.
//!
//! An operator with kernels implements [`Operator`]: the shapes of its outputs, its forward launch and its backward
//! launch, over plain [`CubeTensor`]s. [`apply`] runs it on tensors of any CubeCL device, under Fusion and Autodiff:
//!
//! - several differentiable outputs (Burn's autodiff knows one output an operation: each output becomes a small node of
//!   its own whose gradient is handed to the operator's node, see [`autodiff`]);
//! - integer inputs (positions, labels), which carry no gradient, and lists of integers (where chunks lie), which are
//!   brought to the device once and kept there, see [`tables`];
//! - optional inputs: the operator says in its fields which are there, and the lists are as long as that;
//! - inputs that are not tracked, outputs that the loss does not use, the same tensor given twice.
//!
//! Devices without kernels never come here: the public functions ask [`has_kernels`] and take the reference.
#![cfg_attr(not(feature = "cube"), allow(unused_imports, dead_code))]

#[cfg(feature = "cube")]
mod autodiff;
#[cfg(feature = "cube")]
mod backend;
#[cfg(feature = "cube")]
mod memory;
#[cfg(any(feature = "cube", feature = "flex"))]
pub(crate) mod own_gradient;
#[cfg(feature = "cube")]
mod tables;

#[cfg(feature = "cube")]
pub use backend::{Call, Operator, TensorSpec, apply};
#[cfg(feature = "cube")]
pub(crate) use backend::{Planned, apply_with};
#[cfg(feature = "cube")]
pub use burn_cubecl::tensor::CubeTensor;
#[cfg(feature = "cube")]
pub use memory::{alloc, contiguous, most_bytes, owned, poison_outputs, storage, zeros};
#[cfg(any(feature = "cube", feature = "flex"))]
pub use own_gradient::{pull, takes_own_gradients};
#[cfg(feature = "cube")]
pub(crate) use tables::Table;

/// Whether a device of this build can begin a backward pass with [`pull`].
#[cfg(not(any(feature = "cube", feature = "flex")))]
pub fn takes_own_gradients(_: &Device) -> bool {
    false
}

/// In a build without devices nothing is computed.
///
/// # Panics
/// Always.
#[cfg(not(any(feature = "cube", feature = "flex")))]
pub fn pull<const D: usize>(_: Vec<(Tensor<D>, Tensor<D>)>) -> Tensor<1> {
    unreachable!("no device of this build takes gradients of one's own")
}

/// Fills the outputs of kernels with NaN before they are launched, for tests. In a build without kernels there are none.
#[cfg(not(feature = "cube"))]
pub fn poison_outputs(_on: bool) {}

use burn::tensor::{Device, Tensor};

use crate::{Engine, OpError};

/// Whether kernels run on this device with this engine.
pub fn has_kernels(device: &Device, engine: Engine) -> bool {
    #[cfg(feature = "cube")]
    {
        engine != Engine::Reference
            && matches!(device.clone().inner().as_dispatch(), burn::backend::DispatchDevice::Cube(_))
    }
    #[cfg(not(feature = "cube"))]
    {
        let _ = (device, engine);
        false
    }
}

/// Whether this is a CUDA device.
#[cfg(feature = "cube")]
pub fn is_cuda(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
    use burn_cubecl::CubeDevice;
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Cube(CubeDevice::Cuda(_)))
}

/// Whether this is a CUDA device on which the kernels for Hopper run.
#[cfg(feature = "cuda")]
pub fn is_hopper(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
    use burn_cubecl::CubeDevice;
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device @ CubeDevice::Cuda(_)) => crate::tile::hopper::supported(&device.client()),
        _ => false,
    }
}

/// Whether this is a CUDA device on which the kernels of [`crate::tile::mma`] run.
#[cfg(feature = "cuda")]
pub fn has_mma(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
    use burn_cubecl::CubeDevice;
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device @ CubeDevice::Cuda(_)) => crate::tile::mma::supported(&device.client()),
        _ => false,
    }
}

/// Checks that `tensor` lives on `device`.
pub(crate) fn same_device<const D: usize>(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
    device: &Device,
) -> Result<(), OpError> {
    let found = tensor.device();
    if found.clone().inner() == device.clone().inner() {
        return Ok(());
    }
    Err(OpError::Device { op, argument, found: format!("{found:?}"), expected: format!("{device:?}") })
}

/// Checks one argument's shape.
pub(crate) fn same_shape<const D: usize>(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
    expected: [usize; D],
    names: &str,
) -> Result<(), OpError> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(OpError::Shape { op, argument, found: tensor.dims().to_vec(), expected: format!("{names} = {expected:?}") })
}

/// Checks one argument's dtype against that of another.
pub(crate) fn same_dtype<const D: usize>(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
    expected: burn::tensor::DType,
) -> Result<(), OpError> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(OpError::DType { op, argument, found: tensor.dtype(), expected: format!("{expected:?}") })
}
