//! The gated activation of a SwiGLU feed-forward layer.
//!
//! ```text
//! y = silu(g) ∘ u        silu(g) = g · σ(g)
//! ```
//!
//! Backward: `dg = dy ∘ u ∘ σ(g) ∘ (1 + g ∘ (1 − σ(g)))`, `du = dy ∘ silu(g)`.
//!
//! Shazeer: *GLU Variants Improve Transformer* (2020).

#[cfg(feature = "cube")]
mod kernels;
#[cfg(feature = "cube")]
mod linear;
pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::{activation, on_kernels};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::{Engine, OpError};

/// `y = silu(gate) ∘ up`, element by element.
///
/// # Shapes
/// - `gate`, `up`: of one shape and dtype, f32, bf16 or f64
/// - returns `y` of the same shape and dtype; computed in f32 (f64 for f64)
///
/// # Gradients
/// With respect to `gate` and `up`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>, engine: Engine) -> Result<Tensor<D>, OpError> {
    const OP: &str = "swiglu";
    activation(OP, "gate", &gate)?;
    same_shape(OP, "up", &up, gate.dims(), "the shape of gate")?;
    same_dtype(OP, "up", &up, gate.dtype())?;
    same_device(OP, "up", &up, &gate.device())?;
    if gate.shape().num_elements() == 0 {
        return Ok(gate);
    }
    #[cfg(feature = "cube")]
    if on_kernels(&gate, engine) {
        let shape = gate.dims();
        let flat = |x: Tensor<D>| Tensor::<1>::into_dispatch(x.reshape([-1]));
        let mut outputs = crate::bridge::apply(kernels::SwiGlu, vec![flat(gate), flat(up)], vec![]);
        return Ok(Tensor::<1>::from_dispatch(outputs.remove(0)).reshape(shape));
    }
    let _ = on_kernels(&gate, engine);
    Ok(reference::swiglu(gate, up))
}

/// A linear layer after [`swiglu()`], `y = (silu(gate) ∘ up) Wᵀ`. On devices with kernels only `gate` and `up` are kept for
/// the backward pass, not what is between.
///
/// # Shapes
/// - `gate`, `up`: `[…, k]`, of one dtype; `weight`: `[n, k]`, of that dtype, or f32 beside bf16: it is rounded for the
///   product, and its gradient is f32
/// - returns `[…, n]` in the dtype of `gate`
///
/// # Gradients
/// With respect to all three.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn swiglu_linear<const D: usize>(
    gate: Tensor<D>,
    up: Tensor<D>,
    weight: Tensor<2>,
    engine: Engine,
) -> Result<Tensor<D>, OpError> {
    #[cfg(feature = "cube")]
    if on_kernels(&gate, engine) && gate.shape().num_elements() > 0 {
        const OP: &str = "swiglu_linear";
        activation(OP, "gate", &gate)?;
        same_shape(OP, "up", &up, gate.dims(), "the shape of gate")?;
        same_dtype(OP, "up", &up, gate.dtype())?;
        same_device(OP, "up", &up, &gate.device())?;
        crate::matmul::check(&gate, &weight, None)?;
        let mut dims = gate.dims();
        let flat = |x: Tensor<D>| x.reshape([dims[..D - 1].iter().product::<usize>(), dims[D - 1]]);
        let y = linear::run(flat(gate), flat(up), weight);
        dims[D - 1] = y.dims()[1];
        return Ok(y.reshape(dims));
    }
    crate::linear(swiglu(gate, up, engine)?, weight, None)
}
