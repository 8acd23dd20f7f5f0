//! RMS norm over groups of the last dimension with a gate before or after it: the output norm of Mamba2.
//!
//! ```text
//! gate before the norm    y = norm_groups(x ∘ silu(z)) ∘ w
//! gate after the norm     y = norm_groups(x) ∘ w ∘ silu(z)
//! ```

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use super::{GateActivation, gated_rms_norm};
use crate::arguments::{activation, last_dim, parameter, positive_eps};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::chunked::compute_dtype;
use crate::{Engine, OpError, rms_norm};

/// Options of [`grouped_gated_rms_norm`](crate::grouped_gated_rms_norm()).
#[derive(Clone, Copy, Debug)]
pub struct GroupedGatedNorm {
    /// ε, added to the mean of the squares.
    pub eps: f64,
    /// Channels that are normalised together, contiguous; `None` is all of the last dimension.
    pub group_size: Option<usize>,
    /// Whether the norm comes first and the gate after it.
    pub norm_before_gate: bool,
}

/// RMS norm over contiguous groups of the last dimension, gated by `silu(gate)`: `norm_groups(x ∘ silu(gate)) ∘ w`, or
/// `norm_groups(x) ∘ w ∘ silu(gate)` where the norm comes first. The norm of a group `u` of `S` channels is
/// `u · (Σ u² / S + eps)^(−1/2)`.
///
/// # Shapes
/// - `x`, `gate`: `[…, D]` of one dtype, f32, bf16 or f64; `D` a multiple of the group size
/// - `weight`: `[D]`, any of these dtypes
/// - returns `y`: `[…, D]` in the dtype of `x`; everything is computed in f32 (f64 for f64)
///
/// # Gradients
/// With respect to `x`, `gate` and `weight`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, where the groups do not divide the last dimension, or
/// where `eps` is not positive.
pub fn grouped_gated_rms_norm<const D: usize>(
    x: Tensor<D>,
    gate: Tensor<D>,
    weight: Tensor<1>,
    options: GroupedGatedNorm,
    engine: Engine,
) -> Result<Tensor<D>, OpError> {
    const OP: &str = "grouped_gated_rms_norm";
    activation(OP, "x", &x)?;
    positive_eps(OP, options.eps)?;
    same_shape(OP, "gate", &gate, x.dims(), "the shape of x")?;
    same_dtype(OP, "gate", &gate, x.dtype())?;
    same_device(OP, "gate", &gate, &x.device())?;
    let width = last_dim(&x);
    parameter(OP, "weight", &weight, [width], "[D]", &x.device())?;
    let size = options.group_size.unwrap_or(width);
    if size == 0 || !width.is_multiple_of(size) {
        let reason = format!("is {size}, but it must divide the {width} channels");
        return Err(OpError::Option { op: OP, option: "group_size", reason });
    }
    if x.shape().num_elements() == 0 {
        return Ok(x);
    }
    if options.norm_before_gate && size == width {
        return gated_rms_norm(x, gate, Some(weight), options.eps, GateActivation::Silu, engine);
    }
    let (shape, out, dtype) = (x.dims(), x.dtype(), compute_dtype(x.dtype()));
    let (x, open) = (x.cast(dtype), silu(gate.cast(dtype)));
    let (x, after) = if options.norm_before_gate { (x, Some(open)) } else { (x * open, None) };
    // One group takes the weight along; more groups have another weight each, which follows.
    let y = if size == width {
        rms_norm(x, Some(weight), options.eps, engine)?
    } else {
        let groups = x.reshape([-1, size as i64]);
        let y = rms_norm::<2>(groups, None, options.eps, engine)?.reshape(shape);
        y * weight.cast(dtype).unsqueeze::<D>()
    };
    let y = match after {
        Some(open) => y * open,
        None => y,
    };
    Ok(y.cast(out))
}
