//! `burn-fla train`.

use std::path::PathBuf;

use burn_fla::train::{Recipe, RunSummary, Trainer};
use clap::Args;

use super::{Clock, Outcome};
use crate::failure::Failure;

/// Train a model from a TOML recipe
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    /// The recipe
    recipe: PathBuf,

    /// Override a key of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,

    /// `auto` continues from the newest checkpoint of the run folder, `never` refuses to where there is one, a path
    /// continues from that checkpoint (default: the recipe's checkpoint.resume)
    #[arg(long, value_name = "auto|never|CHECKPOINT")]
    resume: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla train recipes/quickstart.toml
  burn-fla train recipes/quickstart.toml --set training.steps=2000 --set job.dump_folder=runs/long
  burn-fla train recipes/quickstart.toml --set device.backend=cuda

Ctrl-C finishes the step, saves a checkpoint and exits; the same command then continues. A second Ctrl-C exits at once.";

pub fn run(args: TrainArgs) -> Result<Outcome, Failure> {
    let mut overrides = args.set;
    if let Some(resume) = args.resume {
        // As a TOML string, whatever characters a path has.
        overrides.push(format!("checkpoint.resume={}", serde_json::Value::from(resume)));
    }
    let recipe = Recipe::load(&args.recipe, &overrides)?;
    let summary = Trainer::new(recipe)?.run()?;
    report(&summary);
    Ok(Outcome::Done)
}

/// What there is now, and the command that goes on from it.
pub fn report(summary: &RunSummary) {
    let measured = match (summary.bits_per_byte, summary.accuracy) {
        (Some(bits), _) => format!(", {bits:.3} validation bits per byte"),
        (None, Some(share)) => format!(", {:.2} % of the validation answers right", 100.0 * share),
        (None, None) => String::new(),
    };
    let verb = if summary.interrupted { "stopped after" } else { "trained" };
    let (step, tokens, time) = (summary.step, summary.tokens, Clock(summary.seconds));
    eprintln!("{verb} {step} steps, {tokens} tokens, in {time}{measured}");
    eprintln!("checkpoint: {}", summary.checkpoint.display());
    if summary.interrupted {
        eprintln!("continue with: burn-fla train {}", summary.resume_recipe.display());
    } else if summary.accuracy.is_none() {
        eprintln!("generate with: burn-fla generate {} --prompt '…'", summary.checkpoint.display());
    }
}
