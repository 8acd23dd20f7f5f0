//! Formats of sources, and documents that are not as they should be.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ::parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::tests::{all, open, text};
use super::*;
use crate::recipe::{SourceFormat, SourceSection};

fn source(path: &Path, format: SourceFormat) -> SourceSection {
    SourceSection { format, ..text(None, &[path.to_str().unwrap()]) }
}

/// A file with the columns `id` and `text`, the texts in groups of rows; `None` is a row without a text.
fn write_parquet(path: &Path, groups: &[&[Option<&str>]]) {
    let schema = parse_message_type("message schema { required int32 id; optional binary text (UTF8); }").unwrap();
    let properties = WriterProperties::builder().set_compression(::parquet::basic::Compression::SNAPPY).build();
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).unwrap();
    for group in groups {
        let mut rows = writer.next_row_group().unwrap();
        let mut ids = rows.next_column().unwrap().unwrap();
        let numbers: Vec<i32> = (0..group.len() as i32).collect();
        ids.typed::<Int32Type>().write_batch(&numbers, None, None).unwrap();
        ids.close().unwrap();
        let mut texts = rows.next_column().unwrap().unwrap();
        let levels: Vec<i16> = group.iter().map(|text| i16::from(text.is_some())).collect();
        let values: Vec<ByteArray> = group.iter().flatten().map(|text| ByteArray::from(*text)).collect();
        texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        texts.close().unwrap();
        rows.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_rows_are_documents() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let many: Vec<String> = (0..1000).map(|i| format!("<{i}>")).collect();
    let many: Vec<Option<&str>> = many.iter().map(|text| Some(text.as_str())).collect();
    write_parquet(&path, &[&[Some("one"), None, Some("two")], &many]);
    let mut notes = Vec::new();
    let store = open(folder.path(), &source(&path, SourceFormat::Parquet), &mut notes).unwrap();
    let expected: String = (0..1000).map(|i| format!("<{i}>|")).collect();
    assert_eq!(all(&store), format!("one|two|{expected}"));
    assert_eq!(store.documents(), 1002);

    let mut fails = |source: &SourceSection, parts: &[&str]| {
        let error = open(folder.path(), source, &mut notes).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}");
    };
    let column = |name: &str| SourceSection { column: name.to_string(), ..source(&path, SourceFormat::Parquet) };
    fails(&column("body"), &["a.parquet", "there is no column \"body\"", "id, text"]);
    fails(&column("id"), &["the column \"id\" is INT32, not text"]);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    fails(&column("text"), &["a.parquet", "cannot be read as Parquet"]);
    fs::write(&path, "").unwrap();
    fails(&column("text"), &["a.parquet", "cannot be read as Parquet"]);
}

/// A compressed file that is cut short or damaged is an error that names it: half of a corpus is not a corpus.
#[test]
fn compressed_files_that_are_cut_or_damaged() {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    // Numbers that repeat nothing, so that the compressed file is long.
    let line = |at: u64| format!("{{\"text\": \"{:x}\"}}\n", super::permutation::mix(at));
    let text: String = (0..20_000).map(line).collect();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(text.as_bytes()).unwrap();
    // As `zstd` writes it: with a checksum, without which a bit that has flipped may stay unseen.
    let mut zst = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    zst.include_checksum(true).unwrap();
    zst.write_all(text.as_bytes()).unwrap();
    let mut notes = Vec::new();
    for (name, good) in [("a.jsonl.gz", gz.finish().unwrap()), ("a.jsonl.zst", zst.finish().unwrap())] {
        let path = folder.path().join(name);
        fs::write(&path, &good).unwrap();
        let whole = open(folder.path(), &source(&path, SourceFormat::Jsonl), &mut notes).unwrap();
        assert_eq!(whole.documents(), 20_000, "{name}");
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 0x55;
        for (damage, bytes) in [("cut", good[..good.len() * 2 / 3].to_vec()), ("flipped", flipped)] {
            fs::write(&path, bytes).unwrap();
            let error = open(folder.path(), &source(&path, SourceFormat::Jsonl), &mut notes).expect_err(damage);
            assert!(error.to_string().contains(name), "{name} {damage}: {error}");
        }
        // Nothing in it is no document, and no error of the format.
        fs::write(&path, "").unwrap();
        match open(folder.path(), &source(&path, SourceFormat::Jsonl), &mut notes) {
            Ok(store) => assert_eq!(store.documents(), 0, "{name}"),
            Err(error) => assert!(error.to_string().contains(name), "{error}"),
        }
    }
}

fn token_shard(words: [i32; 3], ids: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    for (at, word) in words.iter().enumerate() {
        bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
    }
    bytes.extend(ids);
    bytes
}

#[test]
fn token_shards_are_taken_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let (short, long) = (folder.path().join("1.bin"), folder.path().join("2.bin"));
    let ids = b"token ids";
    let wide = |bytes: &[u8], width: usize| -> Vec<u8> {
        bytes.iter().flat_map(|byte| u32::from(*byte).to_le_bytes()[..width].to_vec()).collect()
    };
    fs::write(&short, token_shard([20_240_520, 1, 9], &wide(ids, 2))).unwrap();
    fs::write(&long, token_shard([20_240_801, 7, 9], &wide(ids, 4))).unwrap();
    let both =
        SourceSection { format: SourceFormat::Bin, ..text(Some(folder.path().display().to_string()), &["*.bin"]) };
    let mut notes = Vec::new();
    let store = open(folder.path(), &both, &mut notes).unwrap();
    assert_eq!(all(&store), "token idstoken ids", "no separator is added");
    assert_eq!((store.documents(), store.document_starts(0, 18)), (2, vec![9]));
    let bounded = SourceSection { max_bytes: Some(36), ..both };
    assert_eq!(all(&open(folder.path(), &bounded, &mut notes).unwrap()), "token ids");

    let mut fails = |bytes: Vec<u8>, parts: &[&str]| {
        fs::write(&short, bytes).unwrap();
        let error = open(folder.path(), &source(&short, SourceFormat::Bin), &mut notes).unwrap_err().to_string();
        assert!(error.contains("1.bin") && parts.iter().all(|part| error.contains(part)), "{error}");
    };
    fails(Vec::new(), &["0 bytes are no token shard"]);
    fails(token_shard([1, 2, 3], b""), &["begins with 1, 2"]);
    fails(token_shard([20_240_520, 1, 9], &wide(ids, 2)[1..]), &["says 9 ids, 1042 bytes", "has 1041"]);
    fails(token_shard([20_240_520, 1, -5], b""), &["-5 ids"]);
    fails(token_shard([20_240_520, 1, 2], &[1, 0, 0, 1]), &["id 1 is 256", "vocabulary of model.tokenizer has 256"]);
}

#[test]
fn what_is_not_as_it_should_be_is_read_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("1.txt"), b"a\xffb").unwrap();
    fs::write(at("2.txt"), b"").unwrap();
    fs::write(at("3.txt"), b"one\r\ntwo\r\n").unwrap();
    let mut notes = Vec::new();
    let texts = text(Some(folder.path().display().to_string()), &["*.txt"]);
    let mut tokens = Vec::new();
    let store = open(folder.path(), &texts, &mut notes).unwrap();
    store.read(0, store.len() as usize, &mut tokens);
    let bytes: Vec<u8> = tokens.iter().map(|token| *token as u8).collect();
    assert_eq!(bytes, ["a\u{fffd}b".as_bytes(), b"\0one\r\ntwo\r\n\0"].concat(), "line ends stay as they are");
    assert!(notes.iter().any(|note| note.contains("1 documents were not UTF-8")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("1 documents are empty")), "{notes:?}");

    notes.clear();
    fs::write(at("a.jsonl"), b"{\"text\": \"x\xfe\"}\r\n\r\n{\"text\": \"\"}\r\n{\"text\": \"y\"}").unwrap();
    let store = open(folder.path(), &source(&at("a.jsonl"), SourceFormat::Jsonl), &mut notes).unwrap();
    assert_eq!((store.documents(), store.len()), (2, 4 + 1 + 2));
    assert!(notes.iter().any(|note| note.contains("1 documents were not UTF-8")), "{notes:?}");
    fs::write(at("a.jsonl"), "[1]\n").unwrap();
    let error = open(folder.path(), &source(&at("a.jsonl"), SourceFormat::Jsonl), &mut notes).unwrap_err();
    assert!(error.to_string().contains("a.jsonl:1: this line is not a JSON object"), "{error}");
}

#[test]
fn a_document_of_one_long_line_is_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.txt");
    // 200 MB; the bytes are a function of the place, so that a piece in the wrong place would show.
    let line: Vec<u8> =
        (0..200_000_000u64).map(|at| if at % 7 == 0 { b' ' } else { b'a' + (at * at % 23) as u8 }).collect();
    fs::write(&path, &line).unwrap();
    let mut notes = Vec::new();
    let store = open(folder.path(), &source(&path, SourceFormat::Text), &mut notes).unwrap();
    assert_eq!((store.documents(), store.len(), store.bytes()), (1, 200_000_001, 200_000_000));
    for start in (0..200_000_000).step_by(13_333_333) {
        let mut tokens = Vec::new();
        store.read(start, 1000.min(200_000_000 - start as usize), &mut tokens);
        let expected = line[start as usize..].iter().take(tokens.len()).map(|byte| i32::from(*byte));
        assert!(tokens.iter().copied().eq(expected), "at {start}");
    }
}

#[test]
fn labels_never_cross_a_document_and_sequences_begin_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let lengths = [3usize, 40, 1, 9, 9, 9, 25];
    for (index, length) in lengths.iter().enumerate() {
        fs::write(
            folder.path().join(format!("{index}.txt")),
            char::from(b'a' + index as u8).to_string().repeat(*length),
        )
        .unwrap();
    }
    let texts = text(Some(folder.path().display().to_string()), &["*.txt"]);
    let mut notes = Vec::new();
    let mut windows = |packing| Windows::new(open(folder.path(), &texts, &mut notes).unwrap(), 10, packing);
    let store = windows(Packing::default());
    let varlen = windows(Packing { varlen: true, context_len: None });
    let cut = windows(Packing { varlen: true, context_len: Some(4) });
    // Where documents begin, from their lengths alone; each has a separator.
    let begins: Vec<usize> = lengths
        .iter()
        .scan(0, |at, length| {
            let here = *at;
            *at += length + 1;
            Some(here)
        })
        .collect();
    let begin_of = |at: usize| *begins.iter().rev().find(|begin| **begin <= at).unwrap();
    let mut left_out = 0;
    for index in 0..varlen.len() {
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        let (mut plain_ids, mut plain_labels) = (Vec::new(), Vec::new());
        varlen.read(index, &mut ids, &mut labels);
        store.read(index, &mut plain_ids, &mut plain_labels);
        assert_eq!(ids, plain_ids);
        let start = index as usize * 10;
        for at in 0..10 {
            let crosses = begins.contains(&(start + at + 1));
            left_out += usize::from(crosses);
            assert_eq!(labels[at], if crosses { -100 } else { plain_labels[at] }, "row {index}, label {at}");
        }
        let inside: Vec<usize> = (1..10).filter(|at| begins.contains(&(start + at))).collect();
        assert_eq!(varlen.starts(index), Some(inside));
        let every_fourth: Vec<usize> = (1..10).filter(|at| (start + at - begin_of(start + at)) % 4 == 0).collect();
        assert_eq!(cut.starts(index), Some(every_fourth), "row {index}");
        let mut cut_labels = Vec::new();
        cut.read(index, &mut ids, &mut cut_labels);
        assert_eq!(cut_labels, labels, "a cut inside a document keeps its label");
        assert_eq!(store.starts(index), None);
    }
    assert!(left_out >= 5);
    assert!(varlen.describe().contains('%'), "{}", varlen.describe());
    assert_ne!(varlen.fingerprint(), store.fingerprint());
    assert_ne!(varlen.fingerprint(), cut.fingerprint());
    // Parts and joins of rows keep the places.
    let rows = Loader::shuffled(Arc::new(varlen), 1, 0).next_rows(6);
    let starts = rows.starts.clone().unwrap();
    assert!((0..6).all(|row| starts.contains(&(10 * row))), "{starts:?}");
    assert_eq!(Rows::concat(&[rows.part(0, 2), rows.part(2, 3), rows.part(3, 6)]), rows);
}
