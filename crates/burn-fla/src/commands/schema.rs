//! `burn-fla schema`.

use std::io::{self, Write};

use burn_fla::train::recipe;
use clap::Args;

use super::Outcome;
use crate::failure::Failure;

/// Write the JSON schema of recipes, or a recipe with every key
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SchemaArgs {
    /// A commented recipe with every key and its default, in the place of the schema
    #[arg(long)]
    reference: bool,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla schema > burn-fla.schema.json
  burn-fla schema --reference > my.toml

An editor that knows TOML schemas completes and checks a recipe that begins with the line
  #:schema ./burn-fla.schema.json";

pub fn run(args: SchemaArgs) -> Result<Outcome, Failure> {
    let text = match args.reference {
        true => recipe::reference(),
        false => format!("{:#}\n", recipe::schema()),
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}
