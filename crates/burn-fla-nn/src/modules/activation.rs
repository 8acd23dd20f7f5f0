//! Activations that mixers apply to queries, keys and gates.

use burn::tensor::{DType, Tensor, activation};
pub use burn_fla_ops::decay_gate::reference::softplus;
pub use burn_fla_ops::log_gate::reference::log_sigmoid;
use serde::{Deserialize, Serialize};

use crate::NnError;
use crate::models::Fields;

/// An elementwise map of queries and keys (`feature_map` in config.json), computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureMap {
    /// max(x, 0)
    Relu,
    /// σ(x)
    Sigmoid,
    /// ln σ(x)
    LogSigmoid,
    /// x σ(x)
    #[serde(alias = "swish")]
    Silu,
    /// max(x, 0)²
    SqRelu,
    /// x Φ(x), in the tanh form
    Gelu,
}

impl FeatureMap {
    /// The names that config.json may give, each with its map.
    pub const NAMES: [(&'static str, FeatureMap); 7] = [
        ("relu", FeatureMap::Relu),
        ("sigmoid", FeatureMap::Sigmoid),
        ("logsigmoid", FeatureMap::LogSigmoid),
        ("silu", FeatureMap::Silu),
        ("swish", FeatureMap::Silu),
        ("sqrelu", FeatureMap::SqRelu),
        ("gelu", FeatureMap::Gelu),
    ];

    /// The map called `name` in config.json.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, map)| *map)
    }

    /// The field `feature_map` of a config.
    pub(crate) fn from_fields(fields: &Fields<'_>) -> Result<Option<Self>, NnError> {
        let Some(name) = fields.optional_str("feature_map")? else {
            return Ok(None);
        };
        match Self::from_name(name) {
            Some(map) => Ok(Some(map)),
            None => {
                let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
                Err(fields.error(
                    "feature_map",
                    format!("`{name}` is not supported; supported are {} and null", names.join(", ")),
                ))
            }
        }
    }

    /// Applies the map to each element; the output has the input's type.
    pub fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let y = match self {
            Self::Relu => activation::relu(x),
            Self::Sigmoid => activation::sigmoid(x),
            Self::LogSigmoid => log_sigmoid(x),
            Self::Silu => activation::silu(x),
            Self::SqRelu => {
                let y = activation::relu(x);
                y.clone() * y
            }
            Self::Gelu => activation::gelu_approximate(x),
        };
        y.cast(dtype)
    }
}
