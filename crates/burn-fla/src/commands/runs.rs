//! `burn-fla runs` and `burn-fla plot`: what runs have written of themselves.

use std::io::{self, Write};
use std::path::PathBuf;

use burn_fla::train::TrainError;
use burn_fla::train::metrics::{History, plot as draw, plot_png};
use clap::Args;

use super::{Clock, Outcome};
use crate::failure::Failure;

/// List the runs of a folder: steps, tokens, losses, speed
#[derive(Debug, Args)]
pub struct RunsArgs {
    /// The folder, or a run folder (default: runs)
    folder: Option<PathBuf>,
}

/// How the first run is made.
const FIRST_RUN: &str =
    "`burn-fla train recipes/quickstart.toml` makes one in runs/quickstart, or where job.dump_folder says";

pub fn runs(args: RunsArgs) -> Result<Outcome, Failure> {
    let given = args.folder.is_some();
    let folder = args.folder.unwrap_or_else(|| PathBuf::from("runs"));
    let there = folder.exists();
    if given && !there {
        let message = format!("there is no such folder; {FIRST_RUN}");
        return Err(Failure::Folder { path: folder, message });
    }
    let runs = if there { History::all(&folder)? } else { Vec::new() };
    let mut out = io::stdout();
    if runs.is_empty() {
        let what = if there { "a run folder has a metrics.jsonl" } else { "there is no such folder yet" };
        writeln!(out, "no run in {}: {what}; {FIRST_RUN}", folder.display())?;
        return Ok(Outcome::Done);
    }
    let width = runs.iter().map(|run| run.folder.display().to_string().len()).max().unwrap_or(0).max(3);
    writeln!(
        out,
        "{:width$}  {:>9}  {:>14}  {:>8}  {:>9}  {:>14}  {:>10}  {:>12}",
        "run", "step", "tokens", "loss", "held out", "bits per byte", "tokens/s", "time"
    )?;
    for run in &runs {
        let last = run.training.last();
        let figure = |value: Option<f64>, digits: usize| value.map_or("-".to_string(), |x| format!("{x:.digits$}"));
        let held_out = run.validation.last();
        writeln!(
            out,
            "{:width$}  {:>9}  {:>14}  {:>8}  {:>9}  {:>14}  {:>10}  {:>12}",
            run.folder.display().to_string(),
            run.step,
            figure(last.map(|point| point.tokens), 0),
            figure(last.map(|point| point.loss), 4),
            figure(held_out.map(|point| point.loss), 4),
            figure(held_out.and_then(|point| point.bits_per_byte), 4),
            figure(last.map(|point| point.tokens_per_s), 0),
            Clock(run.seconds).to_string(),
        )?;
    }
    Ok(Outcome::Done)
}

/// Draw loss and speed of one or more runs into an SVG or PNG file
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PlotArgs {
    /// Run folders
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,

    /// The file to write; its name ends in .svg or .png
    #[arg(long, short, visible_alias = "out", value_name = "FILE", default_value = "plot.svg")]
    output: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla plot runs/quickstart
  burn-fla plot runs/gla runs/retnet --output compared.png";

pub fn plot(args: PlotArgs) -> Result<Outcome, Failure> {
    let kind = args.output.extension().map(|kind| kind.to_string_lossy().to_ascii_lowercase());
    let runs = args.runs.iter().map(|folder| History::read(folder)).collect::<Result<Vec<_>, TrainError>>()?;
    let file = match kind.as_deref() {
        Some("svg") => draw(&runs)?.into_bytes(),
        Some("png") => plot_png(&runs)?,
        _ => {
            let message = "a plot is written as .svg or .png; end the name with one of them".to_string();
            return Err(Failure::Folder { path: args.output, message });
        }
    };
    burn_fla::nn::hub::write_file(&args.output, &file)?;
    eprintln!("{}", args.output.display());
    Ok(Outcome::Done)
}
