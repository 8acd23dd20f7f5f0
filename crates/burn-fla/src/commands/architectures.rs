//! `burn-fla architectures`.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use burn_fla::nn::verify::ArchitectureTable;
use burn_fla::ops::Engine;
use clap::Args;

use super::{DeviceArgs, Outcome};
use crate::failure::Failure;

/// Hold every architecture to itself and to expected results, and print the table of what was measured
#[derive(Debug, Args)]
#[command(after_help = NOTES)]
pub struct ArchitecturesArgs {
    /// A folder of folders with expected results, as `verify` takes them
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

const NOTES: &str = "\
Every architecture is a small model of random weights. The columns are relative RMS errors: of the logits of 131 tokens in
pieces (forward) and one at a time (step) against the whole, of packed sequences against each alone, of single tokens with
softmax attention in the second layer (hybrid), and of the worst gradient through the states of 67 tokens in pieces against
the whole (backward). The columns `expected` compare with the cases of --golden, the worst of each architecture.

Example:
  burn-fla architectures --golden tests/fixtures/golden

Exits with 1 where a number is past its bound.";

pub fn run(args: ArchitecturesArgs) -> Result<Outcome, Failure> {
    let (device, compute) = args.device.open(Engine::Auto)?;
    let progress = io::stderr().is_terminal();
    let table = ArchitectureTable::measure(args.golden.as_deref(), &device, compute, |row| {
        if progress {
            eprintln!("{} measured", row.model_type);
        }
    })?;
    write!(io::stdout(), "{table}")?;
    Ok(if table.passed() { Outcome::Done } else { Outcome::OutOfBounds })
}
