//! Rows that are drawn while the rest is tokenised.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::growing::GrowingStore;
use super::tests::text;
use super::*;
use crate::recipe::SourceSection;

const SHARD: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

/// A byte a token. It stops at the gate after so many pieces, until that is opened.
struct Gated {
    pieces: AtomicUsize,
    before: usize,
    gate: (Mutex<bool>, Condvar),
}

impl Gated {
    fn new(before: usize) -> Arc<Gated> {
        Arc::new(Gated { pieces: AtomicUsize::new(0), before, gate: (Mutex::new(false), Condvar::new()) })
    }

    fn open(&self) {
        *self.gate.0.lock().unwrap() = true;
        self.gate.1.notify_all();
    }
}

impl Encoder for Gated {
    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        if self.pieces.fetch_add(1, Ordering::Relaxed) >= self.before {
            let open = self.gate.0.lock().unwrap();
            let _open = self.gate.1.wait_while(open, |open| !*open).unwrap();
        }
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

/// Files of 20 MB, of which the first 8 are tokenised at once.
fn write(folder: &Path) -> SourceSection {
    for file in 0..20u64 {
        let bytes: Vec<u8> = (0..1_000_000u64).map(|at| b'a' + ((at * at + file) % 23) as u8).collect();
        fs::write(folder.join(format!("{file:02}.txt")), bytes).unwrap();
    }
    text(Some(folder.display().to_string()), &["*.txt"])
}

fn find(folder: &Path, cache: &str, source: &SourceSection, encoder: &dyn Encoder) -> unbuilt::Found {
    let sources = std::slice::from_ref(source);
    TokenStore::find(&folder.join(cache), "s", sources, Part::All, SHARD, encoder, &mut |_| ()).unwrap()
}

fn whole(folder: &Path, source: &SourceSection) -> TokenStore {
    let encoder = Gated::new(usize::MAX);
    match find(folder, "whole", source, encoder.as_ref()) {
        unbuilt::Found::Cache(store) => store,
        unbuilt::Found::Files(files) => {
            files.build(encoder.as_ref(), &AtomicBool::new(false), &mut |_| (), &mut |_| ()).unwrap()
        }
    }
}

fn wait(rows: &dyn RowSource, draws: u64) {
    let begun = Instant::now();
    while !rows.wait(draws, SECOND).unwrap() {
        assert!(begun.elapsed() < 60 * SECOND, "{draws} draws do not come");
    }
}

#[test]
fn rows_are_the_same_before_and_after_the_rest_is_tokenised() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(folder.path());
    for packing in [Packing::default(), Packing { varlen: true, context_len: Some(300_000) }] {
        let _ = fs::remove_dir_all(folder.path().join("grows"));
        let encoder = Gated::new(10);
        let store =
            GrowingStore::start(find(folder.path(), "grows", &source, encoder.as_ref()), encoder.clone()).unwrap();
        let seq_len = 50_000;
        let grows = Arc::new(Windows::growing(store, seq_len, packing));
        let all = Arc::new(Windows::new(whole(folder.path(), &source), seq_len, packing));
        assert_eq!(all.len(), 20 * 1_000_001 / 50_000);
        let mut drawn = Vec::new();
        let read = |rows: &Arc<Windows>, from: u64, to: u64| {
            let mut loader = Loader::shuffled(rows.clone(), 5, from);
            (from..to).map(|_| loader.next_rows(1)).collect::<Vec<Rows>>()
        };
        // Seven shards of a million and a bit are full and followed by another; the encoder stands at the gate.
        wait(grows.as_ref(), 100);
        assert!(grows.tokens() < all.tokens() && grows.describe().contains("so far"), "{}", grows.describe());
        assert!(!grows.wait(300, Duration::from_millis(50)).unwrap(), "these rows are not there yet");
        drawn.extend(read(&grows, 0, 100));
        let early = (grows.fingerprint_of(0), grows.fingerprint_of(100));
        encoder.open();
        wait(grows.as_ref(), 900);
        assert_eq!(grows.tokens(), all.tokens());
        drawn.extend(read(&grows, 100, 900));
        assert!(drawn == read(&all, 0, 900), "another order");
        assert_eq!(early, (all.fingerprint_of(0), all.fingerprint_of(100)));
        assert_ne!(all.fingerprint_of(0), all.fingerprint_of(100));
        assert_eq!(all.fingerprint_of(400), all.fingerprint_of(900), "all shards were drawn from");
        // Each epoch has every row once: the first in the order of the shards, the others in none.
        let mut order: Vec<u64> = (0..400).map(|at| all.draw(5, at)).collect();
        let shard = |row: &u64| (row + 1) * seq_len as u64 / SHARD;
        assert!(order.is_sorted_by_key(shard) && !order.is_sorted());
        let second: Vec<u64> = (400..800).map(|at| all.draw(5, at)).collect();
        assert!(!second.is_sorted_by_key(shard));
        order.sort_unstable();
        assert_eq!(order, (0..400).collect::<Vec<_>>());
    }
}

#[test]
fn what_cannot_be_read_is_told_when_it_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = write(folder.path());
    // The last file goes away after the files were listed.
    let encoder = Gated::new(10);
    let found = find(folder.path(), "grows", &source, encoder.as_ref());
    fs::remove_file(folder.path().join("19.txt")).unwrap();
    let rows = Windows::growing(GrowingStore::start(found, encoder.clone()).unwrap(), 1000, Packing::default());
    wait(&rows, 1000);
    encoder.open();
    let begun = Instant::now();
    let error = loop {
        match rows.wait(20_000, SECOND) {
            Ok(there) => assert!(!there && begun.elapsed() < 60 * SECOND),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("19.txt"), "{error}");
    assert!(rows.wait(1000, SECOND).unwrap(), "what is there stays there");
    drop(rows);
    assert_eq!(fs::read_dir(folder.path().join("grows")).unwrap().count(), 0, "no temporary folder stays");

    // Whoever wants no more of it is not kept waiting, and a second process waits for the first.
    source.paths = vec!["0*.txt".to_string()];
    let encoder = Gated::new(9);
    let first = GrowingStore::start(find(folder.path(), "two", &source, encoder.as_ref()), encoder.clone()).unwrap();
    while encoder.pieces.load(Ordering::Relaxed) < 9 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let other = Gated::new(usize::MAX);
    let second = GrowingStore::start(find(folder.path(), "two", &source, other.as_ref()), other.clone()).unwrap();
    assert!(!second.wait(1, SECOND / 2).unwrap());
    assert!(second.notes().iter().any(|note| note.contains("another process tokenises")));
    encoder.open();
    drop(first);
    while !second.wait(u64::MAX, SECOND).unwrap() {}
    assert_eq!(second.now().unwrap().len(), 10 * 1_000_001);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(folder.path());
    let encoder = Gated::new(10);
    let found = find(folder.path(), "grows", &source, encoder.as_ref());
    let store = GrowingStore::start(found, encoder.clone()).unwrap();
    assert!(store.wait(1, 60 * SECOND).unwrap());
    // Its tokens are in the first shard already.
    fs::write(folder.path().join("00.txt"), "shorter").unwrap();
    encoder.open();
    assert!(store.wait(u64::MAX, 60 * SECOND).unwrap());
    assert_eq!(store.now().unwrap().len(), 20 * 1_000_001);
    let again = find(folder.path(), "grows", &source, encoder.as_ref());
    assert!(matches!(again, unbuilt::Found::Files(_)), "the cache is of another file");
}
