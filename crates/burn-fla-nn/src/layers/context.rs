//! What the layers of one forward pass share, and what they keep between passes.

use std::cell::{OnceCell, RefCell};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_fla_ops::{CuSeqlens, SequenceOptions};

use crate::{Compute, NnError};

/// What a layer keeps of the tokens it has seen.
// A handful of handles a layer: no box is needed around them.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum LayerState {
    /// A recurrent mixer: constant in the number of tokens.
    Recurrent {
        /// S, f32 `[B, H, K, V]`.
        state: Tensor<4>,
        /// The last inputs of the short convolutions of q, k and v, where the layer has them, `[B, channels, W]`.
        conv: Option<[Tensor<3>; 3]>,
    },
    /// Softmax attention: the keys (already rotated) and values of the tokens seen, or of the window, `[B, S, G, K]`.
    KeyValue {
        /// Keys.
        k: Tensor<4>,
        /// Values.
        v: Tensor<4>,
    },
}

/// What the layers of one forward pass share: the shape of the input, how to compute, and the tensors that depend on
/// positions alone, which are made once and only if a layer asks for them.
#[derive(Debug)]
pub struct SequenceContext {
    compute: Compute,
    cu_seqlens: Option<CuSeqlens>,
    batch: usize,
    tokens: usize,
    seen: usize,
    keep_state: bool,
    device: Device,
    positions: OnceCell<Tensor<2, Int>>,
    biases: RefCell<Vec<((Option<usize>, usize), Tensor<4>)>>,
}

/// Added to the scores of keys that a query must not see. Finite, so that no device has to be right about infinities.
const UNSEEN: f64 = -1e30;

impl SequenceContext {
    /// For an input of `batch` rows of `tokens` on `device`. With `cu_seqlens` the one row is packed of several
    /// sequences, and nothing passes from one to the next.
    ///
    /// # Errors
    /// A type that is not computed in; `cu_seqlens` with more than one row or that does not cover the row.
    pub fn new(
        [batch, tokens]: [usize; 2],
        cu_seqlens: Option<&CuSeqlens>,
        compute: Compute,
        device: &Device,
    ) -> Result<Self, NnError> {
        compute.check()?;
        if let Some(cu) = cu_seqlens {
            if batch != 1 {
                return Err(NnError::argument(
                    "cu_seqlens",
                    format!("packed sequences need one row, and the input has {batch}"),
                ));
            }
            if cu.total() != tokens {
                return Err(NnError::argument(
                    "cu_seqlens",
                    format!("it covers {} tokens, and the row has {tokens}", cu.total()),
                ));
            }
        }
        Ok(Self {
            compute,
            cu_seqlens: cu_seqlens.cloned(),
            batch,
            tokens,
            seen: 0,
            keep_state: false,
            device: device.clone().without_autodiff(),
            positions: OnceCell::new(),
            biases: RefCell::default(),
        })
    }

    /// Go on after `seen` tokens, and return what the layers keep. Not for packed input.
    pub fn continuing(mut self, seen: usize) -> Self {
        self.seen = seen;
        self.keep_state = true;
        self
    }

    /// How to compute.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Whether layers return their state.
    pub fn keep_state(&self) -> bool {
        self.keep_state
    }

    /// The number of tokens before this input.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// The packed sequences.
    pub fn cu_seqlens(&self) -> Option<&CuSeqlens> {
        self.cu_seqlens.as_ref()
    }

    /// One more than the largest position of a token.
    pub fn position_end(&self) -> usize {
        match &self.cu_seqlens {
            Some(cu) => cu.lengths().max().unwrap_or(0),
            None => self.seen + self.tokens,
        }
    }

    /// The position of each token in its sequence, `[B, T]`.
    pub fn positions(&self) -> Tensor<2, Int> {
        let make = || match &self.cu_seqlens {
            Some(cu) => {
                let positions: Vec<i32> = cu.lengths().flat_map(|length| 0..length as i32).collect();
                Tensor::from_data(TensorData::new(positions, [1, self.tokens]), &self.device)
            }
            None => Tensor::<1, Int>::arange(self.seen as i64..(self.seen + self.tokens) as i64, &self.device)
                .unsqueeze_dim::<2>(0)
                .expand([self.batch, self.tokens]),
        };
        self.positions.get_or_init(make).clone()
    }

    /// What to add to the scores of the last `keys` keys up to the last token of this input: 0 where a query may see a
    /// key (not later than itself, fewer than `window` tokens back, of the same sequence), −1e30 elsewhere; f32
    /// `[1, 1, T, keys]`. `None` when every query sees every key.
    pub(crate) fn attention_bias(&self, window: Option<usize>, keys: usize) -> Option<Tensor<4>> {
        let in_window = window.is_none_or(|w| keys <= w);
        if self.tokens == 1 && in_window {
            return None;
        }
        let key = (window, keys);
        let mut biases = self.biases.borrow_mut();
        if let Some((_, bias)) = biases.iter().find(|(known, _)| *known == key) {
            return Some(bias.clone());
        }
        let column =
            |end: usize, length: usize| Tensor::<1, Int>::arange(end as i64 - length as i64..end as i64, &self.device);
        let distance = column(keys, self.tokens).unsqueeze_dim::<2>(1) - column(keys, keys).unsqueeze_dim::<2>(0);
        let flag = |mask: Tensor<2, burn::tensor::Bool>| mask.float().cast(DType::F32);
        let mut unseen = flag(distance.clone().lower_elem(0));
        if let (Some(window), false) = (window, in_window) {
            unseen = unseen + flag(distance.greater_elem(window as i64 - 1));
        }
        if let Some(cu) = &self.cu_seqlens {
            let sequence: Vec<i32> =
                cu.lengths().enumerate().flat_map(|(i, length)| std::iter::repeat_n(i as i32, length)).collect();
            let sequence = Tensor::<1, Int>::from_data(TensorData::new(sequence, [self.tokens]), &self.device);
            let other = sequence.clone().unsqueeze_dim::<2>(1) - sequence.unsqueeze_dim::<2>(0);
            unseen = unseen + flag(other.not_equal_elem(0));
        }
        let bias = (unseen * UNSEEN).unsqueeze_dims::<4>(&[0, 1]);
        biases.push((key, bias.clone()));
        Some(bias)
    }

    /// Options of a sequence operator that goes on from `state`.
    pub(crate) fn options(&self, state: Option<Tensor<4>>) -> SequenceOptions {
        SequenceOptions {
            initial_state: state,
            cu_seqlens: self.cu_seqlens.clone(),
            engine: self.compute.engine,
            ..Default::default()
        }
    }

    /// An error when `x` is not of the context's shape.
    pub(crate) fn check_input(&self, x: &Tensor<3>, width: usize) -> Result<(), NnError> {
        let expected = [self.batch, self.tokens, width];
        if x.dims() != expected {
            return Err(NnError::argument("x", format!("the shape is {:?}, and {expected:?} is expected", x.dims())));
        }
        Ok(())
    }
}

/// The state and the convolution caches of a recurrent layer, or an error when the state is another layer's.
pub(crate) fn recurrent_state(
    past: Option<LayerState>,
) -> Result<(Option<Tensor<4>>, Option<[Tensor<3>; 3]>), NnError> {
    match past {
        None => Ok((None, None)),
        Some(LayerState::Recurrent { state, conv }) => Ok((Some(state), conv)),
        Some(LayerState::KeyValue { .. }) => {
            Err(NnError::argument("state", "a recurrent layer was given the keys and values of an attention layer"))
        }
    }
}
