//! Anything at all as input: an error or a value, never a panic. `PROPTEST_CASES` sets how many cases are tried; what has
//! failed once is kept in `proptest-regressions` and tried first.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use burn_fla_nn::hub::TensorStore;
use burn_fla_nn::models::registry::ARCHITECTURES;
use burn_fla_nn::{CausalLm, ModelConfig};
use burn_fla_train::Recipe;
use burn_fla_train::data::{Encoder, Part, TokenStore};
use burn_fla_train::recipe::{SourceFormat, SourceSection};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A change of a text or of bytes.
#[derive(Clone, Debug)]
enum Edit {
    Replace(usize, u8),
    Remove(usize, usize),
    Insert(usize, Vec<u8>),
    Copy(usize, usize, usize),
    Cut(usize),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let place = any::<usize>();
    // What parsers stumble over, beside single bytes.
    let words = prop::sample::select(vec![
        "[",
        "]",
        "{",
        "}",
        "\"",
        "'",
        "=",
        ",",
        ".",
        "\n",
        "#",
        "-1",
        "0",
        "1e309",
        "nan",
        "99999999999999999999",
        "null",
        "true",
        "[[",
        "\\u",
        "é",
        "\u{0}",
        "18446744073709551615",
        "4294967296",
        "9223372036854775807",
        "1e-320",
    ]);
    let insert = prop_oneof![words.prop_map(|word| word.as_bytes().to_vec()), prop::collection::vec(any::<u8>(), 1..9)];
    let edit = prop_oneof![
        (place, any::<u8>()).prop_map(|(at, byte)| Edit::Replace(at, byte)),
        (place, 1..20usize).prop_map(|(at, count)| Edit::Remove(at, count)),
        (place, insert).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (place, place, 1..40usize).prop_map(|(from, to, count)| Edit::Copy(from, to, count)),
        place.prop_map(Edit::Cut),
    ];
    prop::collection::vec(edit, 1..6)
}

fn apply(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        let n = bytes.len();
        let place = |at: usize| at % (n + 1);
        match edit {
            Edit::Replace(at, byte) if n > 0 => bytes[at % n] = *byte,
            Edit::Replace(..) => {}
            Edit::Remove(at, count) => drop(bytes.drain(place(*at)..(place(*at) + count).min(n))),
            Edit::Insert(at, more) => drop(bytes.splice(place(*at)..place(*at), more.iter().copied())),
            Edit::Copy(from, to, count) => {
                let part = bytes[place(*from)..(place(*from) + count).min(n)].to_vec();
                bytes.splice(place(*to)..place(*to), part);
            }
            Edit::Cut(at) => bytes.truncate(place(*at)),
        }
    }
    bytes
}

/// One byte a token, with a separator.
struct Bytes;

impl Encoder for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, burn_fla_train::TrainError> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn vocab_size(&self) -> usize {
        256
    }
    fn separator(&self) -> Option<u32> {
        Some(0)
    }
    fn fingerprint(&self) -> String {
        "bytes".to_string()
    }
}

fn source(path: &Path, format: SourceFormat) -> SourceSection {
    SourceSection {
        root: None,
        paths: vec![path.display().to_string()],
        format,
        column: "text".to_string(),
        max_bytes: None,
        weight: None,
    }
}

/// Opens a source with this content; what it holds is as large as the file allows.
fn read(format: SourceFormat, bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    std::fs::write(&path, bytes).unwrap();
    let source = [source(&path, format)];
    if let Ok(store) = TokenStore::open(&folder.path().join("cache"), "data", &source, Part::All, &Bytes, &mut |_| ()) {
        // A compressed file may hold more than its size, but these are not compressed that far.
        assert!(store.len() <= 64 * bytes.len() as u64 + 64, "{} tokens of {} bytes", store.len(), bytes.len());
        assert!(store.documents() <= store.len());
    }
}

/// As many cases as `PROPTEST_CASES` says, or a few hundred.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    ProptestConfig { cases, ..ProptestConfig::default() }
}

/// A Parquet file of twenty texts in two groups.
fn parquet_file() -> Vec<u8> {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    let write = || {
        let schema = parse_message_type("message schema { optional binary text (UTF8); }").unwrap();
        let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Default::default()).unwrap();
        for group in 0..2 {
            let mut rows = writer.next_row_group().unwrap();
            let mut texts = rows.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> =
                (0..10).map(|at| ByteArray::from(format!("text {group} {at}").as_str())).collect();
            texts.typed::<ByteArrayType>().write_batch(&values, Some(&[1; 10]), None).unwrap();
            texts.close().unwrap();
            rows.close().unwrap();
        }
        writer.into_inner().unwrap()
    };
    FILE.get_or_init(write).clone()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn recipes(edits in edits()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        let text = std::fs::read(root().join("recipes/reference.toml")).unwrap();
        // The keys behind `#` are to be tried too.
        let text = String::from_utf8(text).unwrap().replace("\n# ", "\n");
        for text in [text.into_bytes(), std::fs::read(root().join("recipes/mqar/base.toml")).unwrap()] {
            std::fs::write(&path, apply(text, &edits)).unwrap();
            if let Ok(recipe) = Recipe::load(&path, &[]) {
                std::fs::write(&path, recipe.to_toml()).unwrap();
                let again = Recipe::load(&path, &[]).unwrap();
                prop_assert_eq!(again.to_toml(), recipe.to_toml());
            }
        }
    }

    #[test]
    fn overrides(text in "[a-z_.=\\[\\]{}\"' 0-9-]{0,40}", key in prop::sample::select(vec!["training.steps", "data.sources", "optimizer.groups", "model.overrides"])) {
        let path = root().join("recipes/quickstart.toml");
        let _ = Recipe::load(&path, std::slice::from_ref(&text));
        let _ = Recipe::load(&path, &[format!("{key}={text}")]);
    }

    #[test]
    fn configs(edits in edits(), which in 0..ARCHITECTURES.len()) {
        let text = ARCHITECTURES[which].tiny_config().unwrap().to_json();
        if let Ok(text) = String::from_utf8(apply(text.into_bytes(), &edits))
            && let Ok(config) = ModelConfig::from_json(&text)
            && config.num_layers() < 50
        {
            // Shapes only: a config may name more weights than memory has room for.
            let _ = CausalLm::outline(&config, &burn_fla_tests::reference_device());
        }
    }

    #[test]
    fn weights(edits in edits()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let bytes = std::fs::read(root().join("tests/fixtures/golden/gla/case.safetensors")).unwrap();
        // Most of a file is numbers; the header is what can be wrong.
        let mut bytes = bytes[..bytes.len().min(20_000)].to_vec();
        bytes = apply(bytes, &edits);
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(store) = TensorStore::open(&path) {
            for name in store.names().map(str::to_string).collect::<Vec<_>>() {
                let _ = (store.floats(&name), store.integers(&name), store.data(&name));
            }
        }
    }

    #[test]
    fn json_lines(edits in edits()) {
        read(SourceFormat::Jsonl, &apply(b"{\"text\": \"a\\u00e9\"}\n\n{\"text\": \"b\", \"n\": [1, {\"m\": 2}]}\r\n".to_vec(), &edits));
    }

    #[test]
    fn token_shards(edits in edits(), width in prop::sample::select(vec![2usize, 4])) {
        let mut bytes = vec![0u8; 1024];
        let (magic, version) = if width == 2 { (20_240_520i32, 1i32) } else { (20_240_801, 7) };
        for (at, word) in [magic, version, 40].iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes.extend((0..40 * width).map(|at| if at % width == 0 { at as u8 } else { 0 }));
        read(SourceFormat::Bin, &apply(bytes, &edits));
    }

    #[test]
    fn parquet_files(edits in edits()) {
        read(SourceFormat::Parquet, &apply(parquet_file(), &edits));
    }

    #[test]
    fn token_caches(edits in edits(), which in 0..3usize) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, "some text to be tokenised").unwrap();
        let (source, cache) = ([source(&path, SourceFormat::Text)], folder.path().join("cache"));
        let open = || TokenStore::open(&cache, "data", &source, Part::All, &Bytes, &mut |_| ());
        let good = open().unwrap().fingerprint();
        let place = std::fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
        let file = place.join(["manifest.json", "documents.bin", "shard_00000.bin"][which]);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, apply(bytes, &edits)).unwrap();
        // Damaged or not, what is opened is what the file holds.
        prop_assert_eq!(open().unwrap().fingerprint(), good);
    }
}

#[test]
fn the_files_that_are_changed_are_good_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    std::fs::write(&path, parquet_file()).unwrap();
    let source = [source(&path, SourceFormat::Parquet)];
    let store =
        TokenStore::open(&folder.path().join("cache"), "data", &source, Part::All, &Bytes, &mut |_| ()).unwrap();
    assert_eq!(store.documents(), 20);
}
