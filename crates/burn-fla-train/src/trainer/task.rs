//! What a run learns, and by which figure it is judged.

use std::sync::Arc;

use burn_fla_nn::ModelConfig;

use super::text::Text;
use crate::TrainError;
use crate::data::{Corpus, Encoder, HeldOutRows, RowSource, Rows, spread};
use crate::recipe::{DataSection, MqarSection, Recipe, TextSection, TrainingSection};

/// What a run learns.
#[derive(Debug)]
pub(crate) enum Task {
    /// To go on with text; judged by bits per byte, and by samples.
    Text(TextSection, Arc<Text>),
    /// To recall; judged by the share of right answers.
    Mqar(MqarSection),
}

impl Task {
    /// Reads the tokenizer where there is text; either way every token must have an embedding.
    pub(crate) fn open(recipe: &Recipe, config: &ModelConfig) -> Result<Task, TrainError> {
        match &recipe.data {
            DataSection::Text(data) => Ok(Task::Text(data.clone(), Arc::new(Text::open(&recipe.model, config)?))),
            DataSection::Mqar(data) if data.vocab_size > config.vocab_size() => Err(TrainError::BadValue {
                at: "recipe".to_string(),
                key: "data.vocab_size".to_string(),
                message: format!(
                    "{} is more than the vocab_size {} of the model {}; raise that (model.overrides) or lower this",
                    data.vocab_size,
                    config.vocab_size(),
                    recipe.model.config.display()
                ),
            }),
            DataSection::Mqar(data) => Ok(Task::Mqar(data.clone())),
        }
    }

    /// The rows to learn from, of which the first can be drawn, and what the run is judged by.
    pub(crate) fn corpus(
        &self,
        training: &TrainingSection,
        tell: &mut dyn FnMut(String),
    ) -> Result<(Arc<dyn RowSource>, HeldOutRows), TrainError> {
        match self {
            Task::Text(data, text) => Corpus::begin(data, training, text, tell),
            Task::Mqar(data) => {
                let Corpus { train, validation } = Corpus::mqar(data, training.seq_len);
                Ok((train, HeldOutRows::There(validation)))
            }
        }
    }

    /// What tokenises text.
    pub(crate) fn encoder(&self) -> Option<&dyn Encoder> {
        self.text().map(|text| text as &dyn Encoder)
    }

    /// The tokenizer of text.
    pub(super) fn text(&self) -> Option<&Text> {
        match self {
            Task::Text(_, text) => Some(text),
            Task::Mqar(_) => None,
        }
    }
}

/// What a run is judged by, once it is asked for.
#[derive(Debug)]
pub(super) enum HeldOutBatches {
    /// It is there, or there is none.
    There(Option<HeldOut>),
    /// It is being gathered beside the run.
    Later(HeldOutRows),
}

impl HeldOutBatches {
    /// Waits for them where they are still being gathered.
    pub(super) fn get(&mut self, recipe: &Recipe, task: &Task) -> Result<Option<&HeldOut>, TrainError> {
        if let HeldOutBatches::Later(rows) = self {
            let rows = std::mem::replace(rows, HeldOutRows::There(None)).wait()?;
            *self = HeldOutBatches::There(HeldOut::of(recipe, rows, task)?);
        }
        match self {
            HeldOutBatches::There(held_out) => Ok(held_out.as_ref()),
            HeldOutBatches::Later(_) => Ok(None),
        }
    }
}

/// Held-out rows, the same at every evaluation.
#[derive(Debug)]
pub(super) struct HeldOut {
    pub batches: Vec<Rows>,
    /// Labels that count.
    pub tokens: u64,
    /// Bytes of the text that the labels spell, where they spell one.
    pub bytes: Option<u64>,
}

impl HeldOut {
    /// The batches of `rows`, if there are any.
    pub(super) fn of(
        recipe: &Recipe,
        rows: Option<Arc<dyn RowSource>>,
        task: &Task,
    ) -> Result<Option<HeldOut>, TrainError> {
        rows.map(|rows| HeldOut::new(recipe, &rows, task)).transpose()
    }

    /// `validation.steps` batches spread over `rows`.
    fn new(recipe: &Recipe, rows: &Arc<dyn RowSource>, task: &Task) -> Result<HeldOut, TrainError> {
        let rows_per_batch = recipe.training.batch_size;
        let rows = spread(rows.as_ref(), recipe.validation.steps * rows_per_batch as u64);
        let batches: Vec<Rows> = rows.chunks(rows_per_batch).map(Rows::concat).collect();
        let bytes = match task.text() {
            None => None,
            Some(text) => {
                let mut bytes = 0;
                for rows in &rows {
                    bytes += text.bytes(rows)?;
                }
                Some(bytes)
            }
        };
        Ok(HeldOut { tokens: batches.iter().map(Rows::tokens).sum(), batches, bytes })
    }
}
