//! Hybrids: some layers with softmax attention, said by the field `attn`.

use serde_json::Value;

use super::config::CommonConfig;
use super::fields::Fields;
use super::registry::Architecture;
use crate::NnError;
use crate::layers::AttentionConfig;

/// One object of `attn`: these layers use softmax attention in place of the architecture's own mixer.
#[derive(Clone, Debug)]
pub struct HybridAttention {
    /// Numbers of the layers, from 0.
    pub layers: Vec<usize>,
    /// Their attention.
    pub attention: AttentionConfig,
}

/// The field `attn`: null, one object or a list of objects. No layer may be out of range or named twice. The fields that
/// the architecture ignores there are as if they were not given.
///
/// An architecture may have an object of its own where the field is not given. That very object also stands in the files
/// of old writers for models of fewer layers: the layers that are not there are dropped.
pub(crate) fn parse(
    fields: &Fields<'_>,
    common: &CommonConfig,
    architecture: &Architecture,
) -> Result<Vec<HybridAttention>, NnError> {
    let ignored = architecture.ignored_in_attn;
    // What the registry has is JSON: a test reads it all.
    let mut own: Option<Value> = architecture.defaults.attn.and_then(|text| serde_json::from_str(text).ok());
    let given = fields.get("attn");
    let is_own = fields.is_absent("attn") || (given.is_some() && given == own.as_ref());
    if let (true, Some(Value::Array(layers))) = (is_own, own.as_mut().and_then(|own| own.get_mut("layers"))) {
        layers.retain(|layer| layer.as_u64().is_some_and(|layer| layer < common.num_hidden_layers as u64));
    }
    let attn = if is_own { own.as_ref() } else { given };
    let objects: Vec<(String, &Value)> = match attn {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().enumerate().map(|(i, value)| (format!("attn[{i}]"), value)).collect(),
        Some(value) => vec![("attn".to_string(), value)],
    };
    let mut taken = vec![false; common.num_hidden_layers];
    let mut parsed = Vec::with_capacity(objects.len());
    for (name, value) in objects {
        let Value::Object(map) = value else {
            return Err(NnError::config(
                name,
                format!("expected an object with `layers` and `num_heads`, found {value}"),
            ));
        };
        let mut map = map.clone();
        map.retain(|field, _| !ignored.contains(&field.as_str()));
        let fields = Fields::new(&map, format!("{name}."));
        let layers = fields.list("layers")?;
        for layer in &layers {
            match taken.get_mut(*layer) {
                Some(taken @ false) => *taken = true,
                Some(true) => {
                    return Err(fields.error("layers", format!("layer {layer} is named twice")));
                }
                None => {
                    return Err(fields.error(
                        "layers",
                        format!(
                            "layer {layer} is out of range: there are {} layers, counted from 0",
                            common.num_hidden_layers
                        ),
                    ));
                }
            }
        }
        let heads = fields.required_usize("num_heads")?;
        let attention = AttentionConfig::of_hybrid(&fields, common.hidden_size, heads)?;
        parsed.push(HybridAttention { layers, attention });
    }
    Ok(parsed)
}
