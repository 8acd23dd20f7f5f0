//! A tiny run: what every test of the loop starts from, and what a run must produce.

use std::path::{Path, PathBuf};

use burn_fla_train::recipe::DataSection;
use burn_fla_train::{Recipe, RunSummary, TrainError, Trainer};
use serde_json::Value;

/// A folder with a tiny model, text and a recipe.
pub struct Bench {
    pub folder: tempfile::TempDir,
}

pub const CONFIG: &str = r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1,
    "num_heads": 2, "expand_k": 1.0, "intermediate_size": 48, "hidden_act": "swish", "initializer_range": 0.02}"#;

impl Bench {
    pub fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let bench = Bench { folder };
        std::fs::write(bench.path("config.json"), CONFIG).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/burn-fla-train/src");
        let recipe = format!(
            r#"
[job]
dump_folder = '{run}'
[device]
threads = 2
[model]
config = '{config}'
[optimizer]
lr = 0.01
[lr_scheduler]
warmup_steps = 2
[training]
batch_size = 4
seq_len = 32
gradient_accumulation_steps = 2
steps = 20
[data]
sources = [{{ root = '{sources}', paths = ["**/*.rs"] }}]
validation_fraction = 0.2
[checkpoint]
interval = 10
keep_latest_k = 0
[metrics]
log_freq = 1
terminal = "plain"
[validation]
freq = 10
steps = 3
"#,
            run = bench.path("run").display(),
            config = bench.path("config.json").display(),
            sources = sources.display(),
        );
        std::fs::write(bench.path("recipe.toml"), recipe).unwrap();
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn train(&self, overrides: &[&str]) -> Result<RunSummary, TrainError> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        Trainer::new(Recipe::load(&self.path("recipe.toml"), &overrides)?)?.run()
    }

    pub fn lines(&self, run: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// (step, loss and gradient norm as they were written) of every training line.
    pub fn losses(&self, run: &str) -> Vec<(u64, String, String)> {
        let lines = self.lines(run);
        let training = lines.iter().filter(|line| line.get("loss").is_some());
        training
            .map(|line| (line["step"].as_u64().unwrap(), line["loss"].to_string(), line["grad_norm"].to_string()))
            .collect()
    }

    pub fn checkpoint(&self, run: &str, step: u64) -> PathBuf {
        self.path(run).join(format!("checkpoints/step_{step:08}"))
    }
}

#[test]
fn a_run_learns_reports_and_saves_a_hugging_face_folder() {
    let bench = Bench::new();
    let summary = bench
        .train(&[
            "training.steps=60",
            "validation.freq=30",
            "validation.samples=[\"fn \"]",
            "metrics.peak_tflops=0.001",
        ])
        .unwrap();
    assert_eq!((summary.step, summary.tokens, summary.interrupted), (60, 60 * 2 * 4 * 32, false));
    let losses = bench.losses("run");
    assert_eq!(losses.len(), 60);
    let number = |at: usize| losses[at].1.parse::<f64>().unwrap();
    assert!((number(0) - 256f64.ln()).abs() < 0.1, "{}", number(0));
    assert!(number(59) < 4.0, "{}", number(59));
    let lines = bench.lines("run");
    let bits: Vec<f64> = lines.iter().filter_map(|line| line.get("validation_bits_per_byte")?.as_f64()).collect();
    assert_eq!(bits.len(), 2);
    assert!(bits[1] < bits[0] && Some(bits[1]) == summary.bits_per_byte, "{bits:?}");
    assert_eq!(lines.iter().filter(|line| line.get("sample").is_some()).count(), 2);
    let train = lines.iter().find(|line| line.get("loss").is_some()).unwrap();
    // The peak that was given is a thousandth of 10¹² operations: the share is the rate over it.
    let share = train["flops_per_s"].as_f64().unwrap() / 1e9;
    assert!((train["mfu"].as_f64().unwrap() / share - 1.0).abs() < 1e-9, "{train}");
    let per_token = train["flops_per_s"].as_f64().unwrap() / train["tokens_per_s"].as_f64().unwrap();
    let maps = 5 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 256 * 32;
    assert!((per_token / (3.0 * (2 * maps + 4 * 2 * 16 * 16) as f64) - 1.0).abs() < 1e-9, "{per_token}");
    for field in ["step", "tokens", "lr", "grad_norm", "tokens_per_s", "data_wait_s", "seconds"] {
        assert!(train[field].is_number(), "{field}: {train}");
    }
    // What the process takes is told where the system tells it; the CPU has no allocator of its own to ask.
    if cfg!(target_os = "linux") {
        let (now, most) = (train["rss_gib"].as_f64().unwrap(), train["peak_rss_gib"].as_f64().unwrap());
        assert!(0.01 < now && now <= most && most < 16.0, "{train}");
        assert!(train.get("reserved_gib").is_none(), "{train}");
    }

    for name in ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "recipe.toml"] {
        assert!(bench.checkpoint("run", 60).join(name).is_file(), "{name}");
    }
    let device = burn_fla_tests::reference_device();
    let model = burn_fla_nn::hub::load_model(bench.checkpoint("run", 60), &device).unwrap();
    assert_eq!(model.config().vocab_size(), 256);
    // The recipe in the run folder continues the run, which is over: nothing is trained, nothing is lost.
    let again = Recipe::load(&bench.path("run").join("recipe.toml"), &[]).unwrap();
    assert_eq!(Trainer::new(again).unwrap().run().unwrap().step, 60);
    assert_eq!(bench.losses("run"), losses);
}

#[test]
fn training_starts_from_given_weights() {
    let bench = Bench::new();
    bench.train(&[]).unwrap();
    let start = format!("model.config={}", bench.checkpoint("run", 20).display());
    let other = format!("job.dump_folder={}", bench.path("other").display());
    bench.train(&[&start, &other, "training.steps=2"]).unwrap();
    let first = bench.losses("other")[0].1.parse::<f64>().unwrap();
    assert!(first < 5.0, "{first} is the loss of random weights");
}

#[test]
fn budgets_of_tokens_and_of_time_end() {
    let bench = Bench::new();
    let recipe = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    std::fs::write(bench.path("recipe.toml"), recipe.replace("steps = 20", "tokens = 1000")).unwrap();
    let summary = bench.train(&[]).unwrap();
    assert_eq!((summary.step, summary.tokens), (4, 1024));
    std::fs::write(bench.path("recipe.toml"), recipe.replace("steps = 20", "hours = 0.0002")).unwrap();
    let other = format!("job.dump_folder={}", bench.path("other").display());
    let summary = bench.train(&[&other, "metrics.log_freq=5"]).unwrap();
    assert!(summary.step > 1 && summary.seconds >= 0.72 && summary.seconds < 60.0, "{summary:?}");
}

/// What is measured changes no number, and a run that goes on keeps the lines of the steps before.
#[test]
fn a_profile_has_every_part_of_the_steps_it_measured() {
    let bench = Bench::new();
    let other = format!("job.dump_folder={}", bench.path("other").display());
    let on = ["profiling.enable=true", "profiling.freq=4", "device.threads=1"];
    bench.train(&["training.steps=10", "device.threads=1", &other]).unwrap();
    bench.train(&[&["training.steps=6"], &on[..]].concat()).unwrap();
    bench.train(&[&["training.steps=10"], &on[..]].concat()).unwrap();
    let last = |run: &str| bench.losses(run).last().cloned().unwrap();
    assert_eq!(bench.losses("run")[..4], bench.losses("other")[..4]);
    assert_eq!(last("run").0, 10);
    let text = std::fs::read_to_string(bench.path("run").join("profile/profile.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 8]);
    for part in ["forward_ms", "backward_ms", "optimizer_ms"] {
        assert!(lines.iter().all(|line| line[part].as_f64().unwrap() > 0.0), "{part}: {text}");
    }
    assert!(!bench.path("other").join("profile").exists());
}

/// The crates that recipes train on are pinned by Cargo.lock in the versions that they name.
#[test]
fn recipes_name_pinned_crates() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let lock = std::fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let pinned: Vec<String> = lock
        .split("[[package]]")
        .filter_map(|package| {
            let field = |name: &str| {
                let line = package.lines().find_map(|line| line.strip_prefix(&format!("{name} = \"")));
                line.map(|rest| rest.trim_end_matches('"').to_string())
            };
            Some(format!("{}-{}", field("name")?, field("version")?))
        })
        .collect();
    for name in ["quickstart", "gla-340M"] {
        let recipe = Recipe::load(&root.join(format!("recipes/{name}.toml")), &[]).unwrap();
        let DataSection::Text(data) = recipe.data else { panic!("{name} trains on text") };
        for source in data.sources.iter().chain(&data.validation) {
            for path in &source.paths {
                let package = path.split('/').next().unwrap();
                assert!(pinned.iter().any(|known| known == package), "{name}: {package} is not in Cargo.lock");
            }
        }
    }
}

/// The loop is the same on a device with kernels, and so is what it learns.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
#[test]
fn a_device_with_kernels_trains_alike() {
    let bench = Bench::new();
    let steps = ["training.steps=8", "device.threads=1"];
    bench.train(&steps).unwrap();
    let backend = if cfg!(feature = "cuda") { "cuda" } else { "wgpu" };
    let device = format!("device.backend={backend}");
    let other = format!("job.dump_folder={}", bench.path("other").display());
    let kernels = ["device.compute_dtype=float32", "validation.samples=[\"fn \"]", &device, &other];
    let summary = bench.train(&[&steps[..1], &kernels].concat()).unwrap();
    for (a, b) in bench.losses("run").iter().zip(&bench.losses("other")) {
        let (a, b): (f64, f64) = (a.1.parse().unwrap(), b.1.parse().unwrap());
        assert!((a - b).abs() < 1e-3, "{a} on the CPU, {b} on {backend}");
    }
    assert!(summary.bits_per_byte.unwrap().is_finite());
    // It resumes there too.
    let more = bench.train(&[&["training.steps=10"], &kernels[..]].concat()).unwrap();
    assert_eq!(more.step, 10);
}
