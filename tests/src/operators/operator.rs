//! What an entry of the list says of its operator.

use burn::tensor::{DType, Device, Distribution, Tensor, activation};
use burn_fla_ops::{OpError, SequenceOptions};

/// Rows, tokens, heads, and channels of keys and of values.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Rows.
    pub b: usize,
    /// Tokens of a row.
    pub t: usize,
    /// Heads.
    pub h: usize,
    /// Heads of queries and keys, of which each is read by as many heads of values, side by side; `h` where each has its own.
    pub key_heads: usize,
    /// Channels of a key.
    pub k: usize,
    /// Channels of a value.
    pub v: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { b, t, h, key_heads, k, v } = *self;
        let heads = if key_heads == h { h.to_string() } else { format!("{key_heads}/{h}") };
        write!(f, "{b} {t} {heads} {k} {v}")
    }
}

/// What an input is, which says how well its gradient must be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Channels, or a parameter that multiplies them.
    Channels,
    /// A decay or a strength, whose gradient is a sum of differences.
    Gate,
    /// Without a gradient.
    Constant,
}

/// An input: `[B, T, H, D]`, with ones for the axes that it has not.
pub struct Input {
    /// Its name in the results.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its numbers, tracked unless they are constant.
    pub tensor: Tensor<4>,
}

/// Most relative RMS errors of bf16, by the recurrence in f64 over the same inputs.
#[derive(Clone, Copy)]
pub struct Bounds {
    /// Of o.
    pub output: f64,
    /// Of the gradient of [`Kind::Channels`].
    pub channels: f64,
    /// Of the gradient of [`Kind::Gate`].
    pub gate: f64,
}

/// Those of most operators: operands and outputs are rounded to bf16, and a decay's gradient is a difference.
pub const BOUNDS: Bounds = Bounds { output: 5e-3, channels: 8e-3, gate: 2e-2 };

/// Matrix products of one chunk of the chunked form, by their shape.
#[derive(Clone, Copy)]
pub struct Products {
    /// Chunk × chunk × keys.
    pub scores: f64,
    /// Chunk × chunk × values.
    pub values: f64,
    /// Chunk × keys × values.
    pub states: f64,
}

/// Tokens of a chunk in which the products are counted.
const CHUNK: f64 = 64.0;

impl Products {
    fn flops(self, tokens: f64, keys: f64, values: f64) -> f64 {
        let Self { scores, values: outputs, states } = self;
        2.0 * tokens * (CHUNK * (scores * keys + outputs * values) + states * keys * values)
    }
}

/// Floating-point operations of the chunked form, forward, and forward and backward. Backward makes anew what is not an
/// output (`forward` without `last`), and has two products for each of forward's.
pub fn flops(forward: Products, last: Products, tokens: usize, keys: usize, values: usize) -> [f64; 2] {
    let count = |products: Products| products.flops(tokens as f64, keys as f64, values as f64);
    [count(forward), 4.0 * count(forward) - count(last)]
}

/// One operator.
pub struct Operator {
    /// That of its public function.
    pub name: &'static str,
    /// Random inputs.
    pub inputs: fn(&Draw) -> Vec<Input>,
    /// The outputs `[B, T, H, V]` and the last state, where it is one tensor. Where `options` has an initial state, it is
    /// used by operators whose state is one tensor.
    pub forward: fn(&[Tensor<4>], SequenceOptions) -> Result<(Tensor<4>, Option<Tensor<4>>), OpError>,
    /// o and the gradient of every input, of one head of one row, by the recurrence in f64, from the inputs as that head
    /// sees them and the gradient of o.
    pub exact: fn(&[Vec<f64>], &[f64], Size) -> Vec<Vec<f64>>,
    /// Floating-point operations of the chunked form, forward, and forward and backward.
    pub flops: fn(Size) -> [f64; 2],
    /// What is an error in bf16.
    pub bounds: Bounds,
}

/// Draws inputs of a size.
pub struct Draw {
    /// Where the inputs are.
    pub device: Device,
    /// How many there are.
    pub size: Size,
    /// The dtype of channels, and of decays by key.
    pub dtype: DType,
    /// The dtype of numbers by token or head.
    pub wide: DType,
}

impl Draw {
    /// Normal numbers, in the wide dtype.
    pub fn normal(&self, shape: [usize; 4]) -> Tensor<4> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), (&self.device, self.wide))
    }

    /// Normal numbers `[B, T, H, width]`, in the wide dtype.
    pub fn by_head(&self, width: usize) -> Tensor<4> {
        self.normal([self.size.b, self.size.t, self.size.h, width])
    }

    /// An input of these numbers.
    pub fn input(&self, name: &'static str, kind: Kind, x: Tensor<4>, dtype: DType) -> Input {
        let x = x.cast(dtype).detach();
        Input { name, kind, tensor: if kind == Kind::Constant { x } else { x.require_grad() } }
    }

    /// Channels of normal numbers.
    pub fn channels(&self, name: &'static str, width: usize) -> Input {
        self.input(name, Kind::Channels, self.by_head(width), self.dtype)
    }

    /// Channels of length 1, of every head of keys.
    pub fn unit(&self, name: &'static str) -> Input {
        let Size { b, t, key_heads, k, .. } = self.size;
        let x = self.normal([b, t, key_heads, k]);
        let x = x.clone() / x.square().sum_dim(3).sqrt();
        self.input(name, Kind::Channels, x, self.dtype)
    }

    /// Queries, keys and values.
    pub fn qkv(&self) -> Vec<Input> {
        vec![self.channels("q", self.size.k), self.channels("k", self.size.k), self.channels("v", self.size.v)]
    }

    /// Queries and keys of length 1, and values.
    pub fn unit_qkv(&self) -> Vec<Input> {
        vec![self.unit("q"), self.unit("k"), self.channels("v", self.size.v)]
    }

    /// Log decays log σ(x) of normal numbers.
    pub fn gate(&self, width: usize) -> Input {
        self.input("g", Kind::Gate, activation::log_sigmoid(self.by_head(width)), self.wide)
    }

    /// Log decays by key.
    pub fn key_gate(&self, name: &'static str) -> Input {
        self.input(name, Kind::Gate, activation::log_sigmoid(self.by_head(self.size.k)), self.dtype)
    }

    /// Writing strengths σ(x).
    pub fn strength(&self) -> Input {
        self.input("beta", Kind::Gate, activation::sigmoid(self.by_head(1)), self.wide)
    }

    /// Rates σ(x) by key.
    pub fn rate(&self, name: &'static str) -> Input {
        self.input(name, Kind::Channels, activation::sigmoid(self.by_head(self.size.k)), self.dtype)
    }
}

/// `[B, T, H, 1]` as `[B, T, H]`.
pub fn by_token(x: &Tensor<4>) -> Tensor<3> {
    let [b, t, h, _] = x.dims();
    x.clone().reshape([b, t, h])
}
