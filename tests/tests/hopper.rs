//! What runs on the tensor cores of NVIDIA GPUs: of Hopper GPUs, and of any since Ampere. A build without CUDA has none of
//! it.
#![cfg(feature = "cuda")]

/// The tests of a file, functions of the engine, with each of several engines.
macro_rules! suite {
    ($($engine:ident: $module:ident),*; $tests:tt) => {
        $(mod $module {
            use burn_fla_ops::Engine::$engine as ENGINE;
            suite!(@ $tests);
        })*
    };
    (@ {$($test:ident,)*}) => {
        $(#[test]
        fn $test() {
            super::$test(ENGINE);
        })*
    };
}

#[path = "hopper/delta.rs"]
mod delta;
#[path = "hopper/dplr.rs"]
mod dplr;
#[path = "hopper/epilogue.rs"]
mod epilogue;
#[path = "hopper/family.rs"]
mod family;
#[path = "hopper/linear.rs"]
mod linear;
#[path = "hopper/mma.rs"]
mod mma;
#[path = "hopper/recurrence.rs"]
mod recurrence;
#[path = "hopper/steps.rs"]
mod steps;
#[path = "hopper/vocabulary.rs"]
mod vocabulary;

use burn::tensor::Device;
use burn_fla_ops::{Engine, bridge};

/// The device, where it is a Hopper GPU.
fn hopper() -> Option<Device> {
    let device = Device::cuda(0);
    let found = bridge::is_hopper(&device);
    if !found {
        println!("no Hopper GPU here: nothing is tested");
    }
    found.then_some(device)
}

/// The device, where this engine has tensor cores on it: by itself those of Hopper, or those since Ampere.
fn device_for(engine: Engine) -> Option<Device> {
    if engine != Engine::Mma {
        return hopper();
    }
    let device = Device::cuda(0);
    let found = bridge::has_mma(&device);
    if !found {
        println!("no tensor cores here: nothing is tested");
    }
    found.then_some(device)
}
