//! What the layers of one forward pass share.

use std::cell::{OnceCell, RefCell};

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_fla_ops::{self as ops, AttentionOptions, CuSeqlens, Engine, ScanOptions, SequenceOptions, TokenShiftOptions};

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
    lower_bounds: Option<Tensor<2>>,
    first_values: RefCell<Option<Tensor<3>>>,
}

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
    pub(crate) fn first_values(&self, values: &Tensor<3>) -> Option<Tensor<3>> {
        let mut first = self.first_values.borrow_mut();
        if first.is_none() {
            *first = Some(values.clone());
            return None;
        }
        first.clone()
    }

    /// What [`first_values`](Self::first_values) has kept.
    pub(crate) fn kept_first_values(&self) -> Option<Tensor<3>> {
        self.first_values.borrow().clone()
    }

    /// With `values` as those of the first layer, which is not part of what is computed.
    pub(crate) fn with_first_values(self, values: Option<Tensor<3>>) -> Self {
        Self { first_values: RefCell::new(values), ..self }
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

    /// How many of `keys` keys up to the last token of this input each row has, where some have fewer: those that began
    /// later stand behind zeros.
    pub(crate) fn key_lengths(&self, keys: usize) -> Option<Vec<usize>> {
        let length = |seen: &usize| (seen + self.tokens).min(keys);
        let ragged = self.cu_seqlens.is_none() && self.seen.iter().any(|seen| length(seen) < keys);
        ragged.then(|| self.seen.iter().map(length).collect())
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

    /// Options of attention to `keys` keys up to the last token of this input.
    pub(crate) fn attention(&self, keys: usize, window: Option<usize>) -> AttentionOptions {
        AttentionOptions {
            window,
            lengths: self.key_lengths(keys),
            cu_seqlens: self.cu_seqlens.clone(),
            engine: self.compute.engine,
            ..Default::default()
        }
    }

    /// Options of a scan along time that goes on from `state`.
    pub(crate) fn scan_options(&self, state: Option<Tensor<2>>) -> ScanOptions {
        ScanOptions { initial_state: state, cu_seqlens: self.cu_seqlens.clone(), engine: self.compute.engine }
    }

    /// The difference of each token to the one before it, and the last token of each sequence, `[N, width]`; `past` are
    /// the tokens before the first ones.
    pub(crate) fn token_shift(&self, x: Tensor<3>, past: Option<Tensor<2>>) -> Result<(Tensor<3>, Tensor<2>), NnError> {
        let options =
            TokenShiftOptions { initial: past, cu_seqlens: self.cu_seqlens.clone(), engine: self.compute.engine };
        Ok(ops::token_shift(x, options)?)
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
