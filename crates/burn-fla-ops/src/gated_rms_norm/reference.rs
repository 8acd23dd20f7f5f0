//! The gated RMS norm in plain tensor operations.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use super::GateActivation;
use crate::chunked::compute_dtype;
use crate::rms_norm::reference::normalise;

/// `y = rms_norm(x) ∘ act(gate)`; everything in f32 (f64 for f64), output in `x`'s dtype.
pub fn gated_rms_norm<const D: usize>(
    x: Tensor<D>,
    gate: Tensor<D>,
    weight: Option<Tensor<1>>,
    eps: f64,
    act: GateActivation,
) -> Tensor<D> {
    let out = x.dtype();
    let gate = gate.cast(compute_dtype(out));
    let open = sigmoid(gate.clone());
    let open = match act {
        GateActivation::Silu => gate * open,
        GateActivation::Sigmoid => open,
    };
    (normalise(x, weight, eps) * open).cast(out)
}
