//! Feature maps that act on a whole head, some of them with parameters.

use burn::module::Module;
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::Activation;
use serde::{Deserialize, Serialize};

use super::Linear;
use crate::models::Fields;
use crate::{NnError, ParamScope};

/// The shifts of [`HeadMap::Dpfp`].
const DPFP_SHIFTS: usize = 4;

/// A map of each query and key head, `[…, D]` to `[…, F]` (`feature_map` of `linear_attn` in config.json).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadMap {
    /// (A x + a) ⊙ (B x + b), learned; F = D.
    ElementwiseProduct,
    /// softmax(\[2y, −2y\]) with y = A x + a, learned; F = 2D (Zhang et al. 2024).
    Hedgehog,
    /// max(A x, 0), learned; F = D (Kasai et al. 2021).
    T2r,
    /// r ⊙ roll(r, j) for j = 1 … 4 side by side, with r = \[max(x, 0), max(−x, 0)\]; F = 8D (Schlag et al. 2021).
    Dpfp,
    /// elu(x) + 1; F = D (Katharopoulos et al. 2020).
    Elu,
    /// max(x, 0); F = D.
    Relu,
    /// x; F = D.
    Identity,
}

impl HeadMap {
    /// The names that config.json may give, each with its map.
    pub const NAMES: [(&'static str, HeadMap); 7] = [
        ("elementwise_product", HeadMap::ElementwiseProduct),
        ("hedgehog", HeadMap::Hedgehog),
        ("t2r", HeadMap::T2r),
        ("dpfp", HeadMap::Dpfp),
        ("elu", HeadMap::Elu),
        ("relu", HeadMap::Relu),
        ("identity", HeadMap::Identity),
    ];

    /// The field `feature_map` of a config.
    pub(crate) fn from_fields(fields: &Fields<'_>) -> Result<Self, NnError> {
        if fields.is_absent("feature_map") {
            return Ok(Self::ElementwiseProduct);
        }
        let name = fields.optional_str("feature_map")?.unwrap_or("null");
        match Self::NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, map)) => Ok(*map),
            None => {
                let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
                let message = format!("`{name}` is not supported; supported are {}", names.join(", "));
                Err(fields.error("feature_map", message))
            }
        }
    }

    /// F of heads of D = `width`.
    pub(crate) fn features(self, width: usize) -> usize {
        match self {
            Self::Hedgehog => 2 * width,
            Self::Dpfp => 2 * DPFP_SHIFTS * width,
            Self::ElementwiseProduct | Self::T2r | Self::Elu | Self::Relu | Self::Identity => width,
        }
    }

    /// Its parameters for heads of `width`, where it has some.
    pub(crate) fn build(self, scope: &ParamScope<'_, '_>, width: usize) -> Option<LearnedMap> {
        let linear = |name, bias| Linear::new(&scope.at(name), width, width, bias);
        match self {
            Self::ElementwiseProduct => {
                Some(LearnedMap::Product(ProductMap { layer1: linear("layer1", true), layer2: linear("layer2", true) }))
            }
            Self::Hedgehog => Some(LearnedMap::Hedgehog(LinearMap { layer: linear("layer", true) })),
            Self::T2r => Some(LearnedMap::T2r(LinearMap { layer: linear("layer", false) })),
            _ => None,
        }
    }

    /// Applies a map that has no parameters; one that has some is left to its [`LearnedMap`].
    pub fn apply(self, x: Tensor<4>) -> Tensor<4> {
        let dtype = x.dtype();
        match self {
            Self::ElementwiseProduct | Self::Hedgehog | Self::T2r | Self::Identity => x,
            Self::Relu => activation::relu(x),
            Self::Elu => {
                let x = x.cast(DType::F32);
                (activation::relu(x.clone()) + x.clamp_max(0.0).exp()).cast(dtype)
            }
            Self::Dpfp => {
                let r = Tensor::cat(vec![activation::relu(x.clone()), activation::relu(x.neg())], 3);
                let width = r.dims()[3];
                let rolled = |shift: usize| {
                    let shift = shift % width;
                    if shift == 0 {
                        return r.clone();
                    }
                    let end = r.clone().narrow(3, width - shift, shift);
                    Tensor::cat(vec![end, r.clone().narrow(3, 0, width - shift)], 3)
                };
                Tensor::cat((1..=DPFP_SHIFTS).map(|shift| r.clone() * rolled(shift)).collect(), 3)
            }
        }
    }
}

/// The parameters of a [`HeadMap`], shared by the heads.
#[derive(Module, Debug)]
pub enum LearnedMap {
    /// Of [`HeadMap::ElementwiseProduct`].
    Product(ProductMap),
    /// Of [`HeadMap::Hedgehog`].
    Hedgehog(LinearMap),
    /// Of [`HeadMap::T2r`].
    T2r(LinearMap),
}

/// Two linear maps of a head.
#[derive(Module, Debug)]
pub struct ProductMap {
    /// `[D, D]` with a bias.
    pub layer1: Linear,
    /// `[D, D]` with a bias.
    pub layer2: Linear,
}

/// A linear map of a head.
#[derive(Module, Debug)]
pub struct LinearMap {
    /// `[D, D]`
    pub layer: Linear,
}

impl LearnedMap {
    /// # Shapes
    /// - input `[B, T, H, D]`, output `[B, T, H, F]`, the input's type
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, x: Tensor<4>) -> Result<Tensor<4>, NnError> {
        Ok(match self {
            Self::Product(maps) => maps.layer1.forward(x.clone())? * maps.layer2.forward(x)?,
            Self::T2r(map) => map.layer.activated(x, Activation::Relu)?,
            Self::Hedgehog(map) => {
                let dtype = x.dtype();
                let y = map.layer.forward(x)?.cast(DType::F32).mul_scalar(2.0);
                activation::softmax(Tensor::cat(vec![y.clone(), y.neg()], 3), 3).cast(dtype)
            }
        })
    }
}
