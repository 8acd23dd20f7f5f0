//! burn-train's steps on [`CausalLm`]: a model of this library under burn-train's `Learner`, with its metrics, schedulers
//! and dashboard (feature `learner`).

use burn::tensor::{ExecutionError, Int, Tensor};
use burn::train::metric::{Adaptor, LossInput};
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};
use burn_fla_ops::CuSeqlens;

use crate::{CausalLm, Compute};

/// What a step is given.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// `[B, T]`, each below the size of the vocabulary.
    pub ids: Tensor<2, Int>,
    /// `[B, T]`: the token each position is to predict; −100 is not counted.
    pub labels: Tensor<2, Int>,
    /// Where sequences begin in a packed row.
    pub cu: Option<CuSeqlens>,
    /// The type of the activations.
    pub compute: Compute,
}

/// What a step gives: the mean cross entropy over the counted positions, `[1]`.
#[derive(Clone, Debug)]
pub struct LanguageModelOutput {
    /// The loss.
    pub loss: Tensor<1>,
}

impl ItemLazy for LanguageModelOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        // Metrics read it when they are shown.
        Ok(self)
    }
}

impl Adaptor<LossInput> for LanguageModelOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl CausalLm {
    /// # Panics
    /// Labels of another shape than the ids, or packed sequences that do not cover the row: burn-train's steps cannot
    /// return an error.
    fn output(&self, batch: TokenBatch) -> LanguageModelOutput {
        let TokenBatch { ids, labels, cu, compute } = batch;
        match self.loss(ids, labels, cu.as_ref(), compute) {
            Ok(loss) => LanguageModelOutput { loss: loss.mean() },
            Err(error) => panic!("a batch that does not fit the model: {error}"),
        }
    }
}

impl TrainStep for CausalLm {
    type Input = TokenBatch;
    type Output = LanguageModelOutput;

    fn step(&self, batch: TokenBatch) -> TrainOutput<LanguageModelOutput> {
        let output = self.output(batch);
        let gradients = output.loss.backward();
        TrainOutput::new(self, gradients, LanguageModelOutput { loss: output.loss.inner() })
    }
}

impl InferenceStep for CausalLm {
    type Input = TokenBatch;
    type Output = LanguageModelOutput;

    fn step(&self, batch: TokenBatch) -> LanguageModelOutput {
        self.output(batch)
    }
}
