//! The output layer with the cross entropy behind it, without the logits of all tokens ever being in memory.
//!
//! ```text
//! z_i = W x_i,   loss = Σ_i (ln Σ_j e^{z_ij} − z_{i, label_i})   over the tokens that count
//! ```
//!
//! The tokens go through in strips. Of a strip the logits are made, in the dtype of `x`, then the loss of each row; where
//! a gradient is wanted, `dz = softmax(z) − onehot(label)` takes the place of the logits, and `dx = dz W` and
//! `dW += dzᵀ x` (f32) are made at once, so that backward only multiplies them by the gradient of the loss. What is kept
//! in between is of the sizes of `x` and `W`.
//!
//! Wijmans et al.: *Cut Your Losses in Large-Vocabulary Language Models* (2024), <https://arxiv.org/abs/2411.09009>, count
//! what the logits cost; Hsu et al.: *Liger Kernel* (2024), <https://arxiv.org/abs/2410.10989>, make the gradient in the
//! forward.

#[cfg(feature = "cube")]
mod kernels;
#[cfg(feature = "cube")]
mod operator;
mod reference;

use burn::tensor::{DType, Int, Tensor};

use crate::arguments::{activation, on_kernels};
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::chunked::compute_dtype;
use crate::{Engine, OpError};

const OP: &str = "linear_cross_entropy";

/// Options of [`linear_cross_entropy`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyOptions {
    /// The label of a token that is not counted; `None` is −100.
    pub ignored: Option<i32>,
    /// `c`: with M of N tokens counted, `c M / N · max_j z_ij` is added to the gradient of the largest logit of every
    /// token, which draws back logits that only grow; the loss is as without (RWKV's L2 regularisation of the maximum).
    pub l2_warp: Option<f64>,
    /// Tokens of a strip; `None` lets the operator choose.
    pub strip: Option<usize>,
    /// Which implementation runs.
    pub engine: Engine,
}

/// The label of a token that is not counted, unless options say otherwise.
const IGNORED: i32 = -100;

/// `Σ_i (ln Σ_j e^{z_ij} − z_{i, label_i})` with `z = x Wᵀ` over the tokens that count, and how many they are.
///
/// # Shapes
/// - `x`: `[N, D]`, f32, bf16 or f64
/// - `weight`: `[V, D]`, of the dtype of `x`; beside a bf16 `x` it may be f32: it is rounded for the products, and its
///   gradient is f32
/// - `labels`: `[N]`, each the ignored label or below V (not checked: labels are on the device)
/// - returns the sum and the number of the tokens that count, `[1]` each, f32 (f64 for f64)
///
/// # Gradients
/// Of the sum with respect to `x` and `weight`. They are made together with the loss, so that computing a loss of tracked
/// inputs costs about as much as its backward would.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together, or a strip has no token.
pub fn linear_cross_entropy(
    x: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    options: CrossEntropyOptions,
) -> Result<(Tensor<1>, Tensor<1>), OpError> {
    let [n, d] = x.dims();
    let v = weight.dims()[0];
    let device = x.device();
    activation(OP, "x", &x)?;
    same_shape(OP, "weight", &weight, [v, d], "[V, D]")?;
    if !(x.dtype() == DType::BF16 && weight.dtype() == DType::F32) {
        same_dtype(OP, "weight", &weight, x.dtype())?;
    }
    same_device(OP, "weight", &weight, &device)?;
    if labels.dims() != [n] {
        let expected = format!("[N] = {:?}", [n]);
        return Err(OpError::Shape { op: OP, argument: "labels", found: labels.dims().to_vec(), expected });
    }
    if labels.device().inner() != device.clone().inner() {
        let (found, expected) = (format!("{:?}", labels.device()), format!("{device:?}"));
        return Err(OpError::Device { op: OP, argument: "labels", found, expected });
    }
    if v == 0 || d == 0 {
        let expected = "at least one token of the vocabulary and one channel".into();
        return Err(OpError::Shape { op: OP, argument: "weight", found: vec![v, d], expected });
    }
    if options.strip == Some(0) {
        return Err(OpError::Option {
            op: OP,
            option: "strip",
            reason: "is 0, but a strip has at least one token".into(),
        });
    }
    let ignored = options.ignored.unwrap_or(IGNORED);
    let dtype = compute_dtype(x.dtype());
    if n == 0 {
        let zero = || Tensor::zeros([1], (&device, dtype));
        return Ok((zero(), zero()));
    }
    let counted = labels.clone().not_equal_elem(ignored).float().cast(dtype);
    let count = counted.clone().sum();
    #[cfg(feature = "cube")]
    if on_kernels(&x, options.engine) {
        let operator = operator::LinearCrossEntropy { ignored, l2_warp: options.l2_warp, strip: options.strip };
        let sum = operator.run(x, weight, count.clone(), labels);
        return Ok((sum, count));
    }
    let _ = on_kernels(&x, options.engine);
    let strip = options.strip.unwrap_or_else(|| strip(n, v, dtype.size(), REFERENCE_BYTES));
    let warp = options.l2_warp.map(|factor| count.clone() * (factor / n as f64));
    Ok((reference::linear_cross_entropy(x, weight, labels, counted, warp, strip), count))
}

/// Bytes that the logits of a strip may take in tensor operations, which need several tensors of that size.
const REFERENCE_BYTES: usize = 32 << 20;

/// Tokens of a strip whose logits of `size` bytes each stay within `bytes`: all strips about equal, in whole steps of 128
/// tokens where there are several, so that products have whole tiles and rows begin at aligned addresses.
fn strip(tokens: usize, vocabulary: usize, size: usize, bytes: usize) -> usize {
    const STEP: usize = 128;
    let most = (bytes / (vocabulary * size) / STEP * STEP).max(STEP);
    if tokens <= most {
        return tokens;
    }
    let count = tokens.div_ceil(most);
    tokens.div_ceil(count).next_multiple_of(STEP).min(most)
}

#[cfg(test)]
mod tests {
    use super::strip;

    #[test]
    fn strips_are_even_and_within_their_bytes() {
        assert_eq!(strip(16_384, 32_000, 2, 256 << 20), 4096);
        assert_eq!(strip(5_000, 32_000, 2, 256 << 20), 2560);
        assert_eq!(strip(100, 32_000, 2, 256 << 20), 100);
        assert_eq!(strip(1_000, 1 << 30, 4, 1 << 20), 128, "a strip has at least one step");
        for tokens in [1, 127, 128, 129, 1000, 4096, 10_000] {
            let strip = strip(tokens, 1000, 4, 2 << 20);
            assert!(strip > 0 && strip * 4000 <= 2 << 20, "{tokens}: {strip}");
        }
    }
}
