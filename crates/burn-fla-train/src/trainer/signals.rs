//! SIGINT and SIGTERM: the first asks the loop to finish its step and save, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Handlers that live as long as the loop.
#[derive(Debug)]
pub(super) struct Signals {
    asked: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Signals {
    pub(super) fn install() -> Signals {
        let asked = Arc::new(AtomicBool::new(false));
        let mut handlers = Vec::new();
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag clear and sets it, the second finds it set.
            let exit = signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, asked.clone());
            handlers.extend(exit.ok());
            handlers.extend(signal_hook::flag::register(signal, asked.clone()).ok());
        }
        Signals { asked, handlers }
    }

    /// Whether the run was asked to stop.
    pub(super) fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}
