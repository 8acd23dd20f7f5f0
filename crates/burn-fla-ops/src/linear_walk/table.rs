//! Where each chunk lies, as the kernels read it.

use crate::CuSeqlens;

/// Words a chunk has in the table: its sequence, its first token, its length.
pub(crate) const CHUNK_WORDS: usize = 3;
/// Words a sequence has in the table, after all chunks: its first chunk, its number of chunks.
pub(crate) const SEQUENCE_WORDS: usize = 2;

pub(crate) struct Table {
    pub(crate) entries: Vec<i32>,
    pub(crate) chunks: usize,
}

/// Cuts every sequence into chunks; no chunk crosses a border.
pub(crate) fn build(sequences: &CuSeqlens, chunk: usize) -> Table {
    let mut chunks = Vec::new();
    let mut per_sequence = Vec::new();
    for (i, window) in sequences.offsets().windows(2).enumerate() {
        let first = chunks.len() / CHUNK_WORDS;
        for start in (window[0]..window[1]).step_by(chunk) {
            let len = chunk.min(window[1] - start);
            chunks.extend([i as i32, start as i32, len as i32]);
        }
        per_sequence.extend([first as i32, (chunks.len() / CHUNK_WORDS - first) as i32]);
    }
    debug_assert_eq!(per_sequence.len(), SEQUENCE_WORDS * sequences.num_sequences());
    let count = chunks.len() / CHUNK_WORDS;
    chunks.extend(per_sequence);
    Table { entries: chunks, chunks: count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_chunk_crosses_a_border() {
        let packed = CuSeqlens::new(vec![0, 5, 5, 6]).unwrap();
        let table = build(&packed, 4);
        assert_eq!(table.chunks, 3);
        assert_eq!(table.entries, [0, 0, 4, 0, 4, 1, 2, 5, 1, 0, 2, 2, 0, 2, 1]);
    }
}
