//! MesaNet: linear attention whose query is first solved against what the keys are correlated with, so that the output is
//! that of a ridge regression of the values on the keys seen.
//!
//! ```text
//! Hkk_t = e^{g_t} Hkk_{t−1} + β_t k_t k_tᵀ        Hkk: [K, K], g_t and β_t scalars
//! Hkv_t = e^{g_t} Hkv_{t−1} + β_t k_t v_tᵀ        Hkv: [K, V]
//! o_t   = Hkv_tᵀ x_t,   x_t ≈ (Hkk_t + diag(λ))⁻¹ q_t
//! ```
//!
//! The solution is what a fixed number of conjugate-gradient steps reach from x = 0 (see
//! [`conjugate_gradients`](reference::conjugate_gradients)); the constant in their denominators stops them early, and what
//! they have reached then, not the exact solution, is what the format's models are trained with.
//!
//! von Oswald et al.: *MesaNet: Sequence Modeling by Locally Optimal Test-Time Training* (2025).

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::{self, query_key_value};
use crate::bridge::{same_device, same_shape};
use crate::chunked::compute_dtype;
use crate::l2_norm::{self, reference::l2_norm};
use crate::sequences::by_sequence;
use crate::{CuSeqlens, Engine, OpError};

/// Steps of the conjugate gradients where none are said.
pub const ITERATIONS: usize = 30;

/// Tokens a chunk.
const CHUNK: usize = 64;

/// What [`mesa_net`](crate::mesa_net()) keeps of the tokens seen.
#[derive(Clone, Debug)]
pub struct MesaState {
    /// Hkk, the keys by keys, f32 `[N, H, K, K]`, symmetric.
    pub keys: Tensor<4>,
    /// Hkv, the keys by values, f32 `[N, H, K, V]`.
    pub values: Tensor<4>,
}

/// Options of [`mesa_net`](crate::mesa_net()).
#[derive(Clone, Debug, Default)]
pub struct MesaOptions {
    /// State before the first token; `None` is zero. Gradients flow into it. Its `keys` are taken to be symmetric.
    pub initial_state: Option<MesaState>,
    /// Packed sequences: the row (batch 1) holds several sequences, and the state restarts at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Steps of the conjugate gradients; `None` is [`ITERATIONS`].
    pub iterations: Option<usize>,
    /// Whether queries and keys are divided by their L2 norm first, as [`l2_norm`](crate::l2_norm()) does with
    /// [`EPS`](crate::l2_norm::EPS).
    pub l2_norm: bool,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// MesaNet over whole sequences.
///
/// `Hkk_t = e^{g_t} Hkk_{t−1} + β_t k_t k_tᵀ`, `Hkv_t = e^{g_t} Hkv_{t−1} + β_t k_t v_tᵀ`, `o_t = Hkv_tᵀ x_t` with
/// `x_t ≈ (Hkk_t + diag(λ))⁻¹ q_t` by conjugate gradients. Returns `o` and the state after the last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - `log_decay`: g, `[B, T, H]`, natural logarithm of the decay, at most 0; `beta`: β, `[B, T, H]`, at least 0; `lambda`:
///   λ, `[H, K]`, above 0; each f32 or the dtype of `q`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state in f32 (f64 for f64), in which all is computed
///
/// # Gradients
/// With respect to all six tensors and the initial state, through both outputs. That of x is the gradient of a solution:
/// with the gradient dx, `y ≈ (Hkk + diag(λ))⁻¹ dx` by the same steps, `dq = y`, `dHkk = −y xᵀ`, `dλ = −Σ y ∘ x`. No step is
/// kept for it. It is exact as far as the steps solve their systems, to about 5e-3; and since they stop where the squared
/// residual is below 1e-5, a dx much smaller than that leaves y smaller than the exact one, as in the format's own
/// implementation, whose expected gradients decided it: they are met twice as closely as by the gradient of the steps.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together, or where there is no step.
pub fn mesa_net(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Tensor<3>,
    beta: Tensor<3>,
    lambda: Tensor<2>,
    options: MesaOptions,
) -> Result<(Tensor<4>, MesaState), OpError> {
    const OP: &str = "mesa_net";
    query_key_value(OP, &q, &k, &v)?;
    let [b, t, h, dk] = q.dims();
    let dv = v.dims()[3];
    let device = q.device();
    for (name, x) in [("log_decay", &log_decay), ("beta", &beta)] {
        arguments::activation(OP, name, x)?;
        same_shape(OP, name, x, [b, t, h], "[B, T, H]")?;
        same_device(OP, name, x, &device)?;
    }
    arguments::parameter(OP, "lambda", &lambda, [h, dk], "[H, K]", &device)?;
    let sequences = arguments::sequences(options.cu_seqlens.clone(), b, t)?;
    let n = sequences.num_sequences();
    if let Some(state) = &options.initial_state {
        same_shape(OP, "initial_state.keys", &state.keys, [n, h, dk, dk], "[N, H, K, K]")?;
        same_device(OP, "initial_state.keys", &state.keys, &device)?;
        same_shape(OP, "initial_state.values", &state.values, [n, h, dk, dv], "[N, H, K, V]")?;
        same_device(OP, "initial_state.values", &state.values, &device)?;
    }
    arguments::chunk(OP, options.chunk)?;
    let iterations = options.iterations.unwrap_or(ITERATIONS);
    if iterations == 0 {
        let reason = "is 0, but without a step the output is 0".into();
        return Err(OpError::Option { op: OP, option: "iterations", reason });
    }

    let out = q.dtype();
    let dtype = compute_dtype(out);
    let state = match options.initial_state {
        Some(state) => MesaState { keys: state.keys.cast(dtype), values: state.values.cast(dtype) },
        None => MesaState {
            keys: Tensor::zeros([n, h, dk, dk], (&device, dtype)),
            values: Tensor::zeros([n, h, dk, dv], (&device, dtype)),
        },
    };
    if t == 0 {
        return Ok((v, state));
    }
    let normalised = |x: Tensor<4>| if options.l2_norm { l2_norm(x, l2_norm::EPS) } else { x.cast(dtype) };
    let column = |x: Tensor<3>| x.cast(dtype).reshape([b, t, h, 1]);
    let inputs = reference::Inputs {
        q: normalised(q),
        k: normalised(k),
        v: v.cast(dtype),
        log_decay: column(log_decay),
        beta: column(beta),
        lambda: lambda.cast(dtype),
    };
    let run = |inputs: reference::Inputs, state| {
        let tokens = inputs.q.dims()[1];
        match (tokens, options.chunk) {
            // A step of generation: the recurrence itself is the least work.
            (1, None) => reference::recurrent(inputs, iterations, state),
            // A short sequence does not pay for a long chunk.
            (_, chunk) => {
                let chunk = chunk.unwrap_or_else(|| CHUNK.min(tokens.next_power_of_two()));
                reference::chunked(inputs, iterations, state, chunk)
            }
        }
    };
    if options.cu_seqlens.is_none() {
        let (o, state) = run(inputs, state);
        return Ok((o.cast(out), state));
    }
    let (o, states) = by_sequence(&sequences, |piece| {
        let state = MesaState { keys: piece.state(&state.keys), values: piece.state(&state.values) };
        if piece.length == 0 {
            return (None, state);
        }
        let (o, state) = run(inputs.tokens(piece), state);
        (Some(o), state)
    });
    let o = o.unwrap_or_else(|| inputs.v.clone());
    let (keys, values) = states.into_iter().map(|state| (state.keys, state.values)).unzip();
    Ok((o.cast(out), MesaState { keys: Tensor::cat(keys, 0), values: Tensor::cat(values, 0) }))
}
