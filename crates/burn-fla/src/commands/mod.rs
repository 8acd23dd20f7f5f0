//! The command line: one file a command.

mod architectures;
mod branch;
mod generate;
mod plan;
mod runs;
mod schema;
mod tokenizer;
mod train;
mod verify;

use std::fmt;

use burn::tensor::{DType, Device};
use burn_fla::nn::Compute;
use burn_fla::nn::device::{Backend, open_device_for};
use burn_fla::ops::Engine;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::failure::Failure;

/// Linear-attention language models on Burn: train from a recipe, generate, verify
#[derive(Debug, Parser)]
#[command(name = "burn-fla", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla train recipes/quickstart.toml
  burn-fla generate runs/quickstart --prompt 'pub fn ' --max-new-tokens 200
  burn-fla verify tests/fixtures/golden/*

Exit codes: 0 done, 1 failed (one line on standard error says why), 2 bad usage.";

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::TrainArgs),
    Plan(plan::PlanArgs),
    Branch(branch::BranchArgs),
    Runs(runs::RunsArgs),
    Plot(runs::PlotArgs),
    Tokenizer(tokenizer::TokenizerArgs),
    Generate(generate::GenerateArgs),
    Verify(verify::VerifyArgs),
    Schema(schema::SchemaArgs),
    Architectures(architectures::ArchitecturesArgs),
}

/// How a command that ran to its end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is well.
    Done,
    /// It measured something that is past its bound, and said so.
    OutOfBounds,
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> Result<Outcome, Failure> {
        match self.command {
            Command::Train(args) => train::run(args),
            Command::Plan(args) => plan::run(args),
            Command::Branch(args) => branch::run(args),
            Command::Runs(args) => runs::runs(args),
            Command::Plot(args) => runs::plot(args),
            Command::Tokenizer(args) => tokenizer::run(args),
            Command::Generate(args) => generate::run(args),
            Command::Verify(args) => verify::run(args),
            Command::Schema(args) => schema::run(args),
            Command::Architectures(args) => architectures::run(args),
        }
    }
}

/// Where and how numbers are computed, for the commands that have no recipe.
#[derive(Debug, Args)]
struct DeviceArgs {
    /// Device: the CPU, an NVIDIA GPU (a build with the feature `cuda`), or Vulkan, Metal, DirectX 12 (`wgpu`)
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_enum)]
    device: DeviceName,

    /// Which of several such devices, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    index: usize,

    /// Type of the activations; parameters and states are always f32
    #[arg(long, value_name = "TYPE", default_value = "f32", value_enum)]
    dtype: DtypeName,
}

impl DeviceArgs {
    fn open(&self, engine: Engine) -> Result<(Device, Compute), Failure> {
        let backend = self.device.into();
        let dtype = match self.dtype {
            DtypeName::F32 => DType::F32,
            DtypeName::Bf16 => DType::BF16,
        };
        let device = open_device_for(backend, self.index, dtype)
            .map_err(|source| Failure::Device { backend: backend.to_string(), source })?;
        Ok((device, Compute { dtype, engine }))
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
    Wgpu,
}

impl From<DeviceName> for Backend {
    fn from(name: DeviceName) -> Self {
        match name {
            DeviceName::Cpu => Self::Cpu,
            DeviceName::Cuda => Self::Cuda,
            DeviceName::Wgpu => Self::Wgpu,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
}

/// A duration as people say it.
struct Clock(f64);

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.round() as u64;
        match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
            (0, 0, s) => write!(f, "{s} s"),
            (0, m, s) => write!(f, "{m} min {s:02} s"),
            (h, m, _) => write!(f, "{h} h {m:02} min"),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_short() {
        let said: Vec<String> = [0.4, 59.0, 119.6, 3725.0].map(|s| Clock(s).to_string()).to_vec();
        assert_eq!(said, ["0 s", "59 s", "2 min 00 s", "1 h 02 min"]);
    }
}
