use super::*;

const MINIMAL: &str = "\
[model]
config = \"gla.json\"

[training]
steps = 100

[data]
sources = [{ path = \"a.txt\" }]
";

fn load(text: &str, overrides: &[&str]) -> Result<Recipe, TrainError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    Recipe::load(&path, &overrides)
}

fn error(text: &str, overrides: &[&str]) -> String {
    load(text, overrides).unwrap_err().to_string()
}

#[test]
fn defaults_fill_a_minimal_recipe() {
    let recipe = load(MINIMAL, &[]).unwrap();
    assert_eq!(recipe.job.dump_folder, Path::new("runs/run"));
    assert_eq!(recipe.checkpoint.folder, Path::new("runs/run/checkpoints"));
    assert_eq!(recipe.device.compute_dtype, ComputeDtype::Float32);
    assert_eq!(recipe.lr_scheduler.warmup_steps, 2);
    assert_eq!(recipe.optimizer.weight_decay, 0.1);
    assert_eq!(recipe.data.seed(), 42);
    assert_eq!(recipe.training.tokens_per_step(), 16 * 1024);
    let cuda = load(MINIMAL, &["device.backend=cuda"]).unwrap();
    assert_eq!(cuda.device.compute_dtype, ComputeDtype::Bfloat16);
}

#[test]
fn the_resolved_recipe_loads_as_itself() {
    let text = "\
[job]
description = \"a \\\"test\\\"\"
seed = 7
[device]
threads = 2
[model]
config = \"gla.json\"
overrides = { hidden_size = 64, attn = { layers = [1], num_heads = 2 }, list = [1, 2] }
[optimizer]
groups = [{ match = \"embed\", lr_scale = 0.5, weight_decay = 0 }, { match = 'norm\\.weight$' }]
[lr_scheduler]
decay_ratio = 0.2
decay_type = \"sqrt\"
[training]
tokens = 1_000_000
tokens_per_step = 65536
[data]
sources = [{ root = \"/x/*\", paths = [\"a/*.rs\", \"b/*.rs\"], max_bytes = 1000 }]
validation = [{ path = \"c.jsonl\", format = \"jsonl\", column = \"body\" }]
[checkpoint]
resume = \"never\"
[validation]
samples = [\"fn \", \"\"]
";
    let recipe = load(text, &[]).unwrap();
    assert_eq!(recipe.training.gradient_accumulation_steps, 4);
    assert_eq!(recipe.training.total_steps(), Some(16));
    let again = load(&recipe.to_toml(), &[]).unwrap();
    assert_eq!(again.to_toml(), recipe.to_toml());
    assert_eq!(again.hash(), recipe.hash());
    assert_ne!(load(text, &["job.seed=8"]).unwrap().hash(), recipe.hash());
    assert_eq!(again.model.overrides["attn"]["layers"][0], 1);
}

#[test]
fn recall_needs_no_source_and_loads_as_itself() {
    let text = "\
[model]
config = \"gla.json\"
[training]
steps = 100
seq_len = 64
[data]
kind = \"mqar\"
num_pairs = 16
";
    let recipe = load(text, &["job.seed=5"]).unwrap();
    let DataSection::Mqar(data) = &recipe.data else { panic!("{:?}", recipe.data) };
    assert_eq!((data.seed, data.vocab_size, data.num_pairs, data.num_examples), (5, 8192, 16, None));
    let again = load(&recipe.to_toml(), &[]).unwrap();
    assert_eq!(again.to_toml(), recipe.to_toml());
    let text = error(MINIMAL, &["data.sources=[{ path = \"x\", format = \"mqar\" }]"]);
    assert!(text.contains("data.kind = \"mqar\""), "{text}");
    assert!(error(MINIMAL, &["data.num_pairs=3"]).contains("unknown key `data.num_pairs`"));
}

#[test]
fn a_profile_is_part_of_a_recipe_only_where_it_is_on() {
    let off = load(MINIMAL, &[]).unwrap();
    assert!(!off.profiling.enable && !off.to_toml().contains("profiling"), "{}", off.to_toml());
    let on = load(MINIMAL, &["profiling.enable=true"]).unwrap();
    assert_eq!((on.profiling.freq, &on.profiling.folder), (10, &on.job.dump_folder.join("profile")));
    let again = load(&on.to_toml(), &[]).unwrap();
    assert_eq!(again.to_toml(), on.to_toml());
}

#[test]
fn unknown_keys_name_file_line_and_nearest() {
    let text = error(&MINIMAL.replace("steps = 100", "steps = 100\nbatchsize = 4"), &[]);
    assert!(text.contains("run.toml:6: unknown key `training.batchsize`"), "{text}");
    assert!(text.contains("did you mean `training.batch_size`"), "{text}");
    let text = error(&format!("{MINIMAL}\n[optimiser]\nlr = 1\n"), &[]);
    assert!(text.contains("run.toml:10: unknown key `optimiser`; did you mean `optimizer`"), "{text}");
    let text = error(&MINIMAL.replace("path =", "pth = 1, path ="), &[]);
    assert!(text.contains("run.toml:8: unknown key `data.sources[0].pth`"), "{text}");
    let text = error(MINIMAL, &["training.step=3"]);
    assert!(text.contains("--set training.step=3: unknown key `training.step`"), "{text}");
    assert!(text.contains("`training.steps`"), "{text}");
}

#[test]
fn wrong_types_and_values_name_what_would_be_right() {
    let cases: &[(&str, &str)] = &[
        ("training.steps=ten", "`training.steps` must be a whole number, zero or more, but it is the string \"ten\""),
        ("training.steps=-1", "but it is the integer -1"),
        ("training.steps=0", "at least 1"),
        ("optimizer.lr=\"x\"", "`optimizer.lr` must be a finite number"),
        ("optimizer.lr=nan", "`optimizer.lr` must be a finite number"),
        ("optimizer.beta1=1.0", "1 must be between 0 and 0.999999"),
        ("optimizer.name=muom", "did you mean \"muon\""),
        ("optimizer.ns_steps=50", "`optimizer.ns_steps`: 50 iterations"),
        ("optimizer.groups=[{ match = \"(\" }]", "`optimizer.groups[0].match`"),
        ("device.backend=cude", "did you mean \"cuda\""),
        ("training.tokens=5", "only one of steps, tokens and hours"),
        ("training.tokens_per_step=5", "no multiple of batch_size * seq_len = 16384"),
        ("training.context_len=8", "only cut with training.varlen"),
        ("training.skip_nan_inf=1", "must be true or false"),
        ("lr_scheduler.warmup_steps=101", "101 is more than the 100 steps"),
        ("data.sources=[]", "`data.sources` is missing"),
        ("data.sources=[{ path = \"x\", format = \"parket\" }]", "did you mean \"parquet\""),
        ("data.sources=[{ format = \"text\" }]", "`data.sources[0].path` is missing"),
        ("data.sources=[{ path = \"x\", weight = 0 }]", "`data.sources[0].weight`"),
        ("data.sources=[{ path = \"x\", weight = 2 }, { path = \"y\" }]", "1 of 2 sources have a weight"),
        #[cfg(not(feature = "tui"))]
        ("metrics.terminal=tui", "--features tui"),
        ("metrics.terminal=tvi", "did you mean \"tui\""),
        ("profiling.freq=0", "profiling.freq"),
        ("model=3", "`model` must be a table"),
        ("model.config=\"$NO_SUCH_VARIABLE/x\"", "NO_SUCH_VARIABLE is not set"),
    ];
    for (set, expected) in cases {
        let text = error(MINIMAL, &[set]);
        assert!(text.contains(expected), "{set}: {text}");
    }
    for set in ["training", "=3", "a..b=1"] {
        assert!(error(MINIMAL, &[set]).contains("section.key=value"), "{set}");
    }
}

#[test]
fn missing_files_and_broken_toml() {
    let text = Recipe::load(Path::new("/no/such/recipe.toml"), &[]).unwrap_err().to_string();
    assert!(text.contains("cannot read the recipe /no/such/recipe.toml"), "{text}");
    let text = error("[model]\nconfig = \n", &[]);
    assert!(text.contains("run.toml:2: not valid TOML"), "{text}");
    let text = error("[training]\nsteps = 1\n", &[]);
    assert!(text.contains("`model.config` is missing"), "{text}");
}

#[test]
fn extends_merges_and_keeps_origins() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("base.toml"), MINIMAL).unwrap();
    std::fs::write(at("mid.toml"), "extends = \"base.toml\"\n[training]\nbatch_size = 3\n").unwrap();
    std::fs::write(at("top.toml"), "extends = \"mid.toml\"\n[training]\nsteps = 7\n").unwrap();
    let recipe = Recipe::load(&at("top.toml"), &["training.seq_len = 5".to_string()]).unwrap();
    assert_eq!(recipe.training.steps, Some(7));
    assert_eq!(recipe.training.batch_size, 3);
    assert_eq!(recipe.training.seq_len, 5);
    let DataSection::Text(data) = recipe.data else { panic!("{:?}", recipe.data) };
    assert_eq!(data.sources[0].paths, ["a.txt"]);
    std::fs::write(at("mid.toml"), "extends = \"base.toml\"\n[training]\nbatch_sice = 3\n").unwrap();
    let text = Recipe::load(&at("top.toml"), &[]).unwrap_err().to_string();
    assert!(text.contains("mid.toml:3: unknown key `training.batch_sice`"), "{text}");
    std::fs::write(at("mid.toml"), "extends = \"top.toml\"\n").unwrap();
    let text = Recipe::load(&at("top.toml"), &[]).unwrap_err().to_string();
    assert!(text.contains("extends this recipe in turn"), "{text}");
    std::fs::write(at("mid.toml"), "extends = \"none.toml\"\n").unwrap();
    assert!(Recipe::load(&at("top.toml"), &[]).unwrap_err().to_string().contains("none.toml"));
}

/// A key that changes nothing on this model or device is no error, and is told.
#[test]
fn keys_without_effect_are_told() {
    assert_eq!(load(MINIMAL, &[]).unwrap().notices.len(), 0);
    let set = ["optimizer.momentum=0.9", "optimizer.ns_steps=4", "checkpoint.export_hf=false", "metrics.jsonl=false"];
    let notices = load(MINIMAL, &set).unwrap().notices;
    assert_eq!(notices.len(), 4, "{notices:?}");
    for (key, notice) in ["optimizer.momentum", "optimizer.ns_steps", "metrics.jsonl", "checkpoint.export_hf"]
        .iter()
        .map(|key| (key, notices.iter().find(|notice| notice.starts_with(key))))
    {
        assert!(notice.is_some_and(|notice| notice.contains("has no effect")), "{key}: {notices:?}");
    }
    let threads = load(MINIMAL, &["device.backend=cuda", "device.threads=3"]).unwrap();
    assert!(threads.notices[0].contains("device.threads = 3 has no effect"), "{:?}", threads.notices);
    assert_eq!(threads.device.threads, 1);
    assert!(load(MINIMAL, &["optimizer.name=muon", "optimizer.momentum=0.9"]).unwrap().notices.is_empty());
}

/// A shard has at least a row, and only another length than the usual is part of what makes a run.
#[test]
fn shards_have_a_row() {
    let usual = load(MINIMAL, &[]).unwrap();
    assert!(!usual.to_toml().contains("shard_tokens"));
    let small = load(MINIMAL, &["data.shard_tokens=4096"]).unwrap();
    assert!(small.to_toml().contains("shard_tokens = 4096") && small.hash() != usual.hash());
    let error = error(MINIMAL, &["data.shard_tokens=1024", "training.seq_len=1024"]);
    assert!(error.contains("data.shard_tokens") && error.contains("1025"), "{error}");
}
