//! What runs on Hopper GPUs alone. A build without CUDA has none of it.
#![cfg(feature = "cuda")]

#[path = "hopper/delta.rs"]
mod delta;
#[path = "hopper/linear.rs"]
mod linear;
#[path = "hopper/recurrence.rs"]
mod recurrence;
#[path = "hopper/vocabulary.rs"]
mod vocabulary;

use burn::tensor::Device;

/// The device, where it is a Hopper GPU.
fn hopper() -> Option<Device> {
    let device = Device::cuda(0);
    let found = burn_fla_ops::bridge::is_hopper(&device);
    if !found {
        println!("no Hopper GPU here: nothing is tested");
    }
    found.then_some(device)
}
