//! What the layers of one forward pass share.

use std::cell::{OnceCell, RefCell};

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use burn_fla_ops::{CuSeqlens, Engine, ScanOptions, SequenceOptions};

use crate::{Compute, NnError};

/// What the layers of one forward pass share: the shape of the input, how to compute, the tensors that depend on
/// positions alone, which are made once and only if a layer asks for them, and what one layer hands to another.
#[derive(Debug)]
pub struct SequenceContext {
    compute: Compute,
    cu_seqlens: Option<CuSeqlens>,
    batch: usize,
    tokens: usize,
    seen: Vec<usize>,
    keep_state: bool,
    device: Device,
    positions: OnceCell<Tensor<2, Int>>,
    biases: RefCell<Vec<((Option<usize>, usize), Tensor<4>)>>,
    lower_bounds: Option<Tensor<2>>,
    first_values: RefCell<Option<Tensor<3>>>,
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
        let sequences = cu_seqlens.map_or(batch, CuSeqlens::num_sequences);
        Ok(Self {
            compute,
            cu_seqlens: cu_seqlens.cloned(),
            batch,
            tokens,
            seen: vec![0; sequences],
            keep_state: false,
            device: device.clone().without_autodiff(),
            positions: OnceCell::new(),
            biases: RefCell::default(),
            lower_bounds: None,
            first_values: RefCell::default(),
        })
    }

    /// Go on after `seen` tokens of each sequence, which may differ, and return what the layers keep.
    ///
    /// # Errors
    /// Another number of sequences; packed input after tokens that were seen, which no layer takes.
    pub fn continuing(mut self, seen: &[usize]) -> Result<Self, NnError> {
        if seen.len() != self.seen.len() {
            return Err(NnError::argument(
                "state",
                format!("it is of {} sequences, and the input has {}", seen.len(), self.seen.len()),
            ));
        }
        if self.cu_seqlens.is_some() && seen.iter().any(|seen| *seen > 0) {
            return Err(NnError::argument("cu_seqlens", "packed sequences begin at their first token"));
        }
        self.seen = seen.to_vec();
        self.keep_state = true;
        Ok(self)
    }

    /// With the lower bounds of the layers' forget gates, `[layers, width]` (HGRN).
    pub(crate) fn with_lower_bounds(mut self, bounds: Option<Tensor<2>>) -> Self {
        self.lower_bounds = bounds;
        self
    }

    /// How to compute.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Which implementation of the operators runs.
    pub(crate) fn engine(&self) -> Engine {
        self.compute.engine
    }

    /// Whether layers return their state.
    pub fn keep_state(&self) -> bool {
        self.keep_state
    }

    /// The number of tokens of each sequence before this input.
    pub fn seen(&self) -> &[usize] {
        &self.seen
    }

    /// The packed sequences.
    pub fn cu_seqlens(&self) -> Option<&CuSeqlens> {
        self.cu_seqlens.as_ref()
    }

    /// The lower bound of the forget gate of layer `layer`, `[width]`, where the model has them.
    pub(crate) fn lower_bound(&self, layer: usize) -> Option<Tensor<1>> {
        self.lower_bounds.as_ref().map(|bounds| bounds.clone().narrow(0, layer, 1).squeeze_dim(0))
    }

    /// The values of the first layer that calls this, which later layers mix with their own (RWKV7). `None` for that
    /// first layer, whose `values` are kept.
    #[expect(dead_code, reason = "for RWKV7")]
    pub(crate) fn first_values(&self, values: &Tensor<3>) -> Option<Tensor<3>> {
        let mut first = self.first_values.borrow_mut();
        if first.is_none() {
            *first = Some(values.clone());
            return None;
        }
        first.clone()
    }

    /// The sequences of a packed row one after the other, of `[1, T, …]`: those of the last `count` tokens of each that
    /// there are, behind zeros where there are fewer, `[N, count, …]`.
    pub(crate) fn last_of_each<const D: usize>(&self, cu: &CuSeqlens, x: &Tensor<D>, count: usize) -> Tensor<D> {
        let rows = cu.offsets().windows(2).map(|window| {
            let (start, end) = (window[0], window[1]);
            let length = (end - start).min(count);
            let mut missing = x.dims();
            missing[1] = count - length;
            let kept = (length > 0).then(|| x.clone().narrow(1, end - length, length));
            let zeros = (length < count).then(|| Tensor::zeros(missing, (&x.device(), x.dtype())));
            let parts: Vec<_> = zeros.into_iter().chain(kept).collect();
            Tensor::cat(parts, 1)
        });
        Tensor::cat(rows.collect(), 0)
    }

    /// One more than the largest position of a token.
    pub fn position_end(&self) -> usize {
        match &self.cu_seqlens {
            Some(cu) => cu.lengths().max().unwrap_or(0),
            None => self.seen.iter().max().unwrap_or(&0) + self.tokens,
        }
    }

    /// The number of tokens that every sequence has seen, where it is one number.
    fn seen_by_all(&self) -> Option<usize> {
        let first = *self.seen.first()?;
        self.seen.iter().all(|seen| *seen == first).then_some(first)
    }

    /// The position of each token in its sequence, `[B, T]`.
    pub fn positions(&self) -> Tensor<2, Int> {
        let given = |positions: Vec<i32>| {
            Tensor::from_data(TensorData::new(positions, [self.batch, self.tokens]), &self.device)
        };
        let make = || match (&self.cu_seqlens, self.seen_by_all()) {
            (Some(cu), _) => given(cu.lengths().flat_map(|length| 0..length as i32).collect()),
            (None, Some(seen)) => Tensor::<1, Int>::arange(seen as i64..(seen + self.tokens) as i64, &self.device)
                .unsqueeze_dim::<2>(0)
                .expand([self.batch, self.tokens]),
            (None, None) => {
                given(self.seen.iter().flat_map(|seen| *seen as i32..(seen + self.tokens) as i32).collect())
            }
        };
        self.positions.get_or_init(make).clone()
    }

    /// What to add to the scores of the last `keys` keys up to the last token of this input: 0 where a query may see a
    /// key (not later than itself, fewer than `window` tokens back, of the same sequence, and not before its first
    /// token), −1e30 elsewhere; f32 `[1 or B, 1, T, keys]`. `None` when every query sees every key.
    pub(crate) fn attention_bias(&self, window: Option<usize>, keys: usize) -> Option<Tensor<4>> {
        let in_window = window.is_none_or(|w| keys <= w);
        // Rows that began later than the first of the keys stand behind zeros.
        let padded = self.cu_seqlens.is_none() && self.seen.iter().any(|seen| seen + self.tokens < keys);
        if self.tokens == 1 && in_window && !padded {
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
        let flag = |mask: Tensor<2, Bool>| mask.float().cast(DType::F32);
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
        let mut unseen = unseen.unsqueeze_dims::<4>(&[0, 1]);
        if padded {
            let before = |seen: &usize| keys.saturating_sub(seen + self.tokens);
            let absent: Vec<f32> = self
                .seen
                .iter()
                .flat_map(|seen| (0..keys).map(move |key| if key < before(seen) { 1.0 } else { 0.0 }))
                .collect();
            unseen = unseen + Tensor::from_data(TensorData::new(absent, [self.batch, 1, 1, keys]), &self.device);
        }
        let bias = unseen * UNSEEN;
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

    /// Options of a scan along time that goes on from `state`.
    pub(crate) fn scan_options(&self, state: Option<Tensor<2>>) -> ScanOptions {
        ScanOptions { initial_state: state, cu_seqlens: self.cu_seqlens.clone(), engine: self.compute.engine }
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
