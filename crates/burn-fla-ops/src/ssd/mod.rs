//! The state space duality of Mamba2: a state `[N_s, P]` for each head with one decay a token, whose input and output
//! maps `B` and `C` are shared by groups of heads.
//!
//! ```text
//! S_t = e^{Δ_t A} S_{t−1} + B_t (Δ_t x_t)ᵀ        S: [N_s, P], A a number a head, at most 0
//! y_t = S_tᵀ C_t + D ∘ x_t                          D where it is given
//! ```
//!
//! This is [`simple_gla`](crate::simple_gla()) with queries `C`, keys `B`, values `Δ x`, log decay `Δ A` and scale 1, and runs on
//! its kernels, with what stands before and after them in one operator (`operator.rs` counts its passes over memory). Those on
//! matrix units take Δ, A and D themselves, so that `Δ x` is never rounded, and read `B` and `C` of a head's group where they are;
//! the others read a copy for each head. One token of generation is one kernel, with f32 inside as well.
//!
//! Dao, Gu: *Transformers are SSMs* (2024).

#[cfg(feature = "cube")]
mod kernels;
#[cfg(feature = "cube")]
mod operator;
pub mod reference;

#[cfg(feature = "cube")]
use burn::backend::DispatchTensor;
use burn::tensor::{DType, Tensor};
#[cfg(feature = "cuda")]
pub(crate) use kernels::LEAST_STEP;
#[cfg(feature = "cube")]
pub(crate) use kernels::Skip;

use crate::arguments::{activation, parameter};
#[cfg(feature = "cube")]
use crate::bridge::Planned;
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::chunked::compute_dtype;
#[cfg(feature = "cube")]
use crate::one_step;
use crate::recurrence::{Decay, Problem};
use crate::selective_scan::wide;
use crate::{CuSeqlens, Engine, OpError, SequenceOptions};

const OP: &str = "ssd";

/// Which group of `B` and `C` a head reads, of `G` groups for `H` heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadGroups {
    /// Head `h` reads group `⌊h / (H/G)⌋`: the heads of a group stand side by side. The rule of published checkpoints.
    #[default]
    Contiguous,
    /// Head `h` reads group `h mod G`.
    Tiled,
}

/// Options of [`ssd`](crate::ssd()).
#[derive(Clone, Debug, Default)]
pub struct SsdOptions {
    /// `D`, `[H]` or `[H·P]`: the share of its input that each head or channel adds to its output.
    pub skip: Option<Tensor<1>>,
    /// Which group a head reads.
    pub groups: HeadGroups,
    /// State before the first token, f32 `[N, H, N_s, P]`; `None` is zero. Gradients flow into it.
    pub initial_state: Option<Tensor<4>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and the state restarts at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// State space duality: `S_t = e^{Δ_t A} S_{t−1} + B_t (Δ_t x_t)ᵀ`, `y_t = S_tᵀ C_t + D ∘ x_t`. Returns `y` and the state
/// after the last token.
///
/// # Shapes
/// - `x`: `[B, T, H, P]`, f32, bf16 or f64
/// - `delta`: `[B, T, H]`, the step sizes Δ, at least 0 (a negative one adds something or nothing, by the engine); f32 or the dtype
///   of `x`
/// - `a`: `[H]`, at most 0; any of these dtypes
/// - `b`, `c`: `[B, T, G, N_s]` in the dtype of `x`, `H` a multiple of `G`
/// - returns `y`: `[B, T, H, P]` in the dtype of `x`, and the final state, f32 `[N, H, N_s, P]` (f64 for f64)
///
/// # Gradients
/// With respect to `x`, `delta`, `a`, `b`, `c`, `D` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn ssd(
    x: Tensor<4>,
    delta: Tensor<3>,
    a: Tensor<1>,
    b: Tensor<4>,
    c: Tensor<4>,
    options: SsdOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    check(&x, &delta, &a, &b, &c, &options)?;
    let dtype = compute_dtype(x.dtype());
    let (delta, a) = (delta.cast(dtype), a.cast(dtype));
    let skip = options.skip.map(|skip| skip.cast(dtype));
    let sequence = SequenceOptions {
        scale: Some(1.0),
        initial_state: options.initial_state,
        cu_seqlens: options.cu_seqlens,
        engine: options.engine,
        chunk: options.chunk,
    };
    let problem = Problem::grouped(OP, [c, b, x], options.groups, Decay::Token(delta.clone()), sequence)?;
    #[cfg(feature = "cube")]
    let problem = match on_operator(problem, &a, &skip) {
        Ok(found) => return Ok(found),
        Err(problem) => *problem,
    };
    let x = problem.v.clone();
    let decay = Decay::Token(delta.clone() * a.unsqueeze::<3>());
    let v = (x.clone().cast(dtype) * delta.unsqueeze_dim::<4>(3)).cast(x.dtype());
    let (y, state) = Problem { v, decay, ..problem }.run()?;
    let Some(skip) = skip else { return Ok((y, state)) };
    let out = y.dtype();
    Ok(((y.cast(dtype) + reference::skip(x.cast(dtype), skip)).cast(out), state))
}

/// Runs a problem, with x and Δ as its values and decay, in one operator where kernels take it.
#[cfg(feature = "cube")]
fn on_operator(
    problem: Problem,
    a: &Tensor<1>,
    skip: &Option<Tensor<1>>,
) -> Result<(Tensor<4>, Tensor<4>), Box<Problem>> {
    let [_, _, heads, width] = problem.v.dims();
    let tracked = a.is_tracked() || skip.as_ref().is_some_and(Tensor::is_tracked);
    let by = Skip::of(skip.as_ref().map(|skip| skip.dims()[0]), heads);
    let (a, skip) = (a.clone().into_dispatch(), skip.clone().map(Tensor::into_dispatch));
    if problem.is_one_step(tracked) {
        return Ok(step(problem, a, skip, by).run_recurrence());
    }
    if !crate::rows::fits(width) {
        return Err(Box::new(problem));
    }
    Ok(operator::planned(problem, tracked, a, skip, by)?.run_recurrence())
}

/// A problem of one token a sequence: what stands before and after the recurrence is in its kernel, in f32.
#[cfg(feature = "cube")]
fn step(problem: Problem, a: DispatchTensor, skip: Option<DispatchTensor>, by: Skip) -> Planned {
    let Problem { op, q, k, v, groups, decay, scale, state, .. } = problem;
    let Decay::Token(delta) = decay else { unreachable!("the decay is Δ") };
    one_step::planned(one_step::Problem {
        op,
        form: one_step::Form::Duality(by),
        qkv: [q, k, v],
        a: None,
        b: Some(a),
        gate: (one_step::Gate::Token, Some(delta.into_dispatch())),
        skip,
        scale,
        state,
        tiled: groups == HeadGroups::Tiled,
    })
}

fn check(
    x: &Tensor<4>,
    delta: &Tensor<3>,
    a: &Tensor<1>,
    b: &Tensor<4>,
    c: &Tensor<4>,
    options: &SsdOptions,
) -> Result<(), OpError> {
    let [batch, tokens, heads, width] = x.dims();
    let [_, _, groups, states] = b.dims();
    let device = x.device();
    activation(OP, "x", x)?;
    if [batch, heads, width].contains(&0) {
        let expected = "at least one row, head and channel".into();
        return Err(OpError::Shape { op: OP, argument: "x", found: x.dims().to_vec(), expected });
    }
    if states == 0 || groups == 0 || !heads.is_multiple_of(groups) {
        let expected = format!("[B, T, G, N_s] with G a divisor of the {heads} heads and N_s at least 1");
        return Err(OpError::Shape { op: OP, argument: "b", found: b.dims().to_vec(), expected });
    }
    same_shape(OP, "delta", delta, [batch, tokens, heads], "[B, T, H]")?;
    wide(OP, "delta", delta, x.dtype(), &device)?;
    parameter(OP, "a", a, [heads], "[H]", &device)?;
    for (name, operand) in [("b", b), ("c", c)] {
        same_shape(OP, name, operand, [batch, tokens, groups, states], "[B, T, G, N_s]")?;
        same_dtype(OP, name, operand, x.dtype())?;
        same_device(OP, name, operand, &device)?;
    }
    if let Some(skip) = &options.skip {
        if skip.dims() == [heads * width] {
            parameter(OP, "skip", skip, [heads * width], "[H·P]", &device)?;
        } else {
            parameter(OP, "skip", skip, [heads], "[H], or [H·P] for one number a channel; [H]", &device)?;
        }
    }
    let sequences = match &options.cu_seqlens {
        Some(packed) => {
            packed.check(batch, tokens)?;
            packed.num_sequences()
        }
        None => batch,
    };
    if let Some(state) = &options.initial_state {
        if !matches!(state.dtype(), DType::F32 | DType::F64) {
            let expected = "F32 (F64 for F64)".into();
            return Err(OpError::DType { op: OP, argument: "initial_state", found: state.dtype(), expected });
        }
        same_shape(OP, "initial_state", state, [sequences, heads, states, width], "[N, H, N_s, P]")?;
        same_device(OP, "initial_state", state, &device)?;
    }
    if options.chunk == Some(0) {
        let reason = "is 0, but a chunk has at least one token".into();
        return Err(OpError::Option { op: OP, option: "chunk", reason });
    }
    Ok(())
}
