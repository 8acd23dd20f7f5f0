//! The recipes and model shapes of the repository: all of them are read, built, and what is tiny takes steps.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn_fla_nn::models::registry::ARCHITECTURES;
use burn_fla_nn::{CausalLm, ModelConfig, NnError};
use burn_fla_train::recipe::DataSection;
use burn_fla_train::{Recipe, Trainer};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every file below `folder` with this ending, by its path from the root, in order.
fn files(folder: &str, ending: &str) -> Vec<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![folder.to_string()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(root().join(&folder)).unwrap() {
            let name = format!("{folder}/{}", entry.unwrap().file_name().into_string().unwrap());
            if root().join(&name).is_dir() {
                open.push(name);
            } else if name.ends_with(ending) {
                found.insert(name);
            }
        }
    }
    found.into_iter().collect()
}

/// The recipes that train something; a `base.toml` is what others extend.
fn recipes() -> Vec<String> {
    files("recipes", ".toml").into_iter().filter(|name| !name.ends_with("/base.toml")).collect()
}

fn load(name: &str, overrides: &[String]) -> Recipe {
    Recipe::load(&root().join(name), overrides).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The model of a recipe.
fn model(name: &str, recipe: &Recipe) -> ModelConfig {
    let config = ModelConfig::from_file(root().join(&recipe.model.config));
    let config = config.and_then(|config| config.with_overrides(&recipe.model.overrides));
    config.unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The parameters of a model that is built without any of them.
fn count(config: &ModelConfig) -> Result<usize, NnError> {
    let model = CausalLm::outline(config, &burn_fla_tests::reference_device())?;
    Ok(model.named_parameters().iter().map(|param| param.shape.iter().product::<usize>()).sum())
}

fn rounded(parameters: usize) -> String {
    let millions = parameters as f64 / 1e6;
    match millions {
        ..10.0 => format!("{millions:.2} M"),
        ..1000.0 => format!("{millions:.0} M"),
        _ => format!("{:.2} B", millions / 1e3),
    }
}

#[test]
fn counting_without_parameters_counts_them_all() {
    let config = ModelConfig::from_file(root().join("configs/gla_quickstart.json")).unwrap();
    let device = burn_fla_tests::reference_device();
    let model = CausalLm::init(&config, 1, &device).unwrap();
    let expected: usize = model.named_parameters().iter().map(|param| param.shape.iter().product::<usize>()).sum();
    assert_eq!(count(&config).unwrap(), expected);
}

#[test]
fn every_recipe_loads_and_fits_its_model() {
    let mut folders = BTreeSet::new();
    for name in recipes() {
        let recipe = load(&name, &[]);
        assert!(folders.insert(recipe.job.dump_folder.clone()), "{name}: another recipe has its run folder");
        assert!(recipe.notices.is_empty(), "{name}: {:?}", recipe.notices);
        let config = model(&name, &recipe);
        let tokens = match &recipe.data {
            DataSection::Text(_) => 256,
            DataSection::Mqar(data) => data.vocab_size,
        };
        assert!(tokens <= config.vocab_size(), "{name}: {tokens} tokens");
        count(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn every_architecture_has_a_tiny_model_and_a_recipe() {
    for architecture in ARCHITECTURES {
        let name = architecture.model_type;
        let recipe = load(&format!("recipes/tiny/{name}.toml"), &[]);
        assert_eq!(recipe.model.config, Path::new(&format!("configs/{name}_tiny.json")));
        let config = ModelConfig::from_file(root().join(&recipe.model.config)).unwrap();
        assert_eq!(config.model_type(), name);
    }
}

/// `configs/README.md` lists every shape with the number of its parameters.
#[test]
fn the_shapes_have_the_parameters_that_are_said() {
    let table = std::fs::read_to_string(root().join("configs/README.md")).unwrap();
    let mut wrong = Vec::new();
    for name in files("configs", ".json") {
        let file = name.trim_start_matches("configs/");
        let said = table.lines().find_map(|line| line.strip_prefix(&format!("| `{file}` | ")));
        let said = said.and_then(|rest| rest.split(" |").next()).unwrap_or("nothing");
        let parameters = ModelConfig::from_file(root().join(&name)).and_then(|config| count(&config));
        let found = rounded(parameters.unwrap_or_else(|error| panic!("{name}: {error}")));
        if said != found {
            wrong.push(format!("{file}: {found}, and the table says {said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Three steps of `recipe` in little, on text of this repository or on recall.
fn steps(name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let recipe = load(name, &[]);
    let config = root().join(&recipe.model.config);
    let mut overrides = vec![
        format!("model.config={}", config.display()),
        format!("job.dump_folder={}", path("run")),
        "training.steps=3".to_string(),
        "training.batch_size=2".to_string(),
        "lr_scheduler.warmup_steps=1".to_string(),
        "metrics.log_freq=1".to_string(),
        "metrics.terminal=plain".to_string(),
        "validation.steps=1".to_string(),
    ];
    if let DataSection::Text(_) = recipe.data {
        let sources = root().join("crates/burn-fla-train/src");
        overrides.extend([
            format!("data.cache_folder={}", path("cache")),
            format!("data.sources=[{{ root = '{}', paths = [\"*/*.rs\"] }}]", sources.display()),
            "training.seq_len=64".to_string(),
            "validation.sample_tokens=4".to_string(),
        ]);
    }
    let summary = Trainer::new(load(name, &overrides)).and_then(Trainer::run);
    let summary = summary.unwrap_or_else(|error| panic!("{name}: {error}"));
    let figure = summary.bits_per_byte.or(summary.accuracy);
    assert!(figure.is_some_and(f64::is_finite), "{name}: {summary:?}");
    let journal = std::fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    let losses: Vec<f64> = (journal.lines())
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap().get("loss")?.as_f64())
        .collect();
    let vocabulary = model(name, &recipe).vocab_size() as f64;
    assert_eq!(losses.len(), 3, "{name}");
    assert!((losses[0] / vocabulary.ln() - 1.0).abs() < 0.3, "{name}: the first loss is {}", losses[0]);
    assert!(losses.iter().all(|loss| loss.is_finite()) && !journal.contains("\"skipped\":1"), "{name}: {journal}");
}

#[test]
fn every_tiny_recipe_takes_steps() {
    for name in recipes() {
        if name.starts_with("recipes/tiny/") || name.starts_with("recipes/mqar/small/") {
            steps(&name);
        }
    }
}
