//! A token store that is read while it is being written: training begins with its first shard.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Encoder;
use super::cache::TokenStore;
use super::unbuilt::{Found, Unbuilt};
use crate::TrainError;

/// The tokens that there are by now. A thread of its own tokenises the rest, in the order of the files; a reader that needs
/// more than there is waits for it. What is read does not depend on how far the thread is.
#[derive(Debug)]
pub(super) struct GrowingStore {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    cancelled: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    store: Option<Arc<TokenStore>>,
    failed: Option<TrainError>,
    /// The thread does nothing any more.
    over: bool,
    notes: Vec<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked holding the lock has left nothing half-done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

impl GrowingStore {
    /// A store that is whole.
    pub(super) fn whole(store: TokenStore) -> GrowingStore {
        let state = State { store: Some(Arc::new(store)), over: true, ..State::default() };
        GrowingStore { shared: Arc::new(Shared { state: Mutex::new(state), ..Shared::default() }), thread: None }
    }

    /// Opens a cache that is there; begins to build one that is not.
    pub(super) fn start(found: Found, encoder: Arc<dyn Encoder + Send>) -> Result<GrowingStore, TrainError> {
        match found {
            Found::Cache(store) => Ok(GrowingStore::whole(store)),
            Found::Files(files) => GrowingStore::build(files, encoder),
        }
    }

    fn build(files: Unbuilt, encoder: Arc<dyn Encoder + Send>) -> Result<GrowingStore, TrainError> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let work = move || {
            let shared = theirs;
            let mut show = |store: TokenStore| shared.change(|state| state.store = Some(Arc::new(store)));
            let mut tell = |note: String| shared.change(|state| state.notes.push(note));
            let built = files.build(encoder.as_ref(), &shared.cancelled, &mut show, &mut tell);
            shared.change(|state| {
                match built {
                    Ok(store) => state.store = Some(Arc::new(store)),
                    Err(error) => state.failed = Some(error),
                }
                state.over = true;
            });
        };
        let thread = std::thread::Builder::new().name("tokenise".to_string()).spawn(work);
        let thread = thread
            .map_err(|error| TrainError::Execution(format!("the thread that tokenises does not start: {error}")))?;
        Ok(GrowingStore { shared, thread: Some(thread) })
    }

    /// What there is by now; `None` before the first shard.
    pub(super) fn now(&self) -> Option<Arc<TokenStore>> {
        self.shared.lock().store.clone()
    }

    /// Waits, for at most `patience`, until there are `tokens` tokens or all of them; says whether that is so.
    ///
    /// # Errors
    /// That of the thread that tokenises, once.
    pub(super) fn wait(&self, tokens: u64, patience: Duration) -> Result<bool, TrainError> {
        let enough = |state: &mut State| {
            let there = |store: &Arc<TokenStore>| store.is_whole() || store.len() >= tokens;
            state.store.as_ref().is_some_and(there)
        };
        let waits = |state: &mut State| !enough(state) && !state.over && state.failed.is_none();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), patience, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if enough(&mut state) {
            return Ok(true);
        }
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        match state.over || self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            true => Err(TrainError::Execution("the thread that tokenises has ended".to_string())),
            false => Ok(false),
        }
    }

    /// What the thread has to say since the last call.
    pub(super) fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().notes)
    }
}

impl Drop for GrowingStore {
    /// A run that ends before its data are tokenised stops that too.
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed.
            let _ = thread.join();
        }
    }
}
