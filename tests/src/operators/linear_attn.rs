//! Linear attention without decay and normaliser.

use burn_fla_ops::linear_attn;

use super::operator::{BOUNDS, Operator};
use super::recurrence;

pub(super) const OPERATOR: Operator = Operator {
    name: "linear_attn",
    inputs: |draw| draw.qkv(),
    forward: |x, options| {
        linear_attn(x[0].clone(), x[1].clone(), x[2].clone(), false, options).map(|(o, state)| (o, Some(state)))
    },
    exact: recurrence::exact,
    flops: recurrence::products,
    bounds: BOUNDS,
};
