//! One optimiser step's gradient, and held-out losses, on one device or on the threads of the CPU.

use burn::module::Module;
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use burn_fla_nn::modules::cross_entropy;
use burn_fla_nn::{CausalLm, Compute};
use burn_fla_ops::CuSeqlens;

use super::pool::Pool;
use super::profile::{Part, Stopwatch, Times};
use crate::TrainError;
use crate::data::Rows;
use crate::optim::ParamTable;
use crate::recipe::ActivationCheckpoint;

/// Where the model runs.
#[derive(Debug)]
pub(super) struct Computer {
    pub device: Device,
    pub compute: Compute,
    pub activations: ActivationCheckpoint,
    pub pool: Pool,
}

/// The gradient of a step and its loss, still on the device.
pub(super) struct Gradient {
    /// In the order of the parameter table; `None` where the loss does not depend on the parameter.
    pub grads: Vec<Option<Tensor<1>>>,
    /// Mean cross entropy over the step's tokens, `[1]`.
    pub loss: Tensor<1>,
    /// Where the time went, if it was measured.
    pub times: Times,
}

/// Sums over held-out rows.
pub(super) struct Evaluation {
    /// Cross entropy.
    pub nats: f64,
    /// Right answers, if they were counted.
    pub correct: Option<f64>,
}

impl Computer {
    /// The gradient of the mean loss over all tokens of `batches`, the micro-batches of one step.
    ///
    /// Every worker takes its share of each micro-batch on a copy of the model with leaves of its own; the shares are
    /// summed in the workers' order, so that the sum is the same to the last bit on every run with as many threads.
    /// With `measure` the device is waited for after every part.
    pub(super) fn gradient(
        &self,
        model: &CausalLm,
        table: &ParamTable,
        batches: &[Rows],
        measure: bool,
    ) -> Result<Gradient, TrainError> {
        let tokens: u64 = batches.iter().map(Rows::tokens).sum();
        let scale = 1.0 / tokens.max(1) as f64;
        let jobs = self.shares(batches).into_iter().map(|share| {
            let (model, table) = (model.clone(), table.clone());
            let pass = Pass {
                scale,
                device: self.device.clone().autodiff(),
                compute: self.compute,
                activations: self.activations,
                measure,
            };
            Box::new(move || gradient_of_share(model, &table, &share, &pass)) as _
        });
        let results: Vec<Result<Gradient, TrainError>> = self.pool.run(jobs.collect());
        let mut total: Option<Gradient> = None;
        for result in results {
            total = Some(match total {
                None => result?,
                Some(sum) => add(sum, result?, Times::beside),
            });
        }
        total.ok_or_else(|| TrainError::Execution("a step without rows".to_string()))
    }

    /// What `model`, which has no autodiff, makes of `batches`; the right answers are counted if `answers` asks for it.
    pub(super) fn evaluate(&self, model: &CausalLm, batches: &[Rows], answers: bool) -> Result<Evaluation, TrainError> {
        let jobs = self.shares(batches).into_iter().map(|share| {
            let (model, device, compute) = (model.clone(), self.device.clone(), self.compute);
            Box::new(move || -> Result<Vec<Tensor<1>>, TrainError> {
                let sums = |rows: &Rows| match answers {
                    true => loss_and_hits(&model, rows, &device, compute),
                    false => {
                        let (ids, labels, cu) = tensors(rows, &device)?;
                        Ok(model.loss(ids, labels, cu.as_ref(), compute)?.sum)
                    }
                };
                share.iter().map(sums).collect()
            }) as _
        });
        let mut found = Evaluation { nats: 0.0, correct: answers.then_some(0.0) };
        for sums in self.pool.run::<Result<Vec<Tensor<1>>, TrainError>>(jobs.collect()) {
            for figures in read(Tensor::cat(sums?, 0))?.chunks(if answers { 2 } else { 1 }) {
                found.nats += f64::from(figures[0]);
                found.correct = found.correct.map(|correct| correct + f64::from(figures[1]));
            }
        }
        Ok(found)
    }

    /// Splits the rows of every batch over the workers; workers without rows get no share.
    fn shares(&self, batches: &[Rows]) -> Vec<Vec<Rows>> {
        let threads = self.pool.threads();
        let share = |worker: usize| -> Vec<Rows> {
            let cut = |rows: usize, at: usize| rows * at / threads;
            let part = |batch: &Rows| batch.part(cut(batch.rows, worker), cut(batch.rows, worker + 1));
            batches.iter().map(part).filter(|rows| rows.rows > 0).collect()
        };
        (0..threads).map(share).filter(|share| !share.is_empty()).collect()
    }
}

/// Σ of the cross entropy, and the number of counted positions whose most likely token is the label: `[2]`.
fn loss_and_hits(model: &CausalLm, rows: &Rows, device: &Device, compute: Compute) -> Result<Tensor<1>, TrainError> {
    let (ids, labels, cu) = tensors(rows, device)?;
    let logits = model.forward(ids, cu.as_ref(), compute)?.flatten::<2>(0, 1);
    let labels = labels.flatten::<1>(0, 1);
    let loss = cross_entropy(logits.clone(), labels.clone()).sum;
    // A label that is not counted is negative: no token equals it.
    let hits = logits.argmax(1).squeeze_dim::<1>(1).equal(labels);
    Ok(Tensor::cat(vec![loss, hits.float().cast(DType::F32).sum()], 0))
}

/// How a forward and backward pass is made.
struct Pass {
    /// Multiplies the loss.
    scale: f64,
    device: Device,
    compute: Compute,
    activations: ActivationCheckpoint,
    measure: bool,
}

fn gradient_of_share(model: CausalLm, table: &ParamTable, share: &[Rows], pass: &Pass) -> Result<Gradient, TrainError> {
    let Pass { scale, ref device, compute, activations, measure } = *pass;
    let mut watch = if measure { Some(Stopwatch::start(device)?) } else { None };
    let mut lap = |part: Part| watch.as_mut().map_or(Ok(()), |watch| watch.lap(part));
    let model = model.train();
    let mut total: Option<Gradient> = None;
    for rows in share {
        let (ids, labels, cu) = tensors(rows, device)?;
        lap(Part::Upload)?;
        let (grads, loss) = match activations {
            ActivationCheckpoint::None => {
                let loss = model.loss(ids, labels, cu.as_ref(), compute)?.sum * scale;
                lap(Part::Forward)?;
                let mut gradients = loss.backward();
                (table.gradients(&model, &mut gradients), loss.inner())
            }
            // Forward and backward take turns: all of it counts as backward.
            ActivationCheckpoint::Block => {
                let mut sum = vec![None; table.entries().len()];
                let mut collect = |found: &mut Gradients| {
                    let more = table.gradients(&model, found).into_iter();
                    sum = std::mem::take(&mut sum).into_iter().zip(more).map(sum_of).collect();
                };
                let loss = model.backward_by_block(ids, labels, cu.as_ref(), compute, scale, &mut collect)?;
                (sum, loss)
            }
        };
        lap(Part::Backward)?;
        let part = Gradient { grads, loss, times: Times::default() };
        total = Some(match total {
            None => part,
            Some(sum) => add(sum, part, Times::then),
        });
        lap(Part::Optimizer)?;
    }
    if let (Some(total), Some(watch)) = (&mut total, watch) {
        total.times = watch.times();
    }
    total.ok_or_else(|| TrainError::Execution("a share without rows".to_string()))
}

fn sum_of(pair: (Option<Tensor<1>>, Option<Tensor<1>>)) -> Option<Tensor<1>> {
    match pair {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

fn add(a: Gradient, b: Gradient, times: impl FnOnce(Times, Times) -> Times) -> Gradient {
    Gradient {
        grads: a.grads.into_iter().zip(b.grads).map(sum_of).collect(),
        loss: a.loss + b.loss,
        times: times(a.times, b.times),
    }
}

/// Ids, labels, and where sequences begin: rows that hold several sequences become one packed row.
fn tensors(rows: &Rows, device: &Device) -> Result<(Tensor<2, Int>, Tensor<2, Int>, Option<CuSeqlens>), TrainError> {
    let (shape, offsets) = rows.layout();
    let cu = offsets.map(CuSeqlens::new).transpose().map_err(burn_fla_nn::NnError::from)?;
    let make = |values: &Vec<i32>| Tensor::from_data(TensorData::new(values.clone(), shape), device);
    Ok((make(&rows.ids), make(&rows.labels), cu))
}

/// Reads a vector from the device, which waits for it.
pub(super) fn read(tensor: Tensor<1>) -> Result<Vec<f32>, TrainError> {
    tensor.try_into_vec_as::<f32>().map_err(|error| TrainError::Execution(error.to_string()))
}
