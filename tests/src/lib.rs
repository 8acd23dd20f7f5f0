//! What the suites share: devices, random inputs, and how two results are compared.

use burn::tensor::{DType, Device, Tensor, TensorData};
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
use burn_fla_nn::device::{Backend, open_device};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub mod agree;
pub mod operators;

// The facade brings the definitions that a CUDA build links.
use burn_fla as _;

/// The devices on which kernels run in this build, by name. A build for CUDA tests CUDA: its machine may lack Vulkan.
#[allow(clippy::vec_init_then_push)]
pub fn kernel_devices() -> Vec<(&'static str, Device)> {
    #[allow(unused_mut)]
    let mut devices = Vec::new();
    #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
    devices.push(("wgpu", open_device(Backend::Wgpu, 0).unwrap_or_else(|error| panic!("{error}"))));
    #[cfg(feature = "cuda")]
    devices.push(("cuda", Device::cuda(0)));
    devices
}

/// Where references are computed.
pub fn reference_device() -> Device {
    Device::flex()
}

/// `count` numbers drawn evenly from `range`.
pub fn uniform(seed: u64, count: usize, range: (f64, f64)) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (low, high) = range;
    (0..count).map(|_| low + (high - low) * rng.random::<f64>()).collect()
}

/// A tensor of these numbers.
pub fn tensor<const D: usize>(values: &[f64], shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

/// The numbers of a tensor.
pub fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.into_data().convert::<f64>().try_to_vec::<f64>().expect("a float tensor")
}

/// These numbers as a dtype holds them, for both sides of a comparison.
pub fn rounded(values: &[f64], dtype: DType) -> Vec<f64> {
    numbers(tensor::<1>(values, [values.len()], &reference_device(), dtype))
}

/// RMS of the difference over RMS of the reference. NaN anywhere gives infinity.
pub fn ratio(found: &[f64], reference: &[f64]) -> f64 {
    assert_eq!(found.len(), reference.len(), "as many numbers");
    let difference: f64 = found.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = reference.iter().map(|b| b.powi(2)).sum();
    let ratio = if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() };
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}

/// Panics where two results differ by more than `bound`, naming them.
pub fn assert_close(what: &str, found: &[f64], reference: &[f64], bound: f64) {
    let ratio = ratio(found, reference);
    assert!(ratio <= bound, "{what}: relative RMS error {ratio:.2e} is over {bound:.0e}");
}
