//! The loop.

mod audit;
mod compute;
mod pool;
mod profile;
mod setup;
mod signals;
mod task;
mod text;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::{DType, Tensor};
use burn_fla_nn::hub::ModelSnapshot;
use burn_fla_nn::{CausalLm, ModelConfig};

use crate::TrainError;
use crate::checkpoint::{
    Background, CheckpointStore, OPTIMIZER_FILE, TrainState, optimizer_bytes, write_atomic, write_synced,
};
use crate::data::{Loader, PATIENCE, Rows};
use crate::metrics::{Journal, Line, Memory, SampleLine, Terminal, TrainLine, ValidationLine};
use crate::optim::{Optimizer, StepFigures, StepReport};
use crate::plan::{is_out_of_memory, ran_out};
use crate::recipe::Recipe;
use crate::schedule::Schedule;
use compute::{Computer, read};
use profile::{Part, Profiler, Stopwatch};
pub(crate) use setup::model_config as read_model_config;
use signals::Signals;
use task::HeldOutBatches;
pub(crate) use task::Task;
use text::Text;

/// A run that is ready for its next step.
#[derive(Debug)]
pub struct Trainer {
    recipe: Recipe,
    config: ModelConfig,
    computer: Computer,
    task: Task,
    /// Without autodiff; each step makes copies with it. `None` only while the optimiser has it: being its sole owner
    /// lets the update work in place.
    model: Option<CausalLm>,
    optimizer: Optimizer,
    schedule: Schedule,
    loader: Loader,
    held_out: HeldOutBatches,
    state: TrainState,
    store: CheckpointStore,
    saver: Background,
    journal: Journal,
    terminal: Terminal,
    interval: Interval,
    /// Losses since the last log line that have been read, and those still on the device.
    pending: Vec<f32>,
    unread: Vec<Tensor<1>>,
    report: Option<StepReport>,
    last_lr: f64,
    /// The last evaluation, and the last step saved.
    evaluated: Option<ValidationLine>,
    saved: Option<u64>,
    /// Whether the weights are other than random.
    resumed: bool,
    profiler: Option<Profiler>,
    /// Arithmetic of the model in training, counted.
    flops_per_token: f64,
}

/// What was measured since the last log line.
#[derive(Debug, Default)]
struct Interval {
    time: Duration,
    waited: Duration,
    tokens: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSummary {
    /// Optimiser steps made in all.
    pub step: u64,
    /// Tokens counted in the loss in all.
    pub tokens: u64,
    /// Seconds of training, without evaluations and saves.
    pub seconds: f64,
    /// The last held-out figure, of text.
    pub bits_per_byte: Option<f64>,
    /// The last held-out figure of a task with answers: the share of them that was right.
    pub accuracy: Option<f64>,
    /// The last checkpoint: a Hugging Face folder.
    pub checkpoint: PathBuf,
    /// Whether a signal ended it before its budget.
    pub interrupted: bool,
    /// The recipe that continues the run: `burn-fla train THIS`.
    pub resume_recipe: PathBuf,
}

impl Trainer {
    /// Opens device, model, data and run folder, and restores the checkpoint that the recipe asks for.
    ///
    /// # Errors
    /// See [`TrainError`]; nothing is left half-written.
    pub fn new(recipe: Recipe) -> Result<Trainer, TrainError> {
        setup::prepare(recipe)
    }

    /// Trains until the budget is spent or a signal asks to stop; either way the last step is saved.
    ///
    /// # Errors
    /// A device that fails, files that cannot be written, too many gradients in a row that are not finite.
    pub fn run(mut self) -> Result<RunSummary, TrainError> {
        // A runtime that cannot hand an error on panics with it.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run_to_its_end()));
        let message = match &outcome {
            Ok(Ok(summary)) => return Ok(summary.clone()),
            Ok(Err(error @ (TrainError::Execution(_) | TrainError::Model(_) | TrainError::Op(_)))) => error.to_string(),
            Ok(Err(_)) => String::new(),
            Err(panic) => match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
                (Some(text), _) => text.clone(),
                (None, Some(text)) => (*text).to_string(),
                (None, None) => String::new(),
            },
        };
        if is_out_of_memory(&message) {
            let device = self.computer.device.clone();
            // The allocator of a device that has failed may fail to answer too.
            let usage = catch_unwind(move || device.memory_pool_usage()).ok().flatten();
            let reserved = usage.map(|usage| usage.bytes_reserved);
            return Err(ran_out(&self.recipe, &self.config, self.state.step + 1, reserved));
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn run_to_its_end(&mut self) -> Result<RunSummary, TrainError> {
        let signals = Signals::install();
        let mut last_batch = Vec::new();
        let mut made = 0;
        while !self.finished() && !signals.asked() && !self.terminal.asked_to_stop() {
            if !self.data_are_there()? {
                continue;
            }
            last_batch = self.step()?;
            self.saver.poll()?;
            made += 1;
            if made <= 2 {
                self.release();
            }
            let step = self.state.step;
            let every = |n: u64| n > 0 && step.is_multiple_of(n);
            if every(self.recipe.metrics.log_freq) || self.finished() {
                self.log(&last_batch)?;
            }
            if every(self.recipe.validation.freq) && !self.finished() {
                self.evaluate()?;
                self.release();
            }
            if every(self.recipe.checkpoint.interval) {
                self.save()?;
            }
        }
        let interrupted = !self.finished();
        if !interrupted {
            self.evaluate()?;
        }
        if self.saved != Some(self.state.step) {
            if let Some(report) = &self.report {
                self.check_skips(&report.read()?, &last_batch)?;
            }
            self.save()?;
        }
        self.saver.wait()?;
        self.terminal.finish();
        if let Some(summary) = self.profiler.as_ref().and_then(Profiler::summary) {
            self.terminal.note(&summary);
        }
        Ok(self.summary(interrupted))
    }

    /// Gives memory that the device's allocator holds and no longer needs back to the driver. Its pages grow with the
    /// largest buffer seen, and it keeps the smaller ones that it has left until it is asked: the first steps and an
    /// evaluation would leave a third of a run's memory behind.
    fn release(&self) {
        self.computer.device.memory_cleanup();
    }

    /// Waits a moment for the rows of the next step, where they are still being tokenised; says whether they are there.
    fn data_are_there(&mut self) -> Result<bool, TrainError> {
        let start = Instant::now();
        let training = &self.recipe.training;
        let there = self.loader.wait(training.batch_size * training.gradient_accumulation_steps, PATIENCE)?;
        for note in self.loader.notes() {
            self.terminal.note(&note);
        }
        self.interval.waited += start.elapsed();
        self.clock(start);
        Ok(there)
    }

    /// One optimiser step; the device may still be working on it when this returns.
    fn step(&mut self) -> Result<Vec<Rows>, TrainError> {
        let measure = self.profiler.as_ref().is_some_and(|profiler| profiler.wants(self.state.step + 1));
        let mut watch = if measure { Some(Stopwatch::start(&self.computer.device)?) } else { None };
        let start = Instant::now();
        let training = &self.recipe.training;
        let micro = training.gradient_accumulation_steps;
        let batches: Vec<Rows> = (0..micro).map(|_| self.loader.next_rows(training.batch_size)).collect();
        let tokens: u64 = batches.iter().map(Rows::tokens).sum();
        self.interval.waited += start.elapsed();
        if let Some(watch) = &mut watch {
            watch.lap(Part::Data)?;
        }

        let gradient = self.computer.gradient(self.model(), self.optimizer.table(), &batches, measure)?;
        if let Some(watch) = &mut watch {
            watch.add(gradient.times);
        }
        if self.state.step == 0 && !self.resumed {
            for finding in audit::audit(self.model(), self.optimizer.table(), &gradient, self.config.vocab_size())? {
                self.terminal.note(&format!("warning: {finding}"));
            }
        }
        let lr = self.recipe.optimizer.lr * self.schedule.factor(self.state.step, self.total_steps());
        let model = self.model.take().expect("no update is under way");
        let (model, report) = self.optimizer.step(model, gradient.grads, lr)?;
        self.model = Some(model);
        if let (Some(mut watch), Some(profiler)) = (watch, &mut self.profiler) {
            watch.lap(Part::Optimizer)?;
            self.terminal.note(&profiler.step(self.state.step + 1, watch.times())?);
        }

        self.unread.push(gradient.loss);
        self.report = Some(report);
        self.last_lr = lr;
        self.state.step += 1;
        self.state.tokens += tokens;
        self.state.cursor = self.loader.cursor();
        self.interval.tokens += tokens;
        self.clock(start);
        self.terminal.step(self.state.step);
        Ok(batches)
    }

    fn model(&self) -> &CausalLm {
        self.model.as_ref().expect("no update is under way")
    }

    fn clock(&mut self, start: Instant) {
        let elapsed = start.elapsed();
        self.interval.time += elapsed;
        self.state.seconds += elapsed.as_secs_f64();
    }

    fn finished(&self) -> bool {
        match (self.recipe.training.total_steps(), self.recipe.training.hours) {
            (Some(steps), _) => self.state.step >= steps,
            (None, Some(hours)) => self.state.seconds >= hours * 3600.0,
            (None, None) => true,
        }
    }

    /// The steps of the run; under a budget of time, what they will have been at the present rate.
    fn total_steps(&self) -> u64 {
        self.recipe.training.total_steps().unwrap_or_else(|| {
            let budget = self.recipe.training.hours.unwrap_or(0.0) * 3600.0;
            let rate = self.state.step as f64 / self.state.seconds.max(1e-9);
            ((budget * rate) as u64).max(self.recipe.lr_scheduler.warmup_steps).max(self.state.step + 1)
        })
    }

    /// Reads the losses that are still on the device.
    fn read_losses(&mut self) -> Result<(), TrainError> {
        if !self.unread.is_empty() {
            let losses = std::mem::take(&mut self.unread);
            self.pending.extend(read(Tensor::cat(losses, 0))?);
        }
        Ok(())
    }

    fn log(&mut self, batch: &[Rows]) -> Result<(), TrainError> {
        let start = Instant::now();
        self.read_losses()?;
        let Some(report) = &self.report else { return Ok(()) };
        let figures = report.read()?;
        self.clock(start);
        let interval = std::mem::take(&mut self.interval);
        let losses = std::mem::take(&mut self.pending);
        let count = losses.len().max(1) as f64;
        let tokens_per_s = interval.tokens as f64 / interval.time.as_secs_f64().max(1e-9);
        let line = TrainLine {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: losses.into_iter().map(f64::from).sum::<f64>() / count,
            lr: self.last_lr,
            grad_norm: figures.grad_norm,
            tokens_per_s,
            flops_per_s: tokens_per_s * self.flops_per_token,
            mfu: self.recipe.metrics.peak_tflops.map(|peak| tokens_per_s * self.flops_per_token / (peak * 1e12)),
            sources: self.loader.ledger(),
            data_wait_s: interval.waited.as_secs_f64(),
            seconds: self.state.seconds,
            skipped: figures.skipped,
            memory: Memory::now(&self.computer.device),
        };
        if !line.loss.is_finite() && !self.recipe.training.skip_nan_inf {
            self.terminal.note(&format!(
                "warning: the loss is {} at step {}, and training.skip_nan_inf = false lets it into the weights",
                line.loss, line.step
            ));
        }
        self.terminal.train(&line, self.recipe.training.total_steps());
        self.journal.write(&Line::Train(line))?;
        self.check_skips(&figures, batch)
    }

    /// An error when too many steps in a row were skipped, with the last batch on disk to be looked at.
    fn check_skips(&self, figures: &StepFigures, batch: &[Rows]) -> Result<(), TrainError> {
        let limit = self.recipe.training.max_skipped;
        if figures.skipped_most < limit {
            return Ok(());
        }
        let path = self.recipe.job.dump_folder.join(format!("batch_{:08}.json", self.state.step));
        let rows: Vec<&[i32]> = batch.iter().flat_map(|rows| rows.ids.chunks(rows.seq_len)).collect();
        let dump = serde_json::json!({ "step": self.state.step, "ids": rows });
        write_atomic(&path, dump.to_string().as_bytes())?;
        Err(TrainError::Diverged { step: self.state.step, in_a_row: figures.skipped_most, limit, batch: path })
    }

    /// Held-out loss, bits per byte or accuracy, and samples; once for a step.
    fn evaluate(&mut self) -> Result<(), TrainError> {
        let start = Instant::now();
        let step = self.state.step;
        if self.evaluated.as_ref().is_some_and(|line| line.step == step) {
            return Ok(());
        }
        let model = self.model.as_ref().expect("no update is under way");
        if let Some(held_out) = self.held_out.get(&self.recipe, &self.task)? {
            let found = self.computer.evaluate(model, &held_out.batches, held_out.bytes.is_none())?;
            let tokens = held_out.tokens.max(1) as f64;
            let line = ValidationLine {
                step,
                tokens: self.state.tokens,
                validation_loss: found.nats / tokens,
                validation_bits_per_byte: held_out
                    .bytes
                    .map(|bytes| found.nats / std::f64::consts::LN_2 / bytes.max(1) as f64),
                validation_accuracy: found.correct.map(|correct| correct / tokens),
                seconds: self.state.seconds,
            };
            self.terminal.validation(&line);
            self.journal.write(&Line::Validation(line.clone()))?;
            self.evaluated = Some(line);
        }
        if let Some(profiler) = &mut self.profiler {
            profiler.validation(start.elapsed());
        }
        let Some(text) = self.task.text() else { return Ok(()) };
        for prompt in &self.recipe.validation.samples {
            let (section, compute) = (&self.recipe.validation, self.computer.compute);
            let sample = text.sample(self.model(), prompt, section, self.recipe.job.seed, compute)?;
            self.terminal.print(&format!("--- sample at step {step} ---\n{prompt}{sample}\n---"));
            let line = SampleLine { step, prompt: prompt.clone(), sample };
            self.journal.write(&Line::Sample(line))?;
        }
        Ok(())
    }

    /// Reads all of the run's state from the device, and writes it: on a thread of its own where the recipe asks for that,
    /// and the run goes on meanwhile.
    fn save(&mut self) -> Result<(), TrainError> {
        let start = Instant::now();
        self.read_losses()?;
        self.state.data = self.loader.fingerprint();
        self.state.pending_losses = self.pending.iter().map(|loss| loss.to_bits()).collect();
        let model = ModelSnapshot::take(self.model())?;
        let optimizer = optimizer_bytes(&self.optimizer)?;
        let tokenizer = self.task.text().and_then(Text::file).map(<[u8]>::to_vec);
        let (state, recipe) = (self.state.clone(), self.recipe.to_toml());
        let write = move |folder: &Path| {
            model.save(folder, DType::F32)?;
            if let Some(tokenizer) = tokenizer {
                write_synced(&folder.join("tokenizer.json"), &tokenizer)?;
            }
            write_synced(&folder.join(OPTIMIZER_FILE), &optimizer)?;
            state.save(folder)?;
            write_synced(&folder.join("recipe.toml"), recipe.as_bytes())
        };
        self.saver.save(self.state.step, write)?;
        if !self.recipe.checkpoint.background {
            self.saver.wait()?;
        }
        self.saved = Some(self.state.step);
        if let Some(profiler) = &mut self.profiler {
            profiler.checkpoint(start.elapsed());
        }
        Ok(())
    }

    fn summary(&self, interrupted: bool) -> RunSummary {
        let evaluated = self.evaluated.as_ref();
        RunSummary {
            step: self.state.step,
            tokens: self.state.tokens,
            seconds: self.state.seconds,
            bits_per_byte: evaluated.and_then(|line| line.validation_bits_per_byte),
            accuracy: evaluated.and_then(|line| line.validation_accuracy),
            checkpoint: self.store.folder().join(format!("step_{:08}", self.state.step)),
            interrupted,
            resume_recipe: self.recipe.job.dump_folder.join("recipe.toml"),
        }
    }
}
