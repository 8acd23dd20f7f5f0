//! Gated feed-forward network.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_fla_ops::{self as ops, Engine};

use super::Linear;
use crate::{NnError, ParamScope};

/// y = down(silu(gate(x)) ⊙ up(x)), the SwiGLU network (Shazeer 2020).
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `[intermediate, width]`.
    pub gate_proj: Linear,
    /// `[intermediate, width]`.
    pub up_proj: Linear,
    /// `[width, intermediate]`.
    pub down_proj: Linear,
}

impl GatedMlp {
    /// A network of `intermediate` hidden features.
    pub fn new(scope: &ParamScope<'_, '_>, width: usize, intermediate: usize) -> Self {
        let linear = |name, input, output| Linear::new(&scope.at(name), input, output, false);
        Self {
            gate_proj: linear("gate_proj", width, intermediate),
            up_proj: linear("up_proj", width, intermediate),
            down_proj: linear("down_proj", intermediate, width),
        }
    }

    /// # Shapes
    /// - input and output `[batch, tokens, width]`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: Tensor<3>, engine: Engine) -> Result<Tensor<3>, NnError> {
        let gate = self.gate_proj.forward(x.clone())?;
        let up = self.up_proj.forward(x)?;
        self.down_proj.forward(ops::swiglu(gate, up, engine)?)
    }
}
