//! Checks of arguments that the pointwise and row-wise operators share.

use burn::tensor::{DType, Device, Tensor};

use crate::bridge::{has_kernels, same_device, same_dtype, same_shape};
use crate::{CuSeqlens, Engine, OpError};

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

/// Checks the three inputs of a recurrence: `q`, `k` `[B, T, H, K]` and `v` `[B, T, H, V]`, of one dtype and device, with
/// at least one row, head and channel.
pub(crate) fn query_key_value(op: &'static str, q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>) -> Result<(), OpError> {
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    activation(op, "q", q)?;
    same_shape(op, "k", k, [b, t, h, dk], "[B, T, H, K]")?;
    same_shape(op, "v", v, [b, t, h, dv], "[B, T, H, V]")?;
    for (name, x) in [("k", k), ("v", v)] {
        same_dtype(op, name, x, q.dtype())?;
        same_device(op, name, x, &q.device())?;
    }
    if [b, h, dk, dv].contains(&0) {
        return Err(OpError::Shape {
            op,
            argument: "q",
            found: q.dims().to_vec(),
            expected: "at least one row, head, key and value channel".into(),
        });
    }
    Ok(())
}

/// The sequences of an input of `batch` rows of `tokens`: one a row, or those packed into the one row.
pub(crate) fn sequences(packed: Option<CuSeqlens>, batch: usize, tokens: usize) -> Result<CuSeqlens, OpError> {
    match packed {
        Some(packed) => {
            packed.check(batch, tokens)?;
            Ok(packed)
        }
        None => Ok(CuSeqlens::dense(batch, tokens)),
    }
}

/// Checks the option `chunk`.
pub(crate) fn chunk(op: &'static str, chunk: Option<usize>) -> Result<(), OpError> {
    if chunk == Some(0) {
        let reason = "is 0, but a chunk has at least one token".into();
        return Err(OpError::Option { op, option: "chunk", reason });
    }
    Ok(())
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
