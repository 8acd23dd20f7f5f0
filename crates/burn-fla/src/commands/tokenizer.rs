//! `burn-fla tokenizer`.

use std::path::PathBuf;

use burn_fla::train::Recipe;
use burn_fla::train::data::train_tokenizer;
use clap::{Args, Subcommand};

use super::Outcome;
use crate::failure::Failure;

/// Make a tokenizer from the data of a recipe
#[derive(Debug, Args)]
pub struct TokenizerArgs {
    #[command(subcommand)]
    command: TokenizerCommand,
}

#[derive(Debug, Subcommand)]
enum TokenizerCommand {
    Train(TrainTokenizerArgs),
}

/// Train a byte-level BPE on the training sources of a recipe and write a tokenizer.json
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
struct TrainTokenizerArgs {
    /// The recipe
    recipe: PathBuf,

    /// Override a key of the recipe; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,

    /// Tokens of the vocabulary, the 256 bytes and the end of text among them
    #[arg(long, value_name = "N", default_value_t = 32_000)]
    vocab_size: usize,

    /// Read at most this many bytes of text
    #[arg(long, value_name = "N", default_value_t = 1_000_000_000)]
    max_bytes: u64,

    /// The file to write [default: the one that the recipe names, or tokenizer.json where it names none]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  burn-fla tokenizer train recipes/my.toml --vocab-size 32000

The recipe names the file as model.tokenizer, and the model's config has vocab_size, and eos_token_id = 0: the token 0,
`<|endoftext|>`, is written after every document.";

pub fn run(args: TokenizerArgs) -> Result<Outcome, Failure> {
    let TokenizerCommand::Train(args) = args.command;
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let output = match args.output {
        Some(file) => file,
        None if recipe.model.tokenizer == "byte" => PathBuf::from("tokenizer.json"),
        None => {
            let named = PathBuf::from(&recipe.model.tokenizer);
            // Runs may have been made with it.
            if named.exists() {
                let message = "this tokenizer of the recipe is there already; name a file with --output".to_string();
                return Err(Failure::Folder { path: named, message });
            }
            named
        }
    };
    if let Some(folder) = output.parent() {
        std::fs::create_dir_all(folder).map_err(|source| Failure::Folder {
            path: folder.to_path_buf(),
            message: format!("cannot make this folder for the tokenizer: {source}"),
        })?;
    }
    let report = train_tokenizer(&recipe.data, args.vocab_size, args.max_bytes, &output)?;
    eprintln!(
        "{} tokens from {} documents, {:.1} MB: {}",
        report.tokens,
        report.documents,
        report.bytes as f64 / 1e6,
        output.display()
    );
    Ok(Outcome::Done)
}
