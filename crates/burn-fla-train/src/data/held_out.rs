//! Held-out rows that may not be there yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::rows::RowSource;
use super::{Encoder, Opening};
use crate::TrainError;

/// What a run is judged by.
#[derive(Debug)]
pub(crate) enum HeldOutRows {
    /// It is there, or there is none.
    There(Option<Arc<dyn RowSource>>),
    /// It is being gathered beside the run.
    Later(Gathering),
}

/// The thread that gathers them.
#[derive(Debug)]
pub(crate) struct Gathering {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Option<Arc<dyn RowSource>>, TrainError>>>,
}

impl HeldOutRows {
    /// Begins to gather them. What there is to tell of it is not told: it is of the same files as the training data.
    pub(super) fn later(open: Opening, encoder: Arc<impl Encoder + Send + 'static>) -> Result<HeldOutRows, TrainError> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let theirs = cancelled.clone();
        let work = move || open.held_out(encoder.as_ref(), &theirs, &mut |_| ());
        let thread = std::thread::Builder::new().name("held-out".to_string()).spawn(work);
        let thread = thread
            .map_err(|error| TrainError::Execution(format!("the thread for held-out data does not start: {error}")))?;
        Ok(HeldOutRows::Later(Gathering { cancelled, thread: Some(thread) }))
    }

    /// Waits for them.
    ///
    /// # Errors
    /// What keeps them from being read.
    pub(crate) fn wait(self) -> Result<Option<Arc<dyn RowSource>>, TrainError> {
        match self {
            HeldOutRows::There(rows) => Ok(rows),
            HeldOutRows::Later(mut gathering) => match gathering.thread.take().map(JoinHandle::join) {
                Some(Ok(rows)) => rows,
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                None => Ok(None),
            },
        }
    }
}

impl Drop for Gathering {
    /// A run that ends before they are there needs them no more.
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed.
            let _ = thread.join();
        }
    }
}
