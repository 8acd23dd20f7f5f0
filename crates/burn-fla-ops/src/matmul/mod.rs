//! Matrix products whose accuracy does not depend on the device.
//!
//! On CUDA, Burn's own product stages f32 operands as TF32 on tensor cores, which is off by 1e-3. Here f32 stays f32: the
//! product runs on the plain cores there, and Burn's everywhere else. bf16 takes the kernels of [`hopper`] on a Hopper
//! GPU, and those of `mma` on other NVIDIA GPUs since Ampere; all else takes Burn's.

mod activation;
#[cfg(feature = "cube")]
mod bias;
#[cfg(feature = "cube")]
mod exact;
#[cfg(feature = "cuda")]
pub mod hopper;
#[cfg(feature = "cuda")]
mod mma;
#[cfg(feature = "cube")]
pub(crate) mod raw;

pub use activation::Activation;

use burn::tensor::{DType, Tensor};

use crate::bridge::{same_device, same_dtype};
use crate::{Engine, OpError};

/// The matrix product `a · b` over the last two dimensions.
///
/// # Shapes
/// `a`: `[…, M, K]`, `b`: `[…, K, N]` with the same leading dimensions, of one dtype; returns `[…, M, N]`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Result<Tensor<D>, OpError> {
    let (da, db) = (a.dims(), b.dims());
    let mut expected = da;
    expected[D - 2] = da[D - 1];
    expected[D - 1] = db[D - 1];
    crate::bridge::same_shape("matmul", "b", &b, expected, "[…, K, N]")?;
    same_dtype("matmul", "b", &b, a.dtype())?;
    same_device("matmul", "b", &b, &a.device())?;
    Ok(product(a, b))
}

/// [`matmul`] of operands that are known to fit.
pub(crate) fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cube")]
    if a.dtype() == DType::F32 && crate::bridge::is_cuda(&a.device()) {
        return exact::product(a, b);
    }
    a.matmul(b)
}

/// A linear layer, `y = x Wᵀ + bias`.
///
/// # Shapes
/// `x`: `[…, in]`, `weight`: `[out, in]`, `bias`: `[out]`, of one dtype; returns `[…, out]`. Beside a bf16 `x` weight and bias
/// may be f32: they are rounded for the product and the sum, and their gradients are f32.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Result<Tensor<D>, OpError> {
    linear_with(x, weight, Epilogue { bias, ..Default::default() })
}

/// What follows the product of a linear layer, see [`linear_with`].
#[derive(Clone, Debug, Default)]
pub struct Epilogue<const D: usize> {
    /// b, `[out]`; `None` is zero.
    pub bias: Option<Tensor<1>>,
    /// act.
    pub activation: Activation,
    /// r, of the output's shape and the dtype of `x`; `None` is zero.
    pub residual: Option<Tensor<D>>,
    /// Which kernels multiply.
    pub engine: Engine,
}

/// A linear layer and what follows it, `y = act(x Wᵀ + b) + r`.
///
/// On an NVIDIA GPU since Ampere in bf16 the f32 sums of the product are finished before they are rounded, once; elsewhere each of the
/// three steps rounds to the dtype of `x`.
///
/// # Shapes
/// As [`linear`]; `epilogue.residual`: `[…, out]` in the dtype of `x`.
///
/// # Gradients
/// With respect to `x`, `weight`, the bias and the residual.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn linear_with<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    epilogue: Epilogue<D>,
) -> Result<Tensor<D>, OpError> {
    let Epilogue { bias, activation, residual, engine } = epilogue;
    let mut dims = x.dims();
    let (rows, inner) = (dims[..D - 1].iter().product::<usize>(), dims[D - 1]);
    let out = weight.dims()[0];
    check(&x, &weight, bias.as_ref())?;
    dims[D - 1] = out;
    if let Some(residual) = &residual {
        crate::bridge::same_shape("linear", "residual", residual, dims, "the shape of the output")?;
        same_dtype("linear", "residual", residual, x.dtype())?;
        same_device("linear", "residual", residual, &x.device())?;
    }
    // One product over all rows: its weight gradient is one product too.
    let x = x.reshape([rows, inner]);
    #[cfg(feature = "cuda")]
    if let Some(cores) = hopper::cores(&x, &weight, engine)
        && crate::rows::fits(out)
        && (bias.is_some() || residual.is_some() || activation != Activation::Identity)
    {
        let residual = residual.map(|residual| residual.reshape([rows, out]));
        let y = hopper::linear(x, weight, bias.map(|bias| bias.cast(DType::F32)), residual, activation, cores);
        return Ok(y.reshape(dims));
    }
    let y = rows_times_weight(x, weight, engine)?.reshape(dims);
    let y = match bias {
        Some(bias) => add_bias(y, bias),
        None => y,
    };
    let y = activation.apply(y);
    Ok(match residual {
        Some(residual) => y + residual,
        None => y,
    })
}

/// `x Wᵀ` of checked operands.
fn rows_times_weight(x: Tensor<2>, weight: Tensor<2>, engine: Engine) -> Result<Tensor<2>, OpError> {
    #[cfg(feature = "cuda")]
    if hopper::cores(&x, &weight, engine).is_some() {
        return Ok(hopper::product(x, weight, false, false, DType::BF16, engine));
    }
    #[cfg(not(feature = "cuda"))]
    let _ = engine;
    let weight = weight.cast(x.dtype());
    matmul(x, weight.transpose())
}

/// `y + bias`, in the dtype of `y`.
fn add_bias<const D: usize>(y: Tensor<D>, bias: Tensor<1>) -> Tensor<D> {
    #[cfg(feature = "cube")]
    if let Some(rows) = bias::rows(&bias, y.dims(), y.dtype()) {
        return y + rows;
    }
    let dtype = y.dtype();
    y + bias.cast(dtype).unsqueeze()
}

/// Several linear layers of one input, `yᵢ = x Wᵢᵀ + biasᵢ`. On an NVIDIA GPU since Ampere in bf16, the gradient of `x` is one product over all
/// of them.
///
/// # Shapes
/// `x`: `[…, in]`, `weights`: `[outᵢ, in]`, `biases`: `[outᵢ]`, of one dtype; returns `[…, outᵢ]`. As with [`linear`], weights
/// and biases may be f32 beside a bf16 `x`.
///
/// # Errors
/// [`OpError`] where shapes, dtypes or devices do not fit together.
pub fn linears<const D: usize>(
    x: Tensor<D>,
    layers: Vec<(Tensor<2>, Option<Tensor<1>>)>,
) -> Result<Vec<Tensor<D>>, OpError> {
    linears_with(x, layers, Engine::Auto)
}

/// [`linears`] by the kernels that `engine` asks for.
///
/// # Errors
/// As [`linears`].
pub fn linears_with<const D: usize>(
    x: Tensor<D>,
    layers: Vec<(Tensor<2>, Option<Tensor<1>>)>,
    engine: Engine,
) -> Result<Vec<Tensor<D>>, OpError> {
    for (weight, bias) in &layers {
        check(&x, weight, bias.as_ref())?;
    }
    #[cfg(feature = "cuda")]
    {
        let mut dims = x.dims();
        let flat = x.clone().reshape([dims[..D - 1].iter().product::<usize>(), dims[D - 1]]);
        let few = (2..=hopper::MOST_LINEARS).contains(&layers.len());
        let cores = layers.first().and_then(|(weight, _)| hopper::cores(&flat, weight, engine));
        let all = layers.iter().all(|(weight, _)| hopper::cores(&flat, weight, engine).is_some());
        if let Some(cores) = cores
            && few
            && all
        {
            let (weights, biases): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
            // Where each layer has a bias and the inputs are not too many, the kernel adds them.
            let wide = weights.iter().all(|weight| crate::rows::fits(weight.dims()[0]));
            let within = wide && biases.iter().all(Option::is_some) && 2 * weights.len() <= hopper::MOST_LINEARS;
            let (inside, after) = if within {
                let biases: Vec<_> = biases.into_iter().flatten().map(|bias| bias.cast(DType::F32)).collect();
                let after = vec![None; biases.len()];
                (biases, after)
            } else {
                (Vec::new(), biases)
            };
            let shaped = hopper::linears(flat, weights, inside, cores).into_iter().zip(after).map(|(y, bias)| {
                dims[D - 1] = y.dims()[1];
                let y = y.reshape(dims);
                match bias {
                    Some(bias) => add_bias(y, bias),
                    None => y,
                }
            });
            return Ok(shaped.collect());
        }
    }
    let layer = |(weight, bias)| linear_with(x.clone(), weight, Epilogue { bias, engine, ..Default::default() });
    layers.into_iter().map(layer).collect()
}

/// Checks the arguments of a linear layer.
pub(crate) fn check<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
) -> Result<(), OpError> {
    let (inner, out) = (x.dims()[D - 1], weight.dims()[0]);
    crate::bridge::same_shape("linear", "weight", weight, [out, inner], "[out, in]")?;
    let rounded = x.dtype() == DType::BF16 && weight.dtype() == DType::F32;
    if !rounded {
        same_dtype("linear", "weight", weight, x.dtype())?;
    }
    same_device("linear", "weight", weight, &x.device())?;
    if let Some(bias) = bias {
        crate::bridge::same_shape("linear", "bias", bias, [out], "[out]")?;
        if !(x.dtype() == DType::BF16 && bias.dtype() == DType::F32) {
            same_dtype("linear", "bias", bias, x.dtype())?;
        }
        same_device("linear", "bias", bias, &x.device())?;
    }
    Ok(())
}
