//! A tokenizer made from the training data.

use std::path::Path;
use std::sync::mpsc::sync_channel;

use burn_fla_nn::tokenizer::Tokenizer;

use super::documents::{Document, Repairs, documents};
use super::encode::pieces;
use super::source;
use crate::TrainError;
use crate::recipe::DataSection;

/// What a tokenizer was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VocabularyReport {
    /// Tokens it has.
    pub tokens: usize,
    /// Documents read.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
}

/// Trains a byte-level BPE of `vocab_size` tokens on the training sources of `section`, up to `max_bytes` of their text, and
/// writes `tokenizer.json` whole. Token 0 is `<|endoftext|>`.
///
/// # Errors
/// Data that is generated or is token ids already; files that cannot be read; a vocabulary smaller than the bytes.
pub fn train_tokenizer(
    section: &DataSection,
    vocab_size: usize,
    max_bytes: u64,
    output: &Path,
) -> Result<VocabularyReport, TrainError> {
    let bad = |message: &str| TrainError::BadValue {
        at: "recipe".to_string(),
        key: "data.sources".to_string(),
        message: message.to_string(),
    };
    let DataSection::Text(section) = section else {
        return Err(bad("a tokenizer needs text, and the data is generated as token ids"));
    };
    let listed = section.sources.iter().enumerate();
    let files = listed.map(|(index, source)| source::files(source, &format!("data.sources[{index}]")));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let (send, texts) = sync_channel::<String>(64);
    let (tokenizer, read) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<(u64, u64), TrainError> {
            let send = send;
            let (mut count, mut bytes) = (0, 0);
            for (source, files) in section.sources.iter().zip(&files) {
                // Ids of every size pass: they are refused below.
                documents(source, files, usize::MAX, &mut Repairs::default(), &mut |document| {
                    let Document::Text(text) = document else {
                        return Err(bad("a tokenizer needs text, and a source holds token ids"));
                    };
                    if bytes + text.len() as u64 <= max_bytes {
                        (count, bytes) = (count + 1, bytes + text.len() as u64);
                        // Nobody listens any more where the training has failed; its error is the one to tell.
                        let _ = pieces(&text).into_iter().try_for_each(|piece| send.send(piece.to_string()));
                    }
                    Ok(())
                })?;
            }
            Ok((count, bytes))
        });
        let tokenizer = Tokenizer::train_bpe(texts.into_iter(), vocab_size);
        (tokenizer, reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let (documents, bytes) = read?;
    let tokenizer = tokenizer?;
    tokenizer.save(output)?;
    Ok(VocabularyReport { tokens: tokenizer.vocab_size(), documents, bytes })
}
