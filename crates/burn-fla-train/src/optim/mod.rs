//! AdamW and Muon with a global-norm clip and a guard against gradients that are not finite, all on the device.

mod adamw;
mod groups;
mod muon;
mod optimizer;
mod table;

pub(crate) use adamw::COUNTER_NAMES;
pub use adamw::{AdamW, AdamWState, StepFigures, StepReport};
pub use groups::{ParamRule, ParamRules};
pub use muon::Muon;
pub(crate) use muon::is_matrix;
pub use optimizer::{Optimizer, OptimizerState, ReadState, StateTensor};
pub use table::{ParamEntry, ParamTable};
