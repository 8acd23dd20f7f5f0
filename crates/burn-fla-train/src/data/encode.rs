//! Texts to tokens on all cores, in the order of the documents.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Encoder;
use crate::TrainError;

/// Longer texts are tokenised in pieces: a tokenizer keeps many bytes for each one of a text, and one long document would
/// keep one core alone at work.
pub(super) const PIECE: usize = 1 << 20;

/// `text` in pieces of about [`PIECE`] bytes, cut before a space that follows no other, where the pre-tokenizers in use cut
/// too; a text without such a place is cut between two characters.
pub(super) fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    while text.len() > PIECE {
        let bytes = text.as_bytes();
        let space = (PIECE / 2..PIECE).rev().find(|&at| bytes[at] == b' ' && !bytes[at - 1].is_ascii_whitespace());
        let at = space.unwrap_or_else(|| (0..=PIECE).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(PIECE));
        let (piece, rest) = text.split_at(at);
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

/// The tokens of every piece, in order.
pub(super) fn encode_all(encoder: &dyn Encoder, pieces: &[&str]) -> Result<Vec<Vec<u32>>, TrainError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(pieces.len().max(1));
    let next = AtomicUsize::new(0);
    // Each core takes the next piece that none has taken: a long one keeps nobody waiting.
    let work = || -> Result<Vec<(usize, Vec<u32>)>, TrainError> {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(at) else { return Ok(done) };
            done.push((at, encoder.encode(piece)?));
        }
    };
    let parts: Vec<Result<Vec<(usize, Vec<u32>)>, TrainError>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..cores).map(|_| scope.spawn(work)).collect();
        let own = work();
        let others =
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(own).chain(others).collect()
    });
    let mut tokens = vec![Vec::new(); pieces.len()];
    for part in parts {
        for (at, ids) in part? {
            tokens[at] = ids;
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text_and_are_cut_before_words() {
        let words: String = (0..400_000).map(|i| format!("word{i} ")).collect();
        let cut = pieces(&words);
        assert!(cut.len() > 3 && cut.iter().all(|piece| piece.len() <= PIECE));
        assert_eq!(cut.concat(), words);
        assert!(cut[1..].iter().all(|piece| piece.starts_with(" word")));
        // Nowhere to cut: between characters.
        let long = "é".repeat(PIECE);
        let cut = pieces(&long);
        assert!(cut.len() == 2 || cut.len() == 3, "{}", cut.len());
        assert_eq!(cut.concat(), long);
        assert_eq!(pieces("short"), ["short"]);
        assert_eq!(pieces(""), [""]);
    }
}
