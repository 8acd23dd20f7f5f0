//! `burn-fla generate`.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn_fla::nn::generate::{SamplingConfig, generate_batch};
use burn_fla::nn::hub;
use burn_fla::nn::tokenizer::Tokenizer;
use burn_fla::ops::Engine;
use burn_fla::train::TrainError;
use burn_fla::train::checkpoint::{CheckpointStore, verify};
use clap::Args;

use super::{DeviceArgs, Outcome};
use crate::failure::Failure;

/// Generate text with a model
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct GenerateArgs {
    /// A checkpoint, a run folder (its newest whole checkpoint is taken) or a Hugging Face folder
    folder: PathBuf,

    /// The text to go on from; empty is the start of a document. Given more than once, all texts are made together
    #[arg(long, value_name = "TEXT", required = true)]
    prompt: Vec<String>,

    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,

    /// 0 takes the most likely token, 1 samples the model's own distribution
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    temperature: f64,

    /// Sample among the K most likely tokens only
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Sample among the most likely tokens that together have the probability P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,

    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// `byte`, or a tokenizer.json (default: the folder's own)
    #[arg(long, value_name = "byte|PATH")]
    tokenizer: Option<String>,

    #[command(flatten)]
    device: DeviceArgs,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla generate runs/quickstart --prompt 'pub fn '
  burn-fla generate runs/quickstart/checkpoints/step_00000500 --prompt 'impl ' --temperature 0
  burn-fla generate runs/quickstart --prompt 'pub fn ' --prompt 'struct ' --max-new-tokens 100
  burn-fla generate path/to/hf-folder --prompt 'Once' --top-k 50 --top-p 0.95 --seed 1 --device cuda --dtype bf16";

pub fn run(args: GenerateArgs) -> Result<Outcome, Failure> {
    let folder = model_folder(&args.folder)?;
    let config = hub::load_config(&folder)?;
    let (tokenizer, eos) = tokenizer(&folder, args.tokenizer.as_deref())?;
    let eos = eos.or(config.eos_token_id());
    tokenizer.check_vocab(config.vocab_size())?;
    let encode = |text: &String| {
        let mut prompt = tokenizer.encode(text)?;
        if prompt.is_empty() {
            // What stands between the documents that models are trained on.
            prompt.push(config.common().bos_token_id.or(eos).ok_or_else(|| Failure::Folder {
                path: folder.clone(),
                message: "the model names no token that starts a document; give a prompt that is not empty".to_string(),
            })?);
        }
        Ok(prompt)
    };
    let prompts = args.prompt.iter().map(encode).collect::<Result<Vec<_>, Failure>>()?;
    let (device, compute) = args.device.open(Engine::Auto)?;
    let model = hub::load_model(&folder, &device)?;

    let sampling =
        SamplingConfig { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut out = io::stdout().lock();
    // One text is shown as it comes; of several, each when all are there.
    let shown = prompts.len() == 1;
    if shown {
        out.write_all(args.prompt[0].as_bytes())?;
        out.flush()?;
    }
    let mut streams: Vec<_> = prompts.iter().map(|_| (tokenizer.stream(), String::new())).collect();
    let mut failed = None;
    generate_batch(&model, &prompts, args.max_new_tokens, &sampling, eos, compute, |row, token| {
        let (stream, text) = &mut streams[row];
        let written = stream.push(token).map_err(Failure::from).and_then(|piece| {
            if shown {
                out.write_all(piece.as_bytes())?;
                return Ok(out.flush()?);
            }
            text.push_str(&piece);
            Ok(())
        });
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                failed = Some(failure);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    for (row, (stream, text)) in streams.into_iter().enumerate() {
        if !shown {
            if row > 0 {
                out.write_all(b"\n")?;
            }
            out.write_all(args.prompt[row].as_bytes())?;
            out.write_all(text.as_bytes())?;
        }
        out.write_all(stream.finish()?.as_bytes())?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(Outcome::Done)
}

/// The folder with the weights: the one given, or the newest whole checkpoint of a run.
fn model_folder(folder: &Path) -> Result<PathBuf, Failure> {
    let fail = |message: &str| Failure::Folder { path: folder.to_path_buf(), message: message.to_string() };
    if !folder.is_dir() {
        return Err(fail("there is no such folder; give a checkpoint, a run folder or a Hugging Face folder"));
    }
    let checkpoints = folder.join("checkpoints");
    if checkpoints.is_dir() {
        let newest = CheckpointStore::new(&checkpoints, 0).latest(&mut |note| eprintln!("warning: {note}"))?;
        return newest.ok_or_else(|| fail("the run has no checkpoint yet; train it further"));
    }
    if folder.join("state.json").is_file() {
        // Written by the trainer, so its checksums are there to be checked.
        verify(folder).map_err(|error| match error {
            TrainError::CheckpointDamaged { path, message, .. } => TrainError::CheckpointDamaged {
                path,
                message,
                remedy: "give another checkpoint, or the run folder to take the newest whole one".to_string(),
            },
            other => other,
        })?;
    } else if !folder.join(hub::CONFIG_FILE).is_file() {
        return Err(fail(
            "it has neither a config.json nor checkpoints; give a checkpoint, a run folder or a Hugging Face folder",
        ));
    }
    Ok(folder.to_path_buf())
}

/// The tokenizer asked for, or the folder's own; with the token that ends a document, where it knows that itself.
fn tokenizer(folder: &Path, asked: Option<&str>) -> Result<(Tokenizer, Option<u32>), Failure> {
    // Byte 0 never occurs in text.
    let byte = || Ok((Tokenizer::byte(), Some(0)));
    let own = folder.join("tokenizer.json");
    match asked {
        Some("byte") => byte(),
        Some(path) => Ok((Tokenizer::from_file(path)?, None)),
        None if own.is_file() => Ok((Tokenizer::from_file(own)?, None)),
        // A checkpoint of a run over bytes has no tokenizer.json.
        None if folder.join("state.json").is_file() => byte(),
        None => Err(Failure::Folder {
            path: folder.to_path_buf(),
            message: "it has no tokenizer.json; give --tokenizer byte, or --tokenizer with the path of one".to_string(),
        }),
    }
}
