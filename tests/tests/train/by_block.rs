//! Activations that are computed again, block by block: the same gradients to the last bit, in less memory.

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_fla_nn::models::registry::ARCHITECTURES;
use burn_fla_nn::{CausalLm, Compute, ModelConfig};
use burn_fla_ops::CuSeqlens;
use burn_fla_tests::{assert_close, numbers, ratio, uniform};
use burn_fla_train::optim::{ParamEntry, ParamTable};

use super::resume::{same_weights, spawn};
use super::runs::Bench;

const SCALE: f64 = 1.0 / 37.0;

/// A loss and the gradient of every parameter, `None` where there is none.
type Found = (f64, Vec<Option<Vec<f64>>>);

/// A model of which no parameter is where it started: maps that begin at zero would hide the paths behind them.
fn model(config: &ModelConfig, device: &Device) -> (CausalLm, ParamTable) {
    let model = CausalLm::init(config, 3, device).unwrap();
    let entry = |param: burn_fla_nn::NamedParam| ParamEntry { name: param.name, id: param.id, shape: param.shape };
    let table = ParamTable::new(model.named_parameters().into_iter().map(entry).collect());
    let moved = table.map(model, |values| {
        let moved = values.into_iter().enumerate().map(|(at, value)| {
            let value = value?;
            let noise = uniform(at as u64, value.dims()[0], (-0.05, 0.05));
            Some(value + burn_fla_tests::tensor(&noise, [noise.len()], device, DType::F32))
        });
        Ok(moved.collect())
    });
    (moved.unwrap(), table)
}

/// Both ways of going backward.
fn both(config: &ModelConfig, device: &Device, cu: Option<&CuSeqlens>, dtype: DType) -> (Found, Found, Vec<String>) {
    let (model, table) = model(config, device);
    let model = model.train();
    let device = device.clone().autodiff();
    let shape = if cu.is_some() { [1, 38] } else { [2, 19] };
    let draw = |seed| -> Tensor<2, Int> {
        let draws = uniform(seed, 38, (0.0, config.vocab_size() as f64 - 1e-9));
        Tensor::from_data(TensorData::new(draws.into_iter().map(|x| x as i32).collect::<Vec<_>>(), shape), &device)
    };
    let (ids, labels, compute) = (draw(1), draw(2), Compute { dtype, engine: Default::default() });
    let read = |grads: Vec<Option<Tensor<1>>>| grads.into_iter().map(|grad| grad.map(numbers)).collect::<Vec<_>>();

    let loss = model.loss(ids.clone(), labels.clone(), cu, compute).unwrap().sum * SCALE;
    let whole = table.gradients(&model, &mut loss.backward());
    let whole = (numbers(loss.inner())[0], read(whole));

    let mut sum: Vec<Option<Tensor<1>>> = vec![None; table.entries().len()];
    let loss = model.backward_by_block(ids, labels, cu, compute, SCALE, &mut |grads| {
        for (sum, more) in sum.iter_mut().zip(table.gradients(&model, grads)) {
            *sum = match (sum.take(), more) {
                (Some(sum), Some(more)) => Some(sum + more),
                (sum, more) => sum.or(more),
            };
        }
    });
    let parts = (numbers(loss.unwrap())[0], read(sum));
    (whole, parts, table.entries().iter().map(|entry| entry.name.clone()).collect())
}

/// What differs, with the relative error.
fn differences(what: &str, (whole, parts, names): (Found, Found, Vec<String>)) -> Vec<String> {
    assert!(whole.1.iter().flatten().flatten().any(|x| *x != 0.0), "{what}: no gradient");
    let mut found = Vec::new();
    if whole.0.to_bits() != parts.0.to_bits() {
        found.push(format!("{what}: the loss is {} and {}", whole.0, parts.0));
    }
    for ((whole, parts), name) in whole.1.iter().zip(&parts.1).zip(&names) {
        assert_eq!(whole.is_some(), parts.is_some(), "{what}: {name}");
        if let (Some(whole), Some(parts)) = (whole, parts)
            && whole != parts
        {
            found.push(format!("{what}: {name} by {:.1e}", ratio(parts, whole)));
        }
    }
    found
}

fn assert_same(what: &str, found: (Found, Found, Vec<String>)) {
    let found = differences(what, found);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn every_architecture_has_the_same_gradients() {
    let device = burn_fla_tests::reference_device();
    let mut found = Vec::new();
    for architecture in ARCHITECTURES {
        let config = architecture.tiny_config().unwrap();
        found.extend(differences(architecture.model_type, both(&config, &device, None, DType::F32)));
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn packed_rows_tied_maps_and_other_types_too() {
    let device = burn_fla_tests::reference_device();
    let tiny = |name: &str, more: &str| {
        let architecture = ARCHITECTURES.iter().find(|known| known.model_type == name).unwrap();
        let serde_json::Value::Object(more) = serde_json::from_str(more).unwrap() else { panic!() };
        architecture.tiny_config().unwrap().with_overrides(&more).unwrap()
    };
    let cu = CuSeqlens::new(vec![0, 5, 6, 30, 38]).unwrap();
    for name in ["gla", "transformer", "mamba2", "rwkv7", "gated_deltanet"] {
        assert_same(name, both(&tiny(name, "{}"), &device, Some(&cu), DType::F32));
    }
    for more in [r#"{"tie_word_embeddings": true}"#, r#"{"num_hidden_layers": 1}"#, r#"{"num_hidden_layers": 5}"#] {
        assert_same(more, both(&tiny("gla", more), &device, None, DType::F32));
    }
    if device.supports_dtype(DType::BF16) {
        assert_same("bf16", both(&tiny("gla", "{}"), &device, None, DType::BF16));
    }
}

/// The kernels add in a fixed order too, but Burn may fuse what is between them in other ways.
#[test]
fn kernels_give_the_same_gradients() {
    for (name, device) in burn_fla_tests::kernel_devices() {
        for model_type in ["gla", "rwkv7", "gated_deltanet", "mamba2"] {
            let architecture = ARCHITECTURES.iter().find(|known| known.model_type == model_type).unwrap();
            let (whole, parts, names) = both(&architecture.tiny_config().unwrap(), &device, None, DType::F32);
            for ((whole, parts), of) in whole.1.iter().zip(&parts.1).zip(&names) {
                assert_eq!(whole.is_some(), parts.is_some(), "{of}");
                if let (Some(whole), Some(parts)) = (whole, parts) {
                    assert_close(&format!("{model_type} on {name}: {of}"), parts, whole, 1e-5);
                }
            }
        }
    }
}

/// A deep model in a process of its own, whose peak of memory is then that of the run.
#[test]
fn a_run_learns_the_same_in_less_memory() {
    let bench = Bench::new();
    let config = std::fs::read_to_string(bench.path("config.json")).unwrap();
    let deep = config.replace("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 24");
    std::fs::write(bench.path("config.json"), deep).unwrap();
    let recipe = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    let recipe = recipe
        .replace("steps = 20", "steps = 3")
        .replace("interval = 10", "interval = 3")
        .replace("batch_size = 4\nseq_len = 32", "batch_size = 4\nseq_len = 256")
        .replace("threads = 2", "threads = 1");
    let mut peaks = Vec::new();
    for kind in ["none", "block"] {
        let run = format!("dump_folder = '{}'", bench.path("run").display());
        let here = format!("dump_folder = '{}'", bench.path(kind).display());
        let recipe = recipe.replace(&run, &here);
        let recipe = recipe.replace("[training]", &format!("[training]\nactivation_checkpoint = \"{kind}\""));
        std::fs::write(bench.path("recipe.toml"), recipe).unwrap();
        assert!(spawn(&bench).wait().unwrap().success());
        peaks.push(bench.lines(kind).iter().filter_map(|line| line.get("peak_rss_gib")?.as_f64()).fold(0.0, f64::max));
    }
    assert_eq!(bench.losses("none"), bench.losses("block"));
    same_weights(&bench.checkpoint("none", 3), &bench.checkpoint("block", 3));
    println!("peak memory: {peaks:?} GiB");
    if cfg!(target_os = "linux") {
        assert!(peaks[1] < 0.5 * peaks[0], "{peaks:?} GiB");
    }
}
