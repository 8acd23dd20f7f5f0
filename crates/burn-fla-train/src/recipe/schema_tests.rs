use std::collections::BTreeSet;

use serde_json::Value;

use super::super::section::record_keys;
use super::super::value;
use super::*;

/// Every key of the schema with its section, `[]` where a list has tables; the kind of the data aside.
fn keys(schema: &Value, name: &str, found: &mut BTreeSet<String>) {
    for variant in schema["oneOf"].as_array().into_iter().flatten() {
        keys(variant, name, found);
    }
    if schema.get("items").is_some() {
        keys(&schema["items"], &format!("{name}[]"), found);
    }
    for (key, content) in schema["properties"].as_object().into_iter().flatten() {
        let path = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        keys(content, &path, found);
        found.insert(path);
    }
}

/// The schema has the keys that the parser asks for, and no others.
#[test]
fn the_schema_has_the_keys_of_the_parser() {
    let mut said = BTreeSet::new();
    keys(&schema(), "", &mut said);
    // `extends` is read before the sections are.
    assert!(said.remove("extends"));
    let mut asked = BTreeSet::new();
    for text in SAMPLES {
        let table = value::parse(Path::new("sample.toml"), text).unwrap();
        asked.extend(record_keys(|| resolve::resolve(Path::new("sample.toml"), &table).unwrap()));
    }
    let missing: Vec<_> = asked.symmetric_difference(&said).collect();
    assert!(missing.is_empty(), "in one of parser and schema only: {missing:?}");
}

#[test]
fn every_key_is_described_and_shown() {
    fn visit(schema: &Value, path: &str, undescribed: &mut Vec<String>) {
        for part in ["oneOf", "items"] {
            match &schema[part] {
                Value::Array(variants) => variants.iter().for_each(|variant| visit(variant, path, undescribed)),
                Value::Object(_) => visit(&schema[part], path, undescribed),
                _ => {}
            }
        }
        for (key, content) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{key}");
            if content["description"].as_str().is_none_or(str::is_empty) && key != "kind" {
                undescribed.push(path.clone());
            }
            visit(content, &path, undescribed);
        }
    }
    let mut undescribed = Vec::new();
    visit(&schema(), "", &mut undescribed);
    assert!(undescribed.is_empty(), "{undescribed:?}");
    assert!(reference().lines().all(|line| line.chars().count() <= 120));
}

/// `recipes/reference.toml` is what the types say, and it is a recipe; so is every line of it behind `#`.
#[test]
fn the_reference_recipe_is_that_of_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/reference.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text == reference(), "write it anew: burn-fla schema --reference > recipes/reference.toml");
    let recipe = Recipe::load(&path, &[]).unwrap();
    assert_eq!(recipe.notices, Vec::<String>::new());

    let mut section = String::new();
    let mut tried = 0;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_string();
        }
        let Some((key, content)) = line.strip_prefix("# ").and_then(|line| line.split_once(" = ")) else { continue };
        if section.is_empty() || key.contains(' ') || key == "burn-fla" {
            continue;
        }
        let mut set = vec![format!("{section}.{key}={content}")];
        // What a key excludes or asks for.
        let mut base = text.clone();
        match (section.as_str(), key) {
            ("training", "tokens" | "hours") => base = base.replace("\nsteps = ", "\n# steps = "),
            ("training", "context_len") => set.insert(0, "training.varlen=true".to_string()),
            ("data", "kind") if content == "\"text\"" => {}
            ("data", "kind" | "vocab_size" | "num_pairs" | "power_a" | "filler" | "num_examples") => {
                base = base.replace("\nsources = ", "\n# sources = ");
                set.insert(0, "data.kind=\"mqar\"".to_string());
            }
            _ => {}
        }
        let folder = tempfile::tempdir().unwrap();
        let changed = folder.path().join("reference.toml");
        std::fs::write(&changed, base).unwrap();
        Recipe::load(&changed, &set).unwrap_or_else(|error| panic!("{line}: {error}"));
        tried += 1;
    }
    assert!(tried > 40, "{tried} keys");
}

/// A default in the schema is what the parser fills in.
#[test]
fn defaults_are_those_of_the_parser() {
    let schema = schema();
    let at = |pointer: &str| schema.pointer(pointer).unwrap_or_else(|| panic!("{pointer}")).clone();
    assert_eq!(at("/properties/optimizer/properties/lr/default"), 3e-4);
    assert_eq!(at("/properties/job/properties/seed/type"), "integer");
    assert_eq!(at("/properties/training/properties/batch_size/type"), "integer");
    assert_eq!(at("/properties/optimizer/properties/groups/items/properties/lr_scale/default"), 1.0);
    assert_eq!(at("/properties/data/oneOf/0/properties/sources/items/properties/column/default"), "text");
    assert_eq!(at("/properties/data/oneOf/1/properties/vocab_size/default"), 8192);
    assert_eq!(at("/properties/data/oneOf/1/required"), serde_json::json!(["kind"]));
    assert_eq!(at("/properties/job/additionalProperties"), false);
    // What depends on the machine or on other keys has none.
    for key in ["job/properties/dump_folder", "device/properties/compute_dtype", "lr_scheduler/properties/warmup_steps"]
    {
        assert!(schema.pointer(&format!("/properties/{key}")).unwrap().get("default").is_none(), "{key}");
    }
}
