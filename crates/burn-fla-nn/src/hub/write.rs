//! Writing tensors as safetensors.

use std::path::Path;

use burn::tensor::{DType, TensorData};
use serde_json::{Map, Value, json};

use super::atomic::write_with;
use crate::NnError;

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its type in the file.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    code: &'static str,
}

impl TensorSpec {
    /// A tensor of a type that the format has.
    ///
    /// # Errors
    /// [`NnError::Argument`] for another type.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Self, NnError> {
        let code = match dtype {
            DType::F64 => "F64",
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I64 => "I64",
            DType::I32 => "I32",
            DType::U64 => "U64",
            DType::U32 => "U32",
            DType::U8 => "U8",
            other => {
                return Err(NnError::argument("dtype", format!("safetensors files cannot hold {other:?}")));
            }
        };
        Ok(Self { name: name.into(), dtype, shape: shape.into(), code })
    }

    /// Its size in the file.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }
}

/// Writes `tensors`, each in its own type, into `path`, as a whole or not at all.
///
/// # Errors
/// A type that the format does not have; two tensors of one name; a file that cannot be written.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(String, TensorData)],
    metadata: &[(&str, &str)],
) -> Result<(), NnError> {
    let specs = tensors
        .iter()
        .map(|(name, data)| TensorSpec::new(name, data.dtype(), data.shape().to_vec()))
        .collect::<Result<Vec<_>, _>>()?;
    write_safetensors_with(path, &specs, metadata, |i| Ok(tensors[i].1.clone()))
}

/// [`write_safetensors`] of tensors that are fetched one at a time, in the order of `specs`, and converted to the type
/// their spec says: no more than one is in memory.
///
/// # Errors
/// As [`write_safetensors`]; a tensor whose shape is not its spec's; an error of `fetch`.
pub fn write_safetensors_with(
    path: impl AsRef<Path>,
    specs: &[TensorSpec],
    metadata: &[(&str, &str)],
    mut fetch: impl FnMut(usize) -> Result<TensorData, NnError>,
) -> Result<(), NnError> {
    let path = path.as_ref();
    let mut header = Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|(key, value)| (key.to_string(), Value::from(*value)));
        header.insert("__metadata__".into(), Value::Object(entries.collect()));
    }
    let mut offset = 0;
    for spec in specs {
        let end = offset + spec.bytes();
        let entry = json!({"dtype": spec.code, "shape": spec.shape, "data_offsets": [offset, end]});
        if header.insert(spec.name.clone(), entry).is_some() {
            return Err(NnError::argument("tensors", format!("the name `{}` is there twice", spec.name)));
        }
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The format asks for values that begin at a multiple of 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    write_with(path, |file| {
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(NnError::io("write", path));
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        for (i, spec) in specs.iter().enumerate() {
            let data = fetch(i)?;
            if data.shape().to_vec() != spec.shape {
                return Err(NnError::argument(
                    "tensors",
                    format!("`{}` has the shape {:?}, announced was {:?}", spec.name, data.shape(), spec.shape),
                ));
            }
            let data = if data.dtype() == spec.dtype { data } else { data.convert_dtype(spec.dtype) };
            write(data.as_bytes())?;
        }
        Ok(())
    })
}
