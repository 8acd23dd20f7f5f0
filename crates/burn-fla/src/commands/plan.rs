//! `burn-fla plan`.

use std::io::{self, Write};
use std::path::PathBuf;

use burn_fla::train::Recipe;
use burn_fla::train::plan::Plan;
use clap::Args;

use super::Outcome;
use crate::failure::Failure;

/// Say what a recipe asks for, before anything runs: parameters, arithmetic, memory, data, time
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PlanArgs {
    /// The recipe
    recipe: PathBuf,

    /// Override a key of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,

    /// The rate to reckon with (default: the last one of the recipe's run folder)
    #[arg(long, value_name = "X")]
    tokens_per_s: Option<f64>,

    /// Write JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla plan recipes/quickstart.toml
  burn-fla plan recipes/quickstart.toml --set model.config=configs/gla_1.3B.json --tokens-per-s 40000

No device is opened and nothing is written. FLOPs count recurrences in their recurrent form; memory of activations is an
estimate.";

pub fn run(args: PlanArgs) -> Result<Outcome, Failure> {
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let plan = Plan::new(&recipe, args.tokens_per_s.filter(|rate| *rate > 0.0))?;
    let text = match args.json {
        true => format!("{:#}\n", serde_json::to_value(&plan).unwrap_or_default()),
        false => plan.to_string(),
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}
