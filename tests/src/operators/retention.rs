//! simple_gla with the constant decays of retention, 1 − 2^{−5 − h}.

use burn::tensor::Tensor;
use burn_fla_ops::{ScalarDecay, simple_gla};

use super::operator::{BOUNDS, Kind, Operator};
use super::recurrence;

pub(super) const OPERATOR: Operator = Operator {
    name: "retention",
    inputs: |draw| {
        let heads = draw.size.h;
        let decays: Vec<f32> = (0..heads).map(|head| (1.0 - (-5.0 - head as f32).exp2()).ln()).collect();
        let decays = Tensor::<1>::from_data(decays.as_slice(), (&draw.device, draw.wide)).reshape([1, 1, heads, 1]);
        let mut inputs = draw.qkv();
        inputs.push(draw.input("g", Kind::Constant, decays, draw.wide));
        inputs
    },
    forward: |x, options| {
        let decay = ScalarDecay::PerHead(x[3].clone().reshape([-1]));
        simple_gla(x[0].clone(), x[1].clone(), x[2].clone(), decay, options).map(|(o, state)| (o, Some(state)))
    },
    exact: recurrence::exact,
    flops: recurrence::products,
    bounds: BOUNDS,
};
