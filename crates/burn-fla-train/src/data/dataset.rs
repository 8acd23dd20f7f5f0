//! The rows of a corpus as burn-dataset's `Dataset`, for any Burn `DataLoader` (feature `learner`).

use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::{Dataset, DatasetError};
use burn::tensor::{Device, Tensor, TensorData};
use burn_fla_nn::Compute;
use burn_fla_nn::learner::TokenBatch;
use burn_fla_ops::CuSeqlens;

use super::loader::read;
use super::rows::{RowSource, Rows};

/// The rows of a source by their numbers, one [`Rows`] of one row each. The order is the source's own: a `DataLoader`
/// shuffles as it likes.
#[derive(Clone, Debug)]
pub struct RowDataset(Arc<dyn RowSource>);

impl RowDataset {
    /// The rows of `source`, such as [`Corpus::train`](super::Corpus::train) or a [`Windows`](super::Windows).
    pub fn new(source: Arc<dyn RowSource>) -> RowDataset {
        RowDataset(source)
    }
}

impl Dataset<Rows> for RowDataset {
    fn get(&self, index: usize) -> Result<Rows, DatasetError> {
        Ok(read(self.0.as_ref(), std::iter::once(self.0.number(index as u64))))
    }

    fn len(&self) -> usize {
        self.0.len() as usize
    }
}

/// Puts rows below each other, or packs them where they hold several sequences.
#[derive(Clone, Copy, Debug)]
pub struct RowBatcher {
    /// The type of the activations.
    pub compute: Compute,
}

impl Batcher<Rows, TokenBatch> for RowBatcher {
    fn batch(&self, items: Vec<Rows>, device: &Device) -> TokenBatch {
        let rows = Rows::concat(&items);
        let (shape, cu) = rows.layout();
        let tensor = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, shape), device);
        // The offsets of rows rise and end with the last token, so they are always valid.
        let cu = cu.map(|offsets| CuSeqlens::new(offsets).expect("offsets of rows"));
        TokenBatch { ids: tensor(rows.ids), labels: tensor(rows.labels), cu, compute: self.compute }
    }
}
