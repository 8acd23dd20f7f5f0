//! Linear attention with a decay by token.

use burn_fla_ops::{ScalarDecay, simple_gla};

use super::operator::{BOUNDS, Operator, by_token};
use super::recurrence;

pub(super) const OPERATOR: Operator = Operator {
    name: "simple_gla",
    inputs: |draw| {
        let mut inputs = draw.qkv();
        inputs.push(draw.gate(1));
        inputs
    },
    forward: |x, options| {
        let decay = ScalarDecay::PerToken(by_token(&x[3]));
        simple_gla(x[0].clone(), x[1].clone(), x[2].clone(), decay, options).map(|(o, state)| (o, Some(state)))
    },
    exact: recurrence::exact,
    flops: recurrence::products,
    bounds: BOUNDS,
};
