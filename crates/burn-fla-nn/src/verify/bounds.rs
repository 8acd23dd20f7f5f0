//! How far results in f32 may be from what is expected.

/// The largest deviations that pass in f32. Those of logits and gradients are ratios of root mean squares, of the difference
/// over the expected; those of losses are absolute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Of the logits, or of the output of a bare layer.
    pub logits: f64,
    /// Of the gradient of each parameter.
    pub gradient: f64,
    /// Of the loss.
    pub loss: f64,
    /// Of every loss of the curve.
    pub curve: f64,
    /// Why they are not [`Bounds::F32`], where they are not.
    pub reason: Option<&'static str>,
}

impl Bounds {
    /// What rounding in f32 leaves, and no more: a wrong ε of a norm is past it.
    pub const F32: Self = Self { logits: 1e-5, gradient: 1e-4, loss: 1e-5, curve: 1e-4, reason: None };
}
