//! A depthwise causal convolution over the tokens, a few taps wide.
//!
//! ```text
//! z_t = Σ_{j=0}^{W−1} w_j ∘ x_{t−W+1+j} + b        y_t = silu(z_t) or z_t
//! ```
//!
//! Tokens before the first are the history of the sequence, or zero. Backward, with `dz = dy ∘ silu'(z)`:
//! `dx_t = Σ_j w_j ∘ dz_{t+W−1−j}` within the sequence, `dw_j = Σ_t dz_t ∘ x_{t−W+1+j}`, `db = Σ_t dz_t`, and the history
//! receives what reaches past the first token.

#[cfg(feature = "cube")]
mod kernels;
#[cfg(feature = "cube")]
mod operator;
pub mod reference;
#[cfg(feature = "cube")]
mod step;

use burn::tensor::Tensor;

use crate::arguments::{activation, on_kernels, parameter};
use crate::bridge::{same_device, same_shape};
use crate::{CuSeqlens, Engine, OpError};

/// The widest convolution.
const MAX_WIDTH: usize = 16;

/// Options of [`short_conv`](crate::short_conv()).
#[derive(Clone, Debug, Default)]
pub struct ShortConvOptions {
    /// Whether `silu` follows the convolution.
    pub silu: bool,
    /// The last `W` inputs before the first token of each sequence, `[N, D, W]`, the most recent last; `None` is zero.
    /// Gradients flow into it.
    pub initial: Option<Tensor<3>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and the history restarts at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
}

/// Depthwise causal convolution, `y_t = act(Σ_j w_j ∘ x_{t−W+1+j} + b)`. Returns `y` and the history after the last token.
///
/// # Shapes
/// - `x`: `[B, T, D]`, f32, bf16 or f64
/// - `weight`: `[D, W]`, `W` from 1 to 16; `weight[:, W−1]` multiplies the current token; `bias`: `[D]`; any of these
///   dtypes (they are used in f32)
/// - `options.initial`: `[N, D, W]`, `N` the number of sequences: `B`, or as many as are packed
/// - returns `y`: `[B, T, D]` and the last `W` inputs of each sequence, `[N, D, W]` with the most recent last, both in the
///   dtype of `x`. A sequence shorter than `W` keeps the end of its history in front.
///
/// # Gradients
/// With respect to `x`, `weight`, `bias` and the history, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn short_conv(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    options: ShortConvOptions,
) -> Result<(Tensor<3>, Tensor<3>), OpError> {
    const OP: &str = "short_conv";
    let [b, t, d] = x.dims();
    let width = weight.dims()[1];
    let device = x.device();
    activation(OP, "x", &x)?;
    if width == 0 || width > MAX_WIDTH {
        return Err(OpError::Shape {
            op: OP,
            argument: "weight",
            found: weight.dims().to_vec(),
            expected: format!("[D, W] with W from 1 to {MAX_WIDTH}"),
        });
    }
    parameter(OP, "weight", &weight, [d, width], "[D, W]", &device)?;
    if let Some(bias) = &bias {
        parameter(OP, "bias", bias, [d], "[D]", &device)?;
    }
    if let Some(packed) = &options.cu_seqlens {
        packed.check(b, t)?;
    }
    let sequences = options.cu_seqlens.as_ref().map_or(b, CuSeqlens::num_sequences);
    let history = match options.initial {
        Some(history) => {
            activation(OP, "initial", &history)?;
            same_shape(OP, "initial", &history, [sequences, d, width], "[N, D, W]")?;
            same_device(OP, "initial", &history, &device)?;
            Some(history.cast(x.dtype()))
        }
        None => None,
    };
    let zeros = || Tensor::zeros([sequences, d, width], (&device, x.dtype()));
    if x.shape().num_elements() == 0 {
        let history = history.unwrap_or_else(zeros);
        return Ok((x, history));
    }
    #[cfg(feature = "cube")]
    if on_kernels(&x, options.engine) {
        let packed = options.cu_seqlens.as_ref();
        return Ok(operator::run(x, weight, bias, options.silu, history, packed));
    }
    let _ = on_kernels(&x, options.engine);
    let history = history.unwrap_or_else(zeros);
    Ok(reference::short_conv(x, weight, bias, options.silu, history, options.cu_seqlens.as_ref()))
}
