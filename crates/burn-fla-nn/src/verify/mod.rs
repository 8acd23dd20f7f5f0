//! A folder of expected results, checked number by number.
//!
//! The folder holds `config.json` and `model.safetensors` in the Hugging Face format and `case.safetensors` with
//! `input_ids` `[B, T]`, the expected `logits`, `loss`, a `grad.` for each parameter, `loss_curve` (the loss before each
//! of some AdamW steps on this batch), `greedy` (a prompt and its greedy continuation) and, where the row is packed,
//! `cu_seqlens`. What is not there is not checked.
//!
//! A folder whose `config.json` has the field `layer` is of one bare layer: `model.safetensors` holds its weights, and
//! `case.safetensors` its input `x`, output `y`, the gradient `dy` of a loss by `y`, and `grad.x` and a `grad.` for each
//! parameter.

mod adamw;
mod architectures;
mod bounds;
mod layer;
mod report;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use burn_fla_ops::{CuSeqlens, Engine};

pub use architectures::{ArchitectureRow, ArchitectureTable, Golden};
pub use bounds::Bounds;
pub use report::{Check, VerifyReport};

use crate::generate::{SamplingConfig, generate};
use crate::hub::{TensorStore, load_model};
use crate::models::registry::find;
use crate::modules::IGNORED_LABEL;
use crate::{CausalLm, Compute, NnError, ParamPath};

/// In bf16 the rounding of the activations themselves leaves this much on small models ...
const LOGITS_BF16: f64 = 4e-2;
/// ... and the kernels may add no more than half of what the reference with the same casts loses.
const OVER_REFERENCE: f64 = 1.5;
/// Tokens after the prompt in `greedy`.
const CONTINUATION: usize = 12;

/// Runs the case in `folder` on `device` and compares it with what is expected there.
///
/// In f32 every result is held to a bound: logits 1e-5, each gradient 1e-4, loss 1e-5 and loss curve 1e-4 (absolute),
/// greedy tokens equal; an architecture whose expected results cannot be held to these has its own
/// [`Bounds`] in the [registry](crate::models::registry), and the report says why. In bf16 the logits are (4e-2, and one and a half times the error of the reference operators
/// with the same casts); the rest is measured and not judged.
///
/// # Errors
/// A folder that cannot be read or does not fit together. Results past a bound are not errors:
/// [`VerifyReport::passed`] tells.
pub fn verify_folder(folder: impl AsRef<Path>, device: &Device, compute: Compute) -> Result<VerifyReport, NnError> {
    let folder = folder.as_ref();
    if let Some(report) = layer::verify(folder, device, compute)? {
        return Ok(report);
    }
    let case = Case::read(folder, device)?;
    let model = load_model(folder, &device.clone().autodiff())?;
    let exact = compute.dtype == DType::F32;
    let bounds = find(model.config().model_type())?.bounds;
    let bound = |bound: f64| exact.then_some(bound);
    let mut report = VerifyReport::new(folder, device, compute);
    report.reason = bounds.reason.filter(|_| exact);

    let plain = model.valid();
    if let Some(expected) = case.floats("logits")? {
        let error = |compute| -> Result<f64, NnError> {
            let logits = plain.forward(case.ids.clone(), case.cu(), compute)?;
            Ok(rms_ratio(&read(logits)?, &expected))
        };
        let measured = error(compute)?;
        let bound = if exact {
            bounds.logits
        } else {
            let reference = error(compute.with_engine(Engine::Reference))?;
            report.push("logits of the reference, same casts", reference, None);
            LOGITS_BF16.min(OVER_REFERENCE * reference)
        };
        report.push("logits", measured, Some(bound));
    }
    if let Some(expected) = case.floats("loss_eval")? {
        let loss = scalar(case.loss(&plain, compute)?)?;
        let difference = (loss - f64::from(expected[0])).abs();
        report.push("loss in evaluation, absolute", difference, bound(bounds.loss));
    }

    let loss = case.loss(&model, compute)?;
    let mut gradients = loss.backward();
    let loss = scalar(loss)?;
    if let Some(expected) = case.floats("loss")? {
        let difference = (loss - f64::from(expected[0])).abs();
        report.push("loss, absolute", difference, bound(bounds.loss));
    }
    let found = collect(&model, model.param_path(), &mut gradients)?;
    compare_gradients(&mut report, found, |name| case.floats(name), bound(bounds.gradient))?;

    if let Some(expected) = case.floats("loss_curve")? {
        let mut worst = 0f64;
        let mut model = model;
        let mut optimizer = adamw::AdamW::default();
        for (step, expected) in expected.iter().enumerate() {
            let loss = case.loss(&model, compute)?;
            if step + 1 < case.steps {
                model = optimizer.step(model, loss.backward());
            }
            // `max` would drop a NaN.
            let difference = (scalar(loss)? - f64::from(*expected)).abs();
            if difference.is_nan() || difference > worst {
                worst = difference;
            }
        }
        let name = format!("loss curve over {} steps, absolute", case.steps);
        report.push(name, worst, bound(bounds.curve));
    }

    if let Some(greedy) = &case.greedy {
        let (prompt, expected) = greedy.split_at(greedy.len().saturating_sub(CONTINUATION));
        let tokens = generate(&plain, prompt, expected.len(), &SamplingConfig::greedy(), None, compute, |_| {
            ControlFlow::Continue(())
        })?;
        let wrong = tokens.iter().zip(expected).filter(|(a, b)| a != b).count();
        report.push("greedy tokens that differ", wrong as f64, bound(0.0));
    }
    Ok(report)
}

struct Case {
    store: TensorStore,
    ids: Tensor<2, Int>,
    labels: Tensor<2, Int>,
    cu: Option<CuSeqlens>,
    steps: usize,
    greedy: Option<Vec<u32>>,
}

impl Case {
    fn read(folder: &Path, device: &Device) -> Result<Self, NnError> {
        let path = folder.join("case.safetensors");
        let store = TensorStore::open(&path)?;
        let (ids, shape) = store.integers("input_ids")?;
        let [b, t] = shape[..] else {
            return Err(NnError::format(
                &path,
                format!("`input_ids` has the shape {shape:?}, expected [batch, tokens]"),
            ));
        };
        let vocabulary = crate::hub::load_config(folder)?.vocab_size() as i64;
        let in_vocabulary = |name: &str, ids: &[i64]| match ids.iter().find(|id| **id < 0 || **id >= vocabulary) {
            Some(id) => {
                Err(NnError::format(&path, format!("`{name}` has the id {id}; the vocabulary has {vocabulary}")))
            }
            None => Ok(()),
        };
        in_vocabulary("input_ids", &ids)?;
        // The token each position is to predict; the last of a row has none. Packed rows are shifted as a whole.
        let labels = ids.chunks(t.max(1)).flat_map(|row| row.iter().copied().skip(1).chain([IGNORED_LABEL])).collect();
        let int = |values: Vec<i64>| {
            let values: Vec<i32> = values.into_iter().map(|x| x as i32).collect();
            Tensor::from_data(TensorData::new(values, [b, t]), device)
        };
        let cu = if store.contains("cu_seqlens") {
            let (offsets, _) = store.integers("cu_seqlens")?;
            let offsets = offsets.into_iter().map(|x| x.max(0) as usize).collect();
            Some(CuSeqlens::new(offsets)?)
        } else {
            None
        };
        let greedy = if store.contains("greedy") {
            let (tokens, _) = store.integers("greedy")?;
            in_vocabulary("greedy", &tokens)?;
            Some(tokens.into_iter().map(|x| x as u32).collect())
        } else {
            None
        };
        let steps = store.get("loss_curve").map_or(0, |t| t.shape.iter().product());
        Ok(Self { ids: int(ids), labels: int(labels), cu, steps, greedy, store })
    }

    fn cu(&self) -> Option<&CuSeqlens> {
        self.cu.as_ref()
    }

    fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, NnError> {
        if !self.store.contains(name) {
            return Ok(None);
        }
        let (values, _) = self.store.floats(name)?;
        if values.is_empty() {
            return Ok(None);
        }
        Ok(Some(values))
    }

    fn loss(&self, model: &CausalLm, compute: Compute) -> Result<Tensor<1>, NnError> {
        let loss = model.loss(self.ids.clone(), self.labels.clone(), self.cu(), compute)?;
        Ok(loss.mean())
    }
}

fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, NnError> {
    tensor.try_into_vec_as().map_err(|error| NnError::Device(error.to_string()))
}

fn scalar(tensor: Tensor<1>) -> Result<f64, NnError> {
    Ok(read(tensor)?.first().map_or(f64::NAN, |x| f64::from(*x)))
}

/// Root mean square of the difference over that of the expected; NaN for vectors of different lengths.
fn rms_ratio(measured: &[f32], expected: &[f32]) -> f64 {
    if measured.len() != expected.len() {
        return f64::NAN;
    }
    let square = |x: f64| x * x;
    let difference: f64 = measured.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let scale: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    let count = expected.len().max(1) as f64;
    (difference / count).sqrt() / ((scale / count).sqrt() + 1e-8)
}

/// Names, each with its gradient, or `None` where the loss does not depend on it.
type NamedGradients = Vec<(String, Option<Vec<f32>>)>;

/// Compares each gradient with what is expected under `grad.` and its name.
fn compare_gradients(
    report: &mut VerifyReport,
    found: NamedGradients,
    expected: impl Fn(&str) -> Result<Option<Vec<f32>>, NnError>,
    bound: Option<f64>,
) -> Result<(), NnError> {
    for (name, gradient) in found {
        match (gradient, expected(&format!("grad.{name}"))?) {
            (Some(gradient), Some(expected)) if gradient.len() == expected.len() => {
                report.push(format!("grad.{name}"), rms_ratio(&gradient, &expected), bound);
            }
            (None, None) => report.absent.push(name),
            (gradient, expected) => report.push(
                format!(
                    "grad.{name} ({} values, expected {})",
                    gradient.map_or(0, |g| g.len()),
                    expected.map_or(0, |e| e.len())
                ),
                f64::NAN,
                bound,
            ),
        }
    }
    Ok(())
}

/// The gradient of every parameter.
fn collect<M: Module>(module: &M, path: ParamPath, gradients: &mut Gradients) -> Result<NamedGradients, NnError> {
    struct Collect<'a> {
        path: ParamPath,
        gradients: &'a mut Gradients,
        found: Vec<(String, Result<Option<Vec<f32>>, NnError>)>,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = param.val().grad_remove(self.gradients).map(read);
            self.found.push((self.path.name(), gradient.transpose()));
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.path.exit(container_type);
        }
    }
    let mut collect = Collect { path, gradients, found: Vec::new() };
    module.visit(&mut collect);
    collect.found.into_iter().map(|(name, gradient)| Ok((name, gradient?))).collect()
}

/// First and second moment of a parameter, flat.
type Moments = HashMap<burn::module::ParamId, (Tensor<1>, Tensor<1>)>;
