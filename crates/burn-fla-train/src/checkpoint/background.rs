//! Checkpoints written while the run goes on.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use super::CheckpointStore;
use crate::TrainError;

/// Writes one checkpoint at a time on a thread of its own. What is to be written is already in the host's memory: the
/// device is never asked by two threads.
#[derive(Debug)]
pub struct Background {
    store: CheckpointStore,
    running: Option<Receiver<Result<PathBuf, TrainError>>>,
}

impl Background {
    /// A writer into `store`.
    pub fn new(store: CheckpointStore) -> Background {
        Background { store, running: None }
    }

    /// Begins to write the checkpoint of `step`, as [`CheckpointStore::save`] does. One that is still being written is
    /// waited for first.
    ///
    /// # Errors
    /// That of the one before.
    pub fn save(
        &mut self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<(), TrainError> + Send + 'static,
    ) -> Result<(), TrainError> {
        self.wait()?;
        let (done, running) = channel();
        let store = self.store.clone();
        let task = move || {
            let outcome = store.save(step, write);
            // The receiver is gone only when the run is ending in an error of its own.
            let _ = done.send(outcome);
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_string()).spawn(task);
        thread.map_err(TrainError::io("start the thread that writes", self.store.folder()))?;
        self.running = Some(running);
        Ok(())
    }

    /// The outcome of a save that has ended since the last call.
    ///
    /// # Errors
    /// That of the save.
    pub fn poll(&mut self) -> Result<(), TrainError> {
        let Some(running) = &self.running else { return Ok(()) };
        match running.try_recv() {
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => self.wait(),
            Ok(outcome) => {
                self.running = None;
                outcome.map(drop)
            }
        }
    }

    /// Waits for the save that is under way.
    ///
    /// # Errors
    /// That of the save.
    pub fn wait(&mut self) -> Result<(), TrainError> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let ended = || TrainError::Execution("the thread that writes checkpoints has ended".to_string());
        running.recv().map_err(|_| ended())?.map(drop)
    }
}

impl Drop for Background {
    /// A save that is under way ends: the process may live on, and read what it wrote.
    fn drop(&mut self) {
        // An error here is beside the one that ends the run; the checkpoints before are whole.
        let _ = self.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::checkpoint::write_synced;

    #[test]
    fn a_save_runs_beside_and_the_next_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(folder.path(), 0);
        store.prepare().unwrap();
        let mut background = Background::new(store.clone());
        let (go, wait) = channel::<()>();
        background
            .save(1, move |path| {
                wait.recv().unwrap();
                write_synced(&path.join("weights"), b"one")
            })
            .unwrap();
        // It has begun and has not ended: this thread goes on meanwhile.
        background.poll().unwrap();
        assert_eq!(store.list().unwrap(), []);
        go.send(()).unwrap();
        background.save(2, |path| write_synced(&path.join("weights"), b"two")).unwrap();
        assert_eq!(store.list().unwrap()[0].0, 1, "the second began after the first had ended");
        background.wait().unwrap();
        let steps: Vec<u64> = store.list().unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [1, 2]);
    }

    #[test]
    fn a_failure_is_told_once_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(folder.path(), 0);
        store.prepare().unwrap();
        let mut background = Background::new(store.clone());
        background.save(1, |_| Err(TrainError::Execution("no room".to_string()))).unwrap();
        let mut outcome = background.poll();
        while outcome.is_ok() {
            std::thread::yield_now();
            outcome = background.poll();
        }
        assert!(outcome.unwrap_err().to_string().contains("no room"));
        background.wait().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
