//! `burn-fla verify`.

use std::io::{self, Write};
use std::path::PathBuf;

use burn_fla::nn::verify::verify_folder;
use burn_fla::ops::Engine;
use clap::{Args, ValueEnum};

use super::{DeviceArgs, Outcome};
use crate::failure::Failure;

/// Compare models with expected results: logits, loss, gradients, a loss curve, greedy tokens
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Folders with config.json, model.safetensors and the expected results in case.safetensors
    #[arg(required = true, value_name = "DIR")]
    folders: Vec<PathBuf>,

    /// `auto` runs the kernels where the device has them, `reference` the plain tensor operations
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_enum)]
    engine: EngineName,

    #[command(flatten)]
    device: DeviceArgs,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla verify tests/fixtures/golden/gla
  burn-fla verify tests/fixtures/golden/* --device cuda
  burn-fla verify tests/fixtures/golden/retnet --device cuda --dtype bf16

Exits with 1 where a number is past its bound.";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EngineName {
    Auto,
    Reference,
}

pub fn run(args: VerifyArgs) -> Result<Outcome, Failure> {
    let engine = match args.engine {
        EngineName::Auto => Engine::Auto,
        EngineName::Reference => Engine::Reference,
    };
    let (device, compute) = args.device.open(engine)?;
    let mut outcome = Outcome::Done;
    for folder in &args.folders {
        let report = verify_folder(folder, &device, compute)?;
        writeln!(io::stdout(), "{report}\n")?;
        if !report.passed() {
            outcome = Outcome::OutOfBounds;
        }
    }
    Ok(outcome)
}
