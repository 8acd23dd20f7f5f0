use burn::tensor::Tensor;

use crate::CuSeqlens;

/// Which implementation of an operator runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Engine {
    /// The kernels where the device has them (CUDA, wgpu), tensor operations elsewhere.
    #[default]
    Auto,
    /// Tensor operations everywhere, differentiated by Burn: slower, and independent of the kernels.
    Reference,
    /// As `Auto`, but the kernels for the tensor cores of any NVIDIA GPU since Ampere also where the device has faster ones:
    /// to test and time them there.
    Mma,
}

/// Options of a sequence operator.
#[derive(Clone, Debug, Default)]
pub struct SequenceOptions {
    /// Factor on the queries; `None` is `K^(-1/2)`.
    pub scale: Option<f64>,
    /// State before the first token, f32 `[N, H, K, V]`; `None` is zero. Gradients flow into it.
    pub initial_state: Option<Tensor<4>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and state and decay restart at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
    /// Tokens a chunk; `None` lets the operator choose.
    pub chunk: Option<usize>,
}

/// Options of a scan along time in which every channel is by itself.
#[derive(Clone, Debug, Default)]
pub struct ScanOptions {
    /// State before the first token, f32 `[N, D]`; `None` is the state of no tokens. Gradients flow into it.
    pub initial_state: Option<Tensor<2>>,
    /// Packed sequences: the row (batch 1) holds several sequences, and the state restarts at each.
    pub cu_seqlens: Option<CuSeqlens>,
    /// Which implementation runs.
    pub engine: Engine,
}
