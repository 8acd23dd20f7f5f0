//! Where each segment lies, as the kernels read it.

use super::plan::CHUNK;
use crate::CuSeqlens;

/// Words of a segment: first token, length, sequence, flags, first chunk, rows that earlier sequences have more than tokens.
pub(crate) const ITEM_WORDS: usize = 6;
/// Words of a sequence: first segment, number of segments.
pub(crate) const SEQUENCE_WORDS: usize = 2;
/// Words of a chunk: first token, length, rows that earlier sequences have more than tokens, flags.
pub(crate) const CHUNK_WORDS: usize = 4;
/// The segment or chunk is its sequence's first.
pub(crate) const FIRST: u32 = 1;
/// The segment or chunk is its sequence's last.
pub(crate) const LAST: u32 = 2;

/// Segments, then sequences, then chunks.
pub(crate) struct Table {
    pub(crate) entries: Vec<i32>,
    pub(crate) items: usize,
    pub(crate) chunks: usize,
    /// Tokens, and the rows that there are more of.
    pub(crate) rows: usize,
}

/// Cuts every sequence into segments of about `segment` tokens, in whole chunks. A sequence without tokens has one empty
/// segment, which hands its state on.
pub(crate) fn build(sequences: &CuSeqlens, segment: usize) -> Table {
    build_rows(sequences, segment, false)
}

/// The same, but every sequence that has tokens has one row more: see [`super::shift`].
pub(super) fn build_shifted(sequences: &CuSeqlens, segment: usize) -> Table {
    build_rows(sequences, segment, true)
}

fn build_rows(sequences: &CuSeqlens, segment: usize, shifted: bool) -> Table {
    let segment = segment.next_multiple_of(CHUNK);
    let (mut items, mut per_sequence, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
    let mut more = 0;
    for (i, window) in sequences.offsets().windows(2).enumerate() {
        let tokens = window[1] - window[0];
        let longer = usize::from(shifted && tokens > 0);
        let last = window[1] + longer;
        let count = (last - window[0]).div_ceil(segment).max(1);
        per_sequence.extend([(items.len() / ITEM_WORDS) as i32, count as i32]);
        for n in 0..count {
            let start = window[0] + n * segment;
            let end = last.min(start + segment);
            let flags = if n == 0 { FIRST } else { 0 } | if n + 1 == count { LAST } else { 0 };
            let chunk = chunks.len() / CHUNK_WORDS;
            items.extend([start as i32, (end - start) as i32, i as i32, flags as i32, chunk as i32, more as i32]);
            for at in (start..end).step_by(CHUNK) {
                let first = if at == window[0] { FIRST } else { 0 };
                let flags = first | if at + CHUNK >= last { LAST } else { 0 };
                chunks.extend([at as i32, CHUNK.min(end - at) as i32, more as i32, flags as i32]);
            }
        }
        more += longer;
    }
    let (count, chunk_count) = (items.len() / ITEM_WORDS, chunks.len() / CHUNK_WORDS);
    items.extend(per_sequence);
    items.extend(chunks);
    let rows = sequences.offsets().last().copied().unwrap_or(0) + more;
    Table { entries: items, items: count, chunks: chunk_count, rows }
}

/// Tokens a segment: whole sequences where they fill the processors, otherwise as many segments as bring the last round
/// of cubes nearest to full. `cubes` is how many a segment has.
pub(crate) fn segment_tokens(longest: usize, sequences: usize, cubes: usize, processors: usize) -> usize {
    /// How much of the processors whole sequences must keep busy.
    const ENOUGH: f64 = 0.8;
    /// The shortest segment, eight chunks: computing its state first must pay. With twice as many, 8 sequences of 2,048 tokens
    /// and 4 heads of one slice were 64 cubes for 132 processors, with a chunk's time that of one cube.
    const SHORTEST: usize = 512;
    let busy = |count: usize| {
        let all = sequences * cubes * count;
        all as f64 / (processors * all.div_ceil(processors)) as f64
    };
    let most = longest / SHORTEST;
    if busy(1) >= ENOUGH || most < 2 {
        return longest.max(1);
    }
    // Few rounds first: each one more segment costs a state.
    let best = (1..=most.min(32)).find(|n| busy(*n) >= 0.9 || sequences * cubes * n >= 2 * processors).unwrap_or(most);
    longest.div_ceil(best).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_and_chunks_cover_each_sequence() {
        let packed = CuSeqlens::new(vec![0, 5, 5, 1605]).unwrap();
        let table = build(&packed, 1024);
        assert_eq!((table.items, table.chunks), (4, 26));
        let item = |i: usize| &table.entries[i * ITEM_WORDS..(i + 1) * ITEM_WORDS];
        assert_eq!(item(0), [0, 5, 0, 3, 0, 0]);
        assert_eq!(item(1), [5, 0, 1, 3, 1, 0]);
        assert_eq!(item(2), [5, 1024, 2, 1, 1, 0]);
        assert_eq!(item(3), [1029, 576, 2, 2, 17, 0]);
        let chunk = |i: usize| {
            let at = 4 * ITEM_WORDS + 3 * SEQUENCE_WORDS + i * CHUNK_WORDS;
            &table.entries[at..at + CHUNK_WORDS]
        };
        assert_eq!(chunk(0), [0, 5, 0, 3]);
        assert_eq!(chunk(1), [5, 64, 0, 1]);
        assert_eq!(chunk(25), [1541, 64, 0, 2]);
    }

    #[test]
    fn a_shifted_sequence_has_one_row_more() {
        let table = build_shifted(&CuSeqlens::new(vec![0, 64, 64, 65]).unwrap(), 1024);
        assert_eq!((table.items, table.chunks, table.rows), (3, 3, 67));
        assert_eq!(table.entries[..ITEM_WORDS], [0, 65, 0, 3, 0, 0]);
        assert_eq!(table.entries[2 * ITEM_WORDS..3 * ITEM_WORDS], [64, 2, 2, 3, 2, 1]);
        assert_eq!(table.entries[3 * (ITEM_WORDS + SEQUENCE_WORDS)..], [0, 64, 0, 1, 64, 1, 0, 2, 64, 2, 1, 3]);
    }

    #[test]
    fn few_heads_are_cut() {
        assert_eq!(segment_tokens(2048, 8, 32, 132), 2048);
        assert_eq!(segment_tokens(16384, 1, 32, 132), 4096);
        assert_eq!(segment_tokens(2048, 8, 8, 132), 1024);
        assert_eq!(segment_tokens(2048, 8, 4, 132), 512);
        assert_eq!(segment_tokens(100, 1, 1, 132), 100);
    }
}
