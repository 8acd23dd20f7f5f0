//! Native sparse attention: three branches of attention to blocks of keys.
//!
//! ```text
//! compression  o = Σ_c softmax_c(scale · q_t · k̄_c) v̄_c                 over the whole blocks c before or at t,
//!                                                                       k̄, v̄ the means of a block
//! selection    o = Σ_j softmax_j(scale · q_t · k_j) v_j                  over the tokens j ≤ t of the chosen blocks
//! window       o = Σ_j softmax_j(K^(-1/2) · q_t · k_j) v_j               over the last `window` tokens
//! o_t = g_compression o + g_selection o + g_window o
//! ```
//!
//! Blocks are chosen for each key head by their weight in the compression branch, summed over the query heads it serves;
//! the first block, the one of the query and the one before it are always preferred. The choice has no gradient.
//!
//! Yuan et al.: *Native Sparse Attention* (2025).
//!
//! Three things are as in the implementation that checkpoints of this architecture were trained with:
//! - `block_counts` is rounded up to a power of two S: three blocks asked for are four attended to.
//! - Where S is 1 or 2, the preferred blocks tie, and the order of a bitonic sorting network decides between them
//!   ([`select`]).
//! - Where `block_counts` is not a power of two, keys and values get gradients only through the first `block_counts` of
//!   the chosen blocks in the order of their weights, queries through all.

pub mod reference;
pub mod select;

use burn::tensor::Tensor;

use crate::attention::check;
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::sequences::by_sequence;
use crate::{CuSeqlens, Engine, OpError};

/// Options of [`nsa`](crate::nsa()).
#[derive(Clone, Debug)]
pub struct NsaOptions {
    /// Tokens a block, a power of two and at least twice the rounded `block_counts`.
    pub block_size: usize,
    /// Blocks each query attends to in the selection branch; rounded up to a power of two.
    pub block_counts: usize,
    /// How many keys the window branch sees; `None`: there is no such branch.
    pub window: Option<usize>,
    /// Factor on the scores of the compression and selection branches; `None` is `K^(-1/2)`, which the window branch
    /// always has.
    pub scale: Option<f64>,
    /// How many of the `S` keys of each row there are: the last ones. `None`: all.
    pub lengths: Option<Vec<usize>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and no query sees another sequence.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
}

impl NsaOptions {
    /// Blocks of `block_size` tokens, `block_counts` of them selected, and no window branch.
    pub fn new(block_size: usize, block_counts: usize) -> Self {
        Self {
            block_size,
            block_counts,
            window: None,
            scale: None,
            lengths: None,
            cu_seqlens: None,
            engine: Engine::Auto,
        }
    }
}

/// Checks the sizes of blocks and of the window.
///
/// # Errors
/// [`OpError::Option`] for a block size that is no power of two or too small for the selected blocks, and for counts and
/// windows of 0.
pub fn check_blocks(block_size: usize, block_counts: usize, window: Option<usize>) -> Result<(), OpError> {
    let wrong = |option, reason: String| Err(OpError::Option { op: "nsa", option, reason });
    if block_counts == 0 {
        return wrong("block_counts", "is 0, but a query attends to one block at least".into());
    }
    if !block_size.is_power_of_two() {
        return wrong("block_size", format!("is {block_size}, but it must be a power of two"));
    }
    if block_counts.checked_next_power_of_two().is_none_or(|selected| block_size / 2 < selected) {
        return wrong(
            "block_size",
            format!("is {block_size}, but it must be at least twice block_counts {block_counts} rounded up"),
        );
    }
    if window == Some(0) {
        return wrong("window", "is 0, but a query sees its own key at least; leave the branch out with None".into());
    }
    Ok(())
}

/// Native sparse attention of `T` queries to the last of `S ≥ T` keys: query i stands at the place of key `S − T + i`, so
/// keys and values of tokens seen before are simply put in front. Blocks are counted from the first key of a sequence.
///
/// `gates` are those of compression, selection and window. In tensor operations the scores of a call exist as a whole.
///
/// # Shapes
/// - `q`: `[B, T, H, K]`; `k`: `[B, S, G, K]`; `v`: `[B, S, G, V]`; each gate `[B, T, H]`, all of one dtype (f32 or bf16;
///   f64 where the device has it), `H` a multiple of `G`
/// - returns `o`: `[B, T, H, V]` in the dtype of `q`
///
/// # Gradients
/// With respect to `q`, `k`, `v` and the gates.
///
/// # Errors
/// [`OpError`] where shapes, dtypes, devices, lengths or offsets do not fit together, and as [`check_blocks`].
pub fn nsa(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gates: [Tensor<3>; 3],
    options: NsaOptions,
) -> Result<Tensor<4>, OpError> {
    const OP: &str = "nsa";
    const NAMES: [&str; 3] = ["compression gate", "selection gate", "window gate"];
    check(OP, &q, &k, &v, options.lengths.as_deref(), options.cu_seqlens.as_ref())?;
    check_blocks(options.block_size, options.block_counts, options.window)?;
    let [b, t, heads, _] = q.dims();
    for (name, gate) in NAMES.into_iter().zip(&gates) {
        same_shape(OP, name, gate, [b, t, heads], "[B, T, H]")?;
        same_dtype(OP, name, gate, q.dtype())?;
        same_device(OP, name, gate, &q.device())?;
    }
    if t == 0 {
        return Ok(Tensor::zeros([b, 0, heads, v.dims()[3]], (&q.device(), q.dtype())));
    }
    let s = k.dims()[1];
    let packed = options.cu_seqlens.clone();
    let ragged = options.lengths.clone().filter(|lengths| lengths.iter().any(|length| *length < s));
    if let Some(lengths) = ragged {
        // Rows that began at different places have their blocks at different places.
        let rows = lengths.iter().enumerate().map(|(row, length)| {
            let part = |x: &Tensor<4>| x.clone().narrow(0, row, 1);
            let keys = |x: &Tensor<4>| part(x).narrow(1, s - length, *length);
            let gates = gates.each_ref().map(|gate| gate.clone().narrow(0, row, 1));
            reference::parallel(part(&q), keys(&k), keys(&v), gates, &options)
        });
        return Ok(Tensor::cat(rows.collect::<Result<Vec<_>, _>>()?, 0));
    }
    let Some(sequences) = packed else {
        return reference::parallel(q, k, v, gates, &options);
    };
    let (_, outputs) = by_sequence::<4, _>(&sequences, |piece| {
        let run = || {
            let gates = gates.each_ref().map(|gate| piece.tokens(gate));
            reference::parallel(piece.tokens(&q), piece.tokens(&k), piece.tokens(&v), gates, &options)
        };
        (None, (piece.length > 0).then(run))
    });
    let outputs = outputs.into_iter().flatten().collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::cat(outputs, 1))
}
