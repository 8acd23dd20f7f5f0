//! The folder in which a cache is built before it is one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::TrainError;
use crate::checkpoint::sync_folder;

/// An empty folder beside the caches that one process works in at a time. It is removed when the work ends without
/// [`publish`](BuildFolder::publish); what a process that was killed has left is removed by the next.
pub(super) struct BuildFolder {
    path: PathBuf,
    /// Locked while the work goes on. The lock ends with the process, however that ends.
    _lock: Option<File>,
    published: bool,
}

/// What an asked-for end of the work looks like; nobody is told of it.
pub(super) fn check(cancelled: &AtomicBool) -> Result<(), TrainError> {
    match cancelled.load(Ordering::Relaxed) {
        true => Err(TrainError::Execution("tokenising was stopped".to_string())),
        false => Ok(()),
    }
}

impl BuildFolder {
    /// The folder for the cache `key` in `parent`, for this process alone: another that works there is waited for. `None`
    /// if the cache has become `usable` meanwhile.
    pub(super) fn claim(
        parent: &Path,
        key: &str,
        usable: impl Fn() -> bool,
        cancelled: &AtomicBool,
        tell: &mut dyn FnMut(String),
    ) -> Result<Option<BuildFolder>, TrainError> {
        if !cfg!(unix) {
            // Where folders cannot be locked, two processes may both build; the first to end decides.
            let path = parent.join(format!(".building-{key}-{}", std::process::id()));
            fs::create_dir_all(&path).map_err(TrainError::io("create the folder", &path))?;
            return Ok((!usable()).then_some(BuildFolder { path, _lock: None, published: false }));
        }
        let path = parent.join(format!(".building-{key}"));
        let mut told = false;
        loop {
            check(cancelled)?;
            if usable() {
                return Ok(None);
            }
            fs::create_dir_all(&path).map_err(TrainError::io("create the folder", &path))?;
            // Whoever built here may be done, and the folder gone, between any two of these lines.
            let Ok(handle) = File::open(&path) else { continue };
            match handle.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    if !told {
                        tell(format!("another process tokenises these data in {}: waiting for it", path.display()));
                        told = true;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
                Err(fs::TryLockError::Error(error)) => return Err(TrainError::io("lock", &path)(error)),
            }
            if is_at(&handle, &path) {
                empty(&path)?;
                return Ok(Some(BuildFolder { path, _lock: Some(handle), published: false }));
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder the cache `place`.
    pub(super) fn publish(mut self, place: &Path) -> Result<(), TrainError> {
        if place.exists() {
            fs::remove_dir_all(place).map_err(TrainError::io("remove", place))?;
        }
        fs::rename(&self.path, place).map_err(TrainError::io("create", place))?;
        self.published = true;
        sync_folder(place.parent().unwrap_or(Path::new(".")))
    }
}

impl Drop for BuildFolder {
    fn drop(&mut self) {
        if !self.published {
            // What cannot be removed now is removed by the next who works here.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Whether the open folder is the one that lies at `path`.
#[cfg(unix)]
fn is_at(handle: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |meta: fs::Metadata| (meta.dev(), meta.ino());
    handle.metadata().map(of).ok().zip(fs::metadata(path).map(of).ok()).is_some_and(|(a, b)| a == b)
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// Removes what lies in a folder.
fn empty(folder: &Path) -> Result<(), TrainError> {
    for entry in fs::read_dir(folder).map_err(TrainError::io("list", folder))? {
        let path = entry.map_err(TrainError::io("list", folder))?.path();
        fs::remove_file(&path).map_err(TrainError::io("remove", &path))?;
    }
    Ok(())
}
