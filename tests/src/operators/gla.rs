//! Gated linear attention; hgrn2 and lightnet are calls of it.

use burn_fla_ops::gla;

use super::operator::{BOUNDS, Operator};
use super::recurrence;

pub(super) const OPERATOR: Operator = Operator {
    name: "gla",
    inputs: |draw| {
        let mut inputs = draw.qkv();
        inputs.push(draw.key_gate("g"));
        inputs
    },
    forward: |x, options| {
        gla(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), options).map(|(o, state)| (o, Some(state)))
    },
    exact: recurrence::exact,
    flops: recurrence::products,
    bounds: BOUNDS,
};
