//! What a checkpoint holds besides the model: the optimiser's tensors and the integers of the loop.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::write_synced;
use crate::TrainError;
use crate::optim::OptimizerState;

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

/// Writes every tensor of the optimiser's state into `optimizer.safetensors`.
///
/// # Errors
/// A device that cannot be read, a file that cannot be written.
pub fn save_optimizer(optimizer: &impl OptimizerState, folder: &Path) -> Result<(), TrainError> {
    write_synced(&folder.join(OPTIMIZER_FILE), &optimizer_bytes(optimizer)?)
}

/// The content of `optimizer.safetensors`, read from the device.
///
/// # Errors
/// A device that cannot be read.
pub(crate) fn optimizer_bytes(optimizer: &impl OptimizerState) -> Result<Vec<u8>, TrainError> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape, values) in optimizer.tensors() {
        tensors.push((name, shape, read_bytes(values)?));
    }
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, shape, bytes)| TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.as_str(), view)))
        .collect();
    views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| TrainError::Execution(format!("the optimiser's state: {error}")))
}

/// Reads what [`save_optimizer`] wrote into an optimiser of the same kind and parameters.
///
/// # Errors
/// A missing or misshapen tensor, a file that cannot be read.
pub fn load_optimizer(optimizer: &mut impl OptimizerState, folder: &Path, device: &Device) -> Result<(), TrainError> {
    let path = folder.join(OPTIMIZER_FILE);
    let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
    let bad = |message: String| damaged(folder, format!("{OPTIMIZER_FILE}: {message}"));
    let file = SafeTensors::deserialize(&bytes).map_err(|error| bad(error.to_string()))?;
    optimizer.restore(&mut |name, shape| {
        let view = file
            .tensor(name)
            .map_err(|_| bad(format!("the tensor {name} is missing; was the run of another optimizer.name?")))?;
        if view.shape() != shape || view.dtype() != Dtype::F32 {
            return Err(bad(format!("the tensor {name} is {:?} {:?}, not F32 {shape:?}", view.dtype(), view.shape())));
        }
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let n = values.len();
        Ok(Tensor::from_data(TensorData::new(values, [n]), device))
    })
}

/// The optimiser's tensors in a checkpoint.
pub(crate) const OPTIMIZER_FILE: &str = "optimizer.safetensors";

fn read_bytes(tensor: Tensor<1>) -> Result<Vec<u8>, TrainError> {
    let values = tensor.try_into_vec_as::<f32>().map_err(|error| TrainError::Execution(error.to_string()))?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}
