//! What may follow a linear layer, element by element.

use burn::tensor::{Tensor, activation};

use crate::chunked::compute_dtype;

/// The activation after a linear layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// None.
    #[default]
    Identity,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)²`
    ReluSquared,
    /// `1 / (1 + e^{−x})`
    Sigmoid,
    /// `tanh x`
    Tanh,
    /// `x / (1 + e^{−x})`
    Silu,
}

impl Activation {
    /// `act(x)`, computed in f32 (f64 for f64), in the dtype of `x`.
    pub fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let wide = x.clone().cast(compute_dtype(dtype));
        let y = match self {
            Self::Identity => return x,
            Self::Relu => activation::relu(wide),
            Self::ReluSquared => {
                let y = activation::relu(wide);
                y.clone() * y
            }
            Self::Sigmoid => activation::sigmoid(wide),
            Self::Tanh => wide.tanh(),
            Self::Silu => activation::silu(wide),
        };
        y.cast(dtype)
    }
}
