//! Reading tensors from memory-mapped safetensors files.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::{INDEX_FILE, WEIGHTS_FILE};
use crate::NnError;

/// The tensors of one or several safetensors files, mapped into memory and found by name.
pub struct TensorStore {
    path: PathBuf,
    maps: Vec<Mmap>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    map: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor of a [`TensorStore`].
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// Its type in the file.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its values, little-endian, first dimension outermost.
    pub bytes: &'a [u8],
}

impl std::fmt::Debug for TensorStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorStore({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

/// The tensors of a safetensors file, or of a folder with `model.safetensors` or its index.
///
/// # Errors
/// An unreadable, damaged or truncated file.
pub fn read_safetensors(path: impl AsRef<Path>) -> Result<TensorStore, NnError> {
    TensorStore::open(path)
}

/// The files that an index in `folder` names, if there is a readable one.
pub(super) fn index_files(folder: &Path) -> Vec<String> {
    let Ok(text) = std::fs::read_to_string(folder.join(INDEX_FILE)) else {
        return Vec::new();
    };
    let mut files: Vec<String> =
        weight_map(&text).map(|map| map.into_values().filter(|file| is_plain(file)).collect()).unwrap_or_default();
    files.sort();
    files.dedup();
    files
}

/// Whether a file named by an index lies in the folder itself.
fn is_plain(file: &str) -> bool {
    Path::new(file).file_name().is_some_and(|name| name == file)
}

fn weight_map(text: &str) -> Result<BTreeMap<String, String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    serde_json::from_str::<Index>(text).map(|index| index.weight_map).map_err(|error| error.to_string())
}

impl TensorStore {
    /// The tensors of a safetensors file, or of a folder with `model.safetensors` or its index.
    ///
    /// # Errors
    /// An unreadable, damaged or truncated file; an index that is wrong about its files.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NnError> {
        let path = path.as_ref();
        let mut store = Self { path: path.to_path_buf(), maps: Vec::new(), tensors: BTreeMap::new() };
        if !path.is_dir() {
            store.map(path)?;
            return Ok(store);
        }
        let single = path.join(WEIGHTS_FILE);
        let index = path.join(INDEX_FILE);
        if single.exists() || !index.exists() {
            store.map(&single)?;
            return Ok(store);
        }
        let text = std::fs::read_to_string(&index).map_err(NnError::io("read", &index))?;
        let weight_map = weight_map(&text).map_err(|message| NnError::format(&index, message))?;
        let mut files: Vec<&String> = weight_map.values().collect();
        files.sort();
        files.dedup();
        for file in files {
            if !is_plain(file) {
                return Err(NnError::format(&index, format!("`{file}` is not the name of a file beside it")));
            }
            store.map(&path.join(file))?;
        }
        if let Some((name, file)) = weight_map.iter().find(|(name, _)| !store.tensors.contains_key(*name)) {
            return Err(NnError::format(
                &index,
                format!("tensor `{name}` is not in {file}, where the index says it is"),
            ));
        }
        Ok(store)
    }

    fn map(&mut self, path: &Path) -> Result<(), NnError> {
        let file = File::open(path).map_err(NnError::io("read", path))?;
        // SAFETY: the map is only read. Should another process cut the file short meanwhile, a read past its end is
        // a bus error and not a wrong value; writers of this library never change a file in place.
        let map = unsafe { Mmap::map(&file) }.map_err(NnError::io("read", path))?;
        let damaged = |message: String| NnError::format(path, format!("not a whole safetensors file: {message}"));
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| damaged(error.to_string()))?;
        let base = header + 8;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                map: self.maps.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: base + start,
                end: base + end,
            };
            if end < start || base + end > map.len() {
                return Err(damaged(format!("tensor `{name}` lies outside the file")));
            }
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(damaged(format!("tensor `{name}` is in another file too")));
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// The file or folder, for messages.
    pub fn origin(&self) -> String {
        self.path.display().to_string()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Forgets a tensor.
    pub(crate) fn ignore(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// Calls the tensor `old` `new`, where there is one, and none of the new name.
    pub(crate) fn rename(&mut self, old: &str, new: &str) {
        if !self.tensors.contains_key(new)
            && let Some(entry) = self.tensors.remove(old)
        {
            self.tensors.insert(new.to_string(), entry);
        }
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let entry = self.tensors.get(name)?;
        Some(StoredTensor {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: self.maps[entry.map].get(entry.start..entry.end)?,
        })
    }

    /// The values of a float tensor of the given shape, or what is wrong with it.
    pub(crate) fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
        let tensor = self.get(name).ok_or_else(|| format!("missing tensor `{name}` {shape:?}"))?;
        if tensor.shape != shape {
            return Err(format!("tensor `{name}` has the shape {:?}, expected {shape:?}", tensor.shape));
        }
        tensor
            .to_f32()
            .ok_or_else(|| format!("tensor `{name}` is of type {:?}, expected F32, BF16 or F16", tensor.dtype))
    }

    /// The values of the float tensor `name`, of any shape.
    ///
    /// # Errors
    /// [`NnError::Tensors`] when it is missing or not a float.
    pub fn floats(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), NnError> {
        let shape = self.get(name).map(|t| t.shape.to_vec()).unwrap_or_default();
        let values = self.read_f32(name, &shape).map_err(|problem| self.problem(problem))?;
        Ok((values, shape))
    }

    /// The values of the integer tensor `name`, of any shape.
    ///
    /// # Errors
    /// [`NnError::Tensors`] when it is missing or not of type I32 or I64.
    pub fn integers(&self, name: &str) -> Result<(Vec<i64>, Vec<usize>), NnError> {
        let tensor = self.get(name).ok_or_else(|| self.problem(format!("missing tensor `{name}`")))?;
        let values = match tensor.dtype {
            Dtype::I32 => words(tensor.bytes, |b| i64::from(i32::from_le_bytes(b))),
            Dtype::I64 => words(tensor.bytes, i64::from_le_bytes),
            other => {
                return Err(self.problem(format!("tensor `{name}` is of type {other:?}, expected I32 or I64")));
            }
        };
        Ok((values, tensor.shape.to_vec()))
    }

    /// The tensor `name` as Burn's data, in its own type.
    ///
    /// # Errors
    /// [`NnError::Tensors`] when it is missing or of a type Burn has no data of.
    pub fn data(&self, name: &str) -> Result<TensorData, NnError> {
        let tensor = self.get(name).ok_or_else(|| self.problem(format!("missing tensor `{name}`")))?;
        let dtype = match tensor.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::I64 => DType::I64,
            Dtype::I32 => DType::I32,
            Dtype::U32 => DType::U32,
            Dtype::U8 => DType::U8,
            other => {
                return Err(self.problem(format!("tensor `{name}` is of type {other:?}")));
            }
        };
        TensorData::try_from_bytes_vec(tensor.bytes.to_vec(), tensor.shape.to_vec(), dtype)
            .map_err(|error| self.problem(format!("tensor `{name}`: {error}")))
    }

    fn problem(&self, problem: String) -> NnError {
        NnError::Tensors { origin: self.origin(), problems: vec![problem] }
    }
}

impl StoredTensor<'_> {
    /// Its values in f32; `None` when it is not a float of 16 or 32 bits.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        Some(match self.dtype {
            Dtype::F32 => words(self.bytes, f32::from_le_bytes),
            Dtype::BF16 => words(self.bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => words(self.bytes, |b| f16::from_le_bytes(b).to_f32()),
            _ => return None,
        })
    }
}

/// The words of N bytes of `bytes`. Not a cast: the data of a file need not be aligned.
fn words<const N: usize, T>(bytes: &[u8], word: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (words, _) = bytes.as_chunks::<N>();
    words.iter().map(|chunk| word(*chunk)).collect()
}
