use std::path::Path;

use super::*;

const CONFIG: &str = r#"{"model_type": "gla", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2,
    "num_heads": 2, "expand_k": 1.0, "intermediate_size": 64}"#;

fn plan(folder: &Path, config: &str, set: &[&str], rate: Option<f64>) -> Plan {
    std::fs::write(folder.join("config.json"), config).unwrap();
    std::fs::write(folder.join("text.txt"), "abcdefgh\n".repeat(100)).unwrap();
    let recipe = format!(
        "[job]\ndump_folder = '{0}/run'\n[model]\nconfig = '{0}/config.json'\n[training]\nbatch_size = 4\nseq_len = 64\n\
         steps = 1000\n[data]\nsources = [{{ path = '{0}/text.txt' }}]\n",
        folder.display()
    );
    std::fs::write(folder.join("recipe.toml"), recipe).unwrap();
    let set: Vec<String> = set.iter().map(|text| text.to_string()).collect();
    Plan::new(&Recipe::load(&folder.join("recipe.toml"), &set).unwrap(), rate).unwrap()
}

/// Every figure against arithmetic by hand.
#[test]
fn a_small_model_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let plan = plan(folder.path(), CONFIG, &[], Some(25_600.0));
    // q, k, v, gate, output; the decay through 16 features; the network's three maps.
    let maps = 5 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64;
    // The decay's bias, the norm of the heads' outputs, the two norms of the layer.
    let vectors = 32 + 16 + 2 * 32;
    assert_eq!(plan.parameters, 2 * (maps + vectors) + 2 * 256 * 32 + 32);
    assert_eq!(plan.embedding_parameters, 256 * 32);
    let [mixer] = &plan.mixers[..] else { panic!("{:?}", plan.mixers) };
    assert_eq!((mixer.kind.as_str(), mixer.layers, mixer.state, mixer.cache), ("Gla", 2, 2 * 2 * 16 * 16, 0));
    assert_eq!(mixer.map_flops, 2.0 * 2.0 * maps as f64);
    assert_eq!(mixer.mixer_flops, 2.0 * 4.0 * (2 * 16 * 16) as f64);
    let forward = mixer.map_flops + mixer.mixer_flops + 2.0 * (256 * 32) as f64;
    assert_eq!((plan.flops.forward, plan.flops.training), (forward, 3.0 * forward));
    assert_eq!(plan.memory.parameters, 4 * plan.parameters);
    assert_eq!(plan.memory.moments, 8 * plan.parameters);
    assert_eq!((plan.tokens_per_step, plan.steps, plan.tokens), (256, Some(1000), Some(256_000)));
    assert_eq!(plan.seconds, Some(10.0));
    let [data] = &plan.data[..] else { panic!("{:?}", plan.data) };
    assert_eq!((data.files, data.bytes, data.tokens, data.estimated), (1, 900, 900, true));
    assert_eq!(plan.learning_rates.first().unwrap().0, 0);
    assert_eq!(plan.learning_rates.iter().find(|(step, _)| *step == 20).unwrap().1, 3e-4, "the end of the warm-up");
    assert_eq!(plan.learning_rates.last().unwrap().0, 999);
    assert!(!folder.path().join("run").exists(), "a plan writes nothing");
    let text = plan.to_string();
    for part in ["gla with", "Gla", "1000 steps", "tokens/s", "text.txt", "e-4"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn attention_grows_with_the_row_and_tied_maps_count_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "transformer", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1,
        "num_heads": 2, "intermediate_size": 64, "tie_word_embeddings": true}"#;
    let short = plan(folder.path(), config, &["training.seq_len=64"], None);
    let long = plan(folder.path(), config, &["training.seq_len=128"], None);
    // Each query meets (T + 1) / 2 keys on average, of 16 features in 2 heads, then as many values.
    assert_eq!(short.mixers[0].mixer_flops, 2.0 * (2 * 32) as f64 * 65.0 / 2.0);
    assert_eq!(long.mixers[0].mixer_flops, 2.0 * (2 * 32) as f64 * 129.0 / 2.0);
    assert_eq!(short.embedding_parameters, 0);
    let maps = short.mixers[0].map_flops + short.mixers[0].mixer_flops;
    assert_eq!(short.flops.forward, maps + 2.0 * (256 * 32) as f64);
    // No rate, no time; a budget of hours has no steps then.
    assert_eq!((short.seconds, short.tokens_per_s), (None, None));
    // The rate of the run before.
    std::fs::create_dir(folder.path().join("run")).unwrap();
    std::fs::write(folder.path().join("run/metrics.jsonl"), "{\"step\": 1, \"tokens_per_s\": 64000.0}\n{\"step\"")
        .unwrap();
    let again = plan(folder.path(), config, &["training.seq_len=64"], None);
    assert_eq!((again.tokens_per_s, again.seconds), (Some(64_000.0), Some(4.0)));
}

#[test]
fn muon_keeps_one_moment_of_the_matrices() {
    let folder = tempfile::tempdir().unwrap();
    let adamw = plan(folder.path(), CONFIG, &[], None);
    let muon = plan(folder.path(), CONFIG, &["optimizer.name=muon"], None);
    let maps = 2 * (5 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64);
    assert_eq!(adamw.memory.moments - muon.memory.moments, 4 * maps);
}

/// Peaks of resident memory, in MiB, of runs on the CPU with one thread: (model, rows, tokens of a row, width, layers,
/// vocabulary, peak), as `metrics.jsonl` had them.
const MEASURED: [(&str, usize, usize, usize, usize, usize, f64); 14] = [
    (r#""model_type": "gla", "num_heads": 4"#, 8, 256, 256, 4, 256, 529.4),
    (r#""model_type": "gla", "num_heads": 4"#, 8, 1024, 256, 4, 256, 1673.2),
    (r#""model_type": "gla", "num_heads": 4"#, 8, 256, 256, 4, 8192, 865.3),
    (r#""model_type": "gla", "num_heads": 4"#, 8, 256, 512, 8, 256, 1962.0),
    (r#""model_type": "transformer", "num_heads": 4"#, 8, 256, 256, 4, 256, 484.4),
    (r#""model_type": "transformer", "num_heads": 4"#, 8, 1024, 256, 4, 256, 2842.6),
    (r#""model_type": "transformer", "num_heads": 4"#, 8, 256, 512, 8, 256, 1627.1),
    (r#""model_type": "mamba2", "head_dim": 64, "num_heads": 8, "expand": 2"#, 8, 1024, 256, 4, 256, 2520.1),
    (r#""model_type": "gated_deltanet", "num_heads": 4, "head_dim": 64, "expand_v": 1"#, 8, 1024, 256, 4, 256, 2677.8),
    (r#""model_type": "delta_net", "num_heads": 4"#, 2, 256, 256, 4, 256, 289.8),
    (r#""model_type": "delta_net", "num_heads": 4"#, 8, 1024, 256, 4, 256, 2147.3),
    (r#""model_type": "rwkv7", "head_dim": 64"#, 8, 1024, 256, 4, 256, 3822.6),
    (r#""model_type": "retnet", "num_heads": 4"#, 8, 1024, 256, 4, 256, 1646.6),
    (r#""model_type": "hgrn2", "num_heads": 4"#, 8, 1024, 256, 4, 256, 2146.3),
];

#[test]
fn memory_is_estimated_as_it_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    for (model, rows, tokens, width, layers, vocabulary, peak) in MEASURED {
        let config = format!(
            "{{{model}, \"hidden_size\": {width}, \"num_hidden_layers\": {layers}, \"vocab_size\": {vocabulary}}}"
        );
        let set =
            [format!("training.batch_size={rows}"), format!("training.seq_len={tokens}"), "device.threads=1".into()];
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let estimate = plan(folder.path(), &config, &set, None).memory.total() as f64 / f64::from(1 << 20) + 50.0;
        let ratio = peak / estimate;
        assert!((0.87..1.23).contains(&ratio), "{model} {rows} x {tokens}: {estimate:.0} MiB, measured {peak}");
    }
}

fn recipe(folder: &Path, set: &[&str]) -> (Recipe, ModelConfig) {
    plan(folder, CONFIG, &[], None);
    let set: Vec<String> = set.iter().map(|text| text.to_string()).collect();
    (Recipe::load(&folder.join("recipe.toml"), &set).unwrap(), ModelConfig::from_json(CONFIG).unwrap())
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let folder = tempfile::tempdir().unwrap();
    let set = ["training.batch_size=24", "training.gradient_accumulation_steps=5"];
    let (recipe, config) = recipe(folder.path(), &set);
    let memory = MemoryPlan::of(&recipe, &config).unwrap();
    assert_eq!(check_memory(&recipe, &config, Some(1 << 40)).unwrap(), None);
    assert_eq!(check_memory(&recipe, &config, None).unwrap(), None, "where the system does not tell");
    // Room for 12 rows, of the 120 of a step.
    let with = |rows: usize| {
        let mut other = recipe.clone();
        other.training.batch_size = rows;
        MemoryPlan::of(&other, &config).unwrap().total()
    };
    let room = with(12) + (with(13) - with(12)) / 2;
    let process = 50 << 20;
    let tight = check_memory(&recipe, &config, Some(process + memory.total() - 1)).unwrap();
    assert!(tight.unwrap().contains("may be killed"));
    // Half of the estimate is certainly too little for a mixer that was measured, and may do for another.
    let half = (process + memory.total()) / 2;
    assert!(
        check_memory(&recipe, &config, Some(half))
            .unwrap_err()
            .to_string()
            .contains("out of memory: training.batch_size = 24")
    );
    let other = ModelConfig::from_json(&CONFIG.replace("gla", "gsa").replace("\"expand_k\": 1.0,", "")).unwrap();
    let half = (process + MemoryPlan::of(&recipe, &other).unwrap().total()) / 2;
    assert!(check_memory(&recipe, &other, Some(half)).unwrap().unwrap().contains("may be killed"));
    let error = ran_out(&recipe, &config, 7, Some(room)).to_string();
    let [plain, block] = error.split("; or ").collect::<Vec<_>>()[..] else { panic!("{error}") };
    for part in ["out of memory: step 7 with training.batch_size = 24", "batch_size = 12 ", "accumulation_steps = 10 "]
    {
        assert!(plain.contains(part), "{part}: {error}");
    }
    assert!(block.contains("activation_checkpoint = \"block\""), "{error}");
    // Nothing is left even for one row.
    let error = ran_out(&recipe, &config, 1, Some(memory.parameters)).to_string();
    assert!(error.contains("not one row of 64 tokens fits") && error.contains("training.seq_len"), "{error}");
    // Without a word of the allocator, half the rows.
    assert!(ran_out(&recipe, &config, 1, None).to_string().contains("training.batch_size = 12"));
}

#[test]
fn the_words_for_no_memory_are_known() {
    for said in [
        "the device failed: out of device memory allocating 1099511627776 bytes",
        "An out-of-memory error happened during launch",
        "can't allocate buffer of size: 12",
        "CUDA_ERROR_OUT_OF_MEMORY",
    ] {
        assert!(is_out_of_memory(said), "{said}");
    }
    assert!(!is_out_of_memory("the device was poisoned during launch"));
}
