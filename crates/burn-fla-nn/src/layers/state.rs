//! What mixers keep of the tokens they have seen.

use burn::tensor::Tensor;

use super::SequenceContext;
use crate::NnError;
use crate::modules::ShortConv;

/// What a mixer keeps of the tokens it has seen.
pub trait MixerState: Clone + std::fmt::Debug {
    /// How many numbers it holds.
    fn elements(&self) -> usize;
}

/// The state of a recurrent mixer: constant in the number of tokens.
#[derive(Clone, Debug)]
pub struct RecurrentState {
    /// S, f32 `[N, H, K, V]`.
    pub state: Tensor<4>,
    /// The last inputs of the layer's short convolutions, in the order of its fields, each `[N, channels, W]`.
    pub conv: Vec<Tensor<3>>,
}

impl MixerState for RecurrentState {
    fn elements(&self) -> usize {
        self.state.shape().num_elements() + conv_elements(&self.conv)
    }
}

/// How many numbers convolution histories hold.
pub(crate) fn conv_elements(conv: &[Tensor<3>]) -> usize {
    conv.iter().map(|c| c.shape().num_elements()).sum()
}

/// The state of a recurrent mixer that mixes each token with the one before it.
#[derive(Clone, Debug)]
pub struct ShiftState {
    /// S, f32 `[N, H, K, V]`.
    pub state: Tensor<4>,
    /// The last input of the layer, `[N, hidden]`.
    pub last: Tensor<2>,
}

impl MixerState for ShiftState {
    fn elements(&self) -> usize {
        self.state.shape().num_elements() + self.last.shape().num_elements()
    }
}

/// The keys (already rotated) and values of the tokens seen, or of those in the window, `[N, S, G, K]`. A sequence of
/// fewer than S tokens stands at the end, behind zeros.
#[derive(Clone, Debug)]
pub struct KeyValueState {
    /// Keys.
    pub k: Tensor<4>,
    /// Values.
    pub v: Tensor<4>,
}

impl KeyValueState {
    /// Keys and values with those of the tokens before in front of them.
    pub(crate) fn extend(past: Option<Self>, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        match past {
            None => (k, v),
            Some(past) => (Tensor::cat(vec![past.k, k], 1), Tensor::cat(vec![past.v, v], 1)),
        }
    }

    /// What a later token may still see of keys and values, when the context keeps states.
    pub(crate) fn keep(k: Tensor<4>, v: Tensor<4>, window: Option<usize>, context: &SequenceContext) -> Option<Self> {
        context.keep_state().then(|| Self { k: in_window(k, window, context), v: in_window(v, window, context) })
    }
}

/// What a later token may still see of `[B, S, …]`: all, or one less than the window, `[N, S′, …]`.
pub(crate) fn in_window<const D: usize>(x: Tensor<D>, window: Option<usize>, context: &SequenceContext) -> Tensor<D> {
    // One at least: not every device knows tensors without elements.
    let reach = window.map_or(usize::MAX, |window| (window - 1).max(1));
    match context.cu_seqlens() {
        Some(cu) => {
            let longest = cu.lengths().max().unwrap_or(0).max(1);
            context.last_of_each(cu, &x, longest.min(reach))
        }
        None => {
            let length = x.dims()[1];
            if length <= reach { x } else { x.narrow(1, length - reach, reach) }
        }
    }
}

impl MixerState for KeyValueState {
    fn elements(&self) -> usize {
        self.k.shape().num_elements() + self.v.shape().num_elements()
    }
}

/// The keys and values of attention that forgets.
#[derive(Clone, Debug)]
pub struct ForgettingState {
    /// Keys and values.
    pub keys: KeyValueState,
    /// Natural logarithm of the forget gate at each key, f32 `[N, S, H]`.
    pub log_forget: Tensor<3>,
}

impl MixerState for ForgettingState {
    fn elements(&self) -> usize {
        self.keys.elements() + self.log_forget.shape().num_elements()
    }
}

/// Runs the short convolutions of a layer one after the other, each from its history, and collects the new ones.
pub(crate) struct Convs<'a> {
    context: &'a SequenceContext,
    past: std::vec::IntoIter<Tensor<3>>,
    next: Vec<Tensor<3>>,
}

impl<'a> Convs<'a> {
    /// `past` are the histories in the order in which the convolutions will run; none at the beginning of a sequence.
    pub fn new(context: &'a SequenceContext, past: Vec<Tensor<3>>) -> Self {
        Self { context, past: past.into_iter(), next: Vec::new() }
    }

    /// `x` convolved, or as it is where the layer has no convolution.
    pub fn run(&mut self, conv: &Option<ShortConv>, x: Tensor<3>) -> Result<Tensor<3>, NnError> {
        let Some(conv) = conv else { return Ok(x) };
        let context = self.context;
        let (x, history) = conv.forward(x, self.past.next(), context.cu_seqlens().cloned(), context.engine())?;
        self.next.push(history);
        Ok(x)
    }

    /// The new histories.
    pub fn finish(self) -> Vec<Tensor<3>> {
        self.next
    }
}
