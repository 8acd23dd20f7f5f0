//! The selective scan of Mamba: a linear recurrence with a state of `N_s` numbers for each channel, whose step size,
//! input map and output map depend on the token.
//!
//! ```text
//! h_t = e^{Δ_t A} ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ        h: [I, N_s], A: [I, N_s], at most 0
//! y_t = (h_t C_t + D ∘ x_t) ∘ silu(z_t)                D and z where they are given
//! ```
//!
//! Backward, with `dh_t = C_t dy_t + e^{Δ_{t+1} A} ∘ dh_{t+1}`:
//! `dΔ_t = Σ_n dh_t ∘ (A ∘ e^{Δ_t A} ∘ h_{t−1} + x_t B_tᵀ)`, `dA = Σ_t dh_t ∘ Δ_t e^{Δ_t A} ∘ h_{t−1}`,
//! `dB_t = Σ_i dh_t Δ_t x_t`, `dC_t = Σ_i h_t dy_t`, `dx_t = Δ_t Σ_n dh_t B_t + D dy_t`, `dD = Σ_t x_t dy_t`.
//!
//! Gu, Dao: *Mamba: Linear-Time Sequence Modeling with Selective State Spaces* (2023).

pub mod reference;

use burn::tensor::{DType, Device, Tensor};

use crate::arguments::{activation, parameter};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::chunked::compute_dtype;
use crate::sequences::by_sequence;
use crate::{CuSeqlens, Engine, OpError};

const OP: &str = "selective_scan";
/// Tokens a chunk: as many steps are taken one after the other, over all chunks at once.
const CHUNK: usize = 32;

/// Options of [`selective_scan`](crate::selective_scan()).
#[derive(Clone, Debug, Default)]
pub struct SelectiveScanOptions {
    /// `D`, `[I]`: the share of its input that each channel adds to its output.
    pub skip: Option<Tensor<1>>,
    /// `z`, `[B, T, I]` in the dtype of `x`: the output is multiplied by `silu(z)`.
    pub gate: Option<Tensor<3>>,
    /// State before the first token, f32 `[N, I, N_s]`; `None` is zero. Gradients flow into it.
    pub initial_state: Option<Tensor<3>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and the state restarts at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// The selective scan: `h_t = e^{Δ_t A} ∘ h_{t−1} + (Δ_t ∘ x_t) B_tᵀ`, `y_t = (h_t C_t + D ∘ x_t) ∘ silu(z_t)`. Returns
/// `y` and the state after the last token.
///
/// # Shapes
/// - `x`: `[B, T, I]`, f32, bf16 or f64
/// - `delta`: `[B, T, I]`, the step sizes Δ, at least 0; f32 or the dtype of `x`
/// - `a`: `[I, N_s]`, at most 0; any of these dtypes
/// - `b`, `c`: `[B, T, N_s]` in the dtype of `x`
/// - returns `y`: `[B, T, I]` in the dtype of `x`, and the final state, f32 `[N, I, N_s]` (f64 for f64)
///
/// # Gradients
/// With respect to `x`, `delta`, `a`, `b`, `c`, `D`, `z` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn selective_scan(
    x: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    options: SelectiveScanOptions,
) -> Result<(Tensor<3>, Tensor<3>), OpError> {
    let sequences = check(&x, &delta, &a, &b, &c, &options)?;
    let [_, _, channels] = x.dims();
    let states = a.dims()[1];
    let dtype = compute_dtype(x.dtype());
    let state = match options.initial_state {
        Some(state) => state.cast(dtype),
        None => Tensor::zeros([sequences, channels, states], (&x.device(), dtype)),
    };
    if x.dims()[0] * x.dims()[1] == 0 {
        return Ok((x, state));
    }
    // A short sequence does not pay for a long chunk.
    let chunk = |tokens: usize| options.chunk.unwrap_or_else(|| CHUNK.min(tokens.next_power_of_two()));
    let (y, state) = match &options.cu_seqlens {
        None => {
            let tokens = x.dims()[1];
            reference::chunked(x.clone(), delta, a, b, c, state, chunk(tokens))
        }
        Some(packed) => {
            let (y, states) = by_sequence(packed, |piece| {
                let state = piece.state(&state);
                if piece.length == 0 {
                    return (None, state);
                }
                let [x, delta, b, c] = [&x, &delta, &b, &c].map(|x| piece.tokens(x));
                let (y, end) = reference::chunked(x, delta, a.clone(), b, c, state, chunk(piece.length));
                (Some(y), end)
            });
            (y.expect("a token at least"), Tensor::cat(states, 0))
        }
    };
    Ok((reference::skip_and_gate(y, x, options.skip, options.gate), state))
}

/// The number of sequences, where everything fits together.
fn check(
    x: &Tensor<3>,
    delta: &Tensor<3>,
    a: &Tensor<2>,
    b: &Tensor<3>,
    c: &Tensor<3>,
    options: &SelectiveScanOptions,
) -> Result<usize, OpError> {
    let [batch, tokens, channels] = x.dims();
    let states = a.dims()[1];
    let device = x.device();
    activation(OP, "x", x)?;
    if [batch, channels, states].contains(&0) {
        let expected = "at least one row, channel and state".into();
        return Err(OpError::Shape { op: OP, argument: "x", found: x.dims().to_vec(), expected });
    }
    same_shape(OP, "delta", delta, [batch, tokens, channels], "[B, T, I]")?;
    wide(OP, "delta", delta, x.dtype(), &device)?;
    parameter(OP, "a", a, [channels, states], "[I, N_s]", &device)?;
    for (name, operand) in [("b", b), ("c", c)] {
        same_shape(OP, name, operand, [batch, tokens, states], "[B, T, N_s]")?;
        same_dtype(OP, name, operand, x.dtype())?;
        same_device(OP, name, operand, &device)?;
    }
    if let Some(skip) = &options.skip {
        parameter(OP, "skip", skip, [channels], "[I]", &device)?;
    }
    if let Some(gate) = &options.gate {
        same_shape(OP, "gate", gate, [batch, tokens, channels], "[B, T, I]")?;
        same_dtype(OP, "gate", gate, x.dtype())?;
        same_device(OP, "gate", gate, &device)?;
    }
    let sequences = match &options.cu_seqlens {
        Some(packed) => {
            packed.check(batch, tokens)?;
            packed.num_sequences()
        }
        None => batch,
    };
    if let Some(state) = &options.initial_state {
        activation(OP, "initial_state", state)?;
        same_shape(OP, "initial_state", state, [sequences, channels, states], "[N, I, N_s]")?;
        same_device(OP, "initial_state", state, &device)?;
    }
    if options.chunk == Some(0) {
        let reason = "is 0, but a chunk has at least one token".into();
        return Err(OpError::Option { op: OP, option: "chunk", reason });
    }
    Ok(sequences)
}

/// Checks an operand that is f32 whatever the activations are, or of their dtype.
pub(crate) fn wide<const D: usize>(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor<D>,
    dtype: DType,
    device: &Device,
) -> Result<(), OpError> {
    if tensor.dtype() != DType::F32 {
        same_dtype(op, argument, tensor, dtype)?;
    }
    same_device(op, argument, tensor, device)
}
