//! What a model keeps of the tokens it has seen.

use super::BlockState;

/// What a model keeps of the tokens it has seen: one [`BlockState`] a layer, and how many tokens of each sequence there
/// were.
///
/// Constant in the number of tokens for the recurrent mixers; softmax attention keeps the keys and values of its window,
/// or of all tokens when it has none.
#[derive(Clone, Debug)]
pub struct State {
    pub(crate) layers: Vec<BlockState>,
    pub(crate) seen: Vec<usize>,
}

impl State {
    /// The number of tokens seen of each sequence.
    pub fn seen(&self) -> &[usize] {
        &self.seen
    }

    /// What each layer keeps.
    pub fn layers(&self) -> &[BlockState] {
        &self.layers
    }
}
