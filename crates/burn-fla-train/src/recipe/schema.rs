//! What a recipe may say, as a JSON schema and as a commented recipe: both are made from the types of the sections, their
//! documentation and the defaults that the parser fills in, so there is no second list that could fall behind.

use std::fmt::Write;
use std::path::Path;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::{Recipe, resolve, value};

/// The JSON schema (draft 7) of a recipe, for editors that complete and check TOML by one.
pub fn schema() -> Value {
    let settings = SchemaSettings::draft07().for_serialize().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Recipe>().to_value();
    strict(&mut schema);
    for (section, key, content) in typed_only() {
        if let Some(properties) = schema.pointer_mut(section).and_then(Value::as_object_mut) {
            properties.shift_insert(0, key.to_string(), content);
        }
    }
    for text in SAMPLES {
        let [first, second] = [0, 1].map(|other| sample(text, other));
        add_defaults(&mut schema, &first, &second);
    }
    // What the samples say, for the sake of what depends on it.
    for (key, default) in [
        ("/properties/device/properties/backend", Value::from(super::Backend::default().name())),
        ("/properties/profiling/properties/enable", false.into()),
    ] {
        if let Some(key) = schema.pointer_mut(key) {
            key["default"] = default;
        }
    }
    schema["title"] = "A recipe of burn-fla".into();
    schema
}

/// `"cpu"`, `"cuda"` or `"wgpu"`.
pub(super) fn backend(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let names: Vec<&str> = super::Backend::ALL.iter().map(|backend| backend.name()).collect();
    schemars::json_schema!({ "type": "string", "enum": names })
}

/// Keys that are typed, and that resolving turns into others.
fn typed_only() -> Vec<(&'static str, &'static str, Value)> {
    let path = || json!({ "type": "string", "description": "Short for `paths` with one pattern." });
    vec![
        (
            "/properties",
            "extends",
            json!({ "type": "string", "description": "A recipe that this one is laid over, relative to this file." }),
        ),
        (
            "/properties/training/properties",
            "tokens_per_step",
            json!({ "type": "integer", "minimum": 1,
                "description": "Tokens of an optimiser step: gives `gradient_accumulation_steps`." }),
        ),
        ("/properties/data/oneOf/0/properties/sources/items/properties", "path", path()),
        ("/properties/data/oneOf/0/properties/validation/items/properties", "path", path()),
    ]
}

/// As the parser takes it: nothing that has a default is required, nothing unknown is allowed, nothing is null.
fn strict(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("required");
            if map.contains_key("properties") {
                map.insert("additionalProperties".to_string(), false.into());
            }
            if let Some(Value::Array(types)) = map.get_mut("type") {
                types.retain(|name| name != "null");
                if let [only] = &types[..] {
                    let only = only.clone();
                    map.insert("type".to_string(), only);
                }
            }
            // The width of a number; a key may be called `format` too.
            if map.get("format").is_some_and(Value::is_string) {
                map.remove("format");
            }
            // The data is text where no kind is named, so another kind must be.
            let kind = map.get("properties").and_then(|properties| properties.get("kind")).cloned();
            if kind.is_some_and(|kind| kind["const"] != "text") {
                map.insert("required".to_string(), json!(["kind"]));
            }
            map.values_mut().for_each(strict);
        }
        Value::Array(items) => items.iter_mut().for_each(strict),
        _ => {}
    }
}

/// Recipes that say as little as they may; what two of them agree on that differ in all they say is a default.
const SAMPLES: [&str; 2] = [
    "[model]\nconfig = 'CONFIG'\n[training]\nsteps = 100\nbatch_size = 7\n[data]\nsources = [{ path = 'PATH' }]
     validation = [{ path = 'PATH' }]\n[optimizer]\ngroups = [{ match = 'PATH' }]",
    "[model]\nconfig = 'CONFIG'\n[training]\nsteps = 100\nbatch_size = 7\n[data]\nkind = 'mqar'",
];

fn sample(text: &str, other: usize) -> Value {
    let mut text = format!("{text}\n[profiling]\nenable = true\n");
    if other > 0 {
        text = text
            .replace("'PATH'", "'other'")
            .replace("CONFIG", "other")
            .replace("= 100", "= 1000000")
            .replace("7", "3");
        text.push_str("\n[device]\nbackend = 'cuda'\n");
    }
    let path = Path::new(if other > 0 { "other.toml" } else { "sample.toml" });
    let table = value::parse(path, &text).expect("the samples are TOML");
    let recipe = resolve::resolve(path, &table).expect("the samples are recipes");
    serde_json::to_value(recipe).expect("a recipe is plain JSON")
}

/// Writes `default` wherever the schema's key has the same value in both samples.
fn add_defaults(schema: &mut Value, first: &Value, second: &Value) {
    if let Some(Value::Array(variants)) = schema.get_mut("oneOf") {
        let kind = &first["kind"];
        if let Some(variant) = variants.iter_mut().find(|variant| variant["properties"]["kind"]["const"] == *kind) {
            add_defaults(variant, first, second);
        }
        return;
    }
    if let (Some(items), Some(first), Some(second)) = (schema.get_mut("items"), first.get(0), second.get(0)) {
        return add_defaults(items, first, second);
    }
    let Some(Value::Object(properties)) = schema.get_mut("properties") else { return };
    for (key, content) in properties {
        match (first.get(key), second.get(key)) {
            (Some(a), Some(b)) if a == b && !a.is_object() && !a.is_null() && content.get("const").is_none() => {
                content["default"] = a.clone();
            }
            (Some(a), Some(b)) => add_defaults(content, a, b),
            _ => {}
        }
    }
}

/// Values for the keys of [`reference`] that have no default, or none that shows what they are for.
const EXAMPLES: &[(&str, &str)] = &[
    ("extends", "\"base.toml\""),
    ("job.dump_folder", "\"runs/reference\""),
    ("device.compute_dtype", "\"bfloat16\""),
    ("device.threads", "2"),
    ("model.config", "\"configs/gla_quickstart.json\""),
    ("model.overrides", "{ num_hidden_layers = 3 }"),
    ("optimizer.groups", "[{ match = \"embeddings\", lr_scale = 0.5, weight_decay = 0.0 }]"),
    ("optimizer.momentum", "0.95"),
    ("optimizer.ns_steps", "5"),
    ("training.context_len", "1024"),
    ("lr_scheduler.warmup_steps", "20"),
    ("lr_scheduler.decay_ratio", "0.2"),
    ("training.batch_size", "16"),
    ("training.gradient_accumulation_steps", "1"),
    ("training.steps", "1000"),
    ("training.tokens", "100_000_000"),
    ("training.hours", "1.5"),
    ("training.tokens_per_step", "65_536"),
    ("data.seed", "42"),
    ("data.cache_folder", "\"runs/cache\""),
    ("data.sources", "[{ path = \"data/*.txt\" }]"),
    ("data.validation", "[{ path = \"held_out/*.txt\" }]"),
    ("data.shard_tokens", "33_554_432"),
    ("data.num_examples", "100_000"),
    ("checkpoint.folder", "\"runs/reference/checkpoints\""),
    ("metrics.peak_tflops", "989"),
    ("validation.samples", "[\"Once\"]"),
    ("profiling.folder", "\"runs/reference/profile\""),
];

/// The keys of [`reference`] that are set: a run needs them.
const SET: [&str; 3] = ["model.config", "training.steps", "data.sources"];

/// A recipe with every key: those a run needs are set, the others stand behind `#` with their defaults, or with an example
/// where there is none.
pub fn reference() -> String {
    let mut text = "\
# Every key of a recipe, with its default, or with an example where it has none. Written by
#     burn-fla schema --reference
# A key that is unknown or of a wrong type is an error that names the line and the nearest key;
# `--set section.key=value` overrides any of them, and `burn-fla schema` writes the JSON schema for editors.
"
    .to_string();
    let schema = schema();
    let empty = Map::new();
    for (name, content) in schema["properties"].as_object().unwrap_or(&empty) {
        text.push('\n');
        if content["type"] == "string" {
            entry(&mut text, name, name, content, true);
            continue;
        }
        describe(&mut text, content, "");
        let _ = writeln!(text, "[{name}]");
        match content["oneOf"].as_array() {
            None => section(&mut text, name, content, false),
            Some(variants) => {
                for (at, variant) in variants.iter().enumerate() {
                    if at > 0 {
                        text.push_str("\n# Or, in the place of the keys above:\n");
                    }
                    describe(&mut text, variant, "");
                    section(&mut text, name, variant, at > 0);
                }
            }
        }
    }
    text
}

fn section(text: &mut String, name: &str, content: &Value, off: bool) {
    for (key, content) in content["properties"].as_object().unwrap_or(&Map::new()) {
        entry(text, &format!("{name}.{key}"), key, content, off);
    }
}

/// A key with its documentation; the keys of a list's tables are documented above the list.
fn entry(text: &mut String, path: &str, key: &str, content: &Value, off: bool) {
    describe(text, content, "");
    if path == "data.validation" {
        text.push_str("#  With the keys of `sources`.\n");
    } else if let Some(items) = content["items"]["properties"].as_object() {
        for (key, content) in items {
            let names: Vec<String> = choices(content).iter().map(Value::to_string).collect();
            let values = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
            describe(text, content, &format!("  {key}{values}: "));
        }
    }
    let example = EXAMPLES.iter().find(|(name, _)| *name == path).map(|(_, value)| value.to_string());
    let value = match (example, content.get("const"), content.get("default")) {
        (Some(example), ..) => example,
        (None, Some(value), _) | (None, None, Some(value)) => value.to_string(),
        (None, None, None) => unreachable!("a test finds every key without a default or an example: {path}"),
    };
    let mark = if off || !SET.contains(&path) { "# " } else { "" };
    let _ = writeln!(text, "{mark}{key} = {value}");
}

/// The values of a closed list.
fn choices(content: &Value) -> Vec<Value> {
    match (&content["enum"], &content["oneOf"]) {
        (Value::Array(values), _) => values.clone(),
        (_, Value::Array(variants)) => variants.iter().map(|variant| variant["const"].clone()).collect(),
        _ => Vec::new(),
    }
}

/// The documentation of a key as comment lines.
fn describe(text: &mut String, content: &Value, before: &str) {
    const WIDTH: usize = 100;
    let words = content["description"].as_str().unwrap_or_default();
    let mut line = format!("#{}", if before.is_empty() { " " } else { before });
    let start = line.len();
    for word in words.split_whitespace() {
        if line.len() > start && line.len() + word.len() >= WIDTH {
            let _ = writeln!(text, "{}", line.trim_end());
            line = format!("#{}", if before.is_empty() { " " } else { "    " });
        }
        line.push_str(word);
        line.push(' ');
    }
    if !words.is_empty() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
#[path = "schema_tests.rs"]
mod tests;
