//! Constants that live on a device and are made once for each.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Device;

/// A value that a module derives from its configuration and keeps on each device it has run on.
///
/// Not a parameter: it is neither saved nor moved with the module, only rebuilt where it is next needed. Clones share
/// it, so that the replicas of a module on one device make it once.
#[derive(Clone)]
pub(crate) struct PerDevice<T>(Arc<Mutex<Vec<(Device, T)>>>);

impl<T> Default for PerDevice<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> std::fmt::Debug for PerDevice<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PerDevice")
    }
}

impl<T: Clone> PerDevice<T> {
    /// The value on `device` for which `fits` holds; otherwise the one that `make` builds there, outside autodiff.
    pub(crate) fn get(&self, device: &Device, fits: impl Fn(&T) -> bool, make: impl FnOnce(&Device) -> T) -> T {
        let device = device.clone().without_autodiff();
        // A panic while the lock was held leaves the list as it was: every push is the last thing done.
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = entries.iter().find(|(known, value)| *known == device && fits(value)) {
            return value.clone();
        }
        let value = make(&device);
        entries.push((device, value.clone()));
        value
    }
}
