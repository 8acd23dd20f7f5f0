//! The delta rule with a diagonal-plus-low-rank transition, in its general form.
//!
//! ```text
//! S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ        S: [K, V]
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! `a_t` reads the state before it decays. With `a = −k`, `b = β k` and no decay it is the delta rule.
//!
//! Peng et al.: *RWKV-7 "Goose" with Expressive Dynamic State Evolution* (2025); the chunked form follows Yang, Wang,
//! Zhang, Shen, Kim: *Parallelizing Linear Transformers with the Delta Rule over Sequence Length* (2024).

pub mod reference;

use burn::tensor::Tensor;

use crate::bridge::{same_device, same_dtype, same_shape};
use crate::recurrence::{Decay, Problem};
use crate::{OpError, SequenceOptions};

/// The delta rule with a diagonal-plus-low-rank transition over whole sequences.
///
/// `S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`. Returns `o` and the state after the
/// last token.
///
/// # Shapes
/// - `q`, `k`, `a`, `b`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - `log_decay`, `g` above: `[B, T, H, K]`, natural logarithm of the decay, at most 0; f32 or the dtype of `q`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state, f32 `[N, H, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, `a`, `b`, `log_decay` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn dplr(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    a: Tensor<4>,
    b: Tensor<4>,
    log_decay: Tensor<4>,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    let problem = checked("dplr", q, k, v, [("a", &a), ("b", &b)], log_decay, options)?;
    #[cfg(feature = "cube")]
    if takes(&problem.0) {
        return Ok(on_kernels(problem, crate::delta_walk::Form::Free, a, b));
    }
    Ok(run(problem, a, b))
}

/// Whether the kernels take the problem.
#[cfg(feature = "cube")]
pub(crate) fn takes(problem: &Problem) -> bool {
    crate::delta_walk::takes(&problem.v, problem.q.dims()[3], problem.sequences.total(), problem.engine)
}

/// Runs a checked problem on the kernels, with the pair of vectors that the form says.
#[cfg(feature = "cube")]
pub(crate) fn on_kernels(
    (problem, log_decay): (Problem, Tensor<4>),
    form: crate::delta_walk::Form,
    a: Tensor<4>,
    b: Tensor<4>,
) -> (Tensor<4>, Tensor<4>) {
    let Problem { op, q, k, v, scale, state, sequences, chunk, engine, .. } = problem;
    #[cfg(feature = "cuda")]
    if let Some(cores) = crate::hopper_dplr::takes(&v, q.dims()[3], &sequences, engine).filter(|_| chunk.is_none()) {
        use crate::hopper_dplr::{Problem, Vectors, run};
        let removal = form == crate::delta_walk::Form::Removal;
        let vectors = if removal { Vectors::Removal(a, b) } else { Vectors::Free(a, b) };
        return run(Problem { op, cores, q, k, vectors, v, log_decay, scale, state, sequences });
    }
    #[cfg(not(feature = "cuda"))]
    let _ = engine;
    crate::delta_walk::run(crate::delta_walk::Problem {
        op,
        form,
        qkv: [q, k, v],
        a: Some(a),
        strength: None,
        b: Some(b),
        decay: Some(crate::delta::Gate::Key(log_decay)),
        scale,
        state,
        sequences,
        chunk,
    })
}

/// A checked problem and its log decay. `pair` are the two inputs beside `q`, `k`, `v`, each with its name.
pub(crate) fn checked(
    op: &'static str,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    pair: [(&'static str, &Tensor<4>); 2],
    log_decay: Tensor<4>,
    options: SequenceOptions,
) -> Result<(Problem, Tensor<4>), OpError> {
    for (name, x) in pair {
        same_shape(op, name, x, q.dims(), "[B, T, H, K]")?;
        same_dtype(op, name, x, q.dtype())?;
        same_device(op, name, x, &q.device())?;
    }
    let problem = Problem::new(op, q, k, v, Decay::Key(log_decay.clone()), options)?;
    Ok((problem, log_decay))
}

/// Runs the reference of a checked problem with the factors `a` and `b`, in any float dtype.
pub(crate) fn run((problem, log_decay): (Problem, Tensor<4>), a: Tensor<4>, b: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let [q, k, v] = [&problem.q, &problem.k, &problem.v].map(Clone::clone);
    problem.each_sequence([q, k, v, a, b, log_decay], |inputs, state, chunk| match inputs[0].dims()[1] {
        // One token is one step: it needs no inverse.
        1 => reference::recurrent(inputs, problem.scale, state),
        _ => reference::chunked(inputs, problem.scale, state, chunk),
    })
}
