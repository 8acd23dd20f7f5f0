//! Causal softmax attention with grouped heads, a sliding window and a forget gate.
//!
//! ```text
//! s_ij = scale · q_i · k_j + Σ_{l = j+1..i} g_l        for the keys j that query i sees
//! o_i = Σ_j softmax_j(s_ij) v_j
//! ```
//!
//! Vaswani et al.: *Attention Is All You Need* (2017); Ainslie et al.: *GQA* (2023); Lin et al.: *Forgetting Transformer*
//! (2025), the gate.

pub mod reference;

use burn::tensor::Tensor;

use crate::arguments;
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::sequences::by_sequence;
use crate::{CuSeqlens, Engine, OpError};

/// Options of [`attention`](crate::attention()).
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// Factor on the scores; `None` is `K^(-1/2)`.
    pub scale: Option<f64>,
    /// How many keys a query sees, its own included; `None`: all up to its own.
    pub window: Option<usize>,
    /// Natural logarithm of a forget gate, at most 0, `[B, S, H]`: one number each key token and query head.
    pub log_forget: Option<Tensor<3>>,
    /// How many of the `S` keys of each row there are: the last ones. What stands before them is never seen. `None`: all.
    pub lengths: Option<Vec<usize>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and no query sees another sequence.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
}

/// Softmax attention of `T` queries to the last of `S ≥ T` keys: query i stands at the place of key `S − T + i` and sees
/// the keys up to there, so keys and values of tokens seen before are simply put in front.
///
/// The scores of a call exist as a whole; products are taken in the dtype of the inputs, the softmax in f32.
///
/// # Shapes
/// - `q`: `[B, T, H, K]`; `k`: `[B, S, G, K]`; `v`: `[B, S, G, V]`, all of one dtype (f32 or bf16; f64 where the device
///   has it), `H` a multiple of `G`: key head j serves the contiguous query heads from `j·H/G`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`
///
/// # Gradients
/// With respect to `q`, `k`, `v` and the forget gate.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices, lengths or offsets do not fit together, and for a window of 0.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions) -> Result<Tensor<4>, OpError> {
    const OP: &str = "attention";
    let [b, t, heads, keys] = q.dims();
    check(OP, &q, &k, &v, options.lengths.as_deref(), options.cu_seqlens.as_ref())?;
    if let Some(gate) = &options.log_forget {
        same_shape(OP, "log_forget", gate, [b, k.dims()[1], heads], "[B, S, H]")?;
        same_device(OP, "log_forget", gate, &q.device())?;
    }
    if options.window == Some(0) {
        let reason = "is 0, but a query sees its own key at least".into();
        return Err(OpError::Option { op: OP, option: "window", reason });
    }
    if t == 0 {
        let values = v.dims()[3];
        return Ok(Tensor::zeros([b, 0, heads, values], (&q.device(), q.dtype())));
    }
    let scale = options.scale.unwrap_or_else(|| (keys as f64).powf(-0.5));
    let run =
        |q, k, v, gate, lengths: Option<&[usize]>| reference::parallel(q, k, v, gate, scale, options.window, lengths);
    let Some(sequences) = &options.cu_seqlens else {
        return run(q, k, v, options.log_forget, options.lengths.as_deref());
    };
    let mut failure = None;
    let (o, _) = by_sequence(sequences, |piece| {
        if piece.length == 0 {
            return (None, ());
        }
        let gate = options.log_forget.as_ref().map(|gate| piece.tokens(gate));
        match run(piece.tokens(&q), piece.tokens(&k), piece.tokens(&v), gate, None) {
            Ok(o) => (Some(o), ()),
            Err(error) => {
                failure = Some(error);
                (None, ())
            }
        }
    });
    match (failure, o) {
        (Some(error), _) => Err(error),
        (None, o) => Ok(o.unwrap_or(v)),
    }
}

/// Checks what attention operators share: queries `[B, T, H, K]` against keys `[B, S, G, K]` and values `[B, S, G, V]`.
pub(crate) fn check(
    op: &'static str,
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    lengths: Option<&[usize]>,
    packed: Option<&CuSeqlens>,
) -> Result<(), OpError> {
    arguments::activation(op, "q", q)?;
    let [b, t, heads, keys] = q.dims();
    let [_, s, groups, _] = k.dims();
    let values = v.dims()[3];
    same_shape(op, "k", k, [b, s, groups, keys], "[B, S, G, K]")?;
    same_shape(op, "v", v, [b, s, groups, values], "[B, S, G, V]")?;
    for (name, x) in [("k", k), ("v", v)] {
        same_dtype(op, name, x, q.dtype())?;
        same_device(op, name, x, &q.device())?;
    }
    let wrong = |argument, found: &Tensor<4>, expected: String| {
        Err(OpError::Shape { op, argument, found: found.dims().to_vec(), expected })
    };
    if [b, heads, groups, keys, values].contains(&0) {
        return wrong("q", q, "at least one row, head, key and value channel".into());
    }
    if !heads.is_multiple_of(groups) {
        return wrong("k", k, format!("a number of heads that divides the {heads} of q"));
    }
    if s < t {
        return wrong("k", k, format!("a key for each of the {t} queries at least"));
    }
    if let Some(packed) = packed {
        packed.check(b, t)?;
        if s != t {
            return wrong("k", k, format!("as many keys as queries, {t}, where sequences are packed"));
        }
        if lengths.is_some() {
            let reason = "is for rows that are not packed; packed sequences have their lengths in cu_seqlens".into();
            return Err(OpError::Option { op, option: "lengths", reason });
        }
    }
    if let Some(lengths) = lengths
        && (lengths.len() != b || lengths.iter().any(|length| !(t..=s).contains(length)))
    {
        let reason = format!("is {lengths:?}, but {b} numbers from {t} (the queries) to {s} (the keys) are needed");
        return Err(OpError::Option { op, option: "lengths", reason });
    }
    Ok(())
}
