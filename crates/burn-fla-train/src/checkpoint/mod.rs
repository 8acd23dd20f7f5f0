//! Checkpoints that are whole or not there: temporary folder, checksums, fsync, rename, verified at load.
//!
//! A checkpoint is a folder `step_00000123` in Hugging Face's layout (config.json, model.safetensors, tokenizer.json if
//! the run has one) with three files more: `optimizer.safetensors`, `state.json` and `recipe.toml`. `DONE`, written
//! last, lists the size and CRC-32 of every other file.

mod background;
mod state;

pub use background::Background;
pub(crate) use state::{OPTIMIZER_FILE, optimizer_bytes};
pub use state::{TrainState, load_optimizer, save_optimizer};

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::TrainError;

const MARKER: &str = "DONE";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    step: u64,
    files: Vec<ManifestFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ManifestFile {
    name: String,
    size: u64,
    crc32: u32,
}

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    folder: PathBuf,
    keep: usize,
}

impl CheckpointStore {
    /// Checkpoints in `folder`, of which the last `keep` stay (0: all).
    pub fn new(folder: &Path, keep: usize) -> Self {
        CheckpointStore { folder: folder.to_path_buf(), keep }
    }

    /// Where they lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Creates the folder, proves that it can be written, and removes what an interrupted save has left.
    ///
    /// # Errors
    /// A folder that cannot be created or written.
    pub fn prepare(&self) -> Result<(), TrainError> {
        let folder = &self.folder;
        fs::create_dir_all(folder).map_err(TrainError::io("create the folder", folder))?;
        tempfile::tempfile_in(folder).map_err(TrainError::io("write in", folder))?;
        for entry in fs::read_dir(folder).map_err(TrainError::io("list", folder))? {
            let entry = entry.map_err(TrainError::io("list", folder))?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(".saving-") {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(TrainError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// The checkpoints, oldest first.
    ///
    /// # Errors
    /// A folder that cannot be listed; a missing one has none.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(TrainError::io("list", &self.folder)(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(TrainError::io("list", &self.folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(step) = name.strip_prefix("step_").and_then(|digits| digits.parse().ok()) {
                found.push((step, entry.path()));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Writes a checkpoint: `write` fills a temporary folder, which is checked, synced and renamed.
    ///
    /// # Errors
    /// Those of `write`, and any file operation that fails; the checkpoints already there are untouched.
    pub fn save(&self, step: u64, write: impl FnOnce(&Path) -> Result<(), TrainError>) -> Result<PathBuf, TrainError> {
        let temporary = tempfile::Builder::new()
            .prefix(".saving-")
            .tempdir_in(&self.folder)
            .map_err(TrainError::io("create a folder in", &self.folder))?;
        let inside = temporary.path();
        write(inside)?;
        let files = sync_files(inside)?;
        let manifest = Manifest { version: 1, step, files };
        let text = serde_json::to_string_pretty(&manifest).expect("a manifest is plain JSON");
        write_synced(&inside.join(MARKER), text.as_bytes())?;
        sync_folder(inside)?;
        readable_by_all(inside)?;

        let place = self.folder.join(format!("step_{step:08}"));
        let replaced = inside.with_extension("replaced");
        if place.exists() {
            fs::rename(&place, &replaced).map_err(TrainError::io("move", &place))?;
        }
        fs::rename(inside, &place).map_err(TrainError::io("create", &place))?;
        sync_folder(&self.folder)?;
        if replaced.exists() {
            fs::remove_dir_all(&replaced).map_err(TrainError::io("remove", &replaced))?;
        }
        self.prune()?;
        Ok(place)
    }

    fn prune(&self) -> Result<(), TrainError> {
        let all = self.list()?;
        if self.keep == 0 || all.len() <= self.keep {
            return Ok(());
        }
        for (_, path) in &all[..all.len() - self.keep] {
            // The marker goes first: a folder half removed is then no checkpoint any more.
            let marker = path.join(MARKER);
            if marker.exists() {
                fs::remove_file(&marker).map_err(TrainError::io("remove", &marker))?;
            }
            fs::remove_dir_all(path).map_err(TrainError::io("remove", path))?;
        }
        Ok(())
    }

    /// The newest checkpoint that is whole. Damaged ones are passed over, each with a line to `tell`; if all are
    /// damaged that is an error, for training from scratch in silence would lose the run.
    ///
    /// # Errors
    /// A folder that cannot be listed, or checkpoints of which none is whole.
    pub fn latest(&self, tell: &mut dyn FnMut(String)) -> Result<Option<PathBuf>, TrainError> {
        let all = self.list()?;
        let mut last = None;
        for (_, path) in all.iter().rev() {
            match verify(path) {
                Ok(()) => return Ok(Some(path.clone())),
                Err(error) => {
                    tell(format!("{error}"));
                    last = Some(error);
                }
            }
        }
        match last {
            None => Ok(None),
            Some(TrainError::CheckpointDamaged { path, message, .. }) => Err(TrainError::CheckpointDamaged {
                path,
                message,
                remedy:
                    "no other checkpoint is whole: remove them to start again, or set checkpoint.resume to a good copy"
                        .to_string(),
            }),
            Some(other) => Err(other),
        }
    }
}

/// Checks every file of a checkpoint against its manifest.
///
/// # Errors
/// A folder that is not there, or the first file that differs.
pub fn verify(path: &Path) -> Result<(), TrainError> {
    if !path.is_dir() {
        return Err(TrainError::CheckpointMissing {
            path: path.to_path_buf(),
            message: "there is no such folder; give the path of a step_… folder".to_string(),
        });
    }
    let damaged = |message: String| TrainError::CheckpointDamaged {
        path: path.to_path_buf(),
        message,
        remedy: "falling back to the one before it".to_string(),
    };
    let text = fs::read_to_string(path.join(MARKER))
        .map_err(|error| damaged(format!("its manifest {MARKER} cannot be read ({error})")))?;
    let manifest: Manifest = serde_json::from_str(&text)
        .map_err(|error| damaged(format!("its manifest {MARKER} is not valid ({error})")))?;
    for file in &manifest.files {
        let (size, crc32) = checksum(&path.join(&file.name))
            .map_err(|error| damaged(format!("{} cannot be read ({error})", file.name)))?;
        if size != file.size {
            return Err(damaged(format!("{} has {size} bytes, not {}", file.name, file.size)));
        }
        if crc32 != file.crc32 {
            return Err(damaged(format!("{} has another checksum than when it was written", file.name)));
        }
    }
    Ok(())
}

/// Syncs every file of a folder and lists them.
fn sync_files(folder: &Path) -> Result<Vec<ManifestFile>, TrainError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(TrainError::io("list", folder))? {
        let entry = entry.map_err(TrainError::io("list", folder))?;
        let path = entry.path();
        let file = File::open(&path).map_err(TrainError::io("open", &path))?;
        file.sync_all().map_err(TrainError::io("sync", &path))?;
        let (size, crc32) = checksum(&path).map_err(TrainError::io("read", &path))?;
        files.push(ManifestFile { name: entry.file_name().to_string_lossy().into_owned(), size, crc32 });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn checksum(path: &Path) -> std::io::Result<(u64, u32)> {
    let mut file = File::open(path)?;
    let mut hash = crc32fast::Hasher::new();
    let (mut buffer, mut size) = (vec![0; 1 << 20], 0);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((size, hash.finalize()));
        }
        hash.update(&buffer[..n]);
        size += n as u64;
    }
}

/// Writes a file whole and synced; the caller renames its folder.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(TrainError::io("write", path))
}

/// Replaces a file in one step: readers see the old or the new text.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(TrainError::io("write in", folder))?;
    let write = (|| -> std::io::Result<()> {
        file.write_all(bytes)?;
        file.as_file().sync_all()
    })();
    write.map_err(TrainError::io("write", path))?;
    readable_by_all(file.path())?;
    file.persist(path).map_err(|error| TrainError::io("write", path)(error.error))?;
    sync_folder(folder)
}

/// Makes renames inside a folder survive a power cut; systems that cannot open folders have no such call.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        File::open(folder).and_then(|handle| handle.sync_all()).map_err(TrainError::io("sync the folder", folder))?;
    }
    Ok(())
}

/// Temporary files and folders are private to the user; what they become has the mode of any new one.
pub(crate) fn readable_by_all(path: &Path) -> Result<(), TrainError> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = if path.is_dir() { 0o755 } else { 0o644 };
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(path, mode).map_err(TrainError::io("set the mode of", path))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(keep: usize) -> (tempfile::TempDir, CheckpointStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(&folder.path().join("checkpoints"), keep);
        store.prepare().unwrap();
        (folder, store)
    }

    fn save(store: &CheckpointStore, step: u64) -> PathBuf {
        store.save(step, |path| write_synced(&path.join("weights"), format!("step {step}").as_bytes())).unwrap()
    }

    #[test]
    fn keeps_the_last_and_finds_the_newest() {
        let (_guard, store) = store(2);
        for step in [5, 10, 15] {
            save(&store, step);
        }
        let steps: Vec<u64> = store.list().unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [10, 15]);
        let latest = store.latest(&mut |line| panic!("{line}")).unwrap().unwrap();
        assert!(latest.ends_with("step_00000015"));
        assert_eq!(fs::read_to_string(latest.join("weights")).unwrap(), "step 15");
    }

    #[test]
    fn damage_falls_back_and_says_so() {
        let (_guard, store) = store(0);
        for step in [1, 2, 3, 4] {
            save(&store, step);
        }
        let at = |step: u64| store.folder().join(format!("step_{step:08}"));
        fs::write(at(4).join("weights"), "step").unwrap();
        fs::write(at(3).join("weights"), "Step 3").unwrap();
        fs::remove_file(at(2).join(MARKER)).unwrap();
        let mut lines = Vec::new();
        let latest = store.latest(&mut |line| lines.push(line)).unwrap().unwrap();
        assert_eq!(latest, at(1));
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains("weights has 4 bytes, not 6"), "{}", lines[0]);
        assert!(lines[1].contains("checksum"), "{}", lines[1]);
        assert!(lines[2].contains(MARKER), "{}", lines[2]);
        fs::remove_file(at(1).join("weights")).unwrap();
        let error = store.latest(&mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("no other checkpoint is whole"), "{error}");
    }

    #[test]
    fn a_failed_save_leaves_nothing() {
        let (_guard, store) = store(1);
        save(&store, 1);
        let failed = store.save(2, |path| {
            write_synced(&path.join("weights"), b"half")?;
            Err(TrainError::Execution("no".to_string()))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(store.folder()).unwrap().count(), 1);
    }

    #[test]
    fn the_same_step_is_replaced_and_leftovers_go() {
        let (_guard, store) = store(0);
        save(&store, 7);
        store.save(7, |path| write_synced(&path.join("weights"), b"new")).unwrap();
        let path = store.latest(&mut |line| panic!("{line}")).unwrap().unwrap();
        assert_eq!(fs::read(path.join("weights")).unwrap(), b"new");
        fs::create_dir(store.folder().join(".saving-abc")).unwrap();
        store.prepare().unwrap();
        assert_eq!(fs::read_dir(store.folder()).unwrap().count(), 1);
    }
}
