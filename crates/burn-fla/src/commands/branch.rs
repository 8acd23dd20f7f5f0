//! `burn-fla branch`.

use std::path::PathBuf;

use burn_fla::train::branch::Branch;
use burn_fla::train::recipe::{DecayKind, Resume};
use burn_fla::train::{TrainError, Trainer};
use clap::{Args, ValueEnum};

use super::{Outcome, train};
use crate::failure::Failure;

/// Train decay runs out of the stable phase of a run, one after the other
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BranchArgs {
    /// The run folder
    run: PathBuf,

    /// Steps of the decay; each gives a run of its own
    #[arg(long, value_name = "STEPS", required = true)]
    decay: Vec<u64>,

    /// The step of the checkpoint to start from (default: the newest)
    #[arg(long, value_name = "STEP")]
    from: Option<u64>,

    /// The shape of the decay (default: that of the run)
    #[arg(long, value_name = "SHAPE", value_enum)]
    shape: Option<Shape>,

    /// Say what would be trained, and train nothing
    #[arg(long)]
    dry_run: bool,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla branch runs/stable --decay 200 --decay 800
  burn-fla branch runs/stable --from 4000 --decay 400 --shape sqrt

The run is one whose rate is constant where it is branched: a recipe with lr_scheduler.decay_ratio, before its decay. Each
decay run has a folder beside it, continues its data, and goes on where it stopped when the command is given again.";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    Cosine,
    Linear,
    Sqrt,
}

pub fn run(args: BranchArgs) -> Result<Outcome, Failure> {
    let decay_type = args.shape.map(|shape| match shape {
        Shape::Cosine => DecayKind::Cosine,
        Shape::Linear => DecayKind::Linear,
        Shape::Sqrt => DecayKind::Sqrt,
    });
    let branch = |decay_steps| Branch { run: args.run.clone(), from: args.from, decay_steps, decay_type, folder: None };
    // All of them are checked before the first is trained.
    let recipes = args.decay.iter().map(|steps| branch(*steps).recipe()).collect::<Result<Vec<_>, TrainError>>()?;
    for mut recipe in recipes {
        eprintln!("{}: {}", recipe.job.dump_folder.display(), recipe.job.description);
        if args.dry_run {
            continue;
        }
        if recipe.checkpoint.folder.exists() {
            recipe.checkpoint.resume = Resume::Auto;
        }
        let summary = Trainer::new(recipe)?.run()?;
        train::report(&summary);
        if summary.interrupted {
            break;
        }
    }
    Ok(Outcome::Done)
}
