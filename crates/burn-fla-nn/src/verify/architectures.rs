//! Every architecture held to itself, and to the expected cases there are: one row each.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use burn_fla_ops::CuSeqlens;

use super::{Bounds, collect, layer, read, rms_ratio, verify_folder};
use crate::hub::{self, CONFIG_FILE, TensorStore, WEIGHTS_FILE};
use crate::models::registry::{ARCHITECTURES, Architecture};
use crate::{CausalLm, Compute, Draws, ModelConfig, NnError, State};

/// Tokens of the sequences on which a small model is held to itself: past two chunks of every operator, and odd.
const TOKENS: usize = 131;
/// Tokens where gradients pass through states, one token at a time included.
const GRADIENT_TOKENS: usize = 67;

/// What was measured of one architecture: relative RMS errors.
#[derive(Clone, Debug)]
pub struct ArchitectureRow {
    /// Its `model_type`.
    pub model_type: &'static str,
    /// Logits of a sequence run in pieces of 1, 63, 64 and 3 tokens, against the whole.
    pub forward: f64,
    /// The worst gradient of a loss behind pieces of 1, 31, 34 and 1 tokens, against the whole.
    pub backward: f64,
    /// Logits after single tokens, against the whole.
    pub step: f64,
    /// Logits of packed sequences, against each alone.
    pub packed: f64,
    /// `step` with softmax attention in the second layer; `None` where `attn` is not for this architecture.
    pub hybrid: Option<f64>,
    /// The expected cases of it.
    pub golden: Option<Golden>,
}

/// The expected cases of one architecture: the worst of each.
#[derive(Clone, Debug, Default)]
pub struct Golden {
    /// How many there are.
    pub cases: usize,
    /// Whether every one is within its bounds.
    pub passed: bool,
    /// Whether the weights, written again, have the names, shapes, types and values of the file, and the config its
    /// fields.
    pub round_trip: bool,
    /// Relative RMS error of the logits, or of a bare layer's output.
    pub logits: Option<f64>,
    /// That of the worst gradient.
    pub gradient: Option<f64>,
    /// The largest difference in the loss curve; bare layers have none.
    pub curve: Option<f64>,
}

/// All rows. Its `Display` is a table in Markdown.
#[derive(Clone, Debug)]
pub struct ArchitectureTable(pub Vec<ArchitectureRow>);

impl ArchitectureTable {
    /// Measures every architecture on `device`. Each folder in `golden` with a `config.json` is an expected case.
    ///
    /// # Errors
    /// Whatever a model returns; a case that cannot be read.
    pub fn measure(
        golden: Option<&Path>,
        device: &Device,
        compute: Compute,
        mut on_row: impl FnMut(&ArchitectureRow),
    ) -> Result<Self, NnError> {
        let mut cases: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        if let Some(golden) = golden {
            let entries = std::fs::read_dir(golden).map_err(NnError::io("read", golden))?;
            for entry in entries {
                let folder = entry.map_err(NnError::io("read", golden))?.path();
                if folder.join(CONFIG_FILE).is_file() && folder.join("case.safetensors").is_file() {
                    let model_type = match layer::model_type(&folder)? {
                        Some(model_type) => model_type.to_string(),
                        None => hub::load_config(&folder)?.model_type().to_string(),
                    };
                    cases.entry(model_type).or_default().push(folder);
                }
            }
        }
        let mut rows = Vec::new();
        for architecture in ARCHITECTURES {
            let config = architecture.tiny_config()?;
            let own = own_errors(&config, device, compute)?;
            let hybrid = match with_attention(architecture, &config)? {
                Some(config) => Some(own_errors(&config, device, compute)?.step),
                None => None,
            };
            let golden = match cases.get(architecture.model_type) {
                Some(folders) => Some(expected(folders, device, compute)?),
                None => None,
            };
            let row = ArchitectureRow {
                model_type: architecture.model_type,
                forward: own.forward,
                backward: own.backward,
                step: own.step,
                packed: own.packed,
                hybrid,
                golden,
            };
            on_row(&row);
            rows.push(row);
        }
        Ok(Self(rows))
    }

    /// Whether every row is within the bounds of f32: 1e-5 for logits, 1e-4 for gradients, and those of each case.
    pub fn passed(&self) -> bool {
        self.0.iter().all(|row| {
            let logits = [row.forward, row.step, row.packed, row.hybrid.unwrap_or(0.0)];
            logits.iter().all(|error| *error <= Bounds::F32.logits)
                && row.backward <= Bounds::F32.gradient
                && row.golden.as_ref().is_none_or(|golden| golden.passed && golden.round_trip)
        })
    }
}

impl fmt::Display for ArchitectureTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| `model_type` | forward | backward | step | packed | hybrid | import, export | expected: logits | worst \
             gradient | loss curve |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|---|")?;
        for row in &self.0 {
            let shown = |error: Option<f64>| error.map_or("-".to_string(), |error| format!("{error:.0e}"));
            let hybrid = shown(row.hybrid);
            write!(
                f,
                "| `{}` | {:.0e} | {:.0e} | {:.0e} | {:.0e} | {hybrid} ",
                row.model_type, row.forward, row.backward, row.step, row.packed
            )?;
            match &row.golden {
                Some(golden) => writeln!(
                    f,
                    "| {} | {} | {} | {} |",
                    if golden.round_trip { "equal" } else { "DIFFERENT" },
                    shown(golden.logits),
                    shown(golden.gradient),
                    shown(golden.curve)
                )?,
                None => writeln!(f, "| - | - | - | - |")?,
            }
        }
        Ok(())
    }
}

/// The small config with softmax attention in its second layer.
fn with_attention(architecture: &Architecture, config: &ModelConfig) -> Result<Option<ModelConfig>, NnError> {
    if !architecture.hybrid {
        return Ok(None);
    }
    let mut overrides = serde_json::Map::new();
    overrides.insert("attn".into(), serde_json::json!({"layers": [1], "num_heads": 4, "num_kv_heads": 2}));
    config.with_overrides(&overrides).map(Some)
}

/// Moves every parameter a little off its start: some architectures begin with output maps of zero, whose layers would
/// agree with any other.
struct Shake {
    count: u64,
}

impl ModuleMapper for Shake {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        let shape = value.dims();
        self.count += 1;
        let mut draws = Draws::new(self.count, "shake");
        let by: Vec<f32> = (0..value.shape().num_elements()).map(|_| (0.4 * draws.uniform() - 0.2) as f32).collect();
        let moved = value.clone().inner() + Tensor::from_data(TensorData::new(by, shape), &value.device().inner());
        Param::from_mapped_value(id, Tensor::from_inner(moved).require_grad(), mapper)
    }
}

struct OwnErrors {
    forward: f64,
    backward: f64,
    step: f64,
    packed: f64,
}

/// One sequence computed in every way that a model can compute it.
fn own_errors(config: &ModelConfig, device: &Device, compute: Compute) -> Result<OwnErrors, NnError> {
    let device = device.clone().autodiff();
    let model = CausalLm::init(config, 11, &device)?.map(&mut Shake { count: 0 });
    let plain = model.valid();
    let vocabulary = config.vocab_size();
    let row = |tokens: usize, device: &Device| {
        let ids: Vec<i32> = (0..tokens).map(|i| (1 + (i * i * 7 + i * 13 + 5) % (vocabulary - 1)) as i32).collect();
        Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens]), device)
    };
    let inner = plain.device();
    let ids = row(TOKENS, &inner);
    let whole = read(plain.forward(ids.clone(), None, compute)?)?;
    let last = &whole[(TOKENS - 1) * vocabulary..];
    let forward = rms_ratio(&read(in_pieces(&plain, &ids, &[1, 63, 64, 3], compute)?)?, last);
    let step = rms_ratio(&read(in_pieces(&plain, &ids, &[1; TOKENS], compute)?)?, last);

    let offsets = vec![0, 1, 64, 64, TOKENS];
    let packed = read(plain.forward(ids.clone(), Some(&CuSeqlens::new(offsets.clone())?), compute)?)?;
    let mut alone = Vec::with_capacity(packed.len());
    for pair in offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
        let part = ids.clone().narrow(1, pair[0], pair[1] - pair[0]);
        alone.extend(read(plain.forward(part, None, compute)?)?);
    }

    let ids = row(GRADIENT_TOKENS, &device);
    let end = |logits: Tensor<3>| logits.narrow(1, GRADIENT_TOKENS - 1, 1).squeeze_dim::<2>(1);
    let whole = gradients(&model, end(model.forward(ids.clone(), None, compute)?))?;
    let pieces = gradients(&model, in_pieces(&model, &ids, &[1, 31, 34, 1], compute)?)?;
    let errors = whole.iter().zip(&pieces).map(|(a, b)| rms_ratio(b, a));
    // `max` would drop a NaN.
    let backward = errors.fold(0.0, |worst, error| if error.is_nan() || error > worst { error } else { worst });
    Ok(OwnErrors { forward, backward, step, packed: rms_ratio(&packed, &alone) })
}

/// The logits of the last token, run in pieces.
fn in_pieces(model: &CausalLm, ids: &Tensor<2, Int>, pieces: &[usize], compute: Compute) -> Result<Tensor<2>, NnError> {
    let mut state: Option<State> = None;
    let mut start = 0;
    let mut logits = None;
    for length in pieces {
        let (last, next) = model.advance(ids.clone().narrow(1, start, *length), state, compute)?;
        (logits, state) = (Some(last), Some(next));
        start += length;
    }
    logits.ok_or_else(|| NnError::argument("pieces", "there is none"))
}

/// The gradient of every parameter for the cross entropy of the last token with token 1.
fn gradients(model: &CausalLm, logits: Tensor<2>) -> Result<Vec<Vec<f32>>, NnError> {
    let label = Tensor::from_data([1], &logits.device());
    let mut gradients: Gradients = crate::modules::cross_entropy(logits, label).sum.backward();
    Ok(collect(model, model.param_path(), &mut gradients)?
        .into_iter()
        .map(|(_, gradient)| gradient.unwrap_or_default())
        .collect())
}

/// The expected cases in `folders`.
fn expected(folders: &[PathBuf], device: &Device, compute: Compute) -> Result<Golden, NnError> {
    let mut golden = Golden { passed: true, round_trip: true, ..Golden::default() };
    for folder in folders {
        let report = verify_folder(folder, device, compute)?;
        golden.cases += 1;
        golden.passed &= report.passed();
        for check in &report.checks {
            let worst = match check.name.as_str() {
                "logits" | "y" => &mut golden.logits,
                name if name.starts_with("grad.") => &mut golden.gradient,
                name if name.starts_with("loss curve") => &mut golden.curve,
                _ => continue,
            };
            // `max` would drop a NaN.
            if check.measured.is_nan() || worst.is_none_or(|worst| check.measured > worst) {
                *worst = Some(check.measured);
            }
        }
        // A bare layer is not exported.
        if layer::model_type(folder)?.is_none() {
            golden.round_trip &= round_trip(folder, device)?;
        }
    }
    Ok(golden)
}

/// Whether the model of `folder`, loaded and written again, is the same file in names, shapes, types and values, with the
/// same config.
fn round_trip(folder: &Path, device: &Device) -> Result<bool, NnError> {
    let model = hub::load_model(folder, device)?;
    let again = tempfile::tempdir().map_err(NnError::io("create", std::env::temp_dir()))?;
    hub::save_model(&model, again.path(), DType::F32)?;
    let (before, after) =
        (TensorStore::open(folder.join(WEIGHTS_FILE))?, TensorStore::open(again.path().join(WEIGHTS_FILE))?);
    let names = |store: &TensorStore| store.names().map(String::from).collect::<std::collections::BTreeSet<_>>();
    if names(&before) != names(&after) {
        return Ok(false);
    }
    for name in before.names() {
        if before.floats(name)? != after.floats(name)? {
            return Ok(false);
        }
    }
    Ok(hub::load_config(folder)?.fields() == hub::load_config(again.path())?.fields())
}
