//! Import and export.

use std::collections::BTreeMap;

use burn::tensor::{DType, TensorData};
use burn_fla_nn::hub::{
    self, TensorStore, load_model, read_safetensors, save_model, save_model_sharded, write_safetensors,
};
use burn_fla_nn::{Compute, NnError};
use burn_fla_tests::{numbers, reference_device};

use crate::common::{GOLDEN, configs, golden, ids, model, parameter_values};

fn shapes(store: &TensorStore) -> BTreeMap<String, Vec<usize>> {
    let shape = |name: &str| store.get(name).expect("a tensor").shape.to_vec();
    store.names().map(|name| (name.to_string(), shape(name))).collect()
}

fn files(folder: &std::path::Path) -> Vec<String> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    files.sort();
    files
}

#[test]
fn what_is_saved_is_loaded_to_the_last_bit() {
    let device = reference_device();
    for (name, config) in configs() {
        let folder = tempfile::tempdir().expect("a folder");
        let model = model(&config, &device);
        save_model(&model, folder.path(), DType::F32).expect(name);
        assert_eq!(files(folder.path()), ["config.json", "model.safetensors"]);
        let again = load_model(folder.path(), &device).expect(name);
        let logits =
            |m: &burn_fla_nn::CausalLm| numbers(m.forward(ids(2, 9, &device), None, Compute::f32()).expect(name));
        assert_eq!(logits(&model), logits(&again), "{name}");
        assert_eq!(again.config().fields(), config.fields());
        // From a training device, in half the bytes.
        for dtype in [DType::BF16, DType::F16] {
            let trained = crate::common::model(&config, &device.clone().autodiff());
            save_model(&trained, folder.path(), dtype).expect(name);
            let half = load_model(folder.path(), &device).expect(name);
            // Every weight is the nearest one of the type, no more and no less.
            let rounded = |data: TensorData| data.convert_dtype(dtype).convert_dtype(DType::F32);
            let expected = parameter_values(&model).into_iter().map(|(name, data)| (name, rounded(data)));
            for ((name, found), expected) in parameter_values(&half).into_iter().zip(expected) {
                assert_eq!((&name, found), (&expected.0, expected.1));
            }
            save_model(&half, folder.path(), dtype).expect(name);
            assert_eq!(logits(&half), logits(&load_model(folder.path(), &device).expect(name)));
        }
    }
}

#[test]
fn exports_have_the_keys_and_shapes_of_the_format() {
    for case in GOLDEN {
        let folder = tempfile::tempdir().expect("a folder");
        let model = load_model(golden(case), &reference_device()).expect(case);
        save_model(&model, folder.path(), DType::F32).expect(case);
        let expected = read_safetensors(golden(case)).expect(case);
        let found = read_safetensors(folder.path()).expect(case);
        assert_eq!(shapes(&found), shapes(&expected));
        for name in expected.names() {
            let bytes = |store: &TensorStore| store.get(name).expect("a tensor").bytes.to_vec();
            assert_eq!(bytes(&found), bytes(&expected), "{name}");
        }
        let fields = |path: std::path::PathBuf| hub::load_config(path).expect(case).fields().clone();
        assert_eq!(fields(folder.path().into()), fields(golden(case)));
    }
}

#[test]
fn large_models_are_split_and_stale_files_leave() {
    let device = reference_device();
    let (name, config) = configs().swap_remove(5);
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(&config, &device);
    save_model(&model, folder.path(), DType::F32).expect(name);
    save_model_sharded(&model, folder.path(), DType::F32, 40_000).expect(name);
    let split = files(folder.path());
    assert!(split.contains(&"model.safetensors.index.json".to_string()), "{split:?}");
    assert!(split.iter().any(|f| f.starts_with("model-00002-of-")), "{split:?}");
    assert!(!split.contains(&"model.safetensors".to_string()), "{split:?}");
    let logits = |m: &burn_fla_nn::CausalLm| numbers(m.forward(ids(1, 9, &device), None, Compute::f32()).expect(name));
    assert_eq!(logits(&load_model(folder.path(), &device).expect(name)), logits(&model));
    std::fs::remove_file(folder.path().join(&split[1])).expect("removed");
    let missing = load_model(folder.path(), &device).expect_err("a file is missing").to_string();
    assert!(missing.contains(&split[1]), "{missing}");
    save_model(&model, folder.path(), DType::F32).expect(name);
    assert_eq!(files(folder.path()), ["config.json", "model.safetensors"]);
    // An index may not point elsewhere.
    let index = r#"{"weight_map": {"lm_head.weight": "../model.safetensors"}}"#;
    std::fs::remove_file(folder.path().join("model.safetensors")).expect("removed");
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).expect("written");
    assert!(load_model(folder.path(), &device).expect_err("outside").to_string().contains("beside"));
}

#[test]
fn an_import_names_every_tensor_that_does_not_fit() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = read_safetensors(golden("gla")).expect("a store");
    let mut tensors: Vec<(String, TensorData)> = store
        .names()
        .filter(|name| !name.contains("layers.0.mlp."))
        .map(|name| (name.to_string(), store.data(name).expect("data")))
        .collect();
    for (name, data) in &mut tensors {
        if name == "model.norm.weight" {
            *data = TensorData::zeros::<f32, _>([63]);
        } else if name == "lm_head.weight" {
            *data = TensorData::zeros::<i32, _>([96, 64]);
        }
    }
    tensors.push(("extra.weight".into(), TensorData::zeros::<f32, _>([2])));
    write_safetensors(folder.path().join("model.safetensors"), &tensors, &[]).expect("written");
    std::fs::copy(golden("gla").join("config.json"), folder.path().join("config.json")).expect("a copy");
    let error = load_model(folder.path(), &reference_device()).expect_err("it does not fit");
    let NnError::Tensors { problems, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(problems.len(), 6, "{error}");
    for part in [
        "missing tensor `model.layers.0.mlp.gate_proj.weight` [96, 64]",
        "missing tensor `model.layers.0.mlp.up_proj.weight`",
        "missing tensor `model.layers.0.mlp.down_proj.weight`",
        "`model.norm.weight` has the shape [63], expected [64]",
        "`lm_head.weight` is of type I32",
        "unexpected tensor `extra.weight`",
    ] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    std::fs::copy(golden("gla").join("config.json"), folder.path().join("config.json")).expect("a copy");
    let whole = std::fs::read(golden("gla").join("model.safetensors")).expect("a file");
    let load = || load_model(folder.path(), &reference_device());
    let missing = load().expect_err("no weights").to_string();
    assert!(missing.contains("model.safetensors"), "{missing}");
    for length in [0, 5, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).expect("written");
        let error = load().expect_err("truncated").to_string();
        assert!(error.contains("not a whole safetensors file"), "{error}");
    }
    let mut wrong = whole.clone();
    wrong[20] = b'\x01';
    std::fs::write(&path, &wrong).expect("written");
    assert!(load().is_err());
    std::fs::write(folder.path().join("config.json"), "{\"model_type\": ").expect("written");
    let error = load().expect_err("no JSON").to_string();
    assert!(error.contains("config.json"), "{error}");
    std::fs::remove_file(folder.path().join("config.json")).expect("removed");
    assert!(matches!(load().expect_err("no config"), NnError::Io { .. }));
}

#[test]
fn a_failed_write_leaves_nothing_and_harms_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.safetensors");
    let tensor = |name: &str| (name.to_string(), TensorData::zeros::<f32, _>([3]));
    write_safetensors(&path, &[tensor("a")], &[("k", "v")]).expect("written");
    assert!(write_safetensors(&path, &[tensor("a"), tensor("a")], &[]).is_err());
    let flags = ("b".to_string(), TensorData::from([true]));
    assert!(write_safetensors(&path, &[flags], &[]).is_err());
    let specs = [hub::TensorSpec::new("a", DType::F32, vec![4]).expect("a spec")];
    let wrong = hub::write_safetensors_with(&path, &specs, &[], |_| Ok(TensorData::zeros::<f32, _>([3])));
    assert!(wrong.expect_err("another shape").to_string().contains("announced"));
    assert_eq!(files(folder.path()), ["x.safetensors"]);
    assert_eq!(shapes(&read_safetensors(&path).expect("the old file")).keys().collect::<Vec<_>>(), ["a"]);
    let nowhere = folder.path().join("x.safetensors/model");
    let (_, config) = configs().swap_remove(0);
    let error = save_model(&model(&config, &reference_device()), &nowhere, DType::F32).expect_err("not a folder");
    assert!(error.to_string().contains("x.safetensors"), "{error}");
    assert!(save_model(&model(&config, &reference_device()), folder.path().join("new"), DType::I32).is_err());
    assert!(!folder.path().join("new").exists());
}

#[test]
fn every_type_survives_a_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("types.safetensors");
    let tensors = vec![
        ("f64".to_string(), TensorData::from([0.1f64, -2.0])),
        ("i64".to_string(), TensorData::from([1i64 << 40, -3])),
        ("u8".to_string(), TensorData::from([1u8, 255, 7])),
        ("u32".to_string(), TensorData::from([u32::MAX])),
        ("f32".to_string(), TensorData::from([[0.25f32], [1e-30]])),
    ];
    write_safetensors(&path, &tensors, &[("step", "12")]).expect("written");
    let store = read_safetensors(&path).expect("read");
    for (name, data) in &tensors {
        assert_eq!(&store.data(name).expect("data"), data, "{name}");
    }
    assert!(store.data("none").is_err());
}
