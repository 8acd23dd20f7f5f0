//! Linear attention without decay, with an optional normaliser.
//!
//! ```text
//! S_t = S_{t−1} + k_t v_tᵀ,   z_t = z_{t−1} + k_t        S: [K, V], z: [K]
//! o_t = scale · S_tᵀ q_t,     or with the normaliser  scale · S_tᵀ q_t / (scale · z_tᵀ q_t + 1e-10)
//! ```
//!
//! Katharopoulos, Vyas, Pappas, Fleuret: *Transformers are RNNs* (2020).

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments::query_key_value;
use crate::chunked::compute_dtype;
use crate::recurrence::{Decay, Problem};
use crate::{OpError, SequenceOptions};

/// Added to the denominator, which is zero where queries and keys are orthogonal.
const NORMALIZER_EPS: f64 = 1e-10;

/// Linear attention over whole sequences.
///
/// `S_t = S_{t−1} + k_t v_tᵀ`, `z_t = z_{t−1} + k_t`; `o_t = scale · S_tᵀ q_t`, and with `normalize`
/// `o_t = scale · S_tᵀ q_t / (scale · z_tᵀ q_t + 1e-10)`. Returns `o` and the state after the last token. Queries and
/// keys come with their feature map applied.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`, all of one dtype (f32 or bf16; f64 where the device has it)
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`, and the final state, f32: `S` `[N, H, K, V]`, or with `normalize`
///   `[N, H, K, V + 1]`, whose last column is `z`. An initial state has the same shape.
///
/// # Gradients
/// With respect to `q`, `k`, `v` and the initial state, through both outputs.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices or offsets do not fit together.
pub fn linear_attn(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    normalize: bool,
    options: SequenceOptions,
) -> Result<(Tensor<4>, Tensor<4>), OpError> {
    const OP: &str = "linear_attn";
    if !normalize {
        return Problem::new(OP, q, k, v, Decay::None, options)?.run();
    }
    query_key_value(OP, &q, &k, &v)?;
    let out = q.dtype();
    let dtype = compute_dtype(out);
    let values = v.dims()[3];
    // z is the column of the state that belongs to a value of one. In f32: the quotient of two rounded sums would be
    // further off than each of them.
    let v = with_ones(v.cast(dtype));
    let (o, state) = Problem::new(OP, q.cast(dtype), k.cast(dtype), v, Decay::None, options)?.run()?;
    let sum = o.clone().narrow(3, values, 1);
    let o = o.narrow(3, 0, values) / sum.add_scalar(NORMALIZER_EPS);
    Ok((o.cast(out), state))
}

/// `[B, T, H, V]` with a column of ones behind the last.
pub(crate) fn with_ones(v: Tensor<4>) -> Tensor<4> {
    let [b, t, h, _] = v.dims();
    let ones = Tensor::ones([b, t, h, 1], (&v.device(), v.dtype()));
    Tensor::cat(vec![v, ones], 3)
}
