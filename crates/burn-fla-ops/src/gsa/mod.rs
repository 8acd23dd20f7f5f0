//! Gated slot attention: a memory of M slots for keys and values that forgets slot by slot, read by a softmax.
//!
//! ```text
//! Hk_t = Hk_{t−1} diag(e^{g_t}) + k_t s_tᵀ        Hk: [K, M]
//! p_t  = softmax_M(scale · Hk_tᵀ q_t)
//! Hv_t = diag(e^{g_t}) Hv_{t−1} + s_t v_tᵀ        Hv: [M, V]
//! o_t  = Hv_tᵀ p_t
//! ```
//!
//! The second recurrence is gated linear attention with queries p, keys s and a decay for each key. The first is linear
//! attention too, with queries q, keys k and values s, and a decay for each *value*.
//!
//! Zhang et al.: *Gated Slot Attention for Efficient Linear-Time Sequence Modeling* (2024).

#[cfg(feature = "cube")]
mod kernels;
pub mod reference;

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Tensor};

use crate::arguments::{activation, on_kernels};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::chunked::compute_dtype;
use crate::recurrence::{Decay, Problem};
use crate::running_softmax::with_weights;
use crate::{CuSeqlens, Engine, OpError, ScanOptions, SequenceOptions};

/// What [`gsa`](crate::gsa()) keeps of the tokens seen.
#[derive(Clone, Debug)]
pub struct GsaState {
    /// The keys of the slots, f32 `[N, H, K, M]`.
    pub keys: Tensor<4>,
    /// The values of the slots, f32 `[N, H, M, V]`.
    pub values: Tensor<4>,
}

/// Options of [`gsa`](crate::gsa()).
#[derive(Clone, Debug, Default)]
pub struct GsaOptions {
    /// Factor on the queries; `None` is `K^(-1/2)`.
    pub scale: Option<f64>,
    /// State before the first token; `None` is zero. Gradients flow into it.
    pub initial_state: Option<GsaState>,
    /// Packed sequences: the row (batch 1) holds several sequences, and state and decay restart at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// Gated slot attention over whole sequences: `p_t = softmax(scale · Hk_tᵀ q_t)`, `o_t = Hv_tᵀ p_t`, where both memories
/// decay by `e^{g_t}` slot by slot and take in `k_t` and `v_t` with the weights `s_t`. Returns `o` and the state after the
/// last token.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`; `slots`: s, `[B, T, H, M]`, all of one dtype (f32 or bf16; f64 where
///   the device has it)
/// - `log_decay`: g, `[B, T, H, M]`, natural logarithm of the decay, at most 0; f32 or the dtype of `q`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state in f32 (f64 for f64). The softmax between the
///   two memories is f32.
///
/// # Gradients
/// With respect to all five tensors and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn gsa(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    slots: Tensor<4>,
    log_decay: Tensor<4>,
    options: GsaOptions,
) -> Result<(Tensor<4>, GsaState), OpError> {
    const OP: &str = "gsa";
    let sequences = check(OP, &q, &k, &v, &slots, "slots", options.cu_seqlens.as_ref())?;
    same_shape(OP, "log_decay", &log_decay, slots.dims(), "[B, T, H, M]")?;
    same_device(OP, "log_decay", &log_decay, &q.device())?;
    if let Some(state) = &options.initial_state {
        check_state(OP, state, &q, &v, &slots, sequences.num_sequences())?;
    }
    check_chunk(OP, options.chunk)?;
    let (o, state, _) = run(OP, [q, k, v], Slots::Given(slots, log_decay), options)?;
    Ok((o, state))
}

/// The checks of what ABC and GSA share. Returns the sequences.
pub(crate) fn check(
    op: &'static str,
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    slots: &Tensor<4>,
    slots_argument: &'static str,
    packed: Option<&CuSeqlens>,
) -> Result<CuSeqlens, OpError> {
    let [b, t, h, dk] = q.dims();
    let (m, dv) = (slots.dims()[3], v.dims()[3]);
    let device: Device = q.device();
    activation(op, "q", q)?;
    if [b, h, dk].contains(&0) {
        return Err(OpError::Shape {
            op,
            argument: "q",
            found: q.dims().to_vec(),
            expected: "at least one row, head and channel".into(),
        });
    }
    let others =
        [("k", k, dk, "[B, T, H, K]"), ("v", v, dv, "[B, T, H, V]"), (slots_argument, slots, m, "[B, T, H, M]")];
    for (argument, x, width, names) in others {
        same_shape(op, argument, x, [b, t, h, width], names)?;
        same_dtype(op, argument, x, q.dtype())?;
        same_device(op, argument, x, &device)?;
        if width == 0 {
            let expected = "at least one channel".into();
            return Err(OpError::Shape { op, argument, found: x.dims().to_vec(), expected });
        }
    }
    match packed {
        Some(packed) => packed.check(b, t).map(|()| packed.clone()),
        None => Ok(CuSeqlens::dense(b, t)),
    }
}

/// Checks the two memories against the other arguments.
pub(crate) fn check_state(
    op: &'static str,
    state: &GsaState,
    q: &Tensor<4>,
    v: &Tensor<4>,
    slots: &Tensor<4>,
    sequences: usize,
) -> Result<(), OpError> {
    let [_, _, h, dk] = q.dims();
    let (m, dv) = (slots.dims()[3], v.dims()[3]);
    same_shape(op, "initial_state.keys", &state.keys, [sequences, h, dk, m], "[N, H, K, M]")?;
    same_device(op, "initial_state.keys", &state.keys, &q.device())?;
    same_shape(op, "initial_state.values", &state.values, [sequences, h, m, dv], "[N, H, M, V]")?;
    same_device(op, "initial_state.values", &state.values, &q.device())
}

/// Checks the option `chunk`.
pub(crate) fn check_chunk(op: &'static str, chunk: Option<usize>) -> Result<(), OpError> {
    match chunk {
        Some(0) => {
            let reason = "is 0, but a chunk has at least one token".into();
            Err(OpError::Option { op, option: "chunk", reason })
        }
        _ => Ok(()),
    }
}

/// The softmax over the slots, in f32 and rounded to the dtype of the scores.
fn probabilities(scores: Tensor<4>, engine: Engine) -> Tensor<4> {
    #[cfg(feature = "cube")]
    if on_kernels(&scores, engine) && scores.shape().num_elements() > 0 {
        let mut outputs = crate::bridge::apply(kernels::Softmax, vec![scores.into_dispatch()], Vec::new());
        return Tensor::from_dispatch(outputs.remove(0));
    }
    let _ = on_kernels(&scores, engine);
    let dtype = scores.dtype();
    softmax(scores.cast(compute_dtype(dtype)), 3).cast(dtype)
}

/// What the slots take in of the tokens, and keep of what they hold.
pub(crate) enum Slots {
    /// s and g.
    Given(Tensor<4>, Tensor<4>),
    /// Those of a running softmax: its scores, `[B, T, H, M]`, and the initial normaliser, `[N, H · M]`.
    Running(Tensor<4>, Option<Tensor<2>>),
}

/// Both passes over checked arguments (q, k and v, and the slots): two problems with a softmax between them. Returns the
/// last normaliser too, `[N, H · M]`, where the slots are those of a running softmax.
///
/// The first decays by value, with the slots as values; the second by key, with the slots as keys. On tensor cores
/// bf16 stays bf16, with a softmax in f32; everywhere else both are computed in f32.
pub(crate) fn run(
    op: &'static str,
    [q, k, v]: [Tensor<4>; 3],
    slots: Slots,
    options: GsaOptions,
) -> Result<(Tensor<4>, GsaState, Option<Tensor<2>>), OpError> {
    let out = q.dtype();
    let wide = compute_dtype(out);
    let (keys, values) = options.initial_state.map(|state| (state.keys, state.values)).unzip();
    let pass = |scale: Option<f64>, initial_state: Option<Tensor<4>>| SequenceOptions {
        scale,
        initial_state,
        cu_seqlens: options.cu_seqlens.clone(),
        engine: options.engine,
        chunk: options.chunk,
    };
    let first = |dtype: DType, s: Tensor<4>, g: Tensor<4>| {
        let [q, k, s] = [q.clone(), k.clone(), s].map(|x| x.cast(dtype));
        Problem::new(op, q, k, s, Decay::Value(g), pass(options.scale, keys.clone()))
    };
    let second = |dtype: DType, p: Tensor<4>, s: Tensor<4>, g: Tensor<4>| {
        let [s, v] = [s, v.clone()].map(|x| x.cast(dtype));
        Problem::new(op, p, s, v, Decay::Key(g), pass(Some(1.0), values.clone()))
    };
    // Sizes, dtypes and the device choose the engine, and for them the scores of a running softmax stand for what comes of
    // them, as the slots do for the queries of the second pass.
    let (s, g) = match &slots {
        Slots::Given(s, g) => (s.clone(), g.clone()),
        Slots::Running(scores, _) => (scores.clone(), scores.clone()),
    };
    let (begin, probe) = (first(out, s.clone(), g.clone())?, second(out, s.clone(), s, g)?);
    let narrow = begin.on_matrix_units() && probe.on_matrix_units();
    #[cfg(feature = "cuda")]
    if let Some(cores) = begin.cores().zip(probe.cores()).map(|(first, second)| first.of_both(second)) {
        if crate::hopper_walk::takes_both(&probe) {
            let running = match slots {
                Slots::Given(..) => None,
                Slots::Running(_, initial) => Some(initial),
            };
            let (o, keys, values, normaliser) = crate::hopper_walk::run_slots(begin, probe, cores, running);
            return Ok((o, GsaState { keys, values }, normaliser));
        }
    }
    drop((begin, probe));
    let dtype = if narrow { out } else { wide };
    let (s, g, normaliser) = match slots {
        Slots::Given(s, g) => (s, g, None),
        Slots::Running(scores, initial_state) => {
            let [b, t, h, m] = scores.dims();
            let scan = ScanOptions { initial_state, cu_seqlens: options.cu_seqlens.clone(), engine: options.engine };
            let (weights, log_decay, end) = with_weights(op, scores.reshape([b, t, h * m]), dtype, scan)?;
            (weights.reshape([b, t, h, m]), log_decay.reshape([b, t, h, m]), Some(end))
        }
    };
    // A decay in f32 beside bf16 stays f32.
    let g = if g.dtype() == wide { g } else { g.cast(dtype) };
    let (scores, keys) = first(dtype, s.clone(), g.clone())?.run()?;
    let p = probabilities(scores, options.engine);
    let (o, values) = second(dtype, p, s, g)?.run()?;
    Ok((o.cast(out), GsaState { keys, values }, normaliser))
}
