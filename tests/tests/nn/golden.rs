//! The expected cases, on every device of the build.

use burn::tensor::Device;
use burn_fla_nn::verify::verify_folder;
use burn_fla_nn::{Compute, NnError};
use burn_fla_ops::Engine;
use burn_fla_tests::{kernel_devices, reference_device};

use crate::common::{GOLDEN, GOLDEN_LAYERS, golden};

fn passes(case: &str, device: &Device, compute: Compute) {
    let report = verify_folder(golden(case), device, compute).expect(case);
    println!("{report}\n");
    assert!(report.passed(), "{report}");
}

#[test]
fn golden_cases_on_the_cpu() {
    for case in GOLDEN.iter().chain(&GOLDEN_LAYERS) {
        passes(case, &reference_device(), Compute::f32());
    }
}

/// On GPUs most of a case's time is the compilation of its kernels, so a third of the cases is a test.
macro_rules! thirds {
    ($function:ident: $first:ident, $second:ident, $third:ident) => {
        #[test]
        fn $first() {
            $function(0)
        }

        #[test]
        fn $second() {
            $function(1)
        }

        #[test]
        fn $third() {
            $function(2)
        }
    };
}

thirds!(with_kernels: golden_cases_with_kernels, more_golden_cases_with_kernels, yet_more_golden_cases_with_kernels);
thirds!(in_bf16: golden_cases_in_bf16, more_golden_cases_in_bf16, yet_more_golden_cases_in_bf16);

fn with_kernels(third: usize) {
    for (_, device) in kernel_devices() {
        for case in GOLDEN.iter().chain(&GOLDEN_LAYERS).skip(third).step_by(3) {
            passes(case, &device, Compute::f32());
        }
    }
}

fn in_bf16(third: usize) {
    let devices = kernel_devices().into_iter().map(|(_, device)| device);
    let devices = devices.filter(|device| device.supports_dtype(burn::tensor::DType::BF16));
    for device in std::iter::once(reference_device()).chain(devices) {
        for case in GOLDEN.iter().skip(third).step_by(3) {
            passes(case, &device, Compute::bf16());
        }
    }
}

#[test]
fn a_wrong_layer_does_not_pass() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["model.safetensors", "case.safetensors"] {
        std::fs::copy(golden("layer_rebased").join(file), folder.path().join(file)).expect("a copy");
    }
    let config = std::fs::read_to_string(golden("layer_rebased").join("config.json")).expect("a config");
    let write = |config: &str| std::fs::write(folder.path().join("config.json"), config).expect("a config");
    let verify = || verify_folder(folder.path(), &reference_device(), Compute::f32());
    write(&config.replacen('{', r#"{"eps": 1e-6, "#, 1));
    let report = verify().expect("a report");
    assert!(!report.passed(), "{report}");
    write(&config.replace("ReBasedLinearAttention", "Attention"));
    assert!(verify().expect_err("unknown").to_string().contains("`Attention` is not supported"));
}

#[test]
fn a_wrong_model_does_not_pass() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["model.safetensors", "case.safetensors"] {
        std::fs::copy(golden("gla").join(file), folder.path().join(file)).expect("a copy");
    }
    let config = std::fs::read_to_string(golden("gla").join("config.json")).expect("a config");
    let wrong = config.replace("\"norm_eps\": 1e-06", "\"norm_eps\": 1e-05");
    assert_ne!(config, wrong);
    std::fs::write(folder.path().join("config.json"), wrong).expect("a config");
    let compute = Compute::f32().with_engine(Engine::Reference);
    let report = verify_folder(folder.path(), &reference_device(), compute).expect("a report");
    assert!(!report.passed());
    assert!(report.to_string().contains("TOO LARGE"), "{report}");
    std::fs::remove_file(folder.path().join("case.safetensors")).expect("removed");
    let missing = verify_folder(folder.path(), &reference_device(), compute).expect_err("no case");
    assert!(matches!(missing, NnError::Io { .. }), "{missing}");
    assert!(missing.to_string().contains("case.safetensors"), "{missing}");
}
