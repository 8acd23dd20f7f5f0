//! Import from and export to a Hugging Face folder: `config.json` with `model.safetensors`, or with several of them
//! and an index.
//!
//! Files are memory-mapped and read tensor by tensor, f32, bf16 or f16, into f32 parameters. A file is written under
//! another name, synced and renamed, so that a reader finds the old one or the new one and never a half.

mod atomic;
mod read;
mod write;

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};

pub use atomic::write_file;
pub use read::{StoredTensor, TensorStore, read_safetensors};
pub use write::{TensorSpec, write_safetensors, write_safetensors_with};

use crate::{CausalLm, ModelConfig, NnError, ParamPath, ParamSource};

/// Name of the config in a folder.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the weights in a folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Name of the index of weights in several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Weights larger than this are split over several files.
const SHARD_BYTES: u64 = 5_000_000_000;

/// The config of `folder`.
///
/// # Errors
/// No readable `config.json`, or one that is not supported.
pub fn load_config(folder: impl AsRef<Path>) -> Result<ModelConfig, NnError> {
    ModelConfig::from_file(folder.as_ref().join(CONFIG_FILE))
}

/// The model of `folder` on `device`.
///
/// # Errors
/// Those of [`load_config`]; unreadable, damaged or truncated weights; and, in one error, every tensor that is missing,
/// not known to the model, of another shape, or of a type that is not a float.
pub fn load_model(folder: impl AsRef<Path>, device: &Device) -> Result<CausalLm, NnError> {
    let folder = folder.as_ref();
    let config = load_config(folder)?;
    let mut store = TensorStore::open(folder)?;
    if config.common().tie_word_embeddings {
        // Some writers store the shared matrix under both names.
        store.ignore("lm_head.weight");
    }
    // The name of the first writers of Mamba.
    store.rename("backbone.embedding.weight", "backbone.embeddings.weight");
    let source = ParamSource::stored(&store, device);
    let model = CausalLm::build(&config, &source.root())?;
    source.finish()?;
    Ok(model)
}

/// Writes `model` into `folder`, weights in `dtype` (F32, BF16 or F16), split over several files above 5 GB.
///
/// # Errors
/// Another type; a folder or file that cannot be written; a device that fails while the weights are read.
pub fn save_model(model: &CausalLm, folder: impl AsRef<Path>, dtype: DType) -> Result<(), NnError> {
    save_model_sharded(model, folder, dtype, SHARD_BYTES)
}

/// [`save_model`] with files of at most `shard_bytes` (or one tensor).
///
/// # Errors
/// As [`save_model`].
pub fn save_model_sharded(
    model: &CausalLm,
    folder: impl AsRef<Path>,
    dtype: DType,
    shard_bytes: u64,
) -> Result<(), NnError> {
    write_model(&model.config(), &parameters(model), folder.as_ref(), dtype, shard_bytes)
}

/// A model's parameters in the host's memory, to be written while the model goes on changing.
#[derive(Debug)]
pub struct ModelSnapshot {
    config: ModelConfig,
    tensors: Vec<(String, TensorData)>,
}

impl ModelSnapshot {
    /// Reads every parameter from the device.
    ///
    /// # Errors
    /// A device that fails while the weights are read.
    pub fn take(model: &CausalLm) -> Result<Self, NnError> {
        let tensors = parameters(model).into_iter().map(|tensor| Ok((tensor.name, (tensor.read)()?)));
        Ok(Self { config: model.config(), tensors: tensors.collect::<Result<_, NnError>>()? })
    }

    /// Writes what [`save_model`] would have written when the snapshot was taken.
    ///
    /// # Errors
    /// As [`save_model`].
    pub fn save(self, folder: impl AsRef<Path>, dtype: DType) -> Result<(), NnError> {
        let parameter = |(name, data): (String, TensorData)| Parameter {
            name,
            shape: data.shape().to_vec(),
            read: Box::new(move || Ok(data.clone())),
        };
        let parameters: Vec<Parameter> = self.tensors.into_iter().map(parameter).collect();
        write_model(&self.config, &parameters, folder.as_ref(), dtype, SHARD_BYTES)
    }
}

fn write_model(
    config: &ModelConfig,
    tensors: &[Parameter],
    folder: &Path,
    dtype: DType,
    shard_bytes: u64,
) -> Result<(), NnError> {
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Err(NnError::argument("dtype", format!("weights are written in F32, BF16 or F16, not in {dtype:?}")));
    }
    std::fs::create_dir_all(folder).map_err(NnError::io("create", folder))?;
    let specs = tensors
        .iter()
        .map(|tensor| TensorSpec::new(&tensor.name, dtype, tensor.shape.clone()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut bytes = 0;
    for (i, spec) in specs.iter().enumerate() {
        if bytes > 0 && bytes + spec.bytes() > shard_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += spec.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(i);
        }
    }
    let old_index = read::index_files(folder);
    let write = |file: &str, shard: &[usize]| {
        let specs: Vec<_> = shard.iter().map(|i| specs[*i].clone()).collect();
        write_safetensors_with(folder.join(file), &specs, &[("format", "pt")], |i| (tensors[shard[i]].read)())
    };
    let mut kept = vec![];
    if let [all] = &shards[..] {
        write(WEIGHTS_FILE, all)?;
        kept.push(WEIGHTS_FILE.to_string());
    } else {
        let mut map = serde_json::Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            write(&file, shard)?;
            for tensor in shard {
                map.insert(specs[*tensor].name.clone(), file.clone().into());
            }
            kept.push(file);
        }
        let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
        let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
        write_file(folder.join(INDEX_FILE), format!("{index:#}\n").as_bytes())?;
        kept.push(INDEX_FILE.to_string());
    }
    write_file(folder.join(CONFIG_FILE), config.to_json().as_bytes())?;
    // An older export in other files would be read instead of this one, or beside it.
    let stale = old_index.into_iter().chain([WEIGHTS_FILE.to_string(), INDEX_FILE.to_string()]);
    for file in stale.filter(|file| !kept.contains(file)) {
        let path = folder.join(file);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(NnError::io("remove", path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A parameter's shape, and a way to read it from its device.
struct Parameter {
    name: String,
    shape: Vec<usize>,
    read: Box<dyn Fn() -> Result<TensorData, NnError>>,
}

/// The parameters of a model; only handles are copied.
fn parameters(model: &CausalLm) -> Vec<Parameter> {
    struct Collect {
        path: ParamPath,
        found: Vec<Parameter>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val().without_autodiff();
            self.found.push(Parameter {
                name: self.path.name(),
                shape: tensor.shape().to_vec(),
                read: Box::new(move || tensor.try_to_data().map_err(|error| NnError::Device(error.to_string()))),
            });
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.path.exit(container_type);
        }
    }
    let mut collect = Collect { path: model.param_path(), found: Vec::new() };
    model.visit(&mut collect);
    collect.found
}
