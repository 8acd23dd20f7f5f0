//! The rotary position embedding on the two halves of each head.
//!
//! ```text
//! y₁ = x₁ ∘ cos_p − x₂ ∘ sin_p        y₂ = x₁ ∘ sin_p + x₂ ∘ cos_p        p the position of the token
//! ```
//!
//! Its gradient is the rotation by the negative angle.
//!
//! Su et al.: *RoFormer: Enhanced Transformer with Rotary Position Embedding* (2021).

#[cfg(feature = "cube")]
mod kernels;
pub mod reference;

#[cfg(feature = "cube")]
use burn::tensor::DType;
use burn::tensor::{Int, Tensor};

use crate::arguments::{activation, on_kernels, parameter};
use crate::{Engine, OpError};

/// Rotates the two halves of each head by the angles of its token's position.
///
/// # Shapes
/// - `x`: `[B, T, H, D]`, f32, bf16 or f64, `D` even
/// - `cos`, `sin`: `[P, D/2]`, one row for each position; constant, without gradient; used in f32
/// - `positions`: `[B, T]`, at least 0 and below `P`. The kernels do not report one outside: they take the nearest row.
/// - returns `[B, T, H, D]` in the dtype of `x`; computed in f32 (f64 for f64)
///
/// # Gradients
/// With respect to `x`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, and, without kernels, where a position has no row.
pub fn rotary(
    x: Tensor<4>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    positions: Tensor<2, Int>,
    engine: Engine,
) -> Result<Tensor<4>, OpError> {
    const OP: &str = "rotary";
    let [b, t, h, d] = x.dims();
    let device = x.device();
    activation(OP, "x", &x)?;
    let rows = cos.dims()[0];
    if d % 2 == 1 || rows == 0 {
        let (argument, found, expected) = if d % 2 == 1 {
            ("x", x.dims().to_vec(), "an even last dimension")
        } else {
            ("cos", cos.dims().to_vec(), "at least one row")
        };
        return Err(OpError::Shape { op: OP, argument, found, expected: expected.into() });
    }
    parameter(OP, "cos", &cos, [rows, d / 2], "[P, D/2]", &device)?;
    parameter(OP, "sin", &sin, [rows, d / 2], "[P, D/2]", &device)?;
    if positions.dims() != [b, t] {
        return Err(OpError::Shape {
            op: OP,
            argument: "positions",
            found: positions.dims().to_vec(),
            expected: format!("[B, T] = {:?}", [b, t]),
        });
    }
    if positions.device().inner() != device.clone().inner() {
        return Err(OpError::Device {
            op: OP,
            argument: "positions",
            found: format!("{:?}", positions.device()),
            expected: format!("{device:?}"),
        });
    }
    if b * t * h * d == 0 {
        return Ok(x);
    }
    let (cos, sin) = (cos.without_autodiff(), sin.without_autodiff());
    #[cfg(feature = "cube")]
    if on_kernels(&x, engine) {
        let table = |table: Tensor<2>| table.cast(DType::F32).into_dispatch();
        let inputs = vec![x.reshape([b * t, h, d]).into_dispatch(), table(cos), table(sin)];
        let positions = positions.reshape([b * t]).cast(DType::I32).into_dispatch();
        let mut outputs = crate::bridge::apply(kernels::Rotary, inputs, vec![positions]);
        return Ok(Tensor::<3>::from_dispatch(outputs.remove(0)).reshape([b, t, h, d]));
    }
    let _ = on_kernels(&x, engine);
    let (low, high) = (positions.clone().min(), positions.clone().max());
    let (low, high) = (low.into_scalar::<i64>(), high.into_scalar::<i64>());
    if low < 0 || high >= rows as i64 {
        return Err(OpError::Option {
            op: OP,
            option: "positions",
            reason: format!("reach from {low} to {high}, but the tables have rows 0 to {}", rows - 1),
        });
    }
    Ok(reference::rotary(x, cos, sin, positions))
}
