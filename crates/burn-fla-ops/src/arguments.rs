//! Checks of arguments that the pointwise and row-wise operators share.

use burn::tensor::{DType, Device, Tensor};

use crate::bridge::{has_kernels, same_device, same_shape};
use crate::{Engine, OpError};

/// Checks that an activation is of a dtype that operators take.
pub(crate) fn activation<const D: usize>(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
) -> Result<(), OpError> {
    if matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F64) {
        return Ok(());
    }
    Err(OpError::DType { op, argument, found: tensor.dtype(), expected: "F32, BF16 or F64".into() })
}

/// Checks a parameter (a weight, a bias, a table): its shape and device. Its dtype is free among those of activations,
/// because it is cast to the dtype in which the operator computes.
pub(crate) fn parameter<const D: usize>(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
    shape: [usize; D],
    names: &str,
    device: &Device,
) -> Result<(), OpError> {
    activation(op, argument, tensor)?;
    same_shape(op, argument, tensor, shape, names)?;
    same_device(op, argument, tensor, device)
}

/// Checks that `eps` is a positive number: a row of zeros would be divided by zero.
pub(crate) fn positive_eps(op: &'static str, eps: f64) -> Result<(), OpError> {
    if eps.is_finite() && eps > 0.0 {
        return Ok(());
    }
    Err(OpError::Option { op, option: "eps", reason: format!("is {eps}, but it must be a positive number") })
}

/// The size of the last dimension.
pub(crate) fn last_dim<const D: usize>(tensor: &Tensor<D>) -> usize {
    tensor.dims()[D - 1]
}

/// Whether the kernels take an activation of this device and dtype.
pub(crate) fn on_kernels<const D: usize>(tensor: &Tensor<D>, engine: Engine) -> bool {
    has_kernels(&tensor.device(), engine) && matches!(tensor.dtype(), DType::F32 | DType::BF16)
}

/// A weight as the row-wise kernels read it: f32, ones where there is none.
#[cfg(feature = "cube")]
pub(crate) fn weight_or_ones(weight: Option<Tensor<1>>, dim: usize, device: &Device) -> Tensor<1> {
    match weight {
        Some(weight) => weight.cast(DType::F32),
        None => Tensor::ones([dim], (&device.clone().inner(), DType::F32)),
    }
}
