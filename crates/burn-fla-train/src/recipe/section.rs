//! Typed reading of one table: each getter names its key once, and what was never asked for is unknown.

use std::cell::RefCell;

use super::value::{Kind, Table, Value};
use crate::TrainError;

/// A table of the recipe while it is read.
pub(crate) struct Section<'a> {
    /// Dotted name, empty for the top.
    name: String,
    /// The recipe's path, for keys that are missing.
    recipe: &'a str,
    table: Option<&'a Table>,
    known: RefCell<Vec<&'static str>>,
}

impl<'a> Section<'a> {
    pub(crate) fn top(recipe: &'a str, table: &'a Table) -> Self {
        Section { name: String::new(), recipe, table: Some(table), known: RefCell::default() }
    }

    /// A table that may be absent.
    pub(crate) fn section(&self, key: &'static str) -> Result<Section<'a>, TrainError> {
        let table = match self.get(key) {
            None => None,
            Some(Value { kind: Kind::Table(table), .. }) => Some(table),
            Some(other) => return Err(self.wrong(key, "a table", other)),
        };
        Ok(Section { name: self.dotted(key), recipe: self.recipe, table, known: RefCell::default() })
    }

    /// A list of tables; `None` when the key is absent.
    pub(crate) fn tables(&self, key: &'static str) -> Result<Option<Vec<Section<'a>>>, TrainError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Kind::Array(items) = &value.kind else {
            return Err(self.wrong(key, "a list of tables", value));
        };
        let sections = items.iter().enumerate().map(|(index, item)| match &item.kind {
            Kind::Table(table) => Ok(Section {
                name: format!("{}[{index}]", self.dotted(key)),
                recipe: self.recipe,
                table: Some(table),
                known: RefCell::default(),
            }),
            _ => Err(self.wrong(key, "a list of tables", item)),
        });
        sections.collect::<Result<Vec<_>, _>>().map(Some)
    }

    pub(crate) fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.known.borrow_mut().push(key);
        self.table.and_then(|table| table.get(key))
    }

    pub(crate) fn string(&self, key: &'static str) -> Result<Option<String>, TrainError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value { kind: Kind::String(s), .. }) => Ok(Some(s.clone())),
            Some(other) => Err(self.wrong(key, "a string", other)),
        }
    }

    pub(crate) fn strings(&self, key: &'static str) -> Result<Option<Vec<String>>, TrainError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Kind::Array(items) = &value.kind else {
            return Err(self.wrong(key, "a list of strings", value));
        };
        let strings = items.iter().map(|item| match &item.kind {
            Kind::String(s) => Ok(s.clone()),
            _ => Err(self.wrong(key, "a list of strings", item)),
        });
        strings.collect::<Result<Vec<_>, _>>().map(Some)
    }

    /// A string out of a closed list.
    pub(crate) fn choice(
        &self,
        key: &'static str,
        choices: &[&'static str],
        default: &'static str,
    ) -> Result<&'static str, TrainError> {
        let Some(text) = self.string(key)? else { return Ok(default) };
        match choices.iter().find(|choice| **choice == text) {
            Some(choice) => Ok(choice),
            None => {
                let near = nearest(&text, choices.iter().copied());
                let list: Vec<String> = choices.iter().map(|c| format!("{c:?}")).collect();
                let hint = near.map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
                Err(self.bad(key, format!("{text:?} is none of {}{hint}", list.join(", "))))
            }
        }
    }

    /// A finite number; integers are numbers too.
    pub(crate) fn number(&self, key: &'static str) -> Result<Option<f64>, TrainError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value { kind: Kind::Float(x), .. }) if x.is_finite() => Ok(Some(*x)),
            Some(Value { kind: Kind::Integer(i), .. }) => Ok(Some(*i as f64)),
            Some(other) => Err(self.wrong(key, "a finite number", other)),
        }
    }

    /// A number inside `low..=high`.
    pub(crate) fn number_in(&self, key: &'static str, default: f64, low: f64, high: f64) -> Result<f64, TrainError> {
        let x = self.number(key)?.unwrap_or(default);
        if (low..=high).contains(&x) {
            return Ok(x);
        }
        let range = if high == f64::MAX { format!("at least {low}") } else { format!("between {low} and {high}") };
        Err(self.bad(key, format!("{x} must be {range}")))
    }

    /// A whole number that is not negative.
    pub(crate) fn count(&self, key: &'static str) -> Result<Option<u64>, TrainError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value { kind: Kind::Integer(i), .. }) if *i >= 0 => Ok(Some(*i as u64)),
            Some(other) => Err(self.wrong(key, "a whole number, zero or more", other)),
        }
    }

    /// A whole number of at least one.
    pub(crate) fn positive(&self, key: &'static str) -> Result<Option<u64>, TrainError> {
        match self.count(key)? {
            Some(0) => Err(self.bad(key, "it must be at least 1".to_string())),
            other => Ok(other),
        }
    }

    pub(crate) fn bool(&self, key: &'static str, default: bool) -> Result<bool, TrainError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value { kind: Kind::Bool(b), .. }) => Ok(*b),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// Fails for the first key that no getter asked for.
    pub(crate) fn finish(self) -> Result<(), TrainError> {
        let known = self.known.borrow();
        #[cfg(test)]
        record(&self.name, &known);
        let Some(table) = self.table else { return Ok(()) };
        match table.entries.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some((key, value)) => Err(TrainError::UnknownKey {
                at: value.origin.to_string(),
                key: self.dotted(key),
                nearest: nearest(key, known.iter().copied()).map(|name| self.dotted(name)),
            }),
        }
    }

    pub(crate) fn bad(&self, key: &str, message: String) -> TrainError {
        TrainError::BadValue { at: self.at(key), key: self.dotted(key), message }
    }

    pub(crate) fn missing(&self, key: &str, message: &str) -> TrainError {
        TrainError::MissingKey { path: self.recipe.to_string(), key: self.dotted(key), message: message.to_string() }
    }

    fn at(&self, key: &str) -> String {
        match self.table.and_then(|table| table.get(key)) {
            Some(value) => value.origin.to_string(),
            None => self.recipe.to_string(),
        }
    }

    fn wrong(&self, key: &str, expected: &'static str, found: &Value) -> TrainError {
        TrainError::WrongType { at: found.origin.to_string(), key: self.dotted(key), expected, found: found.describe() }
    }

    fn dotted(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_string() } else { format!("{}.{key}", self.name) }
    }
}

/// The valid name most like `typed`, if any is near enough to be what was meant.
fn nearest<'n>(typed: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names
        .map(|name| (strsim::jaro_winkler(typed, name), name))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
thread_local! {
    static RECORDED: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

#[cfg(test)]
fn record(section: &str, known: &[&'static str]) {
    let section = section.split('[').map(|part| part.split_once(']').map_or(part, |(_, rest)| rest));
    let section = section.collect::<Vec<_>>().join("[]");
    RECORDED.with_borrow_mut(|recorded| {
        let names =
            known.iter().map(|key| if section.is_empty() { key.to_string() } else { format!("{section}.{key}") });
        recorded.iter_mut().for_each(|list| list.extend(names.clone()));
    });
}

/// The names of all keys that are asked for while `f` runs, `[]` where a list has tables.
#[cfg(test)]
pub(super) fn record_keys<T>(f: impl FnOnce() -> T) -> Vec<String> {
    RECORDED.set(Some(Vec::new()));
    f();
    RECORDED.take().unwrap_or_default()
}
