//! The delta rule with a decay by token.

use burn_fla_ops::gated_delta_rule;

use super::operator::{BOUNDS, Operator, by_token};
use super::transition;

pub(super) const OPERATOR: Operator = Operator {
    name: "gated_delta_rule",
    inputs: |draw| {
        let mut inputs = draw.unit_qkv();
        inputs.extend([draw.gate(1), draw.strength()]);
        inputs
    },
    forward: |x, options| {
        let (g, beta) = (by_token(&x[3]), by_token(&x[4]));
        let result = gated_delta_rule(x[0].clone(), x[1].clone(), x[2].clone(), g, beta, options.into());
        result.map(|(o, state)| (o, Some(state)))
    },
    exact: transition::delta_rule,
    flops: transition::delta_products,
    bounds: BOUNDS,
};
