//! What a checkpoint holds besides the model: the optimiser's tensors and the integers of the loop.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::write_synced;
use crate::TrainError;
use crate::optim::{AdamW, AdamWState, COUNTER_NAMES};

/// The state of the loop; with the tensors beside it, everything the next step depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Format of this file.
    pub version: u32,
    /// Optimiser steps made.
    pub step: u64,
    /// Tokens counted in the loss so far.
    pub tokens: u64,
    /// Windows drawn from the shuffled data.
    pub cursor: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Losses since the last log line, as the bits of f32: read from the device for the save, reported later.
    pub pending_losses: Vec<u32>,
    /// Seed of the shuffle.
    pub data_seed: u64,
    /// Tokens of a row: with the seed and the fingerprint, what fixes the order of the windows.
    pub seq_len: usize,
    /// Data and tokenizer.
    pub data: String,
    /// SHA-256 of the resolved recipe.
    pub recipe: String,
    /// Data-parallel threads, which fix the order of the gradient's sum.
    pub threads: usize,
}

impl TrainState {
    /// Writes `state.json`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), TrainError> {
        let text = serde_json::to_string_pretty(self).expect("the state is plain JSON");
        write_synced(&folder.join("state.json"), text.as_bytes())
    }

    /// Reads `state.json`.
    ///
    /// # Errors
    /// A file that cannot be read or is of another format.
    pub fn load(folder: &Path) -> Result<TrainState, TrainError> {
        let path = folder.join("state.json");
        let text = std::fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let state: TrainState =
            serde_json::from_str(&text).map_err(|error| damaged(folder, format!("state.json: {error}")))?;
        if state.version != 1 {
            return Err(damaged(folder, format!("state.json has version {}, not 1", state.version)));
        }
        Ok(state)
    }
}

fn damaged(folder: &Path, message: String) -> TrainError {
    TrainError::CheckpointDamaged {
        path: folder.to_path_buf(),
        message,
        remedy: "choose another checkpoint (checkpoint.resume)".to_string(),
    }
}

/// Writes the moments as `exp_avg.NAME` and `exp_avg_sq.NAME` in the parameters' shapes, and the counters.
///
/// # Errors
/// A device that cannot be read, a file that cannot be written.
pub fn save_optimizer(optimizer: &AdamW, folder: &Path) -> Result<(), TrainError> {
    let state = optimizer.state();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (at, entry) in optimizer.table().entries().iter().enumerate() {
        for (kind, moments) in [("exp_avg", &state.first), ("exp_avg_sq", &state.second)] {
            let bytes = read_bytes(moments[at].clone())?;
            tensors.push((format!("{kind}.{}", entry.name), entry.shape.clone(), bytes));
        }
    }
    for (name, counter) in COUNTER_NAMES.iter().zip(read_bytes(state.counters.clone())?.chunks(4)) {
        tensors.push((name.to_string(), vec![1], counter.to_vec()));
    }
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, shape, bytes)| TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.as_str(), view)))
        .collect();
    let bytes = views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| TrainError::Execution(format!("the optimiser's state: {error}")))?;
    write_synced(&folder.join("optimizer.safetensors"), &bytes)
}

/// Reads what [`save_optimizer`] wrote into an optimiser of the same parameters.
///
/// # Errors
/// A missing or misshapen tensor, a file that cannot be read.
pub fn load_optimizer(optimizer: &mut AdamW, folder: &Path, device: &Device) -> Result<(), TrainError> {
    let path = folder.join("optimizer.safetensors");
    let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
    let bad = |message: String| damaged(folder, format!("optimizer.safetensors: {message}"));
    let file = SafeTensors::deserialize(&bytes).map_err(|error| bad(error.to_string()))?;
    let read = |name: &str, shape: &[usize]| -> Result<Tensor<1>, TrainError> {
        let view = file.tensor(name).map_err(|_| bad(format!("the tensor {name} is missing")))?;
        if view.shape() != shape || view.dtype() != Dtype::F32 {
            return Err(bad(format!("the tensor {name} is {:?} {:?}, not F32 {shape:?}", view.dtype(), view.shape())));
        }
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let n = values.len();
        Ok(Tensor::from_data(TensorData::new(values, [n]), device))
    };
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for entry in optimizer.table().entries() {
        first.push(read(&format!("exp_avg.{}", entry.name), &entry.shape)?);
        second.push(read(&format!("exp_avg_sq.{}", entry.name), &entry.shape)?);
    }
    let mut counters = Vec::new();
    for name in COUNTER_NAMES {
        counters.push(read(name, &[1])?);
    }
    optimizer.set_state(AdamWState { first, second, counters: Tensor::cat(counters, 0) });
    Ok(())
}

fn read_bytes(tensor: Tensor<1>) -> Result<Vec<u8>, TrainError> {
    let values = tensor.try_into_vec_as::<f32>().map_err(|error| TrainError::Execution(error.to_string()))?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}
