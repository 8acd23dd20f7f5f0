//! AdamW on tensors against the same equations in f64.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use burn_fla_tests::uniform;
use burn_fla_train::checkpoint::{load_optimizer, save_optimizer};
use burn_fla_train::optim::{AdamW, ParamEntry, ParamTable};
use burn_fla_train::recipe::{GroupRule, OptimizerName, OptimizerSection, TrainingSection};

#[derive(Module, Debug)]
struct Model {
    matrix: Param<Tensor<2>>,
    vector: Param<Tensor<1>>,
    unused: Param<Tensor<1>>,
}

const SIZES: [(&str, &[usize]); 3] = [("a.matrix", &[5, 7]), ("a.vector", &[11]), ("unused", &[3])];

fn devices() -> Vec<(&'static str, Device)> {
    let mut devices = burn_fla_tests::kernel_devices();
    devices.push(("flex", burn_fla_tests::reference_device()));
    devices
}

fn model(device: &Device, values: &[Vec<f64>]) -> Model {
    let data =
        |at: usize| TensorData::new(values[at].iter().map(|x| *x as f32).collect::<Vec<_>>(), SIZES[at].1.to_vec());
    Model {
        matrix: Param::from_data(data(0), device),
        vector: Param::from_data(data(1), device),
        unused: Param::from_data(data(2), device),
    }
}

fn table(model: &Model) -> ParamTable {
    let ids = [model.matrix.id, model.vector.id, model.unused.id];
    let entry = |at: usize| ParamEntry { name: SIZES[at].0.to_string(), id: ids[at], shape: SIZES[at].1.to_vec() };
    ParamTable::new((0..3).map(entry).collect())
}

fn values(model: &Model) -> Vec<Vec<f32>> {
    let read = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
    vec![read(model.matrix.val().reshape([35])), read(model.vector.val()), read(model.unused.val())]
}

fn grads(device: &Device, values: &[Vec<f64>]) -> Vec<Option<Tensor<1>>> {
    let tensor = |values: &Vec<f64>| {
        let n = values.len();
        let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        Some(Tensor::from_data(TensorData::new(values, [n]), device))
    };
    let mut grads: Vec<_> = values.iter().map(tensor).collect();
    grads.push(None);
    grads
}

fn sections(max_norm: f64, skip: bool) -> (OptimizerSection, TrainingSection) {
    let optimizer = OptimizerSection {
        name: OptimizerName::Adamw,
        lr: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        momentum: None,
        ns_steps: None,
        groups: vec![GroupRule { pattern: "vector".to_string(), lr_scale: 0.5, weight_decay: Some(0.3) }],
    };
    let training = TrainingSection {
        batch_size: 1,
        seq_len: 1,
        varlen: false,
        context_len: None,
        gradient_accumulation_steps: 1,
        steps: Some(1),
        tokens: None,
        hours: None,
        max_norm,
        skip_nan_inf: skip,
        max_skipped: 10,
        activation_checkpoint: burn_fla_train::recipe::ActivationCheckpoint::None,
    };
    (optimizer, training)
}

/// The documented equations, in f64.
struct Plain {
    values: Vec<Vec<f64>>,
    first: Vec<Vec<f64>>,
    second: Vec<Vec<f64>>,
    t: i32,
}

impl Plain {
    fn step(&mut self, grads: &[Vec<f64>], lr: f64, max_norm: f64) {
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.t += 1;
        let (c1, c2) = (1.0 - 0.9f64.powi(self.t), 1.0 - 0.999f64.powi(self.t));
        for (at, grads) in grads.iter().enumerate() {
            let (lr, decay) = if at == 0 { (lr, 0.1) } else { (lr * 0.5, 0.3) };
            for (i, g) in grads.iter().enumerate() {
                let g = g * clip;
                let (m, v) = (&mut self.first[at][i], &mut self.second[at][i]);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let p = &mut self.values[at][i];
                *p = *p * (1.0 - lr * decay) - lr * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
            }
        }
    }
}

fn start() -> Vec<Vec<f64>> {
    vec![uniform(1, 35, (-1.0, 1.0)), uniform(2, 11, (-1.0, 1.0)), uniform(3, 3, (-1.0, 1.0))]
}

fn gradient(step: u64) -> Vec<Vec<f64>> {
    // Every third gradient is long enough to be clipped.
    let size = if step.is_multiple_of(3) { 3.0 } else { 0.1 };
    vec![uniform(100 + step, 35, (-size, size)), uniform(200 + step, 11, (-size, size))]
}

#[test]
fn follows_the_equations() {
    for (name, device) in devices() {
        for max_norm in [0.0, 1.0] {
            let mut model = model(&device, &start());
            let (optimizer, training) = sections(max_norm, true);
            let mut adamw = AdamW::new(table(&model), &optimizer, &training, &device).unwrap();
            let zeros = |sizes: [usize; 2]| sizes.iter().map(|n| vec![0.0; *n]).collect::<Vec<_>>();
            let mut plain = Plain { values: start(), first: zeros([35, 11]), second: zeros([35, 11]), t: 0 };
            for step in 0..30 {
                let lr = 0.01 * (1.0 + step as f64 / 10.0);
                let gradient = gradient(step);
                let (next, report) = adamw.step(model, grads(&device, &gradient), lr).unwrap();
                model = next;
                plain.step(&gradient, lr, max_norm);
                let norm = report.read().unwrap().grad_norm;
                let exact = gradient.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
                assert!((norm / exact - 1.0).abs() < 1e-5, "{name}: norm {norm}, not {exact}");
            }
            for (at, found) in values(&model).iter().enumerate() {
                for (found, expected) in found.iter().zip(&plain.values[at]) {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(error < 3e-6, "{name}, {}: {found}, not {expected}", SIZES[at].0);
                }
            }
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    for (name, device) in devices() {
        for (poison, at) in [(f64::NAN, 0), (f64::INFINITY, 1), (1e30, 0)] {
            // 1e30 is finite, but its square is not in f32: that norm cannot be clipped either.
            let (optimizer, training) = sections(1.0, true);
            let clean_run = |poisoned: &[u64]| {
                let mut model = model(&device, &start());
                let mut adamw = AdamW::new(table(&model), &optimizer, &training, &device).unwrap();
                let mut counts = Vec::new();
                for step in 0..6 {
                    if poisoned.contains(&step) {
                        let mut bad = gradient(step);
                        bad[at][3] = poison;
                        let before = values(&model);
                        let (next, report) = adamw.step(model, grads(&device, &bad), 0.01).unwrap();
                        model = next;
                        assert_eq!(values(&model), before, "{name}: {poison} at step {step}");
                        let figures = report.read().unwrap();
                        counts.push([figures.skipped_in_a_row, figures.skipped_most, figures.skipped]);
                    }
                    model = adamw.step(model, grads(&device, &gradient(step)), 0.01).unwrap().0;
                }
                (values(&model), counts)
            };
            let (clean, _) = clean_run(&[]);
            let (poisoned, counts) = clean_run(&[0, 3, 4]);
            assert_eq!(poisoned, clean, "{name}: a skip must leave no trace, not even in the moments");
            assert_eq!(counts, [[1, 1, 1], [1, 1, 2], [1, 1, 3]], "{name}");
        }
    }
}

#[test]
fn without_the_guard_it_spreads() {
    let device = burn_fla_tests::reference_device();
    let (optimizer, training) = sections(1.0, false);
    let first = model(&device, &start());
    let mut adamw = AdamW::new(table(&first), &optimizer, &training, &device).unwrap();
    let mut bad = gradient(0);
    bad[0][0] = f64::NAN;
    let (model, _) = adamw.step(first, grads(&device, &bad), 0.01).unwrap();
    assert!(values(&model)[1].iter().all(|x| x.is_nan()), "the norm of all gradients is NaN");
}

#[test]
fn saved_moments_continue_to_the_last_bit() {
    for (name, device) in devices() {
        let folder = tempfile::tempdir().unwrap();
        let (optimizer, training) = sections(1.0, true);
        let mut model = model(&device, &start());
        let mut adamw = AdamW::new(table(&model), &optimizer, &training, &device).unwrap();
        for step in 0..3 {
            model = adamw.step(model, grads(&device, &gradient(step)), 0.01).unwrap().0;
        }
        save_optimizer(&adamw, folder.path()).unwrap();
        let mut restored = AdamW::new(table(&model), &optimizer, &training, &device).unwrap();
        load_optimizer(&mut restored, folder.path(), &device).unwrap();
        let mut again = model.clone();
        for step in 3..6 {
            model = adamw.step(model, grads(&device, &gradient(step)), 0.01).unwrap().0;
            again = restored.step(again, grads(&device, &gradient(step)), 0.01).unwrap().0;
        }
        assert_eq!(values(&model), values(&again), "{name}");

        let file = folder.path().join("optimizer.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 8]).unwrap();
        let error = load_optimizer(&mut restored, folder.path(), &device).unwrap_err().to_string();
        assert!(error.contains("optimizer.safetensors"), "{name}: {error}");
    }
}

/// A file as it has been written from the first version on: moments by name in the parameters' shapes, counters by name.
#[test]
fn the_file_of_the_moments_is_what_it_was() {
    let device = burn_fla_tests::reference_device();
    let folder = tempfile::tempdir().unwrap();
    let (optimizer, training) = sections(1.0, true);
    let model = model(&device, &start());
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let bytes = |values: &[f64]| values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect::<Vec<u8>>();
    let start = Plain {
        values: start(),
        first: vec![uniform(7, 35, (-0.1, 0.1)), uniform(8, 11, (-0.1, 0.1))],
        second: vec![uniform(9, 35, (0.0, 0.01)), uniform(10, 11, (0.0, 0.01))],
        t: 4,
    };
    for (at, (name, shape)) in SIZES.iter().enumerate() {
        let zeros = vec![0.0; 3];
        let (first, second) = (start.first.get(at).unwrap_or(&zeros), start.second.get(at).unwrap_or(&zeros));
        tensors.push((format!("exp_avg.{name}"), shape.to_vec(), bytes(first)));
        tensors.push((format!("exp_avg_sq.{name}"), shape.to_vec(), bytes(second)));
    }
    let corrections = [1.0 - 0.9f64.powi(4), 1.0 - 0.999f64.powi(4)];
    let names = ["correction1", "correction2", "skipped_in_a_row", "skipped_most", "skipped"];
    for (name, value) in names.into_iter().zip([corrections[0], corrections[1], 0.0, 2.0, 3.0]) {
        tensors.push((name.to_string(), vec![1], bytes(&[value])));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = folder.path().join("optimizer.safetensors");
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let mut adamw = AdamW::new(table(&model), &optimizer, &training, &device).unwrap();
    load_optimizer(&mut adamw, folder.path(), &device).unwrap();
    let (model, report) = adamw.step(model, grads(&device, &gradient(0)), 0.01).unwrap();
    let mut plain = start;
    plain.step(&gradient(0), 0.01, 1.0);
    for (found, expected) in values(&model).iter().zip(&plain.values) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found}, not {expected}");
        }
    }
    let figures = report.read().unwrap();
    assert_eq!((figures.skipped_in_a_row, figures.skipped_most, figures.skipped), (0, 2, 3));
    let written = folder.path().join("written");
    std::fs::create_dir(&written).unwrap();
    save_optimizer(&adamw, &written).unwrap();
    let described = |path: &std::path::Path| {
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut names: Vec<_> =
            file.tensors().iter().map(|(n, v)| (n.clone(), v.shape().to_vec(), v.dtype())).collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        names
    };
    assert_eq!(described(&written.join("optimizer.safetensors")), described(&file));
}
