//! Gated DeltaProduct: several steps of the delta rule a token, so that a token multiplies the state by a product of
//! several Householder matrices.
//!
//! ```text
//! S_{t,0} = e^{g_t} S_{t−1,n}                                                S: [K, V], g_t a scalar
//! S_{t,j} = S_{t,j−1} + β_{t,j} k_{t,j} (v_{t,j} − S_{t,j−1}ᵀ k_{t,j})ᵀ       j = 1 … n
//! o_t = scale · S_{t,n}ᵀ q_t
//! ```
//!
//! Siems, Carstensen, Zela, Hutter, Pontil, Grazzi: *DeltaProduct: Improving State-Tracking in Linear RNNs via
//! Householder Products* (2025).

use burn::tensor::Tensor;

use crate::bridge::same_shape;
use crate::delta::{Arguments, Gate, activated};
use crate::{CuSeqlens, DeltaOptions, OpError};

/// Gated DeltaProduct over whole sequences, with `n` steps of the delta rule a token.
///
/// A token decays the state once, writes `n` keys one after another, and reads after the last. Returns `o` and the state
/// after the last token. It is the (gated) delta rule over `n · T` steps, of which every `n`-th is read.
///
/// # Shapes
/// - `q`: `[B, T, H, K]`; `k`: `[B, n·T, H, K]`, the steps of a token side by side; `v`: `[B, n·T, HV, V]`, all of one dtype
///   (f32 or bf16; f64 where the device has it). `HV` is a multiple of `H`: value head `i` uses key head `⌊i · H / HV⌋`
/// - `log_decay`: `[B, T, HV]`, natural logarithm of the decay, at most 0, or `None`; `beta`: `[B, n·T, HV]`; f32 or the
///   dtype of `q`
/// - offsets of packed sequences count tokens, and a chunk is of steps
/// - returns `o`: `[B, T, HV, V]` in the dtype of `q`, and the final state, f32 `[N, HV, K, V]`
///
/// # Gradients
/// With respect to `q`, `k`, `v`, `log_decay`, `beta` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together, or where `n` is 0.
pub fn gated_delta_product(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    log_decay: Option<Tensor<3>>,
    beta: Tensor<3>,
    n: usize,
    mut options: DeltaOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    const OP: &str = "gated_delta_product";
    let [b, t, h, dk] = q.dims();
    let [.., heads, dv] = v.dims();
    if n == 0 {
        let reason = "is 0, but a token has at least one step".into();
        return Err(OpError::Option { op: OP, option: "n", reason });
    }
    same_shape(OP, "k", &k, [b, n * t, h, dk], "[B, n·T, H, K]")?;
    same_shape(OP, "v", &v, [b, n * t, heads, dv], "[B, n·T, HV, V]")?;
    if let Some(g) = &log_decay {
        same_shape(OP, "log_decay", g, [b, t, heads], "[B, T, HV]")?;
    }
    // Before the zeros that stand for whole decays.
    let gate = activated(OP, log_decay.map(Gate::Token), options.decay_gate.take(), options.sequence.engine)?;
    if let Some(packed) = options.sequence.cu_seqlens.take() {
        packed.check(b, t)?;
        let steps = CuSeqlens::new(packed.offsets().iter().map(|offset| offset * n).collect())?;
        options.sequence.cu_seqlens = Some(steps);
    }
    // The query stands at the last step of its token, the decay at the first; zeros stand elsewhere.
    let zeros = |width: usize, x: &Tensor<4>| Tensor::zeros([b, t, n - 1, width], (&x.device(), x.dtype()));
    let q = match n {
        1 => q,
        _ => {
            let q = q.reshape([b, t, 1, h * dk]);
            Tensor::cat(vec![zeros(h * dk, &q), q], 2).reshape([b, n * t, h, dk])
        }
    };
    let gate = gate.map(|gate| match (n, gate) {
        (1, gate) | (_, gate @ Gate::Key(_)) => gate,
        (_, Gate::Token(g)) => {
            let g = g.reshape([b, t, 1, heads]);
            Gate::Token(Tensor::cat(vec![g.clone(), zeros(heads, &g)], 2).reshape([b, n * t, heads]))
        }
    });
    let (o, state) = Arguments { op: OP, q, k, v, p: None, gate, beta, options }.run()?;
    let o = o.reshape([b, t, n, heads, dv]).narrow(2, n - 1, 1).reshape([b, t, heads, dv]);
    Ok((o, state))
}
