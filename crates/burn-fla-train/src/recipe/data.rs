//! `[data]`: documents to be tokenised, or a task whose rows are generated.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use super::section::Section;
use super::{Job, TrainingSection, resolve::folder};
use crate::TrainError;
use crate::data::SHARD_TOKENS;

/// `[data]`: its `kind` says what the rest of the section is about.
#[derive(Clone, Debug, JsonSchema, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum DataSection {
    /// `"text"` (default): documents of files, tokenised once.
    Text(TextSection),
    /// `"mqar"`: multi-query associative recall, generated.
    Mqar(MqarSection),
}

impl DataSection {
    /// Seed of the shuffle, and of what is generated.
    pub fn seed(&self) -> u64 {
        match self {
            DataSection::Text(data) => data.seed,
            DataSection::Mqar(data) => data.seed,
        }
    }
}

/// The format of a source's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceFormat {
    /// One document per file.
    Text,
    /// One JSON object per line, also `.gz` and `.zst`.
    Jsonl,
    /// One document per row.
    Parquet,
    /// Token shards of llm.c, of 16 or 32 bits; a file is one document.
    Bin,
}

/// One entry of `data.sources` or `data.validation`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct SourceSection {
    /// Folder pattern the `paths` are relative to. Files are named and ordered by their path under it, so that the
    /// order does not depend on where it lies; when it matches several folders, each entry of `paths` is taken from
    /// the first (in order of names) that has it.
    pub root: Option<String>,
    /// Patterns, in order; the files of each in order of their names. `path = "…"` is short for one of them.
    pub paths: Vec<String>,
    /// `"text"` (default), `"jsonl"`, `"parquet"` or `"bin"`.
    pub format: SourceFormat,
    /// The field of a JSON line, or the column of a Parquet file, that holds the text (`"text"`).
    pub column: String,
    /// Documents are taken until the next would pass this many bytes of text (no bound); a token of `"bin"` counts 4.
    pub max_bytes: Option<u64>,
    /// The source's share of the tokens, over the sum of all weights; all sources have one, or none. Without weights the
    /// sources are one after the other, and an epoch has each token once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

impl SourceSection {
    /// What the source is called in reports: its first pattern, with the root before it.
    pub fn name(&self) -> String {
        let first = self.paths.first().map_or("", String::as_str);
        match &self.root {
            Some(root) => format!("{root}/{first}"),
            None => first.to_string(),
        }
    }
}

/// `[data]` of `kind = "text"`.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct TextSection {
    /// Where token caches are kept (default `cache` in the run folder).
    pub cache_folder: PathBuf,
    /// Seed of the shuffle (`job.seed`).
    pub seed: u64,
    /// Training documents.
    pub sources: Vec<SourceSection>,
    /// Held-out documents.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<SourceSection>,
    /// Without `validation`: the fraction of the training documents that is held out (0).
    pub validation_fraction: f64,
    /// Tokens of a shard of the cache (33,554,432). Training begins when the first is tokenised, and the first epoch is
    /// shuffled within each.
    #[serde(skip_serializing_if = "is_usual_shard")]
    pub shard_tokens: u64,
}

fn is_usual_shard(tokens: &u64) -> bool {
    *tokens == SHARD_TOKENS
}

/// What stands where neither a pair nor a query does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Filler {
    /// A token drawn from the whole vocabulary.
    Random,
    /// Token 0, which is neither a key nor a value.
    Zero,
}

/// `[data]` of `kind = "mqar"`: multi-query associative recall, see [`crate::data::Mqar`]. A row has
/// `training.seq_len` tokens, and `validation.steps` batches of other examples are held out.
#[derive(Clone, Debug, JsonSchema, Serialize)]
pub struct MqarSection {
    /// Seed of the examples and of their order (`job.seed`).
    pub seed: u64,
    /// Tokens of the vocabulary (8192), at most the model's: the lower half are keys, the upper half values.
    pub vocab_size: usize,
    /// Pairs of an example, each asked for once (8).
    pub num_pairs: usize,
    /// Exponent of the power law that places the queries (0.01): 1 is uniform, and the smaller the nearer to the pairs.
    pub power_a: f64,
    /// `"random"` (default) or `"zero"`.
    pub filler: Filler,
    /// Training examples of an epoch; without it none ever repeats.
    pub num_examples: Option<u64>,
}

/// Whether the section's rows are token ids from the start.
pub(super) fn generated(section: &Section<'_>) -> Result<bool, TrainError> {
    Ok(section.choice("kind", &["text", "mqar"], "text")? == "mqar")
}

pub(super) fn data(section: Section<'_>, job: &Job, training: &TrainingSection) -> Result<DataSection, TrainError> {
    let data = match generated(&section)? {
        true => DataSection::Mqar(mqar(&section, job, training)?),
        false => DataSection::Text(text(&section, job, training)?),
    };
    section.finish()?;
    Ok(data)
}

fn text(section: &Section<'_>, job: &Job, training: &TrainingSection) -> Result<TextSection, TrainError> {
    let sources = section.tables("sources")?.unwrap_or_default();
    if sources.is_empty() {
        return Err(section.missing("sources", "at least one, such as [{ path = \"data/*.txt\" }]"));
    }
    let validation = section.tables("validation")?.unwrap_or_default();
    let validation_fraction = section.number_in("validation_fraction", 0.0, 0.0, 0.5)?;
    if validation_fraction > 0.0 && !validation.is_empty() {
        let message = "give either validation or validation_fraction".to_string();
        return Err(section.bad("validation_fraction", message));
    }
    let sources = sources.into_iter().map(source).collect::<Result<Vec<_>, _>>()?;
    let validation = validation.into_iter().map(source).collect::<Result<Vec<_>, _>>()?;
    let weights = sources.iter().filter(|source| source.weight.is_some()).count();
    if weights != 0 && weights != sources.len() {
        let message =
            format!("{weights} of {} sources have a weight; give one to all of them, or to none", sources.len());
        return Err(section.bad("sources", message));
    }
    if validation.iter().any(|source| source.weight.is_some()) {
        return Err(section.bad("validation", "a weight has no meaning here: all of it is read".to_string()));
    }
    let shard_tokens = section.positive("shard_tokens")?.unwrap_or(SHARD_TOKENS);
    if !(training.seq_len as u64 + 1..=1 << 40).contains(&shard_tokens) {
        let message = format!(
            "{shard_tokens} must be between training.seq_len + 1 = {}, so that a shard has a row, and 2^40",
            training.seq_len + 1
        );
        return Err(section.bad("shard_tokens", message));
    }
    Ok(TextSection {
        shard_tokens,
        cache_folder: folder(section, "cache_folder", job.dump_folder.join("cache"))?,
        seed: section.count("seed")?.unwrap_or(job.seed),
        sources,
        validation,
        validation_fraction,
    })
}

fn source(section: Section<'_>) -> Result<SourceSection, TrainError> {
    let paths = match (section.string("path")?, section.strings("paths")?) {
        (Some(path), None) => vec![path],
        (None, Some(paths)) if !paths.is_empty() => paths,
        (None, Some(_)) => return Err(section.bad("paths", "the list is empty".to_string())),
        (Some(_), Some(_)) => {
            return Err(section.bad("path", "give either path or paths".to_string()));
        }
        (None, None) => return Err(section.missing("path", "a file name or a pattern such as data/*.txt")),
    };
    if section.string("format")?.as_deref() == Some("mqar") {
        let message = "\"mqar\" is not a format of files; set data.kind = \"mqar\" without sources".to_string();
        return Err(section.bad("format", message));
    }
    let source = SourceSection {
        root: section.string("root")?,
        paths,
        format: match section.choice("format", &["text", "jsonl", "parquet", "bin"], "text")? {
            "jsonl" => SourceFormat::Jsonl,
            "parquet" => SourceFormat::Parquet,
            "bin" => SourceFormat::Bin,
            _ => SourceFormat::Text,
        },
        column: section.string("column")?.unwrap_or_else(|| "text".to_string()),
        max_bytes: section.positive("max_bytes")?,
        weight: match section.number("weight")? {
            None => None,
            Some(_) => Some(section.number_in("weight", 1.0, f64::MIN_POSITIVE, f64::MAX)?),
        },
    };
    section.finish()?;
    Ok(source)
}

/// Ids are `i32`.
const LARGEST_VOCABULARY: u64 = 1 << 30;

fn mqar(section: &Section<'_>, job: &Job, training: &TrainingSection) -> Result<MqarSection, TrainError> {
    let vocab_size = section.count("vocab_size")?.unwrap_or(8192);
    if !(4..=LARGEST_VOCABULARY).contains(&vocab_size) {
        return Err(section.bad("vocab_size", format!("{vocab_size} must be between 4 and {LARGEST_VOCABULARY}")));
    }
    let num_pairs = section.positive("num_pairs")?.unwrap_or(8);
    let keys = vocab_size / 2 - 1;
    if num_pairs > keys {
        let message = format!("{num_pairs} pairs need as many keys, but data.vocab_size {vocab_size} has {keys}");
        return Err(section.bad("num_pairs", message));
    }
    if num_pairs.saturating_mul(4) > training.seq_len as u64 {
        let message = format!(
            "{num_pairs} pairs and as many queries, each with a token between, need {} tokens, but training.seq_len is {}",
            num_pairs.saturating_mul(4),
            training.seq_len
        );
        return Err(section.bad("num_pairs", message));
    }
    Ok(MqarSection {
        seed: section.count("seed")?.unwrap_or(job.seed),
        vocab_size: vocab_size as usize,
        num_pairs: num_pairs as usize,
        power_a: section.number_in("power_a", 0.01, 0.0, 1.0)?,
        filler: match section.choice("filler", &["random", "zero"], "random")? {
            "zero" => Filler::Zero,
            _ => Filler::Random,
        },
        num_examples: section.positive("num_examples")?,
    })
}
