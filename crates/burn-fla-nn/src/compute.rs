//! How numbers are kept while computing.

use burn::tensor::DType;
use burn_fla_ops::Engine;

use crate::NnError;

/// How numbers are kept while computing: parameters are always f32, activations in `dtype`.
///
/// A weight is cast where it is used, so that its gradient arrives in f32. Norm statistics, log decays, recurrent
/// states, softmax and the loss are f32 whatever `dtype` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Type of the activations: [`DType::F32`] or [`DType::BF16`].
    pub dtype: DType,
    /// Which implementation of the operators runs.
    pub engine: Engine,
}

impl Compute {
    /// f32 activations, kernels where the device has them.
    pub const fn f32() -> Self {
        Self { dtype: DType::F32, engine: Engine::Auto }
    }

    /// bf16 activations, kernels where the device has them.
    pub const fn bf16() -> Self {
        Self { dtype: DType::BF16, engine: Engine::Auto }
    }

    /// The same types with another engine.
    pub const fn with_engine(self, engine: Engine) -> Self {
        Self { dtype: self.dtype, engine }
    }

    /// An error for a type that no layer computes in.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        match self.dtype {
            DType::F32 | DType::BF16 => Ok(()),
            other => {
                Err(NnError::argument("compute", format!("activations can be kept in F32 or BF16, not in {other:?}")))
            }
        }
    }
}

impl Default for Compute {
    fn default() -> Self {
        Self::f32()
    }
}
