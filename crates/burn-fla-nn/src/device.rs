//! From the name of a backend to a device that answers.
//!
//! A device of Burn opens itself at the first computation, and a driver that is missing shows itself as a panic then.
//! [`open_device`] asks first, and computes something small, so that what is wrong becomes a message before any work.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType, Device, Tensor};

/// The families of devices that models run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The processor, through Burn's Flex backend (feature `flex`).
    #[default]
    Cpu,
    /// NVIDIA GPUs (feature `cuda`).
    Cuda,
    /// Vulkan, Metal or DirectX 12 through wgpu (feature `wgpu`).
    Wgpu,
}

impl Backend {
    /// Every backend, whether it is in this build or not.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::Wgpu];

    /// The name in recipes and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
        }
    }

    /// The cargo feature that puts it into a build.
    pub const fn feature(self) -> &'static str {
        match self {
            Self::Cpu => "flex",
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
        }
    }

    /// Whether it is in this build.
    pub const fn is_built(self) -> bool {
        match self {
            Self::Cpu => cfg!(feature = "flex"),
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Wgpu => cfg!(feature = "wgpu"),
        }
    }

    /// Where to look when a machine that should have such a device shows none.
    const fn remedy(self) -> &'static str {
        match self {
            Self::Cpu => "this is a bug, please report it",
            Self::Cuda => {
                "`nvidia-smi` must list a GPU, and NVRTC and the headers of the CUDA toolkit must be installed (CUDA_PATH names their folder where it is not /usr/local/cuda)"
            }
            Self::Wgpu => {
                "`vulkaninfo --summary` must list a device (on Debian and Ubuntu the package mesa-vulkan-drivers has one in software)"
            }
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| format!("`{text}` is no backend; there are `cpu`, `cuda` and `wgpu`"))
    }
}

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The backend is not in this build.
    #[error(
        "this build has no {backend}; rebuild with `cargo run --release --features {} -- …`",
        backend.feature()
    )]
    NotBuilt {
        /// The backend.
        backend: Backend,
    },
    /// The machine has no such device.
    #[error("this machine shows no {backend} device: {}; or use the device `cpu`", backend.remedy())]
    NotFound {
        /// The backend.
        backend: Backend,
    },
    /// The machine has such devices, but not one of that index.
    #[error("there is no {backend} device {index}: this machine shows {count}, counted from 0")]
    Index {
        /// The backend.
        backend: Backend,
        /// The index asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is there, but a first small computation on it failed.
    #[error("the {backend} device {index} does not compute ({reason}): {}; or use the device `cpu`", backend.remedy())]
    NoAnswer {
        /// The backend.
        backend: Backend,
        /// Its index.
        index: usize,
        /// What the driver or the runtime said.
        reason: String,
    },
    /// The device does not compute in this type.
    #[error("the {backend} device does not compute in {dtype:?}; use f32")]
    DType {
        /// The backend.
        backend: Backend,
        /// The type.
        dtype: DType,
    },
}

/// Opens a device and checks that it computes.
///
/// `index` counts the devices that the driver lists; the CPU has the index 0 alone.
///
/// # Errors
/// A backend that is not in this build, a machine without such a device or without one of that index, and a device
/// that fails at a first small computation (a driver or a toolkit that is incomplete).
pub fn open_device(backend: Backend, index: usize) -> Result<Device, DeviceError> {
    let devices = list(backend).ok_or(DeviceError::NotBuilt { backend })?;
    let count = devices.len();
    if count == 0 {
        return Err(DeviceError::NotFound { backend });
    }
    let device = devices.into_iter().nth(index).ok_or(DeviceError::Index { backend, index, count })?;
    compute(&device).map_err(|reason| DeviceError::NoAnswer { backend, index, reason })?;
    Ok(device)
}

/// Opens a device that computes in `dtype` too.
///
/// # Errors
/// Those of [`open_device`], and a device that has no such type.
pub fn open_device_for(backend: Backend, index: usize, dtype: DType) -> Result<Device, DeviceError> {
    let device = open_device(backend, index)?;
    if device.supports_dtype(dtype) { Ok(device) } else { Err(DeviceError::DType { backend, dtype }) }
}

/// The devices of a backend, in the driver's order; `None` where the build does not have it.
fn list(backend: Backend) -> Option<Vec<Device>> {
    match backend {
        #[cfg(feature = "flex")]
        Backend::Cpu => Some(vec![Device::flex()]),
        #[cfg(feature = "cuda")]
        Backend::Cuda => Some(enumerate(burn::tensor::DeviceType::Cuda)),
        #[cfg(feature = "wgpu")]
        Backend::Wgpu => Some(enumerate(burn::tensor::DeviceType::Wgpu)),
        #[allow(unreachable_patterns)]
        _ => None,
    }
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn enumerate(kind: burn::tensor::DeviceType) -> Vec<Device> {
    // A driver that is half there may panic even when asked what there is: then there is nothing to use.
    probe(move || Device::enumerate(kind).to_vec()).unwrap_or_default()
}

/// A first kernel, compiled, run and read back.
fn compute(device: &Device) -> Result<(), String> {
    let device = device.clone();
    let data = probe(move || (Tensor::<1>::ones([4], &device) * 2.0).try_into_data().map_err(|e| e.to_string()))
        .and_then(|result| result)
        .map_err(|reason| one_line(&reason))?;
    let numbers: Vec<f32> = data.iter::<f32>().collect();
    if numbers == [2.0; 4] { Ok(()) } else { Err(format!("twice one came out as {numbers:?}")) }
}

/// How many threads are in [`open_device`].
static PROBING: AtomicUsize = AtomicUsize::new(0);

/// Whether a device is being opened. A panic at that time is how a runtime says that it cannot, and becomes the message
/// of a [`DeviceError`]; a program's own panic hook may keep silent about it.
pub fn is_probing() -> bool {
    PROBING.load(Ordering::Relaxed) > 0
}

/// Runs `f`; a panic in it becomes its message.
fn probe<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    PROBING.fetch_add(1, Ordering::Relaxed);
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(f));
    PROBING.fetch_sub(1, Ordering::Relaxed);
    outcome.map_err(|panic| match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text.clone(),
        (None, Some(text)) => (*text).to_string(),
        (None, None) => "the runtime gave no reason".to_string(),
    })
}

/// The beginning of a message of many lines.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(240).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_backends_are_one_to_one() {
        for backend in Backend::ALL {
            assert_eq!(backend.name().parse(), Ok(backend));
        }
        assert!("gpu".parse::<Backend>().unwrap_err().contains("`cuda`"));
    }

    #[test]
    fn a_backend_outside_the_build_says_how_to_get_it() {
        for backend in Backend::ALL.into_iter().filter(|b| !b.is_built()) {
            let message = open_device(backend, 0).unwrap_err().to_string();
            assert!(message.contains(&format!("--features {}", backend.feature())), "{message}");
        }
    }

    #[test]
    #[cfg(feature = "flex")]
    fn the_cpu_answers_at_index_zero_alone() {
        assert!(open_device(Backend::Cpu, 0).is_ok());
        let message = open_device(Backend::Cpu, 1).unwrap_err().to_string();
        assert!(message.contains("device 1") && message.contains("shows 1"), "{message}");
    }

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(probe(|| -> () { panic!("no {}", "driver") }), Err("no driver".to_string()));
        assert_eq!(one_line("\n  CUDA not found.\n  Please\n"), "CUDA not found. Please");
    }
}
