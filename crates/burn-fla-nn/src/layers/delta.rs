//! What the layers of the delta rule share.

use burn::module::Param;
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::{self as ops, DecayGate, DeltaOptions, Engine, GateActivation};

use super::{Convs, SequenceContext, StepSizes};
use crate::init::Init;
pub(crate) use crate::modules::check_conv;
use crate::modules::{Linear, RmsNorm, ShortConv};
use crate::{NnError, ParamScope};

/// The heads of a layer whose heads have a width of their own, whatever the width of the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heads {
    /// H, heads of queries and keys.
    pub keys: usize,
    /// HV, heads of values: a multiple of H.
    pub values: usize,
    /// K
    pub key_width: usize,
    /// V
    pub value_width: usize,
}

impl Heads {
    pub fn new(heads: usize, value_heads: Option<usize>, head_dim: usize, expand_v: f64) -> Result<Self, NnError> {
        let value_heads = value_heads.unwrap_or(heads);
        if heads == 0 {
            return Err(NnError::config("num_heads", "must be at least 1"));
        }
        if head_dim == 0 {
            return Err(NnError::config("head_dim", "must be at least 1"));
        }
        if value_heads == 0 || !value_heads.is_multiple_of(heads) {
            let message = format!("must be a multiple of num_heads {heads}, and it is {value_heads}");
            return Err(NnError::config("num_v_heads", message));
        }
        let width = head_dim as f64 * expand_v;
        if !width.is_finite() || width < 1.0 || width.fract() != 0.0 {
            let message = format!("head_dim {head_dim} times {expand_v} is not a whole number of features");
            return Err(NnError::config("expand_v", message));
        }
        Ok(Self { keys: heads, values: value_heads, key_width: head_dim, value_width: width as usize })
    }

    /// H · K
    pub fn all_keys(&self) -> usize {
        self.keys * self.key_width
    }

    /// HV · K · V
    pub fn state(&self) -> usize {
        self.values * self.key_width * self.value_width
    }

    /// HV · V
    pub fn all_values(&self) -> usize {
        self.values * self.value_width
    }
}

/// silu of `x`, after the convolution where the layer has one.
pub(crate) fn convolved(convs: &mut Convs<'_>, conv: &Option<ShortConv>, x: Tensor<3>) -> Result<Tensor<3>, NnError> {
    match conv {
        Some(_) => convs.run(conv, x),
        None => Ok(activation::silu(x)),
    }
}

/// A: its logarithm starts as that of even draws between `low` and 16, one for each of `heads`.
pub(crate) fn a_log(scope: &ParamScope<'_, '_>, heads: usize, low: f64) -> Param<Tensor<1>> {
    scope.start("A_log", [heads], &Init::Drawn(&|draws| (low + (16.0 - low) * draws.uniform()).ln()))
}

/// The bias of a step size before the softplus: step sizes start between 0.001 and 0.1, evenly in their logarithm.
pub(crate) fn dt_bias(scope: &ParamScope<'_, '_>, count: usize) -> Param<Tensor<1>> {
    StepSizes::new().bias(scope, "dt_bias", count)
}

/// The gate of log decays, −A softplus(a + dt_bias).
pub(crate) fn decay_gate(a_log: &Param<Tensor<1>>, dt_bias: &Param<Tensor<1>>) -> DecayGate {
    DecayGate { a_log: a_log.val(), bias: Some(dt_bias.val()) }
}

/// The writing strengths σ(b), f32; twice that where eigenvalues may be negative.
pub(crate) fn strength(b: Tensor<3>, allow_neg_eigval: bool) -> Tensor<3> {
    let beta = activation::sigmoid(b.cast(DType::F32));
    if allow_neg_eigval { beta.mul_scalar(2.0) } else { beta }
}

/// Options of an operator that normalises queries and keys, makes decays of `gate` where there is one, and goes on from
/// `state`.
pub(crate) fn normalised(context: &SequenceContext, state: Option<Tensor<4>>, gate: Option<DecayGate>) -> DeltaOptions {
    DeltaOptions { sequence: context.options(state), l2_norm: true, decay_gate: gate }
}

/// The norm on the output of each head, times act(gate) where there is a gate.
pub(crate) fn gated_norm(
    o: Tensor<4>,
    gate: Option<Tensor<4>>,
    norm: &RmsNorm,
    act: GateActivation,
    engine: Engine,
) -> Result<Tensor<4>, NnError> {
    Ok(match gate {
        Some(gate) => ops::gated_rms_norm(o, gate, Some(norm.weight.val()), norm.eps, act, engine)?,
        None => norm.forward(o, engine)?,
    })
}

/// Makes the maps of a layer: their names, widths and places.
pub(crate) struct Maps<'a, 's, 'p> {
    pub scope: &'a ParamScope<'s, 'p>,
    pub hidden: usize,
    /// `None`: the layer has no convolutions.
    pub conv_size: Option<usize>,
}

impl Maps<'_, '_, '_> {
    /// From the width of the model, without bias.
    pub fn linear(&self, name: &str, output: usize) -> Linear {
        Linear::new(&self.scope.at(name), self.hidden, output, false)
    }

    /// To the width of the model, without bias.
    pub fn output(&self, input: usize) -> Linear {
        Linear::new(&self.scope.at("o_proj"), input, self.hidden, false)
    }

    pub fn conv(&self, name: &str, channels: usize) -> Option<ShortConv> {
        self.conv_size.map(|size| ShortConv::new(&self.scope.at(name), channels, size))
    }
}

#[cfg(test)]
mod tests {
    use crate::ModelConfig;

    #[test]
    fn fields_that_no_layer_has_are_named() {
        for (model_type, field, words) in [
            ("delta_net", r#""qk_norm": "l1""#, ["qk_norm", "l2 and sum"]),
            ("delta_net", r#""qk_activation": "gelu""#, ["qk_activation", "identity"]),
            ("delta_net", r#""num_heads": 3"#, ["expand_k", "num_heads 3"]),
            ("delta_net", r#""conv_size": 17"#, ["conv_size", "16"]),
            ("gated_deltanet", r#""num_v_heads": 7"#, ["num_v_heads", "multiple of num_heads 6"]),
            ("gated_deltanet", r#""num_v_heads": 3"#, ["num_v_heads", "it is 3"]),
            ("gated_deltanet", r#""head_dim": 10, "expand_v": 1.25"#, ["expand_v", "whole"]),
            ("gated_deltanet", r#""output_gate_activation": "tanh""#, ["output_gate_activation", "sigmoid"]),
            ("gated_deltaproduct", r#""num_householder": 5000"#, ["num_householder", "1024"]),
            ("kda", r#""safe_gate": true"#, ["lower_bound", "missing"]),
            ("kda", r#""safe_gate": true, "lower_bound": -6"#, ["lower_bound", "-6"]),
            ("kda", r#""lower_bound": 0.0"#, ["lower_bound", "below 0"]),
            ("comba", r#""use_output_gate": "yes""#, ["use_output_gate", "true or false"]),
            ("mesa_net", r#""lambda_lower_bound": 1.0"#, ["lambda_lower_bound", "below 1"]),
            ("mesa_net", r#""max_cg_step_decoding": 0"#, ["max_cg_step_decoding", "from 1"]),
            ("mesa_net", r#""conv_size": 17"#, ["conv_size", "16"]),
        ] {
            let text = format!(r#"{{"model_type": "{model_type}", {field}}}"#);
            let message = ModelConfig::from_json(&text).expect_err(field).to_string();
            for word in words {
                assert!(message.contains(word), "{field}: {message}");
            }
        }
        // A convolution that is not there has no size.
        let without = r#"{"model_type": "delta_net", "use_short_conv": false, "conv_size": 17}"#;
        assert!(ModelConfig::from_json(without).is_ok());
    }
}
