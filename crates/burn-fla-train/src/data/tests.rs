use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::recipe::{SourceFormat, SourceSection};

struct Bytes {
    vocab: usize,
}

impl Encoder for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn vocab_size(&self) -> usize {
        self.vocab
    }
    fn separator(&self) -> Option<u32> {
        Some(0)
    }
    fn fingerprint(&self) -> String {
        format!("bytes{}", self.vocab)
    }
}

const BYTES: Bytes = Bytes { vocab: 256 };

pub(super) fn text(root: Option<String>, paths: &[&str]) -> SourceSection {
    SourceSection {
        root,
        paths: paths.iter().map(|path| path.to_string()).collect(),
        format: SourceFormat::Text,
        column: "text".to_string(),
        max_bytes: None,
        weight: None,
    }
}

pub(super) fn open(folder: &Path, source: &SourceSection, notes: &mut Vec<String>) -> Result<TokenStore, TrainError> {
    let cache = folder.join("cache");
    TokenStore::open(&cache, "data.sources", std::slice::from_ref(source), Part::All, &BYTES, &mut |note| {
        notes.push(note);
    })
}

pub(super) fn all(store: &TokenStore) -> String {
    let mut tokens = Vec::new();
    store.read(0, store.len() as usize, &mut tokens);
    tokens.into_iter().map(|token| if token == 0 { '|' } else { token as u8 as char }).collect()
}

#[test]
fn order_and_names_do_not_depend_on_the_root() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (name, content) in [
        ("registry/hash-b/one-1/src/z.rs", "Z"),
        ("registry/hash-b/one-1/src/a/m.rs", "M"),
        ("registry/hash-b/two-1/lib.rs", "T"),
        ("registry/hash-a/two-1/lib.rs", "A"),
        ("registry/hash-a/two-1/empty.rs", ""),
    ] {
        fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        fs::write(at(name), content).unwrap();
    }
    let root = Some(format!("{}/registry/*", folder.path().display()));
    let mut notes = Vec::new();
    let source = text(root.clone(), &["two-1/**/*.rs", "one-1/**/*.rs"]);
    let store = open(folder.path(), &source, &mut notes).unwrap();
    assert_eq!(all(&store), "A|M|Z|", "patterns in order, files sorted, the first root that has a pattern");
    assert_eq!((store.documents(), store.bytes()), (3, 3));
    let bounded = SourceSection { max_bytes: Some(2), ..source.clone() };
    assert_eq!(all(&open(folder.path(), &bounded, &mut notes).unwrap()), "A|M|");
    let missing = text(root, &["two-1/*.rs", "three-1/*.rs"]);
    let error = open(folder.path(), &missing, &mut notes).unwrap_err().to_string();
    assert!(error.contains("data.sources[0]") && error.contains("three-1/*.rs"), "{error}");
    let error = open(folder.path(), &text(Some("/none/*".into()), &["x"]), &mut notes).unwrap_err();
    assert!(error.to_string().contains("/none/*"), "{error}");
}

#[test]
fn a_cache_is_reused_rebuilt_and_carried() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.txt");
    fs::write(&file, "hello").unwrap();
    let source = text(None, &[file.to_str().unwrap()]);
    let mut notes = Vec::new();
    let first = open(folder.path(), &source, &mut notes).unwrap().fingerprint();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert_eq!(open(folder.path(), &source, &mut notes).unwrap().fingerprint(), first);
    assert_eq!(notes.len(), 1, "the second run reuses the cache");

    // Damage of a shard, of its length and of the manifest: rebuilt, and said.
    let cache = fs::read_dir(folder.path().join("cache")).unwrap().next().unwrap().unwrap().path();
    let shard = cache.join("shard_00000.bin");
    let good = fs::read(&shard).unwrap();
    for damage in [b"x".to_vec(), [&good[..], b"x"].concat(), {
        let mut flipped = good.clone();
        flipped[34] ^= 1;
        flipped
    }] {
        notes.clear();
        fs::write(&shard, damage).unwrap();
        assert_eq!(all(&open(folder.path(), &source, &mut notes).unwrap()), "hello|");
        assert!(notes[0].contains("damaged") && notes[0].contains("shard_00000.bin"), "{notes:?}");
    }
    notes.clear();
    fs::write(cache.join("manifest.json"), "{").unwrap();
    open(folder.path(), &source, &mut notes).unwrap();
    assert!(notes[0].contains("manifest.json"), "{notes:?}");

    notes.clear();
    fs::write(&file, "hello, world").unwrap();
    assert_eq!(all(&open(folder.path(), &source, &mut notes).unwrap()), "hello, world|");
    assert!(notes[0].contains("have changed"), "{notes:?}");

    notes.clear();
    fs::remove_file(&file).unwrap();
    assert_eq!(all(&open(folder.path(), &source, &mut notes).unwrap()), "hello, world|");
    assert!(notes[0].contains("using the token cache"), "{notes:?}");
    assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 1, "no temporary folder stays");
}

#[test]
fn json_lines_plain_and_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let lines = "{\"body\": \"ab\", \"n\": 1}\n\n{\"body\": \"c\\n\"}\n";
    fs::write(folder.path().join("1.jsonl"), lines).unwrap();
    let gz = fs::File::create(folder.path().join("2.jsonl.gz")).unwrap();
    let mut gz = flate2::write::GzEncoder::new(gz, flate2::Compression::fast());
    gz.write_all(lines.as_bytes()).unwrap();
    gz.finish().unwrap();
    let zst = zstd::stream::encode_all(lines.as_bytes(), 1).unwrap();
    fs::write(folder.path().join("3.jsonl.zst"), zst).unwrap();
    let source = SourceSection {
        format: SourceFormat::Jsonl,
        column: "body".to_string(),
        ..text(Some(folder.path().display().to_string()), &["*.jsonl*"])
    };
    let mut notes = Vec::new();
    let store = open(folder.path(), &source, &mut notes).unwrap();
    assert_eq!(all(&store), "ab|c\n|".repeat(3));
    for (content, expected) in [
        ("{\"body\": \"a\"}\nnot json\n", "1.jsonl:2: this line is not JSON"),
        ("{\"text\": \"a\"}\n", "1.jsonl:1: there is no field \"body\""),
        ("{\"body\": 3}\n", "the field \"body\" is not a string"),
    ] {
        fs::write(folder.path().join("1.jsonl"), content).unwrap();
        let error = open(folder.path(), &source, &mut notes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn parts_split_the_documents() {
    let folder = tempfile::tempdir().unwrap();
    for index in 0..200 {
        fs::write(folder.path().join(format!("{index:03}.txt")), format!("<{index:03}>")).unwrap();
    }
    let source = [text(Some(folder.path().display().to_string()), &["*.txt"])];
    let part = |part| {
        let cache = folder.path().join("cache");
        TokenStore::open(&cache, "s", &source, part, &BYTES, &mut |_| ()).unwrap()
    };
    let (train, held) = (part(Part::Train(0.2)), part(Part::HeldOut(0.2)));
    assert_eq!(train.documents() + held.documents(), 200);
    assert!((20..60).contains(&held.documents()), "{}", held.documents());
    let train = all(&train);
    assert!(all(&held).split_terminator('|').all(|document| !train.contains(document)));
}

#[test]
fn windows_cover_an_epoch_and_resume_at_a_cursor() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.txt");
    fs::write(&file, (0..100).map(|i| char::from(b'0' + i % 70)).collect::<String>()).unwrap();
    let wide = Bytes { vocab: 1 << 17 };
    let source = [text(None, &[file.to_str().unwrap()])];
    let cache = folder.path().join("cache");
    let open = || TokenStore::open(&cache, "s", &source, Part::All, &wide, &mut |_| ()).unwrap();
    let (mut expected, store) = (Vec::new(), open());
    assert_eq!(store.len(), 101);
    store.read(1, 100, &mut expected);
    expected.sort_unstable();
    let windows = Arc::new(Windows::new(store, 10, Packing::default()));
    assert_eq!(windows.len(), 10);
    let mut loader = Loader::shuffled(windows.clone(), 1, 0);
    let rows = loader.next_rows(10);
    for row in 0..10 {
        let row = rows.part(row, row + 1);
        assert_eq!(row.ids[1..], row.labels[..9], "labels are the next tokens");
        assert_eq!(row.tokens(), 10);
    }
    let mut labels = rows.labels.clone();
    labels.sort_unstable();
    assert_eq!(labels, expected, "an epoch has every token once as a label");
    let second = loader.next_rows(10);
    assert_ne!(rows, second, "the next epoch has another order");
    let mut resumed = Loader::shuffled(windows.clone(), 1, 7);
    assert_eq!(resumed.next_rows(3), rows.part(7, 10));
    assert_eq!(resumed.next_rows(10), second);
    let sample = spread(windows.as_ref(), 3);
    let starts: Vec<i32> = sample.iter().map(|rows| rows.ids[0]).collect();
    assert_eq!(starts, [0, 30, 60].map(|at| i32::from(b'0') + at));
    assert_eq!(spread(windows.as_ref(), 99).len(), 10);
    assert_eq!(Rows::concat(&sample).rows, 3);
}

#[test]
fn variables_expand() {
    assert_eq!(expand("a/b*"), Ok("a/b*".to_string()));
    let home = std::env::var("HOME").unwrap();
    assert_eq!(expand("~/x"), Ok(format!("{home}/x")));
    assert_eq!(expand("$HOME/x~"), Ok(format!("{home}/x~")));
    assert_eq!(expand("a${HOME}b"), Ok(format!("a{home}b")));
    assert!(expand("$CARGO_HOME/registry").unwrap().ends_with("/registry"));
    assert!(expand("$").is_err() && expand("${HOME").is_err());
    assert!(expand("$NO_SUCH_VARIABLE").unwrap_err().contains("NO_SUCH_VARIABLE"));
}
