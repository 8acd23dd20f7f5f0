//! How the step sizes of a layer start.

use burn::config::Config;
use burn::module::Param;
use burn::tensor::Tensor;

use crate::init::Init;
use crate::models::Fields;
use crate::{NnError, ParamScope};

/// The step sizes Δ = softplus(… + b) that a layer starts with at an input of 0: drawn between `min` and `max`, evenly in
/// their logarithm, and none below `floor`.
#[derive(Config, Copy, Debug, PartialEq)]
pub struct StepSizes {
    /// The smallest draw.
    #[config(default = "0.001")]
    pub min: f64,
    /// The largest draw.
    #[config(default = "0.1")]
    pub max: f64,
    /// No step starts below this.
    #[config(default = "1e-4")]
    pub floor: f64,
}

impl StepSizes {
    /// Reads the fields of these names: of the smallest draw, the largest, and the floor.
    pub(crate) fn from_fields(fields: &Fields<'_>, [min, max, floor]: [&str; 3]) -> Result<Self, NnError> {
        let sizes = Self {
            min: fields.positive(min, 0.001)?,
            max: fields.positive(max, 0.1)?,
            floor: fields.positive(floor, 1e-4)?,
        };
        if sizes.max < sizes.min {
            return Err(fields.error(max, format!("is {}, below {min}, which is {}", sizes.max, sizes.min)));
        }
        Ok(sizes)
    }

    /// An error for values that nothing can be drawn from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        let Self { min, max, floor } = *self;
        if min > 0.0 && max >= min && max.is_finite() && floor > 0.0 && floor.is_finite() {
            return Ok(());
        }
        Err(NnError::config("step_sizes", format!("must be 0 < min ≤ max and 0 < floor, and they are {self:?}")))
    }

    /// The bias b before the softplus, `[count]`.
    pub(crate) fn bias(&self, scope: &ParamScope<'_, '_>, name: &str, count: usize) -> Param<Tensor<1>> {
        let (low, high) = (self.min.ln(), self.max.ln());
        let inverse_softplus = |step: f64| step + (-(-step).exp_m1()).ln();
        let draw = |uniform: f64| inverse_softplus((low + (high - low) * uniform).exp().max(self.floor));
        scope.start(name, [count], &Init::Drawn(&|draws| draw(draws.uniform())))
    }
}
