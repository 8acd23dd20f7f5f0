//! Keeps `benches/results/` and writes `benches/RESULTS.md`. To be run in the root of the repository.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use burn_fla_benches::{BenchResult, Table, engines, load, machine, operators, plot, render, steps};
use clap::Parser;

/// Keep measured results, and write the page that shows them
#[derive(Debug, Parser)]
#[command(name = "report")]
enum Cli {
    /// Write RESULTS.md from the results
    Write,
    /// Keep a result, then write RESULTS.md
    Add(Add),
    /// Draw columns of a result's table, both axes logarithmic, into an SVG file
    Plot(Plot),
}

#[derive(Debug, clap::Args)]
struct Plot {
    /// Name of the result's file, without .json
    name: String,
    /// The column along
    #[arg(long)]
    x: String,
    /// The columns to draw
    #[arg(long, value_delimiter = ',')]
    y: Vec<String>,
    /// The file to write
    #[arg(long, short)]
    output: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Add {
    /// Name of its file; results are shown in the order of these, so begin with a number: 10-quickstart-cpu
    name: String,
    /// What was measured
    #[arg(long)]
    title: String,
    /// The command that gave it
    #[arg(long)]
    command: String,
    /// The machine (default: this one)
    #[arg(long)]
    machine: Option<String>,
    /// The commit that was built (default: the one checked out)
    #[arg(long)]
    commit: Option<String>,
    /// What is to be said about it
    #[arg(long, default_value = "")]
    note: String,
    /// A table: tab-separated lines, the first one the heads
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// A table of the operators among the lines of JSON that `bench-hopper operators` and scripts/peer.py printed
    #[arg(long, value_name = "FILE", value_delimiter = ',', conflicts_with = "table")]
    operators: Vec<PathBuf>,
    /// A table of the operators that `bench-hopper operators` timed both by themselves and with `:mma`, side by side
    #[arg(long, value_name = "FILE", value_delimiter = ',', conflicts_with_all = ["table", "operators"])]
    engines: Vec<PathBuf>,
    /// A table of the lines of JSON that `bench-hopper step` printed
    #[arg(long, value_name = "FILE", value_delimiter = ',', conflicts_with_all = ["table", "operators", "engines"])]
    steps: Vec<PathBuf>,
    /// What the command printed; `-` is standard input
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> io::Result<()> {
    let benches = Path::new("benches");
    if !benches.join("Cargo.toml").is_file() {
        return Err(io::Error::other("run this in the root of the repository"));
    }
    let results = benches.join("results");
    if let Cli::Plot(Plot { name, x, y, output }) = cli {
        let text = read(&results.join(format!("{name}.json")))?;
        let result: BenchResult = serde_json::from_str(&text).map_err(io::Error::other)?;
        plot(&result, &x, &y, &output)?;
        println!("{}", output.display());
        return Ok(());
    }
    if let Cli::Add(add) = cli {
        let result = BenchResult {
            title: add.title,
            machine: add.machine.unwrap_or_else(machine),
            commit: add.commit.map_or_else(commit, Ok)?,
            command: add.command,
            note: add.note,
            table: match (&add.operators[..], &add.engines[..], &add.steps[..]) {
                ([_, ..], _, _) => Some(rows(&add.operators, operators)?),
                (_, [_, ..], _) => Some(rows(&add.engines, engines)?),
                (_, _, [_, ..]) => Some(rows(&add.steps, steps)?),
                _ => add.table.as_deref().map(table).transpose()?,
            },
            output: add.output.as_deref().map(read).transpose()?.unwrap_or_default(),
        };
        println!("{}", result.save(&results, &add.name)?.display());
    }
    let page = benches.join("RESULTS.md");
    std::fs::write(&page, render(&load(&results)?))?;
    println!("{}", page.display());
    Ok(())
}

fn read(path: &Path) -> io::Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
}

/// A table of all lines of these files.
fn rows(paths: &[PathBuf], table: fn(&str) -> Result<Table, String>) -> io::Result<Table> {
    let texts: Vec<String> = paths.iter().map(|path| read(path)).collect::<io::Result<_>>()?;
    table(&texts.join("\n")).map_err(io::Error::other)
}

fn table(path: &Path) -> io::Result<Table> {
    let text = read(path)?;
    let mut lines = text.lines().map(|line| line.split('\t').map(str::to_string).collect::<Vec<_>>());
    let columns = lines.next().unwrap_or_default();
    let rows: Vec<_> = lines.collect();
    match rows.iter().position(|row| row.len() != columns.len()) {
        Some(i) => Err(io::Error::other(format!(
            "{}: line {} has {} columns, the first has {}",
            path.display(),
            i + 2,
            rows[i].len(),
            columns.len()
        ))),
        None => Ok(Table { columns, rows }),
    }
}

/// The commit checked out, marked where files differ from it.
fn commit() -> io::Result<String> {
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=10"]).output()?;
    if !output.status.success() {
        return Err(io::Error::other("git names no commit here; give --commit"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}
