//! AdamW over all parameters of a model at once, with a global-norm clip and a guard against gradients that are not
//! finite.
//!
//! ```text
//! n = √ Σ g²                                       over all parameters
//! g ← g · min(1, max_norm / (n + 1e-6))
//! m ← β₁ m + (1 − β₁) g                            c₁ ← β₁ c₁ + 1 − β₁
//! v ← β₂ v + (1 − β₂) g²                           c₂ ← β₂ c₂ + 1 − β₂
//! p ← p (1 − η λ) − η (m / c₁) / (√(v / c₂) + ε)   η = lr · lr_scale
//! ```
//!
//! `c = 1 − βᵗ` over the t updates made: its recurrence needs no host, and loses no digits when β is near 1. Where the
//! guard is on and `n` is not finite, nothing changes but the counters of skips. Norm, decision and counters stay on the
//! device, so an update never waits for it.
//!
//! Loshchilov & Hutter: *Decoupled Weight Decay Regularization* (2017), <https://arxiv.org/abs/1711.05101>.

#[cfg(feature = "cube")]
mod kernels;
#[cfg(feature = "cube")]
mod operator;
mod reference;

use burn::tensor::{DType, Device, Tensor};

use crate::bridge::{same_device, same_shape};
use crate::{Engine, OpError};

const OP: &str = "adamw";

/// Numbers of [`AdamWStep::counters`].
pub const COUNTERS: usize = 5;

/// What an update does, the same for every parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// η before the scale of a parameter's group.
    pub lr: f64,
    /// β₁, at least 0 and below 1.
    pub beta1: f64,
    /// β₂, at least 0 and below 1.
    pub beta2: f64,
    /// ε, not negative.
    pub eps: f64,
    /// The norm that gradients are clipped to; 0 clips nothing.
    pub max_norm: f64,
    /// Whether a norm that is not finite skips the update.
    pub skip_non_finite: bool,
    /// Which implementation runs.
    pub engine: Engine,
}

/// One parameter, flat, with what belongs to it.
#[derive(Clone, Debug)]
pub struct AdamWSlot {
    /// p, `[n]`, f32.
    pub value: Tensor<1>,
    /// g, `[n]`, f32.
    pub grad: Tensor<1>,
    /// m, `[n]`, f32.
    pub first: Tensor<1>,
    /// v, `[n]`, f32.
    pub second: Tensor<1>,
    /// Factor on the learning rate.
    pub lr_scale: f64,
    /// λ.
    pub weight_decay: f64,
}

/// A parameter after the update.
#[derive(Clone, Debug)]
pub struct AdamWUpdated {
    /// p, `[n]`.
    pub value: Tensor<1>,
    /// m, `[n]`.
    pub first: Tensor<1>,
    /// v, `[n]`.
    pub second: Tensor<1>,
}

/// All parameters after the update, in their order.
#[derive(Clone, Debug)]
pub struct AdamWStep {
    /// The parameters.
    pub updated: Vec<AdamWUpdated>,
    /// c₁, c₂, skips in a row, the most skips in a row, skips in all: `[5]`, f32.
    pub counters: Tensor<1>,
    /// n before the clip: `[1]`, f32.
    pub norm: Tensor<1>,
}

/// Updates every parameter. `counters` is that of the update before, zeros before the first.
///
/// A device with kernels makes three kinds of launches: sums of squares of many gradients each, one over these sums, and
/// updates of many parameters each. What no one else holds is updated in place.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, tensors are tracked by autodiff, or options are out of
/// range.
pub fn adamw(slots: Vec<AdamWSlot>, counters: Tensor<1>, options: AdamWOptions) -> Result<AdamWStep, OpError> {
    options.check()?;
    let device = counters.device();
    check("counters", &counters, COUNTERS, "[5]", &device)?;
    for slot in &slots {
        let n = slot.value.dims()[0];
        check("value", &slot.value, n, "[n]", &device)?;
        check("grad", &slot.grad, n, "[n]", &device)?;
        check("first", &slot.first, n, "[n]", &device)?;
        check("second", &slot.second, n, "[n]", &device)?;
    }
    #[cfg(feature = "cube")]
    if crate::bridge::has_kernels(&device, options.engine) && !slots.is_empty() {
        return Ok(operator::run(slots, counters, options));
    }
    Ok(reference::adamw(slots, counters, options))
}

fn check(argument: &'static str, tensor: &Tensor<1>, size: usize, names: &str, device: &Device) -> Result<(), OpError> {
    same_shape(OP, argument, tensor, [size], names)?;
    same_device(OP, argument, tensor, device)?;
    if tensor.dtype() != DType::F32 {
        return Err(OpError::DType { op: OP, argument, found: tensor.dtype(), expected: "F32".into() });
    }
    if tensor.is_tracked() || tensor.device().is_autodiff() {
        let reason = format!("must have no autodiff, and `{argument}` has: use `inner()`");
        return Err(OpError::Option { op: OP, option: "slots", reason });
    }
    Ok(())
}

impl AdamWOptions {
    fn check(&self) -> Result<(), OpError> {
        let within = |option: &'static str, value: f64, fits: bool, range: &str| match fits {
            true => Ok(()),
            false => Err(OpError::Option { op: OP, option, reason: format!("is {value}, but it must be {range}") }),
        };
        within("lr", self.lr, self.lr.is_finite(), "a finite number")?;
        within("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "at least 0 and below 1")?;
        within("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "at least 0 and below 1")?;
        within("eps", self.eps, self.eps.is_finite() && self.eps >= 0.0, "a finite number, not negative")?;
        within(
            "max_norm",
            self.max_norm,
            self.max_norm.is_finite() && self.max_norm >= 0.0,
            "a finite number, not negative",
        )
    }
}
