//! The expected results of one bare layer.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::{Map, Value};

use super::{Bounds, VerifyReport, collect, compare_gradients, read, rms_ratio};
use crate::hub::{CONFIG_FILE, TensorStore, WEIGHTS_FILE};
use crate::layers::SequenceContext;
use crate::{Compute, ModelConfig, NnError, ParamPath, ParamSource};

/// The layers of the peer that stand in no model of its own, each with the architecture here.
const LAYERS: [(&str, &str); 2] = [("BasedLinearAttention", "based"), ("ReBasedLinearAttention", "rebased")];

/// The architecture whose bare layer the folder is of; `None` for a folder that is of a model.
pub(super) fn model_type(folder: &Path) -> Result<Option<&'static str>, NnError> {
    Ok(read_config(folder)?.map(|(model_type, _)| model_type))
}

/// The report on a folder that is of a bare layer; `None` for one that is of a model.
pub(super) fn verify(folder: &Path, device: &Device, compute: Compute) -> Result<Option<VerifyReport>, NnError> {
    match read_config(folder)? {
        Some((model_type, fields)) => report(folder, fields, model_type, device, compute).map(Some),
        None => Ok(None),
    }
}

/// The architecture of a bare layer, and the fields of its config.
fn read_config(folder: &Path) -> Result<Option<(&'static str, Map<String, Value>)>, NnError> {
    let path = folder.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(NnError::io("read", &path))?;
    // What is no JSON is told where the config of a model is read.
    let Ok(Value::Object(fields)) = serde_json::from_str(&text) else { return Ok(None) };
    let Some(Value::String(layer)) = fields.get("layer") else { return Ok(None) };
    match LAYERS.iter().find(|(name, _)| name == layer) {
        Some((_, model_type)) => Ok(Some((*model_type, fields))),
        None => {
            let known: Vec<_> = LAYERS.iter().map(|(name, _)| *name).collect();
            let message = format!("`{layer}` is not supported; supported: {}", known.join(", "));
            Err(NnError::config("layer", message))
        }
    }
}

fn report(
    folder: &Path,
    mut fields: Map<String, Value>,
    model_type: &str,
    device: &Device,
    compute: Compute,
) -> Result<VerifyReport, NnError> {
    fields.insert("model_type".into(), model_type.into());
    fields.insert("num_hidden_layers".into(), 1.into());
    let config = ModelConfig::from_map(fields)?;
    let weights = TensorStore::open(folder.join(WEIGHTS_FILE))?;
    let device = device.clone().autodiff();
    let source = ParamSource::stored(&weights, &device);
    let mixer = config.layers()[0].mixer.build(&source.root())?;
    source.finish()?;

    let case = TensorStore::open(folder.join("case.safetensors"))?;
    let width = config.hidden_size();
    let tensor = |name: &str| -> Result<Tensor<3>, NnError> {
        let (values, shape) = case.floats(name)?;
        match shape[..] {
            [b, t, d] if d == width => Ok(Tensor::from_data(TensorData::new(values, [b, t, d]), &device)),
            _ => Err(NnError::format(
                folder.join("case.safetensors"),
                format!("`{name}` has the shape {shape:?}, expected [batch, tokens, {width}]"),
            )),
        }
    };
    let expected = |name: &str| match case.contains(name) {
        true => case.floats(name).map(|(values, _)| Some(values)),
        false => Ok(None),
    };
    let x = tensor("x")?.require_grad();
    let [b, t, _] = x.dims();
    let context = SequenceContext::new([b, t], None, compute, &device)?;
    let (y, _) = mixer.forward(x.clone().cast(compute.dtype), None, &context)?;
    let y = y.cast(DType::F32);
    let mut gradients = (y.clone() * tensor("dy")?).sum().backward();

    let exact = compute.dtype == DType::F32;
    let mut report = VerifyReport::new(folder, &device, compute);
    let error = rms_ratio(&read(y)?, &expected("y")?.unwrap_or_default());
    report.push("y", error, exact.then_some(Bounds::F32.logits));
    let dx = x.grad_remove(&mut gradients).map(read).transpose()?;
    let mut found = vec![("x".to_string(), dx)];
    found.extend(collect(&mixer, ParamPath::default(), &mut gradients)?);
    compare_gradients(&mut report, found, expected, exact.then_some(Bounds::F32.gradient))?;
    Ok(report)
}
