//! The difference between each token and the one before it, which RWKV mixes its inputs with.
//!
//! ```text
//! δ_t = x_{t−1} − x_t
//! ```
//!
//! The token before the first is given, or zero. Backward: `dx_t = dδ_{t+1} − dδ_t` within the sequence, and the given
//! token receives `dδ` of the first.
//!
//! Peng et al.: *RWKV: Reinventing RNNs for the Transformer Era* (2023).

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::activation;
use crate::bridge::{same_device, same_shape};
use crate::{CuSeqlens, Engine, OpError};

/// Options of [`token_shift`](crate::token_shift()).
#[derive(Clone, Debug, Default)]
pub struct TokenShiftOptions {
    /// The token before the first of each sequence, `[N, D]`; `None` is zero. Gradients flow into it.
    pub initial: Option<Tensor<2>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and each has its own token before the first.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
}

/// The difference to the token before, `δ_t = x_{t−1} − x_t`. Returns `δ` and the last token of each sequence.
///
/// # Shapes
/// - `x`: `[B, T, D]`, f32, bf16 or f64
/// - `options.initial`: `[N, D]`, `N` the number of sequences: `B`, or as many as are packed
/// - returns `δ`: `[B, T, D]` and the last token of each sequence, `[N, D]`, both in the dtype of `x`. A sequence without
///   tokens keeps its initial one.
///
/// # Gradients
/// With respect to `x` and the initial token, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn token_shift(x: Tensor<3>, options: TokenShiftOptions) -> Result<(Tensor<3>, Tensor<2>), OpError> {
    const OP: &str = "token_shift";
    let [b, t, d] = x.dims();
    let device = x.device();
    activation(OP, "x", &x)?;
    if let Some(packed) = &options.cu_seqlens {
        packed.check(b, t)?;
    }
    let sequences = options.cu_seqlens.as_ref().map_or(b, CuSeqlens::num_sequences);
    let initial = match options.initial {
        Some(initial) => {
            activation(OP, "initial", &initial)?;
            same_shape(OP, "initial", &initial, [sequences, d], "[N, D]")?;
            same_device(OP, "initial", &initial, &device)?;
            initial.cast(x.dtype())
        }
        None => Tensor::zeros([sequences, d], (&device, x.dtype())),
    };
    if x.shape().num_elements() == 0 {
        return Ok((x, initial));
    }
    Ok(reference::token_shift(x, initial, options.cu_seqlens.as_ref()))
}
