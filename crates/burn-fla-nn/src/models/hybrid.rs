//! Hybrids: some layers with softmax attention, said by the field `attn`.

use serde_json::Value;

use super::config::CommonConfig;
use super::fields::Fields;
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

/// The field `attn`: null, one object or a list of objects. No layer may be out of range or named twice. The fields in
/// `ignored` are as if they were not given.
pub(crate) fn parse(
    fields: &Fields<'_>,
    common: &CommonConfig,
    ignored: &[&str],
) -> Result<Vec<HybridAttention>, NnError> {
    let objects: Vec<(String, &Value)> = match fields.get("attn") {
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
