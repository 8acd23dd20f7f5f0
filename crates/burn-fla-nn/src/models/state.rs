//! What a model keeps of the tokens it has seen.

use crate::layers::LayerState;

/// What a model keeps of the tokens it has seen: one [`LayerState`] a layer, and how many tokens there were.
///
/// Constant in the number of tokens for the recurrent mixers; softmax attention keeps the keys and values of its window,
/// or of all tokens when it has none.
#[derive(Clone, Debug)]
pub struct State {
    pub(crate) layers: Vec<LayerState>,
    pub(crate) seen: usize,
}

impl State {
    /// The number of tokens seen.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// What each layer keeps.
    pub fn layers(&self) -> &[LayerState] {
        &self.layers
    }
}
