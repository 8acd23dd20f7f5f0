//! The list of operators that are timed, and tested by their recurrence. Each is one file: its inputs, its call, and its
//! recurrence in f64 with its gradients, which shares no code with the operator.

mod abc;
mod check;
mod delta_rule;
mod dplr;
mod gated_delta_rule;
mod gla;
mod gsa;
mod kda;
mod linear_attn;
mod operator;
mod recurrence;
mod retention;
mod rwkv6;
mod rwkv7;
mod simple_gla;
mod ssd;
mod transition;

pub use check::{Check, Error, Heads};
pub use operator::{BOUNDS, Bounds, Draw, Input, Kind, Operator, Products, Size};

/// Those whose heads of values may share queries and keys.
pub const SHARED_KEYS: [&Operator; 2] = [&delta_rule::OPERATOR, &gated_delta_rule::OPERATOR];

/// All operators.
pub const OPERATORS: [&Operator; 13] = [
    &retention::OPERATOR,
    &linear_attn::OPERATOR,
    &simple_gla::OPERATOR,
    &ssd::OPERATOR,
    &gla::OPERATOR,
    &rwkv6::OPERATOR,
    &gsa::OPERATOR,
    &abc::OPERATOR,
    &delta_rule::OPERATOR,
    &gated_delta_rule::OPERATOR,
    &kda::OPERATOR,
    &rwkv7::OPERATOR,
    &dplr::OPERATOR,
];
