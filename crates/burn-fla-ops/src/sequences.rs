use std::sync::Arc;

use burn::tensor::Tensor;

use crate::OpError;

/// Offsets `[0, n1, n1 + n2, …]` of sequences packed into one row of tokens.
///
/// They live on the host, because chunks are laid out before any kernel is launched. A sequence of length zero is legal:
/// it has no tokens, and its final state is its initial state.
///
/// ```
/// let packed = burn_fla_ops::CuSeqlens::new(vec![0, 3, 3, 10])?;
/// assert_eq!(packed.num_sequences(), 3);
/// assert_eq!(packed.lengths().collect::<Vec<_>>(), [3, 0, 7]);
/// # Ok::<(), burn_fla_ops::OpError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CuSeqlens {
    offsets: Arc<[usize]>,
}

impl CuSeqlens {
    /// Checks that the offsets start at 0 and never decrease.
    ///
    /// # Errors
    /// [`OpError::CuSeqlens`] where they do not, or where fewer than two are given.
    pub fn new(offsets: Vec<usize>) -> Result<Self, OpError> {
        let wrong = |reason: String| Err(OpError::CuSeqlens { reason });
        if offsets.len() < 2 {
            return wrong(format!(
                "{} offsets given, but at least two are needed: 0 and the number of tokens",
                offsets.len()
            ));
        }
        if offsets[0] != 0 {
            return wrong(format!("the first offset is {}, but it must be 0", offsets[0]));
        }
        if let Some(at) = offsets.windows(2).position(|w| w[1] < w[0]) {
            return wrong(format!(
                "offset {} is {} after {}, but offsets must not decrease",
                at + 1,
                offsets[at + 1],
                offsets[at]
            ));
        }
        Ok(Self { offsets: offsets.into() })
    }

    /// `batch` sequences of `length` tokens each, as a dense batch has them.
    pub(crate) fn dense(batch: usize, length: usize) -> Self {
        Self { offsets: (0..=batch).map(|i| i * length).collect() }
    }

    /// The offsets, one more than there are sequences.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// How many sequences are packed.
    pub fn num_sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// How many tokens there are in all.
    pub fn total(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// The length of each sequence.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.offsets.windows(2).map(|w| w[1] - w[0])
    }

    /// Checks that the offsets describe a row of `batch` × `tokens`.
    pub(crate) fn check(&self, batch: usize, tokens: usize) -> Result<(), OpError> {
        if batch != 1 {
            return Err(OpError::CuSeqlens {
                reason: format!(
                    "packed sequences need a batch of 1, but the batch is {batch}; flatten it to [1, B*T, …]"
                ),
            });
        }
        if self.total() != tokens {
            return Err(OpError::CuSeqlens {
                reason: format!("the last offset is {}, but there are {tokens} tokens", self.total()),
            });
        }
        Ok(())
    }
}

/// One of the sequences of a packed row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Which sequence, from 0: the row of its state.
    pub(crate) index: usize,
    /// Its first token.
    pub(crate) start: usize,
    /// Its number of tokens, 0 too.
    pub(crate) length: usize,
}

impl Piece {
    /// The tokens of the sequence, from a row `[1, T, …]`.
    pub(crate) fn tokens<const D: usize>(self, x: &Tensor<D>) -> Tensor<D> {
        x.clone().narrow(1, self.start, self.length)
    }

    /// The state of the sequence, from `[N, …]`.
    pub(crate) fn state<const D: usize>(self, x: &Tensor<D>) -> Tensor<D> {
        x.clone().narrow(0, self.index, 1)
    }
}

/// Runs every sequence of a packed row by itself, for the references: the outputs `[1, T, …]` as one row, and what else
/// `run` returns for each sequence. `run` is to return no output for a sequence without tokens. `None` when no sequence
/// has a token.
pub(crate) fn by_sequence<const D: usize, R>(
    sequences: &CuSeqlens,
    mut run: impl FnMut(Piece) -> (Option<Tensor<D>>, R),
) -> (Option<Tensor<D>>, Vec<R>) {
    let mut outputs = Vec::new();
    let mut rest = Vec::with_capacity(sequences.num_sequences());
    for (index, window) in sequences.offsets().windows(2).enumerate() {
        let (output, other) = run(Piece { index, start: window[0], length: window[1] - window[0] });
        outputs.extend(output);
        rest.push(other);
    }
    let output = if outputs.is_empty() { None } else { Some(Tensor::cat(outputs, 1)) };
    (output, rest)
}

/// [`by_sequence`] for a reference whose inputs by token are all `[B, T, H, D]`: `dense` gets the tokens and the state
/// of one sequence, or of the whole batch where nothing is packed, and returns outputs and state. The outputs are `None`
/// where there is no token.
pub(crate) fn each_sequence<const E: usize>(
    inputs: [Tensor<4>; E],
    state: Tensor<4>,
    packed: Option<&CuSeqlens>,
    dense: impl Fn([Tensor<4>; E], Tensor<4>) -> (Tensor<4>, Tensor<4>),
) -> (Option<Tensor<4>>, Tensor<4>) {
    let Some(packed) = packed else {
        if inputs[0].dims()[1] == 0 {
            return (None, state);
        }
        let (o, end) = dense(inputs, state);
        return (Some(o), end);
    };
    let (o, states) = by_sequence(packed, |piece| {
        let state = piece.state(&state);
        if piece.length == 0 {
            return (None, state);
        }
        let (o, end) = dense(inputs.each_ref().map(|x| piece.tokens(x)), state);
        (Some(o), end)
    });
    (o, Tensor::cat(states, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_offsets_are_named() {
        let message = |offsets: Vec<usize>| CuSeqlens::new(offsets).unwrap_err().to_string();
        assert!(message(vec![0]).contains("at least two"));
        assert!(message(vec![1, 2]).contains("must be 0"));
        assert!(message(vec![0, 4, 3]).contains("offset 2 is 3 after 4"));
        let packed = CuSeqlens::new(vec![0, 2, 5]).unwrap();
        assert!(packed.check(2, 5).unwrap_err().to_string().contains("batch of 1"));
        assert!(packed.check(1, 6).unwrap_err().to_string().contains("last offset is 5"));
    }
}
