//! The delta rule with a decay by key.

use burn_fla_ops::kda;

use super::operator::{BOUNDS, Operator, by_token};
use super::transition;

pub(super) const OPERATOR: Operator = Operator {
    name: "kda",
    inputs: |draw| {
        let mut inputs = draw.unit_qkv();
        inputs.extend([draw.key_gate("g"), draw.strength()]);
        inputs
    },
    forward: |x, options| {
        let result = kda(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), by_token(&x[4]), options.into());
        result.map(|(o, state)| (o, Some(state)))
    },
    exact: transition::delta_rule,
    flops: transition::delta_products,
    bounds: BOUNDS,
};
