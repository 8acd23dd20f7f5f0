//! The run's tokenizer: for the data, for bits per byte, for samples.

use std::ops::ControlFlow;
use std::path::Path;

use burn_fla_nn::generate::{SamplingConfig, generate};
use burn_fla_nn::tokenizer::Tokenizer;
use burn_fla_nn::{CausalLm, Compute, ModelConfig};
use sha2::{Digest, Sha256};

use crate::TrainError;
use crate::data::{Encoder, Rows};
use crate::recipe::{ModelSection, ValidationSection, hex};

/// A tokenizer with the separator that the run writes after every document.
#[derive(Debug)]
pub(crate) struct Text {
    tokenizer: Tokenizer,
    separator: Option<u32>,
    fingerprint: String,
    /// The tokenizer.json, if it has one.
    file: Option<Vec<u8>>,
}

impl Text {
    /// The tokenizer of a recipe; the separator is byte 0, or the model's `eos_token_id`.
    pub(super) fn open(section: &ModelSection, config: &ModelConfig) -> Result<Text, TrainError> {
        let text = if section.tokenizer == "byte" {
            Text { tokenizer: Tokenizer::byte(), separator: Some(0), fingerprint: "byte".to_string(), file: None }
        } else {
            let path = Path::new(&section.tokenizer);
            let tokenizer = Tokenizer::from_file(path)?;
            let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
            Text {
                separator: config.eos_token_id().filter(|id| (*id as usize) < tokenizer.vocab_size()),
                tokenizer,
                fingerprint: hex(&Sha256::digest(&bytes)),
                file: Some(bytes),
            }
        };
        let (tokens, vocab) = (text.tokenizer.vocab_size(), config.vocab_size());
        if tokens > vocab {
            return Err(TrainError::TokenizerTooLarge {
                tokenizer: section.tokenizer.clone(),
                tokens,
                model: section.config.display().to_string(),
                vocab,
            });
        }
        Ok(text)
    }

    /// The content of the tokenizer.json, unless tokens are bytes.
    pub(super) fn file(&self) -> Option<&[u8]> {
        self.file.as_deref()
    }

    /// Bytes of the text that the labels spell.
    pub(super) fn bytes(&self, rows: &Rows) -> Result<u64, TrainError> {
        let counted = rows.labels.iter().filter(|label| **label >= 0).map(|label| *label as u32);
        let spelled: Vec<u32> = counted.filter(|label| Some(*label) != self.separator).collect();
        if self.tokenizer.is_byte() {
            return Ok(spelled.len() as u64);
        }
        Ok(self.tokenizer.decode(&spelled)?.len() as u64)
    }

    /// The model's continuation of `prompt`.
    pub(super) fn sample(
        &self,
        model: &CausalLm,
        prompt: &str,
        section: &ValidationSection,
        seed: u64,
        compute: Compute,
    ) -> Result<String, TrainError> {
        let mut ids = self.tokenizer.encode(prompt)?;
        if ids.is_empty() {
            // An empty prompt is the start of a document.
            ids.push(self.separator.unwrap_or(0));
        }
        let sampling = SamplingConfig { temperature: section.temperature, top_k: None, top_p: None, seed };
        let go_on = |_| ControlFlow::Continue(());
        let tokens = generate(model, &ids, section.sample_tokens, &sampling, self.separator, compute, go_on)?;
        // A vocabulary rounded up has ids that no text has; an untrained model may draw them.
        let known = |token: &u32| Some(*token) != self.separator && (*token as usize) < self.tokenizer.vocab_size();
        let spelled: Vec<u32> = tokens.into_iter().filter(known).collect();
        Ok(self.tokenizer.decode(&spelled)?)
    }
}

impl Encoder for Text {
    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(self.tokenizer.encode(text)?)
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    fn separator(&self) -> Option<u32> {
        self.separator
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}
