//! A TOML tree in which every value remembers where it was written, so that an error can name the file
//! and the line even after `extends` and `--set` have been merged into one recipe.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use crate::TrainError;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A line of a file.
    File { path: Arc<str>, line: usize },
    /// An override of the command line.
    Override(Arc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line } => write!(f, "{path}:{line}"),
            Origin::Override(text) => write!(f, "--set {text}"),
        }
    }
}

/// A value and its origin.
#[derive(Clone, Debug)]
pub(crate) struct Value {
    pub kind: Kind,
    pub origin: Origin,
}

/// What a value is.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    String(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    Datetime(String),
    Array(Vec<Value>),
    Table(Table),
}

/// A table in the order of its file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub entries: Vec<(String, Value)>,
}

impl Table {
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    pub(crate) fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.entries.iter().position(|(name, _)| name == key)?;
        Some(self.entries.remove(at).1)
    }

    fn set(&mut self, key: &str, value: Value) {
        match self.entries.iter_mut().find(|(name, _)| name == key) {
            Some(entry) => entry.1 = value,
            None => self.entries.push((key.to_string(), value)),
        }
    }

    /// Lays `over` on top of this table: tables merge key by key, everything else is replaced.
    pub(crate) fn merge(&mut self, over: Table) {
        for (key, value) in over.entries {
            let below = self.entries.iter_mut().find(|(name, _)| *name == key);
            match (below, value) {
                (Some((_, Value { kind: Kind::Table(below), .. })), Value { kind: Kind::Table(table), .. }) => {
                    below.merge(table)
                }
                (Some(entry), value) => entry.1 = value,
                (None, value) => self.entries.push((key, value)),
            }
        }
    }

    /// Sets a dotted key, making the tables on its way.
    pub(crate) fn set_path(&mut self, path: &[&str], value: Value) -> Result<(), String> {
        match path {
            [] => Err("the key is empty".to_string()),
            [key] => {
                self.set(key, value);
                Ok(())
            }
            [section, rest @ ..] => {
                if self.get(section).is_none() {
                    let empty = Value { kind: Kind::Table(Table::default()), origin: value.origin.clone() };
                    self.set(section, empty);
                }
                let entry = self.entries.iter_mut().find(|(name, _)| name == section);
                match entry {
                    Some((_, Value { kind: Kind::Table(table), .. })) => table.set_path(rest, value),
                    _ => Err(format!("`{section}` is not a table")),
                }
            }
        }
    }
}

impl Value {
    /// The type in the words of an error message.
    pub(crate) fn describe(&self) -> String {
        match &self.kind {
            Kind::String(s) => format!("the string {s:?}"),
            Kind::Integer(i) => format!("the integer {i}"),
            Kind::Float(x) => format!("the number {x}"),
            Kind::Bool(b) => format!("the boolean {b}"),
            Kind::Datetime(d) => format!("the date {d}"),
            Kind::Array(_) => "a list".to_string(),
            Kind::Table(_) => "a table".to_string(),
        }
    }

    /// The same value as JSON, for tables that are handed to the model's configuration.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match &self.kind {
            Kind::String(s) | Kind::Datetime(s) => s.clone().into(),
            Kind::Integer(i) => (*i).into(),
            Kind::Float(x) => (*x).into(),
            Kind::Bool(b) => (*b).into(),
            Kind::Array(values) => values.iter().map(Value::to_json).collect(),
            Kind::Table(table) => {
                let pairs = table.entries.iter().map(|(k, v)| (k.clone(), v.to_json()));
                serde_json::Value::Object(pairs.collect())
            }
        }
    }
}

/// Parses the text of a recipe file.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Table, TrainError> {
    let name: Arc<str> = path.display().to_string().into();
    let lines = LineIndex::new(text);
    let parsed = DeTable::parse(text).map_err(|error| TrainError::RecipeSyntax {
        at: format!("{name}:{}", error.span().map_or(1, |span| lines.line(span.start))),
        message: error.message().replace('\n', ", "),
    })?;
    table(parsed.get_ref(), &|offset| Origin::File { path: name.clone(), line: lines.line(offset) })
}

/// Reads `section.key=value`; a value that is not TOML is taken as a string.
pub(crate) fn parse_override(text: &str) -> Result<(Vec<&str>, Value), TrainError> {
    let bad = |message: &str| TrainError::BadOverride { text: text.to_string(), message: message.to_string() };
    let (key, raw) = text.split_once('=').ok_or_else(|| bad("there is no `=`"))?;
    let path: Vec<&str> = key.trim().split('.').map(str::trim).collect();
    if path.iter().any(|part| part.is_empty()) {
        return Err(bad("a part of the key is empty"));
    }
    let raw = raw.trim();
    let origin = Origin::Override(text.into());
    let value = match DeValue::parse(raw) {
        Ok(parsed) => value(parsed.get_ref(), &|_| origin.clone(), origin.clone())?,
        Err(_) => Value { kind: Kind::String(raw.to_string()), origin },
    };
    Ok((path, value))
}

fn table(source: &DeTable<'_>, origin: &dyn Fn(usize) -> Origin) -> Result<Table, TrainError> {
    let mut entries = Vec::with_capacity(source.len());
    for (key, item) in source.iter() {
        let here = origin(key.span().start);
        entries.push((key.get_ref().to_string(), value(item.get_ref(), origin, here)?));
    }
    Ok(Table { entries })
}

fn value(source: &DeValue<'_>, origin: &dyn Fn(usize) -> Origin, here: Origin) -> Result<Value, TrainError> {
    let bad = |what: String| TrainError::RecipeSyntax { at: here.to_string(), message: what };
    let kind = match source {
        DeValue::String(s) => Kind::String(s.to_string()),
        DeValue::Integer(i) => {
            let digits = i.as_str();
            Kind::Integer(
                i64::from_str_radix(digits, i.radix())
                    .map_err(|_| bad(format!("the integer {digits} does not fit 64 bits")))?,
            )
        }
        DeValue::Float(x) => {
            Kind::Float(x.as_str().parse().map_err(|_| bad(format!("{} is not a number", x.as_str())))?)
        }
        DeValue::Boolean(b) => Kind::Bool(*b),
        DeValue::Datetime(d) => Kind::Datetime(d.to_string()),
        DeValue::Array(items) => Kind::Array(
            items
                .iter()
                .map(|item| value(item.get_ref(), origin, origin(item.span().start)))
                .collect::<Result<_, _>>()?,
        ),
        DeValue::Table(t) => Kind::Table(table(t, origin)?),
    };
    Ok(Value { kind, origin: here })
}

/// Byte offsets of line starts.
struct LineIndex(Vec<usize>);

impl LineIndex {
    fn new(text: &str) -> Self {
        let starts = text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1);
        LineIndex(std::iter::once(0).chain(starts).collect())
    }

    fn line(&self, offset: usize) -> usize {
        self.0.partition_point(|start| *start <= offset).max(1)
    }
}
