//! How fast the path of the data is: measurements, to be read by a person.

use std::time::Instant;

use burn_fla_nn::tokenizer::Tokenizer;
use burn_fla_train::data::{Encoder, Loader, Packing, Part, TokenStore, Windows, train_tokenizer};
use burn_fla_train::recipe::DataSection;
use burn_fla_train::{Recipe, TrainError};

struct Bpe(Tokenizer);

impl Encoder for Bpe {
    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(self.0.encode(text)?)
    }
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
    fn separator(&self) -> Option<u32> {
        Some(0)
    }
    fn fingerprint(&self) -> String {
        "bpe".to_string()
    }
}

/// Megabytes of memory that the process holds and that no file backs.
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("RssAnon")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1e3
}

/// `cargo test --release -p burn-fla-tests --test train -- --ignored --nocapture throughput`
#[test]
#[ignore = "a measurement of time, to be read by a person: it asserts nothing"]
fn throughput_of_the_data_path() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/quickstart.toml");
    let recipe = Recipe::load(root.as_ref(), &[]).unwrap();
    let DataSection::Text(section) = &recipe.data else { panic!("text") };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let start = Instant::now();
    let report = train_tokenizer(&recipe.data, 32_000, u64::MAX, &path).unwrap();
    let megabytes = report.bytes as f64 / 1e6;
    println!("a BPE of {} tokens from {megabytes:.1} MB: {:.1} s", report.tokens, start.elapsed().as_secs_f64());

    let encoder = Bpe(Tokenizer::from_file(&path).unwrap());
    let cache = folder.path().join("cache");
    let open = || TokenStore::open(&cache, "data", &section.sources, Part::All, &encoder, &mut |_| ()).unwrap();
    let start = Instant::now();
    let store = open();
    let seconds = start.elapsed().as_secs_f64();
    println!("tokenised {megabytes:.1} MB into {} tokens: {:.2} MB/s", store.len(), megabytes / seconds);

    for (name, packing) in
        [("windows", Packing::default()), ("packed documents", Packing { varlen: true, context_len: None })]
    {
        let mut loader = Loader::shuffled(std::sync::Arc::new(Windows::new(open(), 2048, packing)), 1, 0);
        loader.next_rows(100);
        let (before, start, mut tokens) = (resident(), Instant::now(), 0);
        while tokens < 50_000_000 {
            tokens += loader.next_rows(16).ids.len();
        }
        let (seconds, after) = (start.elapsed().as_secs_f64(), resident());
        println!(
            "{name}: {:.0} M tokens/s over {} M tokens, memory {before:.1} MB before and {after:.1} MB after",
            tokens as f64 / seconds / 1e6,
            tokens / 1_000_000
        );
    }
}
