//! Text to token ids and back.

use std::path::Path;

use crate::NnError;

/// Between text and token ids: bytes, or a Hugging Face `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Byte,
    File(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// Every byte of the UTF-8 text is a token, its value the id. The vocabulary has 256 ids.
    pub fn byte() -> Self {
        Self(Kind::Byte)
    }

    /// The tokenizer of a `tokenizer.json`.
    ///
    /// # Errors
    /// An unreadable file, or one that is not a tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, NnError> {
        let path = path.as_ref();
        let text = std::fs::read(path).map_err(NnError::io("read", path))?;
        tokenizers::Tokenizer::from_bytes(text)
            .map(|tokenizer| Self(Kind::File(Box::new(tokenizer))))
            .map_err(|error| NnError::Tokenizer { path: Some(path.to_path_buf()), message: error.to_string() })
    }

    /// A byte-level BPE trained on `texts`: every text can be encoded, whatever its characters, and decodes to itself. Token
    /// 0 is the special token `<|endoftext|>`.
    ///
    /// # Errors
    /// Fewer than 257 tokens, which the bytes and the special token need; a failure of the training.
    pub fn train_bpe(texts: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<Self, NnError> {
        use tokenizers::models::bpe::{BPE, BpeTrainer};
        use tokenizers::pre_tokenizers::byte_level::ByteLevel;
        if vocab_size < 257 {
            return Err(failed(format!("a vocabulary of {vocab_size} has no room for 256 bytes and <|endoftext|>")));
        }
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .show_progress(false)
            .special_tokens(vec![tokenizers::AddedToken::from("<|endoftext|>", true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let bytes = ByteLevel::new(false, false, true);
        let mut tokenizer =
            tokenizers::TokenizerBuilder::<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new()
                .with_model(BPE::default())
                .with_pre_tokenizer(Some(bytes))
                .with_decoder(Some(bytes))
                .build()
                .map_err(failed)?;
        tokenizer.train(&mut trainer, texts).map_err(failed)?;
        // Through its file's format, so that what is used is what a file would give.
        let text = tokenizer.to_string(false).map_err(failed)?;
        tokenizers::Tokenizer::from_bytes(text).map(|tokenizer| Self(Kind::File(Box::new(tokenizer)))).map_err(failed)
    }

    /// Writes the `tokenizer.json`, whole or not at all.
    ///
    /// # Errors
    /// A tokenizer of bytes, which has no file; a file that cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), NnError> {
        match &self.0 {
            Kind::Byte => Err(failed("bytes have no tokenizer.json")),
            Kind::File(tokenizer) => {
                crate::hub::write_file(path, tokenizer.to_string(true).map_err(failed)?.as_bytes())
            }
        }
    }

    /// Whether tokens are bytes.
    pub fn is_byte(&self) -> bool {
        matches!(self.0, Kind::Byte)
    }

    /// The ids of `text`, without special tokens.
    ///
    /// # Errors
    /// A text that the tokenizer's model cannot encode.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, NnError> {
        match &self.0 {
            Kind::Byte => Ok(text.bytes().map(u32::from).collect()),
            Kind::File(tokenizer) => {
                tokenizer.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()).map_err(failed)
            }
        }
    }

    /// The text of `ids`, special tokens left out. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// With bytes, an id above 255; with a file, what its decoder refuses.
    pub fn decode(&self, ids: &[u32]) -> Result<String, NnError> {
        match &self.0 {
            Kind::Byte => {
                let bytes = ids.iter().map(|id| byte(*id)).collect::<Result<Vec<_>, _>>()?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::File(tokenizer) => tokenizer.decode(ids, true).map_err(failed),
        }
    }

    /// One more than the largest id: what the vocabulary of a model must at least have.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Byte => 256,
            Kind::File(tokenizer) => {
                tokenizer.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1)
            }
        }
    }

    /// The id of the token written `token`, if there is one.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.0 {
            Kind::Byte => match token.as_bytes() {
                [byte] => Some(u32::from(*byte)),
                _ => None,
            },
            Kind::File(tokenizer) => tokenizer.token_to_id(token),
        }
    }

    /// An error when the vocabulary of a model is too small for this tokenizer.
    ///
    /// # Errors
    /// [`NnError::Tokenizer`] with both numbers.
    pub fn check_vocab(&self, vocab_size: usize) -> Result<(), NnError> {
        if self.vocab_size() > vocab_size {
            return Err(failed(format!(
                "its ids go up to {}, and the model has a vocabulary of {vocab_size}: set vocab_size to {} or more",
                self.vocab_size() - 1,
                self.vocab_size()
            )));
        }
        Ok(())
    }

    /// A decoder for ids that come one at a time.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, pending: Vec::new(), context: 0 }
    }
}

fn failed(error: impl ToString) -> NnError {
    NnError::Tokenizer { path: None, message: error.to_string() }
}

fn byte(id: u32) -> Result<u8, NnError> {
    u8::try_from(id).map_err(|_| failed(format!("{id} is not the id of a byte")))
}

/// Turns ids that come one at a time into text that is always whole characters: what several tokens share appears with
/// the last of them.
#[derive(Clone, Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// With bytes: those of an unfinished character. With a file: the last ids shown, then those not yet shown.
    pending: Vec<u32>,
    /// How many of `pending` have been shown. They stay for the sake of decoders that look at the token before.
    context: usize,
}

/// A run of ids that decodes to no whole character for this long is shown as it is.
const LONGEST_PENDING: usize = 64;

impl StreamDecoder<'_> {
    /// The text that `id` completes; often empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, NnError> {
        self.pending.push(id);
        self.take(false)
    }

    /// The text of what is left, with U+FFFD for an unfinished character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String, NnError> {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> Result<String, NnError> {
        if self.tokenizer.is_byte() {
            return self.take_bytes(all);
        }
        let before = self.tokenizer.decode(&self.pending[..self.context])?;
        let now = self.tokenizer.decode(&self.pending)?;
        let unfinished = now.ends_with('\u{fffd}') || now.len() <= before.len();
        let force = all || self.pending.len() - self.context >= LONGEST_PENDING;
        if unfinished && !force {
            return Ok(String::new());
        }
        // A decoder may change what it said of the context (a space before the first word): take the longest part in
        // common as said.
        let said = before
            .char_indices()
            .zip(now.chars())
            .find(|((_, a), b)| a != b)
            .map_or(before.len().min(now.len()), |((at, _), _)| at);
        let text = now[said..].to_string();
        self.pending.drain(..self.context);
        self.context = self.pending.len();
        Ok(text)
    }

    fn take_bytes(&mut self, all: bool) -> Result<String, NnError> {
        let bytes = self.pending.iter().map(|id| byte(*id)).collect::<Result<Vec<_>, _>>()?;
        let mut text = String::new();
        let mut rest = &bytes[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    match error.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &rest[length..];
                        }
                        None if all => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &[];
                            break;
                        }
                        None => break,
                    }
                }
            }
        }
        let left = rest.len();
        self.pending.drain(..self.pending.len() - left);
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_there_and_back() {
        let tokenizer = Tokenizer::byte();
        let text = "fn main() {\n    // größer 🦀\n}\n";
        let ids = tokenizer.encode(text).expect("bytes");
        assert_eq!(tokenizer.decode(&ids).expect("bytes"), text);
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
        assert!(tokenizer.decode(&[256]).is_err());
        assert!(tokenizer.check_vocab(255).is_err());
        assert!(tokenizer.check_vocab(256).is_ok());
    }

    #[test]
    fn a_trained_tokenizer_gives_every_text_back() {
        let texts = || (0..200).map(|i| format!("the cat number {i} sat on the mat, größer than the hat"));
        let tokenizer = Tokenizer::train_bpe(texts(), 400).expect("a tokenizer");
        assert!((300..=400).contains(&tokenizer.vocab_size()), "{}", tokenizer.vocab_size());
        assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
        for text in ["the cat sat on the mat", " 日本語 🦀\n\tfn main() {}", ""] {
            let ids = tokenizer.encode(text).expect("ids");
            assert_eq!(tokenizer.decode(&ids).expect("a text"), text);
        }
        // What it has seen is short, and the word it has seen most is one token.
        assert_eq!(tokenizer.encode(" the").expect("ids").len(), 1);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path).expect("a file");
        let again = Tokenizer::from_file(&path).expect("the file");
        let text = "the cat number 17 sat on the größer hat";
        assert_eq!(again.encode(text).expect("ids"), tokenizer.encode(text).expect("ids"));
        assert!(Tokenizer::train_bpe(texts(), 256).is_err());
        assert!(Tokenizer::byte().save(&path).is_err());
    }

    #[test]
    fn a_stream_never_splits_a_character() {
        let tokenizer = Tokenizer::byte();
        let text = "aé🦀b";
        let mut stream = tokenizer.stream();
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text).expect("bytes") {
            pieces.push(stream.push(id).expect("a byte"));
        }
        assert_eq!(pieces, ["a", "", "é", "", "", "", "🦀", "b"]);
        assert_eq!(stream.finish().expect("nothing left"), "");
        let mut broken = tokenizer.stream();
        assert_eq!(broken.push(0xf0).expect("a byte"), "");
        assert_eq!(broken.push(u32::from(b'x')).expect("a byte"), "\u{fffd}x");
        assert_eq!(broken.push(0xe2).expect("a byte"), "");
        assert_eq!(broken.finish().expect("the rest"), "\u{fffd}");
    }

    #[test]
    fn a_tokenizer_file_streams_what_it_decodes() {
        // Byte-level BPE without merges: every byte a token, written with the usual stand-in characters.
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true}, "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "Ã": 3, "©": 4, "ab": 5}, "merges": ["a b"]}}"#;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json).expect("a file");
        let tokenizer = Tokenizer::from_file(&path).expect("a tokenizer");
        assert_eq!(tokenizer.vocab_size(), 6);
        let text = "ab é ba";
        let ids = tokenizer.encode(text).expect("known bytes");
        assert_eq!(ids[0], 5);
        assert_eq!(tokenizer.decode(&ids).expect("ids"), text);
        let mut stream = tokenizer.stream();
        let mut streamed = String::new();
        for id in ids {
            let piece = stream.push(id).expect("an id");
            assert!(!piece.contains('\u{fffd}'));
            streamed.push_str(&piece);
        }
        streamed.push_str(&stream.finish().expect("nothing left"));
        assert_eq!(streamed, text);
        std::fs::write(&path, "{}").expect("a file");
        assert!(Tokenizer::from_file(&path).is_err());
        assert!(Tokenizer::from_file(folder.path().join("none")).is_err());
    }
}
