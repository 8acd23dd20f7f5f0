//! What the scans along time share that work on every channel by itself: the checks, and steps over distances 1, 2, 4, …
//!
//! All sequences stand one after another as rows `[R, D]`, dense batches too, and a step never reaches over the start of
//! a sequence. So the number of tensor operations grows with the logarithm of the longest sequence, not with the number
//! of tokens or of sequences.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::arguments::activation;
use crate::bridge::{same_device, same_shape};
use crate::chunked::compute_dtype;
use crate::{CuSeqlens, OpError, ScanOptions};

/// The checked arguments of a scan over `[B, T, D]`.
pub(crate) struct Scan {
    shape: [usize; 3],
    /// The dtype in which it computes.
    pub(crate) dtype: DType,
    device: Device,
    sequences: CuSeqlens,
    initial: Option<Tensor<2>>,
    #[cfg(feature = "cube")]
    engine: crate::Engine,
}

impl Scan {
    /// `x` is the argument called `argument`; it decides shape, dtype and device.
    pub(crate) fn new(
        op: &'static str,
        argument: &'static str,
        x: &Tensor<3>,
        options: ScanOptions,
    ) -> Result<Self, OpError> {
        let [b, t, d] = x.dims();
        let device = x.device();
        activation(op, argument, x)?;
        if b == 0 || d == 0 {
            return Err(OpError::Shape {
                op,
                argument,
                found: x.dims().to_vec(),
                expected: "at least one row and channel".into(),
            });
        }
        let sequences = match options.cu_seqlens {
            Some(packed) => {
                packed.check(b, t)?;
                packed
            }
            None => CuSeqlens::dense(b, t),
        };
        let dtype = compute_dtype(x.dtype());
        let initial = match options.initial_state {
            Some(state) => {
                same_shape(op, "initial_state", &state, [sequences.num_sequences(), d], "[N, D]")?;
                same_device(op, "initial_state", &state, &device)?;
                Some(state.cast(dtype))
            }
            None => None,
        };
        Ok(Self {
            shape: [b, t, d],
            dtype,
            device,
            sequences,
            initial,
            #[cfg(feature = "cube")]
            engine: options.engine,
        })
    }

    /// Whether there is no token at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.sequences.total() == 0
    }

    /// Whether the kernels take `x`, of this scan.
    #[cfg(feature = "cube")]
    pub(crate) fn on_kernels(&self, x: &Tensor<3>) -> bool {
        crate::arguments::on_kernels(x, self.engine) && !self.is_empty()
    }

    /// The sequences, those of a dense batch too.
    #[cfg(feature = "cube")]
    pub(crate) fn sequences(&self) -> &CuSeqlens {
        &self.sequences
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The state before the first token, `[N, D]`, where one is given.
    pub(crate) fn initial(&self) -> Option<Tensor<2>> {
        self.initial.clone()
    }

    /// The state before the first token, `fill` where none is given.
    pub(crate) fn initial_or(&self, fill: f64) -> Tensor<2> {
        let shape = [self.sequences.num_sequences(), self.shape[2]];
        self.initial().unwrap_or_else(|| Tensor::full(shape, fill, (&self.device, self.dtype)))
    }

    /// `[B, T, D]` as rows in the dtype of the scan.
    pub(crate) fn rows(&self, x: Tensor<3>) -> Tensor<2> {
        let [b, t, d] = self.shape;
        x.cast(self.dtype).reshape([b * t, d])
    }

    /// Rows as `[B, T, D]`.
    pub(crate) fn unrows(&self, x: Tensor<2>) -> Tensor<3> {
        x.reshape(self.shape)
    }

    pub(crate) fn layout(&self) -> Rows {
        Rows::new(&self.sequences, &self.device)
    }
}

/// Where the sequences stand among the rows. There is a row at least.
pub(crate) struct Rows {
    /// The place of each row in its sequence, `[R, 1]`.
    place: Tensor<2, Int>,
    /// The sequence of each row, `[R]`.
    sequence: Tensor<1, Int>,
    /// The last row of each sequence that has one.
    last: Vec<usize>,
    /// For each sequence, its place in `last`.
    ends: Vec<Option<usize>>,
    longest: usize,
}

impl Rows {
    fn new(sequences: &CuSeqlens, device: &Device) -> Self {
        let rows = sequences.total();
        let (mut place, mut sequence) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let (mut last, mut ends) = (Vec::new(), Vec::new());
        for (index, length) in sequences.lengths().enumerate() {
            place.extend((0..length).map(|i| i as i32));
            sequence.extend(std::iter::repeat_n(index as i32, length));
            ends.push((length > 0).then_some(last.len()));
            if length > 0 {
                last.push(place.len() - 1);
            }
        }
        let longest = sequences.lengths().max().unwrap_or(0);
        Self {
            place: Tensor::from_data(TensorData::new(place, [rows, 1]), device),
            sequence: Tensor::from_data(TensorData::new(sequence, [rows]), device),
            last,
            ends,
            longest,
        }
    }

    /// 1, 2, 4, … below the longest sequence.
    pub(crate) fn distances(&self) -> impl Iterator<Item = usize> + use<> {
        let longest = self.longest;
        std::iter::successors(Some(1), |d| Some(2 * d)).take_while(move |d| *d < longest)
    }

    /// Row `t` is row `t − distance` of `x`, or `fill` where that is in another sequence.
    pub(crate) fn shifted(&self, x: Tensor<2>, distance: usize, fill: f64) -> Tensor<2> {
        let [rows, d] = x.dims();
        let head = Tensor::zeros([distance.min(rows), d], (&x.device(), x.dtype()));
        let x = if distance < rows { Tensor::cat(vec![head, x.narrow(0, 0, rows - distance)], 0) } else { head };
        x.mask_fill(self.place.clone().lower_elem(distance as i64).expand([rows, d]), fill)
    }

    /// As [`shifted`](Self::shifted) by one row, with the state of its sequence before each first row.
    pub(crate) fn shifted_from(&self, x: Tensor<2>, states: Tensor<2>) -> Tensor<2> {
        let shape = x.dims();
        let first = self.place.clone().equal_elem(0).expand(shape);
        self.shifted(x, 1, 0.0).mask_where(first, self.spread(states))
    }

    /// The row of its sequence for each row: `[N, D]` to `[R, D]`.
    pub(crate) fn spread(&self, states: Tensor<2>) -> Tensor<2> {
        states.select(0, self.sequence.clone())
    }

    /// The last row of each sequence, the row of `before` where it has none: `[N, D]`.
    pub(crate) fn ends(&self, x: Tensor<2>, before: Tensor<2>) -> Tensor<2> {
        let device = x.device();
        let indices = |of: Vec<i32>| Tensor::<1, Int>::from_data(of.as_slice(), &device);
        let last = x.select(0, indices(self.last.iter().map(|row| *row as i32).collect()));
        if self.ends.iter().all(Option::is_some) {
            return last;
        }
        let found = self.last.len();
        let order = self.ends.iter().enumerate().map(|(i, end)| end.unwrap_or(found + i) as i32).collect();
        Tensor::cat(vec![last, before], 0).select(0, indices(order))
    }
}
