//! `burn-fla verify`.

use std::fs;

use crate::{Place, golden, text};

#[test]
fn a_table_and_zero_within_the_bounds() {
    let place = Place::new();
    let (gla, retnet) = (golden("gla"), golden("retnet"));
    let table = place.succeed(&["verify", &gla.to_string_lossy(), &retnet.to_string_lossy()]);
    for part in ["logits", "grad.model.embeddings.weight", "loss curve", "greedy", "1.00e-5"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert_eq!(table.matches("passed").count(), 2, "{table}");
}

#[test]
fn a_table_and_one_past_the_bounds() {
    let place = Place::new();
    let case = place.path("case");
    fs::create_dir(&case).expect("a folder");
    for file in ["config.json", "model.safetensors", "case.safetensors"] {
        fs::copy(golden("gla").join(file), case.join(file)).expect("a golden file");
    }
    // A wrong epsilon moves the logits by some 1e-5: the bound must see that.
    let config = fs::read_to_string(case.join("config.json")).expect("a config");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["norm_eps"] = 1e-4.into();
    fs::write(case.join("config.json"), config.to_string()).expect("a writable folder");
    let output = place.run(&["verify", "case"]);
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{table}");
    assert!(table.contains("TOO LARGE") && table.contains("FAILED"), "{table}");
}

#[test]
fn every_tensor_that_does_not_fit_is_named() {
    let place = Place::new();
    let case = place.path("case");
    fs::create_dir(&case).expect("a folder");
    for file in ["model.safetensors", "case.safetensors"] {
        fs::copy(golden("gla").join(file), case.join(file)).expect("a golden file");
    }
    let config = fs::read_to_string(golden("gla").join("config.json")).expect("a config");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["num_hidden_layers"] = (config["num_hidden_layers"].as_u64().expect("a number") + 1).into();
    fs::write(case.join("config.json"), config.to_string()).expect("a writable folder");
    place.fail(&["verify", "case"], &["does not fit", "q_proj.weight", "mlp.down_proj.weight", "missing"]);
}
