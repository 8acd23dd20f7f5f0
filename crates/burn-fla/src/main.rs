//! The command `burn-fla`: trains a model from a recipe, generates text with it, verifies it.

mod commands;
mod failure;

use std::process::ExitCode;

use clap::Parser;

use commands::{Cli, Outcome};

/// The CPU backend allocates a tensor an operation; mimalloc hands such blocks back and forth between threads faster
/// than the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Bad usage ends here, with the exit code 2.
    let cli = Cli::parse();
    failure::say_panics_in_one_line();
    log_to_stderr();
    match cli.run() {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::OutOfBounds) => ExitCode::FAILURE,
        Err(failure) if failure.is_closed_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Warnings of this project and errors of the libraries below it; `RUST_LOG` asks for more.
fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("error,burn_fla_ops=warn,burn_fla_nn=warn,burn_fla_train=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
}
