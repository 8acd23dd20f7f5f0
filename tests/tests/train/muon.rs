//! Muon against its equations in f64, and in a run.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use burn_fla_tests::{reference_device, uniform};
use burn_fla_train::checkpoint::{load_optimizer, save_optimizer};
use burn_fla_train::optim::{Muon, OptimizerState, ParamEntry, ParamTable};
use burn_fla_train::recipe::{GroupRule, OptimizerName, OptimizerSection, TrainingSection};

use super::bad_input::fails;
use super::runs::Bench;

#[derive(Module, Debug)]
struct Model {
    tall: Param<Tensor<2>>,
    wide: Param<Tensor<2>>,
    embedding: Param<Tensor<2>>,
    norm: Param<Tensor<1>>,
}

const PARAMETERS: [(&str, &[usize]); 4] = [
    ("model.layers.0.tall.weight", &[7, 3]),
    ("model.layers.0.wide.weight", &[4, 6]),
    ("model.embeddings.weight", &[5, 4]),
    ("model.layers.0.norm.weight", &[6]),
];

fn sections(max_norm: f64) -> (OptimizerSection, TrainingSection) {
    let optimizer = OptimizerSection {
        name: OptimizerName::Muon,
        lr: 0.02,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        momentum: Some(0.95),
        ns_steps: Some(5),
        groups: vec![GroupRule { pattern: "wide".to_string(), lr_scale: 0.5, weight_decay: Some(0.3) }],
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
        skip_nan_inf: true,
        max_skipped: 10,
        activation_checkpoint: burn_fla_train::recipe::ActivationCheckpoint::None,
    };
    (optimizer, training)
}

fn values(seed: u64) -> Vec<Vec<f32>> {
    let count = |at: usize| PARAMETERS[at].1.iter().product::<usize>();
    (0..4)
        .map(|at| uniform(seed * 10 + at as u64, count(at), (-1.0, 1.0)).iter().map(|x| *x as f32).collect())
        .collect()
}

fn model(device: &Device, values: &[Vec<f32>]) -> (Model, ParamTable) {
    let data = |at: usize| TensorData::new(values[at].clone(), PARAMETERS[at].1.to_vec());
    let model = Model {
        tall: Param::from_data(data(0), device),
        wide: Param::from_data(data(1), device),
        embedding: Param::from_data(data(2), device),
        norm: Param::from_data(data(3), device),
    };
    let ids = [model.tall.id, model.wide.id, model.embedding.id, model.norm.id];
    let entry =
        |at: usize| ParamEntry { name: PARAMETERS[at].0.to_string(), id: ids[at], shape: PARAMETERS[at].1.to_vec() };
    (model.clone(), ParamTable::new((0..4).map(entry).collect()))
}

fn read(model: &Model) -> Vec<Vec<f32>> {
    let flat = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
    vec![
        flat(model.tall.val().reshape([21])),
        flat(model.wide.val().reshape([24])),
        flat(model.embedding.val().reshape([20])),
        flat(model.norm.val()),
    ]
}

fn tensors(values: &[Vec<f32>], device: &Device) -> Vec<Option<Tensor<1>>> {
    values
        .iter()
        .map(|values| Some(Tensor::from_data(TensorData::new(values.clone(), [values.len()]), device)))
        .collect()
}

type Matrix = Vec<Vec<f64>>;

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let cell = |row: &Vec<f64>, column: usize| row.iter().zip(b).map(|(x, other)| x * other[column]).sum();
    a.iter().map(|row| (0..b[0].len()).map(|column| cell(row, column)).collect()).collect()
}

fn transposed(a: &Matrix) -> Matrix {
    (0..a[0].len()).map(|column| a.iter().map(|row| row[column]).collect()).collect()
}

/// The iteration as it is published, on the matrix as it lies.
fn orthogonal(a: &Matrix) -> Matrix {
    let length = a.iter().flatten().map(|x| x * x).sum::<f64>().sqrt() + 1e-7;
    let mut x: Matrix = a.iter().map(|row| row.iter().map(|x| x / length).collect()).collect();
    for _ in 0..5 {
        let gram = product(&x, &transposed(&x));
        let square = product(&gram, &gram);
        let sum = |i: usize, j: usize| -4.7750 * gram[i][j] + 2.0315 * square[i][j];
        let polynomial: Matrix = (0..gram.len()).map(|i| (0..gram.len()).map(|j| sum(i, j)).collect()).collect();
        let change = product(&polynomial, &x);
        x = x
            .iter()
            .zip(change)
            .map(|(row, other)| row.iter().zip(other).map(|(a, b)| 3.4445 * a + b).collect())
            .collect();
    }
    x
}

fn matrix(flat: &[f64], columns: usize) -> Matrix {
    flat.chunks(columns).map(<[f64]>::to_vec).collect()
}

#[test]
fn updates_are_those_of_the_equations() {
    let device = reference_device();
    for max_norm in [0.0, 0.5] {
        let (optimizer, training) = sections(max_norm);
        let (mut model, table) = model(&device, &values(1));
        let mut muon = Muon::new(table, &optimizer, &training, &device).unwrap();
        let wide = |values: &[Vec<f32>]| -> Vec<Vec<f64>> {
            values.iter().map(|values| values.iter().map(|x| f64::from(*x)).collect()).collect()
        };
        let mut expected = wide(&values(1));
        let mut moments = [vec![0.0; 21], vec![0.0; 24]];
        let (mut first, mut second) = (vec![vec![0.0; 20], vec![0.0; 6]], vec![vec![0.0; 20], vec![0.0; 6]]);
        for step in 1..=3 {
            let grads = values(step as u64 + 1);
            let (next, report) = muon.step(model, tensors(&grads, &device), 0.02).unwrap();
            model = next;
            let mut grads = wide(&grads);
            let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
            assert!((report.read().unwrap().grad_norm / norm - 1.0).abs() < 1e-6, "the norm is over all parameters");
            if max_norm > 0.0 {
                let factor = (max_norm / (norm + 1e-6)).min(1.0);
                grads.iter_mut().flatten().for_each(|g| *g *= factor);
            }
            for (at, (columns, lr_scale, decay)) in [(3, 1.0, 0.1), (6, 0.5, 0.3)].into_iter().enumerate() {
                let moment = &mut moments[at];
                let update: Vec<f64> = moment
                    .iter_mut()
                    .zip(&grads[at])
                    .map(|(m, g)| {
                        *m = 0.95 * *m + g;
                        g + 0.95 * *m
                    })
                    .collect();
                let rows = update.len() / columns;
                let change = orthogonal(&matrix(&update, columns)).concat();
                let scale = 0.2 * 0.02 * lr_scale * (rows.max(columns) as f64).sqrt();
                for (p, o) in expected[at].iter_mut().zip(change) {
                    *p = *p * (1.0 - 0.02 * lr_scale * decay) - scale * o;
                }
            }
            for (at, decay) in [(2, 0.1), (3, 0.0)] {
                let (c1, c2) = (1.0 - 0.9f64.powi(step), 1.0 - 0.95f64.powi(step));
                for i in 0..expected[at].len() {
                    let g = grads[at][i];
                    let (m, v) = (&mut first[at - 2][i], &mut second[at - 2][i]);
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.95 * *v + 0.05 * g * g;
                    expected[at][i] *= 1.0 - 0.02 * decay;
                    expected[at][i] -= 0.02 * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
                }
            }
        }
        for (at, (found, expected)) in read(&model).iter().zip(&expected).enumerate() {
            let error: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
            let size: f64 = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(error / size < 2e-6, "{}: {}", PARAMETERS[at].0, error / size);
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_wherever_it_is() {
    let device = reference_device();
    let (optimizer, training) = sections(1.0);
    for (bad, with) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NAN), (3, f32::NEG_INFINITY)] {
        let (start, table) = model(&device, &values(1));
        let mut muon = Muon::new(table, &optimizer, &training, &device).unwrap();
        let (model, _) = muon.step(start, tensors(&values(2), &device), 0.02).unwrap();
        let before = (read(&model), state(&muon)[..muon.tensors().len() - 5].to_vec());
        let mut grads = values(3);
        grads[bad][1] = with;
        let (model, report) = muon.step(model, tensors(&grads, &device), 0.02).unwrap();
        assert_eq!((read(&model), state(&muon)[..muon.tensors().len() - 5].to_vec()), before, "{}", PARAMETERS[bad].0);
        assert_eq!(report.read().unwrap().skipped, 1);
        let (model, report) = muon.step(model, tensors(&values(3), &device), 0.02).unwrap();
        assert_ne!(read(&model), before.0);
        assert_eq!(report.read().unwrap().skipped_in_a_row, 0);
    }
}

fn state(muon: &Muon) -> Vec<Vec<f32>> {
    muon.tensors().into_iter().map(|(_, _, tensor)| tensor.try_into_vec_as::<f32>().unwrap()).collect()
}

#[test]
fn the_state_is_saved_and_restored() {
    let device = reference_device();
    let (optimizer, training) = sections(1.0);
    let (start, table) = model(&device, &values(1));
    let mut muon = Muon::new(table.clone(), &optimizer, &training, &device).unwrap();
    let (_, _) = muon.step(start, tensors(&values(2), &device), 0.02).unwrap();
    let folder = tempfile::tempdir().unwrap();
    save_optimizer(&muon, folder.path()).unwrap();
    let mut again = Muon::new(table, &optimizer, &training, &device).unwrap();
    load_optimizer(&mut again, folder.path(), &device).unwrap();
    assert_eq!(state(&again), state(&muon));
    let names: Vec<String> = muon.tensors().into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names[..2], ["momentum.model.layers.0.tall.weight", "momentum.model.layers.0.wide.weight"]);
    assert!(names.contains(&"exp_avg_sq.model.embeddings.weight".to_string()));
}

#[test]
fn a_run_with_muon_learns_and_resumes_to_the_last_bit() {
    let bench = Bench::new();
    let muon = ["optimizer.name=muon"];
    bench.train(&muon).unwrap();
    let losses = bench.losses("run");
    let number = |at: usize| losses[at].1.parse::<f64>().unwrap();
    assert!(number(19) < number(0) - 0.5, "{} to {}", number(0), number(19));
    let from = format!("checkpoint.resume={}", bench.checkpoint("run", 10).display());
    let other = format!("job.dump_folder={}", bench.path("other").display());
    bench.train(&[&muon[..], &[&from, &other]].concat()).unwrap();
    assert_eq!(bench.losses("other"), losses[10..]);
    fails(&bench, &[&from, &other, "checkpoint.resume=auto"], &["optimizer.safetensors", "optimizer.name"]);
}
