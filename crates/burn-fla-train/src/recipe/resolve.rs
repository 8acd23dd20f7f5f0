//! From the merged TOML tree to a [`Recipe`]: types, ranges, defaults. Every key of the format is named here once.

use std::path::{Path, PathBuf};

use super::section::Section;
use super::value::{Kind, Table};
use super::*;
use crate::data::expand;

pub(super) fn resolve(path: &Path, table: &Table) -> Result<Recipe, TrainError> {
    let name = path.display().to_string();
    let top = Section::top(&name, table);
    let mut notices = Vec::new();
    let job = job(top.section("job")?, path)?;
    let training = training(top.section("training")?)?;
    let data = top.section("data")?;
    let generated = data::generated(&data)?;
    if generated && training.varlen {
        notices.push("training.varlen has no effect with data.kind = \"mqar\": a row is one example".to_string());
    }
    let recipe = Recipe {
        device: device(top.section("device")?, &training, &mut notices)?,
        model: model(top.section("model")?, generated)?,
        optimizer: optimizer(top.section("optimizer")?, &mut notices)?,
        lr_scheduler: scheduler(top.section("lr_scheduler")?, &training)?,
        data: data::data(data, &job, &training)?,
        checkpoint: checkpoint(top.section("checkpoint")?, &job, &mut notices)?,
        metrics: metrics(top.section("metrics")?, &mut notices)?,
        validation: validation(top.section("validation")?, generated)?,
        profiling: profiling(top.section("profiling")?, &job)?,
        job,
        training,
        notices,
    };
    top.finish()?;
    Ok(recipe)
}

pub(super) fn folder(section: &Section<'_>, key: &'static str, default: PathBuf) -> Result<PathBuf, TrainError> {
    match section.string(key)? {
        None => Ok(default),
        Some(text) => path_of(section, key, &text),
    }
}

fn path_of(section: &Section<'_>, key: &str, text: &str) -> Result<PathBuf, TrainError> {
    if text.is_empty() {
        return Err(section.bad(key, "the path is empty".to_string()));
    }
    expand(text).map(PathBuf::from).map_err(|message| section.bad(key, message))
}

fn job(section: Section<'_>, recipe: &Path) -> Result<Job, TrainError> {
    let stem = recipe.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let default = Path::new("runs").join(stem.unwrap_or_else(|| "run".to_string()));
    let job = Job {
        dump_folder: folder(&section, "dump_folder", default)?,
        description: section.string("description")?.unwrap_or_default(),
        seed: section.count("seed")?.unwrap_or(42),
    };
    section.finish()?;
    Ok(job)
}

fn device(
    section: Section<'_>,
    training: &TrainingSection,
    notices: &mut Vec<String>,
) -> Result<DeviceSection, TrainError> {
    let backend = match section.choice("backend", &["cpu", "cuda", "wgpu"], "cpu")? {
        "cuda" => Backend::Cuda,
        "wgpu" => Backend::Wgpu,
        _ => Backend::Cpu,
    };
    let default = if backend == Backend::Cuda { "bfloat16" } else { "float32" };
    let compute_dtype = match section.choice("compute_dtype", &["bfloat16", "float32"], default)? {
        "bfloat16" => ComputeDtype::Bfloat16,
        _ => ComputeDtype::Float32,
    };
    let typed = section.positive("threads")?.map(|threads| threads as usize);
    let threads = match (backend, typed) {
        (Backend::Cpu, Some(threads)) => threads.min(training.batch_size),
        (Backend::Cpu, None) => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            cores.min(training.batch_size)
        }
        (_, Some(threads)) if threads > 1 => {
            notices.push(format!("device.threads = {threads} has no effect with backend = {:?}", backend.name()));
            1
        }
        _ => 1,
    };
    let device =
        DeviceSection { backend, index: section.count("index")?.unwrap_or(0) as usize, compute_dtype, threads };
    section.finish()?;
    Ok(device)
}

/// `generated`: the data is token ids from the start.
fn model(section: Section<'_>, generated: bool) -> Result<ModelSection, TrainError> {
    let config = section
        .string("config")?
        .ok_or_else(|| section.missing("config", "the path of a config.json, or of a folder with weights"))?;
    let overrides = section.section("overrides")?;
    let model = ModelSection {
        config: path_of(&section, "config", &config)?,
        tokenizer: match section.string("tokenizer")?.as_deref() {
            None | Some("byte") => "byte".to_string(),
            Some(path) => path_of(&section, "tokenizer", path)?.display().to_string(),
        },
        overrides: match section.get("overrides").map(|value| &value.kind) {
            Some(Kind::Table(table)) => {
                table.entries.iter().map(|(key, value)| (key.clone(), value.to_json())).collect()
            }
            _ => serde_json::Map::new(),
        },
    };
    if generated && model.tokenizer != "byte" {
        let message = "the data is generated as token ids, so no tokenizer is read; remove the key".to_string();
        return Err(section.bad("tokenizer", message));
    }
    // The model's configuration checks these names itself, so this section has no keys of its own.
    drop(overrides);
    section.finish()?;
    Ok(model)
}

fn optimizer(section: Section<'_>, notices: &mut Vec<String>) -> Result<OptimizerSection, TrainError> {
    let name = match section.choice("name", &["adamw", "muon"], "adamw")? {
        "muon" => OptimizerName::Muon,
        _ => OptimizerName::Adamw,
    };
    let momentum = section.number_in("momentum", 0.95, 0.0, 0.999_999)?;
    let ns_steps = section.positive("ns_steps")?.unwrap_or(5);
    if ns_steps > 20 {
        return Err(section.bad("ns_steps", format!("{ns_steps} iterations are more than 20, and 5 are enough")));
    }
    let muon = name == OptimizerName::Muon;
    for key in ["momentum", "ns_steps"] {
        if !muon && section.get(key).is_some() {
            notices.push(format!("optimizer.{key} has no effect with optimizer.name = \"adamw\""));
        }
    }
    let mut groups = Vec::new();
    for group in section.tables("groups")?.unwrap_or_default() {
        let pattern = group
            .string("match")?
            .ok_or_else(|| group.missing("match", "a regular expression over parameter names"))?;
        if let Err(error) = regex::Regex::new(&pattern) {
            return Err(group.bad("match", error.to_string().replace('\n', " ")));
        }
        groups.push(GroupRule {
            pattern,
            lr_scale: group.number_in("lr_scale", 1.0, 0.0, f64::MAX)?,
            weight_decay: match group.number("weight_decay")? {
                None => None,
                Some(_) => Some(group.number_in("weight_decay", 0.0, 0.0, f64::MAX)?),
            },
        });
        group.finish()?;
    }
    let optimizer = OptimizerSection {
        name,
        lr: section.number_in("lr", 3e-4, 0.0, f64::MAX)?,
        beta1: section.number_in("beta1", 0.9, 0.0, 0.999_999)?,
        beta2: section.number_in("beta2", 0.95, 0.0, 0.999_999)?,
        eps: section.number_in("eps", 1e-8, 1e-30, f64::MAX)?,
        weight_decay: section.number_in("weight_decay", 0.1, 0.0, f64::MAX)?,
        momentum: muon.then_some(momentum),
        ns_steps: muon.then_some(ns_steps as usize),
        groups,
    };
    section.finish()?;
    Ok(optimizer)
}

fn scheduler(section: Section<'_>, training: &TrainingSection) -> Result<SchedulerSection, TrainError> {
    let warmup = section.count("warmup_steps")?;
    if let (Some(warmup), Some(steps)) = (warmup, training.total_steps())
        && warmup > steps
    {
        let message = format!("{warmup} is more than the {steps} steps of the run");
        return Err(section.bad("warmup_steps", message));
    }
    let decay_ratio = match section.number("decay_ratio")? {
        None => None,
        Some(_) => Some(section.number_in("decay_ratio", 1.0, 0.0, 1.0)?),
    };
    let scheduler = SchedulerSection {
        // Two steps in a hundred; under a budget of time the steps are not known, so a usual number.
        warmup_steps: warmup.unwrap_or_else(|| training.total_steps().map_or(100, |steps| steps.div_ceil(50))),
        decay_ratio,
        decay_type: match section.choice("decay_type", &["cosine", "linear", "sqrt"], "cosine")? {
            "linear" => DecayKind::Linear,
            "sqrt" => DecayKind::Sqrt,
            _ => DecayKind::Cosine,
        },
        lr_min: section.number_in("lr_min", 0.1, 0.0, 1.0)?,
    };
    section.finish()?;
    Ok(scheduler)
}

fn training(section: Section<'_>) -> Result<TrainingSection, TrainError> {
    let batch_size = section.positive("batch_size")?.unwrap_or(16) as usize;
    let seq_len = section.positive("seq_len")?.unwrap_or(1024) as usize;
    let micro = (batch_size * seq_len) as u64;
    let accumulate = section.positive("gradient_accumulation_steps")?;
    let gradient_accumulation_steps = match (section.positive("tokens_per_step")?, accumulate) {
        (None, accumulate) => accumulate.unwrap_or(1),
        (Some(tokens), None) if tokens % micro == 0 => tokens / micro,
        (Some(tokens), Some(n)) if tokens == n * micro => n,
        (Some(tokens), None) => {
            let message = format!("{tokens} is no multiple of batch_size * seq_len = {micro}");
            return Err(section.bad("tokens_per_step", message));
        }
        (Some(tokens), Some(n)) => {
            let message = format!(
                "{tokens} differs from batch_size * seq_len * gradient_accumulation_steps = {}; keep one of the two",
                n * micro
            );
            return Err(section.bad("tokens_per_step", message));
        }
    } as usize;
    let steps = section.positive("steps")?;
    let tokens = section.positive("tokens")?;
    let hours = match section.number("hours")? {
        None => None,
        Some(_) => Some(section.number_in("hours", 1.0, 1e-6, f64::MAX)?),
    };
    match (steps.is_some() as u8) + (tokens.is_some() as u8) + (hours.is_some() as u8) {
        0 => return Err(section.missing("steps", "the budget: one of steps, tokens, hours")),
        1 => {}
        _ => {
            let key = if hours.is_some() { "hours" } else { "tokens" };
            return Err(section.bad(key, "only one of steps, tokens and hours can be the budget".into()));
        }
    }
    let varlen = section.bool("varlen", false)?;
    let context_len = section.positive("context_len")?.map(|tokens| tokens as usize);
    match context_len {
        Some(_) if !varlen => {
            return Err(section.bad("context_len", "documents are only cut with training.varlen = true".to_string()));
        }
        Some(tokens) if tokens > seq_len => {
            return Err(section.bad("context_len", format!("{tokens} is more than training.seq_len = {seq_len}")));
        }
        _ => {}
    }
    let training = TrainingSection {
        batch_size,
        seq_len,
        varlen,
        context_len,
        gradient_accumulation_steps,
        steps,
        tokens,
        hours,
        max_norm: section.number_in("max_norm", 1.0, 0.0, f64::MAX)?,
        skip_nan_inf: section.bool("skip_nan_inf", true)?,
        max_skipped: section.positive("max_skipped")?.unwrap_or(10),
        activation_checkpoint: match section.choice("activation_checkpoint", &["none", "block"], "none")? {
            "block" => ActivationCheckpoint::Block,
            _ => ActivationCheckpoint::None,
        },
    };
    section.finish()?;
    Ok(training)
}

fn checkpoint(section: Section<'_>, job: &Job, notices: &mut Vec<String>) -> Result<CheckpointSection, TrainError> {
    if !section.bool("export_hf", true)? {
        notices.push("checkpoint.export_hf = false has no effect: a checkpoint is a Hugging Face folder".to_string());
    }
    let checkpoint = CheckpointSection {
        interval: section.positive("interval")?.unwrap_or(500),
        background: section.bool("async", true)?,
        export_hf: true,
        keep_latest_k: section.count("keep_latest_k")?.unwrap_or(2) as usize,
        folder: folder(&section, "folder", job.dump_folder.join("checkpoints"))?,
        resume: match section.string("resume")?.as_deref() {
            None | Some("auto") => Resume::Auto,
            Some("never") => Resume::Never,
            Some(path) => Resume::From(path_of(&section, "resume", path)?),
        },
    };
    section.finish()?;
    Ok(checkpoint)
}

fn metrics(section: Section<'_>, notices: &mut Vec<String>) -> Result<MetricsSection, TrainError> {
    if !section.bool("jsonl", true)? {
        notices.push("metrics.jsonl = false has no effect: metrics.jsonl is always written".to_string());
    }
    let terminal = section.choice("terminal", &["bar", "plain", "tui"], "bar")?;
    if terminal == "tui" && !cfg!(feature = "tui") {
        let message =
            "this build has no dashboard; use \"bar\", or rebuild with `cargo run --release --features tui -- …`";
        return Err(section.bad("terminal", message.to_string()));
    }
    let metrics = MetricsSection {
        log_freq: section.positive("log_freq")?.unwrap_or(10),
        jsonl: true,
        peak_tflops: match section.number("peak_tflops")? {
            None => None,
            Some(_) => Some(section.number_in("peak_tflops", 1.0, 1e-9, f64::MAX)?),
        },
        tensorboard: section.bool("tensorboard", false)?,
        terminal: match terminal {
            "plain" => TerminalKind::Plain,
            "tui" => TerminalKind::Tui,
            _ => TerminalKind::Bar,
        },
    };
    section.finish()?;
    Ok(metrics)
}

fn validation(section: Section<'_>, generated: bool) -> Result<ValidationSection, TrainError> {
    let validation = ValidationSection {
        freq: section.count("freq")?.unwrap_or(500),
        steps: section.positive("steps")?.unwrap_or(20),
        samples: section.strings("samples")?.unwrap_or_default(),
        sample_tokens: section.positive("sample_tokens")?.unwrap_or(200) as usize,
        temperature: section.number_in("temperature", 0.8, 0.0, 100.0)?,
    };
    if generated && !validation.samples.is_empty() {
        let message = "the data is generated as token ids, so no text can be continued; remove the key".to_string();
        return Err(section.bad("samples", message));
    }
    section.finish()?;
    Ok(validation)
}

fn profiling(section: Section<'_>, job: &Job) -> Result<ProfilingSection, TrainError> {
    let profiling = ProfilingSection {
        enable: section.bool("enable", false)?,
        freq: section.positive("freq")?.unwrap_or(10),
        folder: folder(&section, "folder", job.dump_folder.join("profile"))?,
    };
    section.finish()?;
    Ok(profiling)
}
