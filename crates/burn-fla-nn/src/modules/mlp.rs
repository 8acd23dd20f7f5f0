//! Gated feed-forward network.

use burn::module::Module;
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::{self as ops, Engine};

use super::{Linear, project};
use crate::{NnError, ParamScope};

/// What the gate of a [`GatedMlp`] passes through (`hidden_act` in config.json).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MlpActivation {
    /// silu(x) = x σ(x)
    #[default]
    Swish,
    /// σ(x) x^(3 / (√x + 1)) above zero, σ(x) x below.
    PowLu,
}

impl MlpActivation {
    /// The activation called `name` in config.json.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "swish" | "silu" => Some(Self::Swish),
            "powlu" => Some(Self::PowLu),
            _ => None,
        }
    }
}

/// The power-law gate, in f32.
fn pow_lu(x: Tensor<3>) -> Tensor<3> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    // The power is taken where it is not used too: of a number whose root and logarithm have finite gradients.
    let above = x.clone().clamp_min(1e-12);
    let power = (above.clone().log() / (above.sqrt().add_scalar(1.0)).div_scalar(3.0)).exp();
    let below = x.clone().lower_equal_elem(0.0);
    (activation::sigmoid(x.clone()) * power.mask_where(below, x)).cast(dtype)
}

/// y = down(act(gate(x)) ⊙ up(x)): with the swish the SwiGLU network (Shazeer 2020).
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `[intermediate, width]`.
    pub gate_proj: Linear,
    /// `[intermediate, width]`.
    pub up_proj: Linear,
    /// `[width, intermediate]`.
    pub down_proj: Linear,
    #[module(skip)]
    activation: MlpActivation,
}

impl GatedMlp {
    /// A network of `intermediate` hidden features.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, intermediate: usize, activation: MlpActivation) -> Self {
        let linear = |name, input, output| Linear::new(&scope.at(name), input, output, false);
        Self {
            gate_proj: linear("gate_proj", width, intermediate),
            up_proj: linear("up_proj", width, intermediate),
            down_proj: linear("down_proj", intermediate, width),
            activation,
        }
    }

    /// # Shapes
    /// - input and output `[batch, tokens, width]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: Tensor<3>, engine: Engine) -> Result<Tensor<3>, NnError> {
        let [gate, up] = project([&self.gate_proj, &self.up_proj], x)?;
        match self.activation {
            MlpActivation::Swish if self.down_proj.bias.is_none() => {
                let weight = self.down_proj.weight_for(gate.dtype());
                Ok(ops::swiglu_linear(gate, up, weight, engine)?)
            }
            MlpActivation::Swish => self.down_proj.forward(ops::swiglu(gate, up, engine)?),
            MlpActivation::PowLu => self.down_proj.forward(pow_lu(gate) * up),
        }
    }
}
