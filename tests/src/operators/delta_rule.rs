//! The delta rule.

use burn_fla_ops::delta_rule;

use super::operator::{BOUNDS, Operator, by_token};
use super::transition;

pub(super) const OPERATOR: Operator = Operator {
    name: "delta_rule",
    inputs: |draw| {
        let mut inputs = draw.unit_qkv();
        inputs.push(draw.strength());
        inputs
    },
    forward: |x, options| {
        let result = delta_rule(x[0].clone(), x[1].clone(), x[2].clone(), by_token(&x[3]), options.into());
        result.map(|(o, state)| (o, Some(state)))
    },
    exact: transition::delta_rule,
    flops: transition::delta_products,
    bounds: BOUNDS,
};
